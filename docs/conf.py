"""The site: `sphinx-build -W --keep-going docs build/site` makes it."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['PYTHONPATH'] = str(ROOT)

from docs import pages, reference, rst  # noqa: E402
from dsatgo_jax.version import __version__  # noqa: E402

project = 'dsatgo_jax'
author = 'The dsatgo_jax authors'
release = version = __version__
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
  'sphinx_design',
]
smartquotes = False
html_theme = 'furo'
html_title = 'dsatgo_jax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ['colon_fence', 'attrs_block']
myst_heading_anchors = 3

# A name in a docstring's backquotes links to what it names, if that is here.
default_role = 'py:obj'
autodoc_default_options = {
  'members': True,
  'member-order': 'bysource',
  'special-members': '__call__',
}
autodoc_typehints = 'none'
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_custom_sections = [('Attributes', 'params_style')]
napoleon_use_rtype = False
python_maximum_signature_line_length = 68
toc_object_entries_show_parents = 'hide'


def setup(app):
  """What the build writes before it reads, and how it reads docstrings."""
  app.connect('builder-inited', lambda app: (reference.write(), pages.draw()))
  app.connect('source-read', rst.links)
  app.connect('autodoc-process-docstring', rst.convert, priority=400)
  app.connect('autodoc-skip-member', rst.skip)
  app.connect('autodoc-process-signature', rst.shorten)
  app.connect('missing-reference', rst.resolve)
