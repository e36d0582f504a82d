"""What the pages of docs/ show runs as it stands there."""

import pathlib
import re

import pytest

PAGES = sorted((pathlib.Path(__file__).parent.parent / 'docs').glob('*.md'))


@pytest.mark.sample
@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
  blocks = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
  assert blocks
  monkeypatch.chdir(tmp_path)  # For what they save.
  namespace = {}
  for i, block in enumerate(blocks):
    exec(compile(block, f'{page.name}, block {i}', 'exec'), namespace)
  if page.stem == 'sequences':
    assert namespace['accuracy'] > 0.9
  if page.stem == 'devices':
    ways = (namespace[f'{way}loss'] for way in ('', 'pmap_', 'shard_map_'))
    first, *others = map(float, ways)
    assert others == pytest.approx([first] * 2, rel=1e-4)
