"""Each example runs, on a few steps."""

import ast
import importlib
import math
import pathlib

import pytest

from examples import linen_loop

FILES = sorted(
  (pathlib.Path(__file__).parent.parent / 'examples').glob('[a-z]*.py')
)


def numbers(found):
  """The numbers in what an example returns."""
  if isinstance(found, dict):
    return [x for one in found.values() for x in numbers(one)]
  return [float(found)]


@pytest.mark.sample
@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_runs(file):
  found = importlib.import_module(f'examples.{file.stem}').main(steps=2)
  assert all(map(math.isfinite, numbers(found))) and numbers(found)


@pytest.mark.sample
def test_learns():
  assert linen_loop.main(steps=100) > 0.9


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_is_short_and_says_how_to_run_it(file):
  text = file.read_text()
  assert text.count('\n') < 150
  assert f'python examples/{file.name} --steps=' in ast.get_docstring(
    ast.parse(text)
  )
