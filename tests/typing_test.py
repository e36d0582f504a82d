"""What the README shows is right to type checkers, strict ones too."""

import json
import pathlib
import re
import subprocess
import sys
import typing

import pytest

from dsatgo_jax import dynamics, methods

ROOT = pathlib.Path(__file__).parent.parent
STRICT = {
  'typeCheckingMode': 'strict',
  'extraPaths': [str(ROOT)],
  'reportUnknownMemberType': False,  # Flax's own `init` and `apply`.
}
MORE = """
from dsatgo_jax.neurons import NeuronState

def recordings(x: jax.Array):
  spikes: jax.Array = snn.SpikingNeuron()(x)
  both: tuple[jax.Array, NeuronState] = snn.SpikingNeuron()(
    x, return_state=True
  )
  return spikes, both, snn.LeakyIntegrator()(x)
"""
WRONG = """
from dsatgo_jax import linen as snn

snn.SpikingNeuron('dsatgo')
snn.SpikingNeuron(reset='none')
snn.SpikingNeuron(surrogate='atan')
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The README's examples, one file for each of the two modules."""
  folder = tmp_path_factory.mktemp('examples')
  text = (ROOT / 'README.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  *linen, of_nnx = [block for block in blocks if 'import train' not in block]
  (folder / 'of_linen.py').write_text('\n'.join(linen) + MORE)
  (folder / 'of_nnx.py').write_text(of_nnx)
  (folder / 'wrong.py').write_text(WRONG)
  (folder / 'pyrightconfig.json').write_text(json.dumps(STRICT))
  return folder


def check(*command, folder):
  """The lines that tell of errors, by file."""
  done = subprocess.run(
    [sys.executable, '-m', *command],
    cwd=folder,
    env={'MYPYPATH': str(ROOT), 'PATH': ''},
    capture_output=True,
    text=True,
  )
  lines = [line for line in done.stdout.splitlines() if 'error:' in line or
           ' - error' in line]  # fmt: skip
  assert lines, done.stdout + done.stderr
  return lines


def test_names_are_those_of_the_tables():
  assert typing.get_args(methods.Name) == tuple(methods.METHODS)
  assert typing.get_args(dynamics.Reset) == tuple(dynamics.RESETS)


@pytest.mark.sample
def test_mypy(folder):
  lines = check('mypy', '.', folder=folder)
  assert all('wrong.py' in line for line in lines) and len(lines) == 3, lines


@pytest.mark.sample
def test_pyright(folder):
  pytest.importorskip('basedpyright')
  python = '--pythonpath', sys.executable
  lines = check('basedpyright', *python, '.', folder=folder)
  assert all('wrong.py' in line for line in lines) and len(lines) == 3, lines
