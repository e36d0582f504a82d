r"""Compares methods: several seeds each, all from the same start.

  python -m train.compare --config=configs/digits.py --workdir=runs/compare \
    --methods=vanilla,at,tgo,ds_atgo --seeds=5

Takes the same `--config.FIELD=...` as `train.main`. A seed gives every method
the same weights and the same batches. Settings of a method's own follow its
name: `ds_atgo+threshold=estimated+f_c=0.5`, fields of `config.neuron`, of the
config, or attributes of the network; a tuple as a list, `at+cut=['reset']`,
and what has commas in double quotes, `at,"at+cut=['leak','reset']"`.

What is compared is the accuracy of the last epoch on the test split, by a
paired t test over the seeds, with its 95 % interval; p is adjusted for the
number of comparisons (Holm), and decides at 5 %: better, worse or undecided.

Runs are `workdir/METHOD/seed_N`. The same command resumes what was interrupted,
and runs nothing again that is finished; it exits with 75 after a signal.
"""

import ast
import copy
import html
import json
import pathlib

import numpy as np
from absl import flags

from train import command

METHODS = flags.DEFINE_list(
  'methods',
  ['vanilla', 'at', 'tgo', 'ds_atgo'],
  'The methods, each with settings of its own if need be.',
)
SEEDS = flags.DEFINE_integer('seeds', 5, 'How many; from config.seed on.')
PAIRS = flags.DEFINE_enum(
  'pairs',
  'first',
  ['first', 'previous', 'all'],
  'What is compared: each method with the first, with the one before it, or '
  'with all others.',
)
JOBS = flags.DEFINE_integer(
  'jobs',
  None,
  'How many runs at a time, which share the cores; by default one a core, and '
  'one in all where there is a GPU.',
)
flags.declare_key_flag('json')


def varied(config, method):
  """Returns the config of a method with settings of its own.

  Args:
    config: of all methods.
    method: `NAME+FIELD=VALUE+...`.

  Raises:
    ValueError: no such method, or a setting that is none.
  """
  from dsatgo_jax import methods

  config = copy.deepcopy(config)
  name, *settings = method.split('+')
  if name not in methods.METHODS:
    raise ValueError(
      f'expected methods of {", ".join(methods.METHODS)}, got {name!r}'
    )
  config.method = name
  for setting in settings:
    field, equals, text = setting.partition('=')
    if not equals or field in ('seed', 'method'):
      raise ValueError(
        'expected NAME+FIELD=VALUE with a field other than seed and method, '
        f'got {method!r}'
      )
    try:
      value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
      value = text
    if isinstance(value, list):
      value = tuple(value)
    place = next(
      (fields for fields in (config.neuron, config) if field in fields),
      config.model_args,
    )
    try:
      with config.unlocked():
        place[field] = value
    except TypeError as error:
      raise ValueError(f'{method}: {error}') from error
  return config


def pairs_of(names, which):
  """Returns `(method, against)` of the comparisons."""
  if which == 'first':
    return [(name, names[0]) for name in names[1:]]
  if which == 'previous':
    return list(zip(names[1:], names, strict=False))
  return [(b, a) for i, b in enumerate(names) for a in names[:i]]


def compared(accuracies, which='first'):
  """Compares methods.

  Args:
    accuracies: `{method: {seed: percent}}`, of the same seeds each.
    which: 'first', 'previous' or 'all'.

  Returns:
    `methods`, `{method: {'mean', 'deviation', 'accuracies'}}`, and `pairs`, a
    list of dicts, all in percent: `paired.Paired` of method - against, `p_holm`
    and the word.
  """
  from train import paired

  pairs = pairs_of(list(accuracies), which)
  values = {name: list(one.values()) for name, one in accuracies.items()}
  found = [
    paired.compare(np.subtract(values[method], values[against]))
    for method, against in pairs
  ]
  adjusted = paired.holm([one.p for one in found])
  return {
    'methods': {
      method: {
        'mean': float(np.mean(values[method])),
        'deviation': float(np.std(values[method], ddof=1)),
        'accuracies': one,
      }
      for method, one in accuracies.items()
    },
    'pairs': [
      {
        'method': method,
        'against': against,
        'difference_percent': one.difference,
        'low_percent': one.low,
        'high_percent': one.high,
        'p': one.p,
        'p_holm': p,
        'p_signs': one.p_signs,
        'word': paired.word(one.difference, p),
      }
      for (method, against), one, p in zip(pairs, found, adjusted, strict=True)
    ],
  }


def probability(p):
  """A p value, as it is printed."""
  return '-' if p is None else f'{p:.4f}' if p >= 1e-4 else '< 1e-4'


def lines(found):
  """Yields the lines of the tables of `compared`."""
  from train import tables

  rows = {
    name: [f'{told["mean"]:.2f}', f'{told["deviation"]:.2f}']
    + [f'{value:.2f}' for value in told['accuracies'].values()]
    for name, told in found['methods'].items()
  }
  seeds = next(iter(found['methods'].values()))['accuracies']
  columns = ['mean', 'deviation', *(f'seed {seed}' for seed in seeds)]
  yield from tables.table('test accuracy, %', columns, rows)
  yield ''
  yield from tables.table(
    'method - against',
    ['points', '95 % interval', 'p', 'p (Holm)', 'p (signs)', ''],
    {
      f'{row["method"]} - {row["against"]}': [
        f'{row["difference_percent"]:+.2f}',
        f'{row["low_percent"]:+.2f} to {row["high_percent"]:+.2f}',
        *(probability(row[name]) for name in ('p', 'p_holm', 'p_signs')),
        row['word'],
      ]
      for row in found['pairs']
    },
  )


def write(workdir, runs, found):
  """Writes `comparison.json`, two CSVs, the figures and their page.

  Args:
    workdir: of the comparison.
    runs: a list of `runs.Told`, named by their methods.
    found: of `compared`.

  Returns:
    The path of the page.
  """
  from train import metrics
  from train.drawn import page, training

  metrics.write_json(workdir / 'comparison.json', found)
  page.write_csv(
    workdir / 'comparison.csv',
    [
      {'method': method, 'mean': told['mean'], 'deviation': told['deviation']}
      | {f'seed_{seed}': value for seed, value in told['accuracies'].items()}
      for method, told in found['methods'].items()
    ],
  )
  entries = (
    page.Entry(
      'pairs', 'Differences, paired by seed',
      'Each with its own 95 % interval; the word is by p adjusted for the '
      'number of comparisons.', lambda _: found['pairs'], training.draw_pairs,
    ),
    *training.FIGURES,
  )  # fmt: skip
  folder = workdir / 'figures'
  folder.mkdir(exist_ok=True)
  sections = [page.add(folder, entry, runs) for entry in entries]
  path = folder / 'index.html'
  text = '\n'.join(lines(found))
  config = runs[0].config
  title = f'{config["model"]} on {config["dataset"]}: methods compared'
  page.write(path, title, f'<pre>{html.escape(text)}</pre>', sections)
  return path


def main():
  """Trains what is to be trained, and compares it."""
  from train import data, jobs, lock
  from train.drawn import runs as runs_lib

  workdir, methods = pathlib.Path(command.WORKDIR.value), METHODS.value
  for name, value, right in (
    ('seeds of 2 or more', SEEDS.value, SEEDS.value >= 2),
    ('jobs of 1 or more', JOBS.value, JOBS.value is None or JOBS.value >= 1),
    (
      'methods, two or more, each once',
      ','.join(methods),
      len(set(methods)) == len(methods) >= 2,
    ),
  ):
    if not right:
      raise ValueError(f'expected --{name}, got {value}')
  planned = []
  first = command.CONFIG.value.seed
  for seed in range(first, first + SEEDS.value):
    for method in methods:
      config = varied(command.CONFIG.value, method)
      config.seed = seed
      folder = workdir / method / f'seed_{seed}'
      run = jobs.Run(f'{method}, seed {seed}', folder, config)
      planned.append((method, run))
  with lock.hold(workdir):
    # Prepared once, where need be; what is wrong with them is told at once.
    data.load(command.CONFIG.value)
    jobs.train(
      [run for _, run in planned],
      JOBS.value or jobs.default_jobs(),
      'train.compare',
      workdir.absolute() / 'compiled',
    )
    # One method after the other, each by its seeds.
    planned.sort(key=lambda one: methods.index(one[0]))
    told = [runs_lib.told(run.workdir, method) for method, run in planned]
    accuracies = {method: {} for method in methods}
    for run in told:
      seed = run.config['seed']
      accuracies[run.name][seed] = 100 * run.result['accuracy']
    found = compared(accuracies, PAIRS.value)
    path = write(workdir, told, found)
  if command.JSON.value:
    print(json.dumps(found))
    return
  print(*lines(found), sep='\n')
  print(f'figures: {path}')


if __name__ == '__main__':
  command.run(main, 'config', 'workdir')
