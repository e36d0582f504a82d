"""Docstrings are Markdown; autodoc reads them through these as RST."""

import ast
import re
import textwrap

_SECTION = re.compile(r'(Args|Attributes|Returns|Raises|Yields):$')
# Between backquotes a name, which becomes a link, or code; what RST takes for
# markup where it stands outside of them.
_NAME = re.compile(r'[A-Za-z_][\w.]*(\(\))?')
_MARKUP = re.compile(r'`([^`]+)`(\w?)|(\*\*[A-Za-z][^*]*\*\*)|([*|\\]|\b_|_\b)')


def convert(app, what, name, obj, options, lines):
  """Indented blocks are code, backquotes too; stars and bars are no markup."""
  module = getattr(obj, '__module__', None) or name
  if not module.startswith('dsatgo_jax'):
    lines[:] = [f"Flax's own ``{module}.{obj.__qualname__}``."]
    return
  text = '\n'.join(lines)
  parts = re.split(r'(?<=\n\n)((?: {4,}.*\n|\n)+)(?=\S|$)', text + '\n')
  for i, part in enumerate(parts):
    if i % 2 and not _SECTION.search(parts[i - 1].rstrip().split('\n')[-1]):
      parts[i] = _code(part)
    else:
      parts[i] = _MARKUP.sub(_plain, part)
  lines[:] = ''.join(parts).split('\n')


def _code(block):
  try:
    ast.parse(textwrap.dedent(block))
    language = 'python'
  except SyntaxError:
    language = 'text'
  return f'.. code-block:: {language}\n\n{block}'


def _plain(match):
  code, letter, bold, sign = match.groups()
  if code:
    made = f'`{code}`' if _NAME.fullmatch(code) else f'``{code}``'
    return f'{made}\\ {letter}' if letter else made
  return bold or '\\' + sign


def skip(app, what, name, obj, skipped, options):
  """Leaves out what classes have of Flax, and fields of tuples once more."""
  module = getattr(obj, '__module__', None) or 'dsatgo_jax'
  if what == 'class' and not module.startswith('dsatgo_jax'):
    return True
  if (getattr(obj, '__doc__', None) or '').startswith('Alias for field'):
    return True
  return None


def shorten(app, what, name, obj, options, signature, returns):
  """Leaves out what every Linen module takes, and where functions lie."""
  if signature:
    signature = re.sub(r',\s*parent=.*', ')', signature, flags=re.DOTALL)
    signature = re.sub(
      r'<function (\w+)[^ ]*?( at 0x\w+)?>(?!\.)', r'\1', signature
    )
    signature = re.sub(r"<class '([\w.]+)'>", r'\1', signature)
    signature = signature.replace('variance_scaling.<locals>.init', '...')
  return signature, returns


# Where the site has what pages link to in the repository.
_HERE = {
  r'(\.\./)+benchmarks/README\.md': '/made/benchmarks.md',
  r'(\.\./)+(CHANGELOG|CONTRIBUTING)\.md': r'/made/\2.md',
  r'(\.\./)+configs/(\w+)\.py': r'/made/configs.md#\2',
  r'(\.\./)+examples/(\w+)\.py': r'/made/examples/\2.md',
  r'(\.\./)+dsatgo_jax/(\w+)\.py': r'/made/api/\2.md',
}


def links(app, docname, source):
  """Turns links into the repository to the pages made of what is there."""
  for there, here in _HERE.items():
    source[0] = re.sub(rf'(?<=\]\(){there}', here, source[0])


def resolve(app, env, node, contnode):
  """`threshold.fixed` and `SpikingNeuron` from anywhere in the library."""
  from sphinx.util.nodes import make_refnode  # Late: tests go without it.

  target = node.get('reftarget', '')
  if node.get('reftype') != 'obj':
    return None
  objects = env.domains.python_domain.objects
  for module in ('', '.linen', '.analysis', '.models'):
    full = f'dsatgo_jax{module}.{target}'
    if full in objects:
      found = objects[full]
      return make_refnode(
        app.builder, node['refdoc'], found.docname, found.node_id, contnode
      )
  return None
