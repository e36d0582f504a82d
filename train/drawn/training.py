"""What runs wrote while they trained and at their end: figures 6, 8, 10, 11."""

import numpy as np
from matplotlib.figure import Figure

from train.drawn import page, style

# What the paper measured, in percent.
RATE, RATE_DEVIATION, RATE_VANILLA = 15.0, 1.62, 10.66
RATE_OF_THEOREM = 15.87  # 1 - Phi(1)
RATES_OVER_TIME = 14.0, 15.9
SHARE, SHARE_LAST, SHARE_VANILLA = 38.53, 36.54, 15.13


def curves(runs):
  """Rows of figure 6: loss and accuracy by epoch.

  `accuracy` is that of the split of `split`, in percent; `test_accuracy` is
  there at the last epoch.
  """
  rows = []
  for run in runs:
    split = run.config['select_on']
    last = run.epochs[-1]
    rows += [
      {
        'run': run.name,
        'seed': run.config['seed'],
        'epoch': line['epoch'],
        'train_loss': line.get('train_loss'),
        'split': split,
        'accuracy': 100 * line[f'{split}_accuracy']
        if f'{split}_accuracy' in line
        else None,
        'test_accuracy': 100 * run.result['accuracy'] if line is last else None,
      }
      for line in run.epochs
    ]
  return rows


def draw_curves(rows):
  """Training loss above, accuracy below; a band where there are seeds."""
  figure, (above, below) = style.panels(2, 1, 2.2, sharex=True)
  for run, look in style.looks(style.values(rows, 'run')).items():
    mine = style.where(rows, run=run)
    epochs = style.values(mine, 'epoch')
    for axis, name in (above, 'train_loss'), (below, 'accuracy'):
      of_epochs = [
        style.column(style.where(mine, epoch=epoch), name) for epoch in epochs
      ]
      mean = np.array([values.mean() for values in of_epochs])
      settings = style.line(look) | {'markevery': max(1, len(epochs) // 8)}
      axis.plot(epochs, mean, label=run, **settings)
      if len(of_epochs[0]) > 1:
        deviation = np.array([deviation_of(values) for values in of_epochs])
        axis.fill_between(
          epochs, mean - deviation, mean + deviation, color=look['color'],
          alpha=0.18, linewidth=0,
        )  # fmt: skip
    tested = style.column(mine, 'test_accuracy')
    below.plot(
      epochs[-1], np.nanmean(tested), marker='*', color=look['color'],
      markersize=10, clip_on=False, zorder=4, markeredgecolor='white',
      markeredgewidth=0.5,
    )  # fmt: skip
  # The first epochs would leave no room for the differences of the others.
  late = [row for row in rows if row['epoch'] > max(epochs) / 4]
  for axis, name in (above, 'train_loss'), (below, 'accuracy'):
    values = style.column(late, name)
    if np.isfinite(values).all() and np.ptp(values):
      room = np.ptp(values) / 12
      axis.set_ylim(values.min() - room, values.max() + room)
  splits = ' / '.join(style.values(rows, 'split'))
  above.set(ylabel='training loss (nats)')
  below.set(ylabel=f'accuracy, {splits} (%)', xlabel='epoch')
  below.xaxis.get_major_locator().set_params(integer=True)
  style.legend(figure, above)
  return figure


def deviation_of(values):
  """The standard deviation over seeds; none of one."""
  return np.std(values, ddof=1) if len(values) > 1 else 0.0


def of_layers(name):
  """Returns what gives the rows of a measure by layer and timestep.

  Args:
    name: 'firing_rate' or 'gradient_share'.
  """

  def rows(runs):
    return [
      {
        'run': run.name,
        'seed': run.config['seed'],
        'layer': layer,
        'timestep': t,
        f'{name}_percent': 100 * value,
      }
      for run in runs
      for layer, told in run.result['layers'].items()
      for t, value in enumerate(told[name], start=1)
    ]

  return rows


def by_layer(rows, name, run):
  """Means over time by layer, and their deviations over seeds."""
  mine = style.where(rows, run=run)
  layers = style.values(mine, 'layer')
  seeds = style.values(mine, 'seed')
  means = np.array(
    [
      [
        style.column(style.where(mine, layer=layer, seed=seed), name).mean()
        for seed in seeds
      ]
      for layer in layers
    ]
  )
  return layers, means.mean(1), np.array([deviation_of(row) for row in means])


def lines_by_layer(rows, name, label):
  """A line a run over the layers, from the input on."""
  names = style.values(rows, 'layer')
  figure = Figure(figsize=(style.WIDE, 3.4))
  axis = figure.subplots()
  for run, look in style.looks(style.values(rows, 'run')).items():
    layers, mean, deviation = by_layer(rows, name, run)
    x = [names.index(layer) for layer in layers]
    axis.errorbar(
      x, mean, deviation if deviation.any() else None, label=run, capsize=2,
      **style.line(look),
    )  # fmt: skip
  axis.set_xticks(
    range(len(names)), names, fontsize=7 if len(names) < 12 else 6,
    rotation=90 if len(names) > 6 else 0,
  )  # fmt: skip
  axis.set(xlabel='layer, from the input on', ylabel=label)
  return figure, axis


def reference(axis, value, text, look):
  """The paper's own value, as a line."""
  axis.axhline(value, linestyle=look, label=text, **style.PAPER)


def draw_rates(rows):
  """Figure 8."""
  figure, axis = lines_by_layer(rows, 'firing_rate_percent', 'firing rate (%)')
  axis.axhspan(
    RATE - RATE_DEVIATION, RATE + RATE_DEVIATION, color='0.88', zorder=0,
    label='paper: 15 ± 1.62',
  )  # fmt: skip
  reference(axis, RATE_OF_THEOREM, 'Theorem 1: 15.87', '--')
  reference(axis, RATE_VANILLA, 'paper, vanilla: 10.66', ':')
  axis.set_ylim(bottom=0)
  style.legend(figure, axis)
  return figure


def draw_shares(rows):
  """Figure 11."""
  figure, axis = lines_by_layer(
    rows, 'gradient_share_percent', 'in the gradient window (%)'
  )
  reference(axis, SHARE, 'paper: above 38.53', '--')
  reference(axis, SHARE_LAST, 'paper, last layers: 36.54', '-.')
  reference(axis, SHARE_VANILLA, 'paper, vanilla, last: below 15.13', ':')
  axis.set_ylim(bottom=0)
  style.legend(figure, axis, 2)
  return figure


def draw_rates_by_timestep(rows):
  """Figure 10: the mean over layers, and from the least to the most."""
  figure = Figure(figsize=(style.WIDE, 2.8))
  axis = figure.subplots()
  looks = style.looks(style.values(rows, 'run'))
  for place, (run, look) in enumerate(looks.items()):
    mine = style.where(rows, run=run)
    times = np.array(style.values(mine, 'timestep'))
    layers = [
      style.column(style.where(mine, timestep=t), 'firing_rate_percent')
      for t in times
    ]
    mean = np.array([of.mean() for of in layers])
    reach = [
      [np.mean(of) - of.min() for of in layers],
      [of.max() - np.mean(of) for of in layers],
    ]
    shift = 0.06 * (place - (len(looks) - 1) / 2)
    axis.errorbar(
      times + shift, mean, reach, label=run, capsize=2, elinewidth=0.8,
      **style.line(look),
    )  # fmt: skip
  low, high = RATES_OVER_TIME
  axis.axhspan(
    low, high, color='0.88', zorder=0, label=f'paper: {low} to {high}'
  )
  axis.set(ylabel='firing rate (%)')
  axis.set_ylim(bottom=0)
  style.timesteps(axis, max(times))
  style.legend(figure, axis)
  return figure


def draw_pairs(rows):
  """Paired differences with their intervals, zero marked."""
  figure = Figure(figsize=(style.WIDE, 0.7 + 0.5 * len(rows)))
  axis = figure.subplots()
  looks = {'better': ('#009E73', 'o'), 'worse': ('#D55E00', 's')}
  for place, row in enumerate(rows):
    colour, marker = looks.get(row['word'], ('0.35', 'D'))
    low, high = row['low_percent'], row['high_percent']
    axis.plot([low, high], [place, place], color=colour, linewidth=2)
    axis.plot(row['difference_percent'], place, marker, color=colour)
    axis.annotate(
      row['word'], (max(high, 0), place), xytext=(6, 0),
      textcoords='offset points', va='center', fontsize=8, color=colour,
    )  # fmt: skip
    axis.annotate(
      f'{row["method"]} - {row["against"]}', (0, place),
      xycoords=('axes fraction', 'data'), xytext=(2, 7),
      textcoords='offset points', fontsize=8,
    )  # fmt: skip
  axis.axvline(0, color='0.35', linewidth=1, zorder=1)
  axis.set_yticks([])
  axis.set_ylim(len(rows) - 0.6, -0.8)
  axis.margins(x=0.25)
  axis.set_xlabel('difference in test accuracy (points), with 95 % interval')
  return figure


FIGURES = (
  page.Entry(
    '06_curves',
    'Figure 6: training',
    'Loss of the training batches above, accuracy below, as far as the last '
    'three quarters of the epochs reach; the star is the test accuracy after '
    'the last. Over several seeds the line is their mean and the band one '
    'standard deviation. The paper: both parts together gain most, 1.71 '
    'points over vanilla on CIFAR-10 and 2.30 on CIFAR10-DVS, and TGO alone '
    'gains more than AT alone.',
    curves,
    draw_curves,
  ),
  page.Entry(
    '08_firing_rate',
    'Figure 8: firing rate by layer',
    'The share of neurons that fire, in inference on the test split, mean over '
    'the timesteps. A line near the dashed one does what Theorem 1 promises; a '
    'layer near zero passes nothing on. Bars are a standard deviation over '
    'seeds.',
    of_layers('firing_rate'),
    draw_rates,
  ),
  page.Entry(
    '11_gradient_share',
    'Figure 11: neurons in the gradient window by layer',
    'Only a neuron whose membrane is within half a width of its threshold '
    'passes a gradient: the higher the line, the more of a layer learns. In '
    'inference on the test split, mean over the timesteps; bars are a standard '
    'deviation over seeds.',
    of_layers('gradient_share'),
    draw_shares,
  ),
)
RATES_BY_TIMESTEP = page.Entry(
  '10_rate_by_timestep',
  'Figure 10: firing rate by timestep',
  'Mean over the layers, in inference on the test split; bars reach from the '
  'layer that fires least to the one that fires most. A flat line says that '
  'no timestep is starved.',
  of_layers('firing_rate'),
  draw_rates_by_timestep,
)
