"""Writes the pages that say what the program says of itself."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap
import tokenize
from xml.etree import ElementTree

from flax import traverse_util

from dsatgo_jax import linen

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
# Public modules, in the order in which one meets them.
MODULES = {
  'Layers and networks': ('linen', 'nnx', 'models'),
  'Training': ('losses', 'packing', 'initializers', 'convert'),
  'Functions under the layers': (
    'neurons', 'methods', 'threshold', 'width', 'surrogate', 'recurrent',
    'tdbn', 'time_axis', 'dynamics', 'statistics', 'quantile', 'layers',
    'carry', 'probes',
  ),
  'Analysis': (
    'analysis.activity', 'analysis.flow', 'analysis.energy', 'analysis.start',
    'analysis.curvature', 'analysis.landscape', 'analysis.bias',
  ),
}  # fmt: skip


def write():
  """Writes all of them into `docs/made`, which git ignores."""
  pages = api() | examples() | copies()
  pages |= {'configs': configs(), 'commands': commands()}
  for name, text in pages.items():
    page = DOCS / 'made' / f'{name}.md'
    page.parent.mkdir(parents=True, exist_ok=True)
    if not page.exists() or page.read_text() != text:
      page.write_text(text)


def docstring(path):
  """The docstring of a file, its first line and what follows."""
  head, _, rest = ast.get_docstring(ast.parse(path.read_text())).partition('\n')
  return head, fenced(rest.strip('\n'))


def fenced(text):
  """Fences the indented parts of a docstring, commands and tables."""
  parts = re.split(r'\n\n+', text)
  for i, part in enumerate(parts):
    if all(line.startswith('  ') for line in part.splitlines()):
      part = re.sub(r'(?<=\S) {3,}--', r' \\\n    --', textwrap.dedent(part))
      parts[i] = f'```text\n{part}\n```'
  return '\n\n'.join(parts)


def sentence(text):
  """In one line, with a capital."""
  text = ' '.join(text.split())
  return text[:1].upper() + text[1:]


def attributes(made):
  """What the docstring of a class says of its attributes."""
  text = inspect.getdoc(made).partition('Attributes:\n')[2]
  found = re.findall(r'^  (\w+): (.*(?:\n    .*)*)', text, re.MULTILINE)
  return {name: sentence(said) for name, said in found}


def table(head, rows):
  """A table of Markdown."""
  rows = [[str(cell).replace('|', r'\|') for cell in row] for row in rows]
  rows = [head, ['---'] * len(head), *rows]
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def toctree(*names):
  """Puts pages into the navigation, below the one that has it."""
  return '\n'.join(['```{toctree}', ':hidden:', '', *names, '```', ''])


def copies():
  """Pages that lie elsewhere in the repository."""
  files = 'benchmarks/README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'
  pages = {}
  for file in files:
    text = (ROOT / file).read_text().replace('](docs/', '](../')
    text = text.replace('](examples/', '](../../examples/')
    text = re.sub(r'\[([^\]]+)\]\([\w.]+\)', r'\1', text)
    name = file.removesuffix('/README.md').removesuffix('.md')
    pages[name] = text
  return pages


def api():
  """A page a public module, and the page that lists them."""
  pages, listed, text = {}, [], '# API\n\n'
  for title, names in MODULES.items():
    rows = []
    for name in names:
      path = ROOT / 'dsatgo_jax' / name.replace('.', '/')
      package = path.is_dir()
      path = path / '__init__.py' if package else path.with_suffix('.py')
      rows.append([f'[`{name}`](api/{name}.md)', docstring(path)[0]])
      option = '   :imported-members:\n' if package else ''
      pages[f'api/{name}'] = (
        f'# {name}\n\n```{{eval-rst}}\n'
        f'.. automodule:: dsatgo_jax.{name}\n{option}```\n'
      )
      listed.append(f'api/{name}')
    text += f'## {title}\n\n{table(["module", "what it has"], rows)}\n'
  return pages | {'api': text + toctree(*listed)}


def examples():
  """A page an example, and the page that lists them."""
  pages, rows = {}, []
  for path in sorted((ROOT / 'examples').glob('[a-z]*.py')):
    source = f'../../../examples/{path.name}'
    pages[f'examples/{path.stem}'] = (
      f'# {path.stem}\n\n'
      f'```{{literalinclude}} {source}\n:language: python\n```\n'
    )
    rows.append(
      [f'[`{path.name}`](examples/{path.stem}.md)', docstring(path)[0]]
    )
  text = (
    '# Examples\n\nEach is one file that runs as it stands, from a checkout. '
    '`--steps` says for how long.\n\n' + table(['file', 'what it shows'], rows)
  )
  listed = [*pages]
  return pages | {'examples': f'{text}\n{toctree(*listed)}'}


def configs():
  """The fields of configs/digits.py, and how the other configs differ."""
  files = sorted((ROOT / 'configs').glob('*.py'))
  values = {file.stem: fields(file.stem) for file in files}
  notes = {file.stem: comments(file) for file in files}
  base, said = values['digits'], notes['digits']
  neuron = attributes(linen.SpikingNeuron)
  text = (
    '# Configs, field by field\n\nEvery field can be set on the command line, '
    '`--config.FIELD=VALUE`. The values here are those of `configs/digits.py`; '
    'behind it stands how the other configs differ.\n\n## digits\n\n'
    + '\n\n'.join(docstring(ROOT / 'configs' / 'digits.py'))
    + '\n\n'
  )
  sections = {}
  for name, (section, comment) in said.items():
    if name not in base:
      continue
    comment = comment or neuron.get(name.removeprefix('neuron.'), '')
    if not comment:
      raise ValueError(f'expected a comment on config.{name}, got none')
    cells = [f'`{name}`', f'`{base[name]!r}`', comment]
    sections.setdefault(section, []).append(cells)
  for section, rows in sections.items():
    text += (
      f'### {section}\n\n{table(["field", "value", "what it is"], rows)}\n'
    )
  for file in files:
    if file.stem == 'digits':
      continue
    own, noted = values[file.stem], notes[file.stem]
    rows = [
      [f'`{name}`', f'`{own[name]!r}`', noted.get(name, ('', ''))[1]]
      for name in own
      if own[name] != base.get(name)
    ]
    head, rest = docstring(file)
    text += f'## {file.stem}\n\n{head}\n\n{rest}\n\n'
    text += table(['field', 'value', 'where it is from'], rows) + '\n'
  return text


def fields(stem):
  """What a config has, `{'neuron.decay': 0.2, ...}`."""
  config = importlib.import_module(f'configs.{stem}').get_config()
  fields = config.to_dict()
  whole = {'model_args': fields.pop('model_args')}
  return traverse_util.flatten_dict(fields, sep='.') | whole


def comments(file):
  """What the comments of a config say: `{field: (section, comment)}`."""
  found, section, prefix, name = {}, '', '', None
  with file.open('rb') as opened:
    for token in tokenize.tokenize(opened.readline):
      line = token.line
      if match := re.match(r'  config\.(\w+) = (ConfigDict\($)?', line):
        name, prefix = match[1], f'{match[1]}.' if match[2] else ''
        section = section or 'Other'
      elif prefix and (match := re.match(r"      '(\w+)':", line)):
        name = prefix + match[1]
      if token.type == tokenize.COMMENT:
        comment = token.string.removeprefix('# ')
        if line.startswith('  # '):
          section, prefix = comment.rstrip('.'), ''
        elif name:
          found[name] = section, comment
          continue
      if name:
        found.setdefault(name, (section, ''))
  return found


def commands():
  """What each command of `train/` does, and its own flags."""
  text = (
    '# Commands\n\nAll of them run from a checkout. `-v=0` shows the '
    "libraries' own log, `-v=1` the traceback of an error; `--help` says the "
    'same as this page.\n\n'
  )
  for file in sorted((ROOT / 'train').glob('*.py')):
    if 'command.run(main' not in file.read_text():
      continue
    name = f'train.{file.stem}'
    told = subprocess.run(
      [sys.executable, '-m', name, '--helpxml'],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    rows = []
    for flag in ElementTree.fromstring(told.stdout).iter('flag'):
      if flag.findtext('key') == 'yes':
        default, kind = flag.findtext('default'), flag.findtext('type')
        enum = ', '.join(f'`{value.text}`' for value in flag.iter('enum_value'))
        meaning = re.sub(r'^<.*?>: ', '', flag.findtext('meaning'))
        meaning += f' One of {enum}.' * bool(enum)
        default = f'`{default}`' if default else ''
        rows.append([f'`--{flag.findtext("name")}`', kind, default, meaning])
    head, rest = docstring(file)
    text += f'## {name}\n\n{head}\n\n{rest}\n\n'
    text += table(['flag', 'type', 'default', 'what it is'], rows) + '\n'
  return text
