"""What happens inside trained networks: figures 2, 7, 9 and 10, and traces."""

import dataclasses
import functools

import jax
import numpy as np
from matplotlib.figure import Figure

from dsatgo_jax.analysis import landscape
from train import data
from train import step as step_lib
from train.drawn import page, runs, style


def ends(layers):
  """The first, the middle and the last layer."""
  return list(
    dict.fromkeys([layers[0], layers[(len(layers) - 1) // 2], layers[-1]])
  )


def membranes(networks):
  """Rows of figure 2: how membranes lie to the threshold, by timestep."""
  rows = []
  for network in networks:
    told = runs.happened(network, 'spiking')
    rows += [
      {
        'run': network.name,
        'layer': layer,
        'timestep': t + 1,
        **{
          name: float(np.mean(told[layer][name][t]))
          for name in ('mean', 'std', 'theta', 'width')
        },
      }
      for layer in ends(network.layers)
      for t in range(network.config.num_steps)
    ]
  return rows


def draw_membranes(rows):
  """A row of panels a run, a column a layer."""
  names = style.values(rows, 'run')
  columns = max(
    len(style.values(style.where(rows, run=n), 'layer')) for n in names
  )
  figure, axes = style.panels(
    len(names) * columns, columns, 1.35, sharex=True, sharey='row'
  )
  axes = np.reshape(list(axes), (len(names), columns))
  for row, name in zip(axes, names, strict=True):
    mine = style.where(rows, run=name)
    for axis, layer in zip(row, style.values(mine, 'layer'), strict=False):
      of = style.where(mine, layer=layer)
      t, mean, std, theta, width = (
        style.column(of, column)
        for column in ('timestep', 'mean', 'std', 'theta', 'width')
      )
      axis.fill_between(
        t, theta - width / 2, theta + width / 2, color='0.88', linewidth=0,
        label='gradient window',
      )  # fmt: skip
      axis.fill_between(
        t, mean - std, mean + std, color=style.COLOURS[0], alpha=0.3,
        linewidth=0, label='mean ± deviation of u',
      )  # fmt: skip
      axis.plot(t, mean, color=style.COLOURS[0], marker='o', markersize=3)
      axis.plot(
        t, theta, color=style.COLOURS[1], linestyle='--', marker='s',
        markersize=3, label='threshold',
      )  # fmt: skip
      axis.set_title(f'{name}: {layer}', fontsize=8)
      axis.tick_params(labelsize=7)
      style.timesteps(axis, len(t))
      axis.set_xlabel('')
  figure.supxlabel('timestep', fontsize=9)
  figure.supylabel('membrane potential u', fontsize=9)
  style.legend(figure, axes[0, 0])
  return figure


def with_own_thresholds(model):
  """The network, whose neurons take the batch's thresholds in inference."""
  kind = type(model)

  class Own(kind):
    def parts(self, train):
      parts = super().parts(train)
      neuron = functools.partial(parts.neuron, use_running_average=False)
      return parts._replace(neuron=neuron)

  fields = {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.name not in ('parent', 'name')
  }
  return Own(**fields)


def averages(networks, most=512):
  """Rows of figure 7: accuracy with and without the moving average."""
  rows = []
  for network in networks:
    stats = jax.tree_util.tree_leaves_with_path(
      network.variables['batch_stats']
    )
    kept = any('running_threshold' in str(path) for path, _ in stats)
    if not kept and network.config.neuron.threshold != 'estimated':
      continue
    ways = {'running': network.model}
    if kept:
      ways['of the batch'] = with_own_thresholds(network.model)
    for way, model in ways.items():
      right, count = accuracy(network, model, most)
      rows.append(
        {
          'run': network.name,
          'distribution': 'true' if kept else 'estimated',
          'thresholds': way,
          'num_examples': count,
          'accuracy': 100 * right / count,
        }
      )
  return rows or 'no run has an adaptive threshold'


def accuracy(network, model, most):
  """How many of so many test examples are right, in whole batches."""
  config = network.config
  source = data.load(config).test
  size = min(config.batch_size, len(source))
  source = runs.spread(source, max(size, min(most, len(source)) // size * size))
  (batches,) = data.eval_batches([source], config, batch_size=size)
  mean, std = np.float32(config.mean), np.float32(config.std)

  @jax.jit
  def right(variables, batch):
    images = step_lib.prepare(batch['image'], mean, std)
    logits, _ = model.apply(
      variables, images, train=False, mutable=['batch_stats']
    )
    return (step_lib.predicted(logits) == batch['label']).sum()

  counts = [int(right(network.variables, batch)) for batch in batches]
  return sum(counts), len(source)


def draw_averages(rows):
  """A line a run, a marker a way."""
  names = style.values(rows, 'run')
  figure = Figure(figsize=(style.WIDE, 1.1 + 0.4 * len(names)))
  axis = figure.subplots()
  ways = {
    'running': ('with the moving average', {'marker': 'o', 'color': '#0072B2'}),
    'of the batch': (
      "without: the batch's own",
      {'marker': 's', 'color': '#D55E00', 'markerfacecolor': 'none'},
    ),
  }
  for way, (label, look) in ways.items():
    mine = style.where(rows, thresholds=way)
    axis.plot(
      style.column(mine, 'accuracy'),
      [names.index(row['run']) for row in mine],
      linestyle='', markersize=8, label=label, **look,
    )  # fmt: skip
  labels = [
    f'{name}\n({style.where(rows, run=name)[0]["distribution"]})'
    for name in names
  ]
  axis.set_yticks(range(len(names)), labels)
  axis.invert_yaxis()
  axis.margins(x=0.2, y=0.3)
  count = rows[0]['num_examples']
  axis.set_xlabel(f'accuracy on {count} test examples (%)')
  style.legend(figure, axis)
  return figure


def landscapes(networks, points=13):
  """Rows of figure 9: the loss along two filter-normalised directions."""
  rows = []
  axis = np.linspace(-1, 1, points)
  for network in networks:
    params = network.variables['params']
    directions = landscape.random_directions(params, key=jax.random.key(0))
    *_, grid = landscape.sweep(
      runs.loss(network, train=False), params, directions, axis, axis,
      chunk=points * points,
    )  # fmt: skip
    rows += [
      {
        'run': network.name,
        'first': float(axis[i]),
        'second': float(axis[j]),
        'loss': float(value),
      }
      for (i, j), value in np.ndenumerate(grid.losses)
    ]
  return rows


def draw_landscapes(rows):
  """Contours, of the same levels for all runs."""
  names = style.values(rows, 'run')
  figure, axes = style.panels(len(names), 2, 2.3, sharex=True, sharey=True)
  losses = style.column(rows, 'loss')
  losses = losses[np.isfinite(losses)]
  # A little more, so that the ends are within.
  levels = np.geomspace(losses.min() / 1.001, losses.max() * 1.001, 13)
  for axis, name in zip(axes, names, strict=True):
    mine = style.where(rows, run=name)
    x = style.values(mine, 'first')
    grid = style.column(mine, 'loss').reshape(len(x), len(x)).T
    image = axis.contourf(x, x, grid, levels, cmap='viridis', norm='log')
    lines = axis.contour(
      x, x, grid, levels[::2], colors='white', linewidths=0.6
    )
    axis.clabel(lines, fmt='%.3g', fontsize=6)
    axis.plot(0, 0, '*', color='white', markeredgecolor='black', markersize=9)
    axis.set_title(name)
    axis.grid(False)
  bar = figure.colorbar(image, ax=list(axes), format='%.3g', ticks=levels[::3])
  bar.set_label('loss (nats)')
  bar.ax.minorticks_off()
  figure.supxlabel(
    'along the first direction (norms of the filters)', fontsize=9
  )
  figure.supylabel('along the second direction', fontsize=9)
  return figure


MEMBRANES = page.Entry(
  '02_membranes',
  'Figure 2: membranes and their threshold',
  'Blue: mean and deviation of the membranes of the first, the middle and the '
  'last layer at each timestep, in inference. Where the threshold (dashed) '
  'leaves the upper edge of the band a layer falls silent, or fires too much; '
  'where the grey window leaves the band it stops learning. The paper shows '
  'vanilla over ten timesteps: train with --config.num_steps=10 for those.',
  membranes,
  draw_membranes,
)
AVERAGES = page.Entry(
  '07_averages',
  'Figure 7: true or estimated distribution, with or without moving average',
  'Accuracy where neurons fire against the moving average of the thresholds, '
  "or against the batch's own. Runs with an estimated threshold keep no "
  'average. In the paper the true distribution with it does best.',
  averages,
  draw_averages,
)
LANDSCAPES = page.Entry(
  '09_landscape',
  'Figure 9: the loss around the trained network',
  'Loss of a small batch along two random filter-normalised directions (Li et '
  'al. 2018), the star being the trained network; running statistics and '
  'thresholds stay as they were trained. Colours are the same for all runs: a '
  'wide dark basin is a flat minimum.',
  landscapes,
  draw_landscapes,
)
