"""Runs what pages show: `python -m docs.pages PAGE FOLDER`.

The Python blocks of a page run in one namespace, from top to bottom, in a
folder of the page's own, where they leave the pictures that the page shows.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import subprocess
import sys

DOCS = pathlib.Path(__file__).parent
STYLE = {
  'axes.edgecolor': 'gray',
  'axes.labelcolor': 'gray',
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlecolor': 'gray',
  'figure.constrained_layout.use': True,
  'font.size': 11,
  'legend.frameon': False,
  'legend.labelcolor': 'gray',
  'savefig.transparent': True,
  'svg.hashsalt': 'docs',
  'text.color': 'gray',
  'xtick.color': 'gray',
  'ytick.color': 'gray',
}


def written():
  """The pages that somebody wrote, sorted."""
  pages = DOCS.rglob('*.md')
  return sorted(page for page in pages if 'made' not in page.parts)


def blocks(page):
  """The Python blocks of a page, but for those of a run that is not there."""
  found = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
  return [block for block in found if 'train.load(' not in block]


def pictures(page):
  """The names of the pictures that a page shows, and its own code draws."""
  shown = re.escape(f'made/{page.stem}/')
  return re.findall(rf'\]\((?:\.\./)*{shown}([\w.]+)\)', page.read_text())


def run(page, folder):
  """Runs the blocks of a page in a folder, and returns their namespace."""
  import matplotlib

  matplotlib.use('agg')
  namespace = {}
  with matplotlib.rc_context(STYLE), contextlib.chdir(folder):
    for i, block in enumerate(blocks(page)):
      code = compile(block, f'{page.name}, block {i}', 'exec')
      exec(code, namespace)
  return namespace


def draw():
  """Draws the pictures of all pages, if page or library have changed."""
  library = sorted((DOCS.parent / 'dsatgo_jax').rglob('*.py'))
  library = b''.join(file.read_bytes() for file in library)
  for page in written():
    code = ''.join(blocks(page))
    if 'savefig(' not in code:
      continue
    folder = DOCS / 'made' / page.stem
    mark = folder / 'drawn'
    digest = hashlib.sha256(code.encode() + library).hexdigest()
    if mark.exists() and mark.read_text() == digest:
      continue
    folder.mkdir(parents=True, exist_ok=True)
    _python('-m', 'docs.pages', page, folder)
    mark.write_text(digest)
  augmentation = DOCS / 'made' / 'augmentation.png'
  if not augmentation.exists():
    _python('-m', 'train.augment', f'--output={augmentation}')


def _python(*arguments):
  subprocess.run(
    [sys.executable, *arguments],
    cwd=DOCS.parent,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.DEVNULL,
    check=True,
  )


if __name__ == '__main__':
  run(*map(pathlib.Path, sys.argv[1:]))
