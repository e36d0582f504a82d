"""The figures of a run; `train.report` makes files of them.

Those of `FIGURES` draw the lines of epochs, `RESULT` the result, and `WATCHED`
the lines of watched steps.
"""

import math

import matplotlib
import numpy as np
from matplotlib import cm, colors
from matplotlib.figure import Figure

from dsatgo_jax import statistics
from train import metrics, tables

STYLE = {
  'axes.grid': True,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'figure.constrained_layout.use': True,
  'font.size': 9,
  'grid.alpha': 0.3,
}
# Of Okabe and Ito: told apart by the colour-blind, and printed in grey.
PATHS = {'spatial': '#0072B2', 'leak': '#E69F00', 'reset': '#009E73'}


def curves(epochs, result):
  """Loss and accuracy over the epochs."""
  figure = Figure(figsize=(9, 3.4))
  axes = figure.subplots(1, 2)
  x = [line['epoch'] for line in epochs]
  for axis, name, scale in zip(
    axes, ('loss', 'accuracy'), (1, 100), strict=True
  ):
    for split, colour in ('train', 'C0'), ('validation', 'C1'), ('test', 'C3'):
      key = f'{split}_{name}'
      if key in epochs[0]:
        y = [scale * line[key] for line in epochs]
        axis.plot(x, y, colour, label=split, marker='.')
    if result:
      axis.plot(
        x[-1], scale * result[name], 'C3*', markersize=11, clip_on=False,
        label='test, last checkpoint', zorder=3,
      )  # fmt: skip
    axis.set(title=name + (', %' if scale == 100 else ''), xlabel='epoch')
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
  return figure


def activity(epochs, result):
  """Firing rate and gradient share, layer by timestep."""
  layers = (result or epochs[-1])['layers']
  return heatmaps(layers, ('firing_rate', 'gradient_share'), 100)


def thresholds(epochs, result):
  """Threshold and width, layer by timestep."""
  layers = (result or epochs[-1])['layers']
  return heatmaps(layers, ('theta', 'width'), 1)


LABELS = {
  'firing_rate': 'firing rate, %',
  'gradient_share': 'share in the gradient window, %',
  'theta': 'threshold',
  'width': 'width of the surrogate',
}


def heatmaps(layers, names, scale):
  """One table a measure, coloured: a row a layer, a column a timestep."""
  figure = Figure(figsize=(9, 1.2 + 0.28 * len(layers)))
  axes = figure.subplots(1, 2, sharey=True)
  for axis, name in zip(axes, names, strict=True):
    values = scale * np.array([layer[name] for layer in layers.values()])
    image = axis.imshow(values, aspect='auto', cmap='viridis')
    middle = (values.min() + values.max()) / 2
    decimals = 1 if scale == 100 else 2
    for (row, column), value in np.ndenumerate(values):
      axis.text(
        column,
        row,
        f'{value:.{decimals}f}',
        color='white' if value <= middle else 'black',
        fontsize=7,
        ha='center',
        va='center',
      )
    axis.set(title=LABELS[name], xlabel='timestep')
    axis.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
    axis.set_yticks(range(len(layers)), layers)
    axis.grid(False)
    figure.colorbar(image, ax=axis)
  return figure


def confusion(result):
  """Which classes were taken for which, coloured by the share of a class."""
  counts = np.array(result['confusion'])
  shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
  size = len(counts)
  figure = Figure(figsize=(6.4, 5.4))
  axes = figure.subplots()
  image = axes.imshow(shares, cmap='viridis', vmin=0, vmax=100)
  if size <= tables.FEW:
    for (row, column), count in np.ndenumerate(counts):
      if count:
        axes.text(
          column, row, str(count),
          color='white' if shares[row, column] <= 50 else 'black',
          fontsize=8 if size <= 10 else 6, ha='center', va='center',
        )  # fmt: skip
    axes.set_xticks(range(size))
    axes.set_yticks(range(size))
  axes.set(xlabel='taken for', ylabel='class')
  axes.grid(False)
  figure.colorbar(image, ax=axes, label='of the class, %')
  return figure


def over_training(names, scale):
  """Returns the function that draws measures over the epochs."""

  def draw(epochs, result):
    del result
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots(1, 2)
    layers = list(epochs[0]['layers'])
    x = [line['epoch'] for line in epochs]
    colours = in_order(layers)
    for axis, name in zip(axes, names, strict=True):
      for layer, colour in zip(layers, colours, strict=True):
        y = [scale * np.mean(line['layers'][layer][name]) for line in epochs]
        axis.plot(x, y, color=colour)
      axis.set(title=LABELS[name], xlabel='epoch')
      axis.xaxis.get_major_locator().set_params(integer=True)
    key(figure, axes, layers, colours)
    return figure

  return draw


def in_order(names):
  """Colours for what has an order, readable on white at both ends."""
  return matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(names)))


def key(figure, axes, names, colours):
  """Says beside the axes which colour is which, the first on top."""
  edges = np.arange(len(names) + 1) - 0.5
  scale = cm.ScalarMappable(
    colors.BoundaryNorm(edges, len(names)), colors.ListedColormap(colours)
  )
  bar = figure.colorbar(scale, ax=axes, ticks=range(len(names)))
  bar.ax.set_yticklabels(names, fontsize=7)
  bar.ax.invert_yaxis()
  bar.ax.minorticks_off()


def gradient_flow(lines):
  """What reached the membranes, layer by timestep, and by which paths."""
  layers = lines[-1]['watch']['flow']
  figure = Figure(figsize=(9, 1.2 + 0.28 * len(layers)))
  left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4))
  values = np.array([layer['u'] for layer in layers.values()], float)
  image = left.imshow(
    np.ma.masked_invalid(np.where(values > 0, values, np.nan)),
    aspect='auto', cmap='viridis', norm=decades(values),
  )  # fmt: skip
  legible = values if values.shape[1] <= 12 else np.empty(0)
  for (row, column), value in np.ndenumerate(legible):
    dark = value > 0 and image.norm(value) <= 0.5
    left.text(
      column, row, short(value), color='white' if dark else 'black',
      fontsize=7 if values.shape[1] < 8 else 5.5, ha='center', va='center',
    )  # fmt: skip
  left.set(title='norm of dL/du', xlabel='timestep')
  left.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
  left.set_yticks(range(len(layers)), layers)
  left.grid(False)
  figure.colorbar(image, ax=left)
  start = np.zeros(len(layers))
  for path, colour in PATHS.items():
    parts = [metrics.path_shares(layer)[path] for layer in layers.values()]
    percent = 100 * np.nan_to_num(parts)
    right.barh(
      range(len(layers)), percent, left=start, color=colour, label=path,
      edgecolor='white', height=0.85,
    )  # fmt: skip
    for row, value in enumerate(percent):
      if value >= 6:
        right.text(
          start[row] + value / 2, row, f'{value:.0f}', ha='center', va='center',
          fontsize=7, color='black' if path == 'leak' else 'white',
        )  # fmt: skip
    start += percent
  right.set(xlim=(0, 100), xlabel='share of the norms of the paths, %')
  right.grid(False)
  right.legend(
    loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, frameon=False
  )
  return figure


def decades(values):
  """A logarithmic scale over what is positive, of a decade or more."""
  values = values[values > 0]
  if not values.size:
    return None
  low, high = values.min(), values.max()
  wider = max(1, 10 * low / high) ** 0.5
  return colors.LogNorm(low / wider, high * wider)


def short(value):
  """A number in few characters."""
  if not value > 0:
    return '0' if value == 0 else '-'
  digits, exponent = f'{value:.1e}'.split('e')
  return f'{digits}e{int(exponent)}'


def gradients_over_training(lines):
  """Norms of the gradients of weights and membranes, over the watched steps."""
  figure = Figure(figsize=(9, 4.2))
  axes = figure.subplots(1, 2)
  x = [line['epoch'] for line in lines]
  weights = [by_layer(line['watch']) for line in lines]
  membranes = [
    {
      name: metrics.norm(layer['u'])
      for name, layer in line['watch']['flow'].items()
    }
    for line in lines
  ]
  layers = list(weights[0])
  titles = 'norm of dL/d(parameters)', 'norm of dL/du'
  for axis, series, title in zip(
    axes, (weights, membranes), titles, strict=True
  ):
    for layer, colour in zip(layers, in_order(layers), strict=True):
      if layer in series[0]:
        y = [norms[layer] or math.nan for norms in series]
        axis.plot(x, y, color=colour, marker='.', markersize=3, linewidth=1)
    axis.set(title=title, xlabel='epoch', yscale='log')
  key(figure, axes, layers, in_order(layers))
  return figure


def by_layer(watched):
  """The norm of the gradient of all parameters of a layer, first to last."""
  layers = {name: [] for name in watched['flow']}
  for name, value in watched['gradient_norm'].items():
    inside = (layer for layer in layers if name.startswith(f'{layer}/'))
    layer = next(inside, name.rpartition('/')[0])
    layers.setdefault(layer, []).append(value)
  return {layer: metrics.norm(values) for layer, values in layers.items()}


def membranes(lines):
  """Histograms of membranes around the threshold, with the gradient window."""
  watched = lines[-1]['watch']
  layers = watched['histograms']
  edges = np.array(statistics.EDGES)
  bin_width = edges[1] - edges[0]
  edges = [edges[0] - bin_width, *edges, edges[-1] + bin_width]
  shares = 100 * np.array(list(layers.values()), float)  # [layers, T, bins]
  inside = np.flatnonzero(shares.max((0, 1)) > 0.05)
  columns = min(4, len(layers))
  rows = -(-len(layers) // columns)
  figure = Figure(figsize=(9, 0.9 + 1.6 * rows))
  axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
  times = range(1, shares.shape[1] + 1)
  labelled = times[:: -(-len(times) // 10)]
  for axis, (layer, of_layer) in zip(
    axes.flat, zip(layers, shares, strict=True), strict=False
  ):
    told = watched['activity'][layer]
    width, window = (
      np.mean(np.array(told[name], float))
      for name in ('width', 'gradient_share')
    )
    axis.axvspan(-width / 2, width / 2, color='0.85', linewidth=0)
    axis.axvline(0, color='0.4', linewidth=0.8)
    for percent, colour, t in zip(
      of_layer, in_order(times), times, strict=True
    ):
      label = f't = {t}' if t in labelled else None
      axis.stairs(percent, edges, color=colour, linewidth=1, label=label)
    axis.set_title(f'{layer}: {100 * window:.0f} % in grey', fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_xlim(edges[inside[0]], edges[inside[-1] + 1])
  for axis in axes.flat[len(layers) :]:
    axis.set_axis_off()
  for axis in axes.flat[len(layers) - columns : len(layers)]:
    axis.tick_params(labelbottom=True)  # The lowest one of its column.
  figure.supxlabel(r'membrane from the threshold, $u - \theta$', fontsize=9)
  figure.supylabel(f'neurons in a bin of {bin_width:g}, %', fontsize=9)
  figure.legend(
    *axes.flat[0].get_legend_handles_labels(),
    loc='outside upper center', ncols=10, frameon=False,
  )  # fmt: skip
  return figure


FIGURES = (
  ('curves', 'Loss and accuracy', curves),
  ('activity', 'Firing rate and gradient share at the end', activity),
  (
    'activity_over_training',
    'Firing rate and gradient share over training',
    over_training(('firing_rate', 'gradient_share'), 100),
  ),
  ('thresholds', 'Thresholds and widths at the end', thresholds),
  (
    'thresholds_over_training',
    'Thresholds and widths over training',
    over_training(('theta', 'width'), 1),
  ),
)


RESULT = (('confusion', 'Which classes are taken for which', confusion),)


WATCHED = (
  ('gradient_flow', 'Gradients at the last watched step', gradient_flow),
  (
    'gradients_over_training',
    'Gradients over training',
    gradients_over_training,
  ),
  ('membranes', 'Membranes at the last watched step', membranes),
)
