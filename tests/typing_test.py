"""What README and pages show is right to type checkers, strict ones too."""

import json
import pathlib
import subprocess
import sys
import typing

import pytest

from docs import pages
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
PAGES = {
  'README.md': MORE,
  'docs/howto/neuron.md': '',
  'docs/howto/memory.md': '',
  'docs/howto/nnx.md': '',
}
WRONG = """
from dsatgo_jax import linen as snn

snn.SpikingNeuron('dsatgo')
snn.SpikingNeuron(reset='none')
snn.SpikingNeuron(surrogate='atan')
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Their examples, one file a page."""
  folder = tmp_path_factory.mktemp('examples')
  for page, more in PAGES.items():
    blocks = pages.blocks(ROOT / page)
    code = '\n'.join(blocks) + more
    (folder / f'of_{pathlib.Path(page).stem.lower()}.py').write_text(code)
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
