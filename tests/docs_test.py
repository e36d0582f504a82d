"""What the pages of docs/ show runs as it stands there."""

import pytest

from docs import pages, reference, rst
from dsatgo_jax import surrogate

SHOWN = {page: pages.blocks(page) for page in pages.written()}


def whole(page):
  return page.relative_to(pages.DOCS).with_suffix('').as_posix()


def cases():
  """The pages with code; the site runs those that draw, and CI the site."""
  for page, code in filter(lambda one: one[1], SHOWN.items()):
    sampled = 'accuracy =' in ''.join(code) or not pages.pictures(page)
    mark = pytest.mark.sample if sampled else pytest.mark.slow
    yield pytest.param(page, id=whole(page), marks=mark)


# Pictures are drawn with matplotlib, which warns of what is its own.
@pytest.mark.filterwarnings('ignore::DeprecationWarning:matplotlib')
@pytest.mark.parametrize('page', [*cases()])
def test_python_blocks_run(page, tmp_path):
  namespace = pages.run(page, tmp_path)
  for name, least in {'accuracy': 0.9, 'nnx_accuracy': 0.9}.items():
    assert namespace.get(name, 1) > least
  if page.stem == 'devices':
    ways = (namespace[f'{way}loss'] for way in ('', 'pmap_', 'shard_map_'))
    first, *others = map(float, ways)
    assert others == pytest.approx([first] * 2, rel=1e-4)
  for picture in pages.pictures(page):
    assert (tmp_path / picture).stat().st_size > 1000


def test_pictures_are_drawn_by_the_page_that_shows_them():
  for page, code in SHOWN.items():
    for picture in pages.pictures(page):
      assert f"savefig('{picture}'" in ''.join(code), (page, picture)


def test_reference_tells_each_field_and_each_public_module():
  text = reference.configs()
  for name in reference.fields('digits'):
    assert f'| `{name}` |' in text, name
  told = {name for names in reference.MODULES.values() for name in names}
  files = (pages.DOCS.parent / 'dsatgo_jax').glob('*.py')
  inner = {'blocks', 'devices', 'dtypes', 'fused', 'kernels', 'version', 'xla'}
  assert {file.stem for file in files} - {'__init__'} <= told | inner


def test_docstrings_become_rst():
  lines = [
    '`run` of `a * b`s and *x:',
    '',
    '    y = f(x)',
    '',
    'Args:',
    '  x',
  ]
  rst.convert(None, 'function', 'f', surrogate.custom, {}, lines)
  told, _, code = ' '.join(lines).partition(' .. code-block:: python ')
  assert told.strip() == r'`run` of ``a * b``\ s and \*x:'
  assert code.split() == ['y', '=', 'f(x)', 'Args:', 'x']
