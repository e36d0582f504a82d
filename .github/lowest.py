"""Prints pip constraints: the lower bounds in pyproject.toml, exactly.

python .github/lowest.py > lowest.txt && PIP_CONSTRAINT=lowest.txt .ci/run
"""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
# What a run needs. Linters and the site's generator are taken as they come.
EXTRAS = 'train', 'analysis'

project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
needed = list(project['dependencies'])
for extra in EXTRAS:
  needed += project['optional-dependencies'][extra]
bounds = [re.fullmatch(r'([\w.-]+)>=([\w.]+)', one) for one in needed]
for name, version in (bound.groups() for bound in bounds if bound):
  print(f'{name}=={version}')
