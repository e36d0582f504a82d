"""What the README shows runs as it stands there, and leads somewhere."""

import pathlib
import re

import jax

from docs import pages

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / 'README.md'


def test_python_block_runs(tmp_path):
  namespace = pages.run(README, tmp_path)
  net, images = namespace['Net'](), jax.numpy.zeros((8, 16, 16, 1))
  variables = net.init(jax.random.key(0), images, train=False)
  assert net.apply(variables, images, train=False).shape == (8, 10)


def test_links_lead_to_what_is_there():
  for file in README, ROOT / 'CONTRIBUTING.md':
    text = re.sub(r'`[^`\n]*`', '', file.read_text())
    for target in re.findall(r'\]\(([^)#]+)', text):
      assert target.startswith('https://') or (ROOT / target).exists(), target


def test_layout_names_what_is_there():
  text = (ROOT / 'docs/reference/layout.md').read_text()
  layout = text.split('```')[1]
  names = re.findall(r'[a-z_]+(?:\.py|/)', layout)
  assert names
  for name in names:
    assert any(
      any(ROOT.glob(folder + name)) for folder in ('', 'dsatgo_jax/', 'train/')
    ), name
