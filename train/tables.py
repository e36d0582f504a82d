"""Tables of an evaluation, as lines of text."""

import numpy as np

from train import metrics

# Up to so many classes every confusion is told; else so many of the worst.
FEW = 20
WORST = 10


def table(title, columns, rows):
  """Returns the lines of a table: `{row: cells}`, cells as they are printed."""
  wide = max(map(len, [title, *rows]))
  sizes = [
    max(map(len, cells)) for cells in zip(columns, *rows.values(), strict=True)
  ]
  return [
    f'{name:{wide}}'
    + ''.join(
      f'  {cell:>{size}}' for cell, size in zip(cells, sizes, strict=True)
    )
    for name, cells in {title: columns, **rows}.items()
  ]


def over_time(title, layers, form, last, summarise):
  """Returns the lines of a table: a row a layer, a column a timestep.

  Args:
    title: what is told.
    layers: `{layer: numbers}`, one a timestep.
    form: of a number.
    last: the name of the last column.
    summarise: what makes that one of a layer's numbers.
  """
  num_steps = len(next(iter(layers.values())))
  columns = [f't={t}' for t in range(1, num_steps + 1)] + [last]
  rows = {
    layer: [form.format(x) for x in [*values, summarise(values)]]
    for layer, values in layers.items()
  }
  return table(title, columns, rows)


def flow_tables(found):
  """Yields the lines of the tables of `gradient_flow`."""
  yield from over_time(
    f'norm of dL/du, {found["num_examples"]} examples',
    {
      name: np.array(told['u'], float) for name, told in found['layers'].items()
    },
    '{:.2e}',
    'all',
    metrics.norm,
  )
  yield ''
  rows = {
    layer: ['-' if x is None else f'{100 * x:.2f}' for x in shares.values()]
    for layer, shares in found['shares'].items()
  }
  yield from table(
    'shares of the paths, %', next(iter(found['shares'].values())), rows
  )


def energy_table(found):
  """Yields the lines of the table of `energy_per_example`."""
  names = 'operations', 'energy', 'relu_operations', 'relu_energy'

  def cells(row, kind='', rate=''):
    return [kind, rate, *(f'{row[name] / 1e3:,.1f}' for name in names)]

  rows = {
    layer: cells(row, row['kind'], f'{100 * row["rate"]:.2f}')
    for layer, row in found['layers'].items()
  }
  accumulates, multiply_accumulates = (
    found[name] for name in ('accumulates', 'multiply_accumulates')
  )
  whole = found | {'operations': accumulates + multiply_accumulates}
  yield from table(
    'operations, an example',
    ['kind', 'input, %', 'thousand', 'nJ', 'ReLU, thousand', 'ReLU, nJ'],
    rows | {'total': cells(whole)},
  )
  share = found['energy'] / found['relu_energy']
  yield (
    f'{accumulates:,.0f} accumulates (AC) and {multiply_accumulates:,.0f} '
    f'multiply-accumulates (MAC): {share:.1%} of the energy with ReLU'
  )


def activity_tables(layers):
  """Yields the lines of the tables of what layers do, in percent."""
  for title, name in (
    ('firing rate, %', 'firing_rate'),
    ('in the gradient window, %', 'gradient_share'),
  ):
    percent = {
      layer: 100 * np.array(told[name]) for layer, told in layers.items()
    }
    yield ''
    yield from over_time(title, percent, '{:.2f}', 'mean', np.mean)


def class_accuracy(confusion):
  """The share of each class that was taken for it; NaN for one without any.

  Args:
    confusion: [K, K], how many examples of a class (rows) were taken for a
      class (columns).

  Returns:
    [K].
  """
  totals = np.sum(confusion, 1)
  right = np.diagonal(confusion)
  return np.divide(
    right, totals, np.full(len(totals), np.nan), where=totals > 0
  )


def class_tables(confusion):
  """Yields the lines of the tables of classes and what they are taken for.

  Args:
    confusion: [K, K], as in `class_accuracy`. Where K is more than `FEW`, the
      worst classes and the most frequent confusions stand for the rest.
  """
  confusion = np.array(confusion)
  totals, accuracy = confusion.sum(1), class_accuracy(confusion)
  if len(confusion) <= FEW:
    yield from table(
      'class, taken for',
      [*map(str, range(len(confusion))), 'examples', 'right, %'],
      {
        str(label): [
          *(str(count or '.') for count in row),
          str(totals[label]),
          percent(accuracy[label]),
        ]
        for label, row in enumerate(confusion)
      },
    )
    return
  wrong = confusion * ~np.eye(len(confusion), dtype=bool)
  if not wrong.any():
    yield f'every example of {np.count_nonzero(totals)} classes is right'
    return
  worst = [
    label
    for label in np.lexsort((-totals, accuracy))[:WORST]
    if accuracy[label] < 1
  ]
  yield from table(
    'worst classes',
    ['examples', 'right, %', 'mostly taken for (times)'],
    {
      str(label): [
        str(totals[label]),
        percent(accuracy[label]),
        f'{wrong[label].argmax()} ({wrong[label].max()})',
      ]
      for label in worst
    },
  )
  yield ''
  pairs = np.argsort(-wrong, axis=None, kind='stable')[:WORST]
  pairs = [divmod(int(pair), len(wrong)) for pair in pairs]
  yield from table(
    'most frequent confusions',
    ['times', 'of the class, %'],
    {
      f'{label} taken for {other}': [
        str(wrong[label, other]),
        percent(wrong[label, other] / totals[label]),
      ]
      for label, other in pairs
      if wrong[label, other]
    },
  )


def percent(share):
  """A share, as it is printed."""
  return '-' if np.isnan(share) else f'{100 * share:.2f}'
