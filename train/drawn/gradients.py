"""What the paper does not draw: gradients, curvature and energy."""

import jax
import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure

from dsatgo_jax.analysis import curvature, energy, flow
from dsatgo_jax.dynamics import PATHS
from train import metrics, plots
from train.drawn import page, runs, style


def flows(network):
  """Norms, paths and reach of the gradient, `{layer: {name: array}}`.

  Of the mean loss of the examples, with their own statistics and thresholds, as
  a training step has them.
  """
  zeros = flow.zeros(
    network.model, network.variables, network.images, train=True,
    names=('paths', 'reach'),
  )  # fmt: skip

  def loss(zeros, variables, images, labels):
    logits, _ = network.model.apply(
      variables | zeros, images, train=True, mutable=['batch_stats']
    )
    return network.loss(logits, labels).mean()

  told = runs.once(
    jax.grad(loss), zeros, network.variables, network.images, network.labels
  )
  layers = {
    path.removesuffix('/neuron'): jax.device_get(one)
    for path, one in flow.summary(told['flow']).items()
  }
  return {layer: layers[layer] for layer in network.layers}


def norms(all_flows):
  """Rows: the norm of dL/du by layer and timestep, and of its paths.

  Args:
    all_flows: `{run: flows}`.
  """
  return [
    {
      'run': run,
      'layer': layer,
      'timestep': t + 1,
      **{name: float(told[name][t]) for name in ('u', *PATHS)},
    }
    for run, layers in all_flows.items()
    for layer, told in layers.items()
    for t in range(len(told['u']))
  ]


def draw_norms(rows):
  """A table a run, of the same colours."""
  names = style.values(rows, 'run')
  layers = len(style.values(rows, 'layer'))
  figure, axes = style.panels(len(names), 2, 0.55 + 0.2 * layers)
  # Where no gradient comes there is nothing to colour.
  scale = plots.decades(style.column(rows, 'u')) or colors.LogNorm(0.1, 1)
  for axis, name in zip(axes, names, strict=True):
    mine = style.where(rows, run=name)
    own = style.values(mine, 'layer')
    cells = style.column(mine, 'u').reshape(len(own), -1)
    times = range(1, cells.shape[1] + 1)
    positive = np.where(cells > 0, cells, np.nan)
    image = style.table(axis, positive, own, times, plots.short, scale)
    axis.set_title(name)
  ticks = np.geomspace(scale.vmin, scale.vmax, 3)
  bar = figure.colorbar(
    image,
    ax=list(axes),
    ticks=ticks,
    format=lambda value, _: plots.short(value),
  )
  bar.set_label('norm of dL/du')
  bar.ax.minorticks_off()
  figure.supxlabel('timestep', fontsize=9)
  return figure


def shares(all_flows):
  """Rows: the parts of the three paths in what reaches a layer's membranes."""
  return [
    {'run': run, 'layer': layer}
    | {
      f'{path}_percent': 100 * share
      for path, share in metrics.path_shares(told).items()
    }
    for run, layers in all_flows.items()
    for layer, told in layers.items()
  ]


def draw_shares(rows):
  """Stacked bars, a panel a run."""
  names = style.values(rows, 'run')
  layers = len(style.values(rows, 'layer'))
  figure, axes = style.panels(len(names), 2, 0.55 + 0.2 * layers, sharex=True)
  hatches = dict(zip(plots.PATHS, ('', '////', '....'), strict=True))
  for axis, name in zip(axes, names, strict=True):
    mine = style.where(rows, run=name)
    left = np.zeros(len(mine))
    for path, colour in plots.PATHS.items():
      part = np.nan_to_num(style.column(mine, f'{path}_percent'))
      axis.barh(
        range(len(mine)), part, left=left, color=colour, label=path,
        hatch=hatches[path], edgecolor='white', linewidth=0.5, height=0.8,
      )  # fmt: skip
      left += part
    axis.set_yticks(
      range(len(mine)), [row['layer'] for row in mine], fontsize=7
    )
    axis.invert_yaxis()
    axis.set(title=name, xlim=(0, 100))
    axis.grid(False)
  figure.supxlabel('share of the norms of the paths (%)', fontsize=9)
  style.legend(figure, axes[0])
  return figure


def reach(all_flows):
  """Rows: how many timesteps later the loss was told of a membrane.

  The mean over the timesteps t from which so many later ones are left.
  """
  rows = []
  for run, layers in all_flows.items():
    for layer, told in layers.items():
      shares = told['reach'][:, :-1]  # [T, T]; nothing lies beyond the end.
      num_steps = len(shares)
      rows += [
        {
          'run': run,
          'layer': layer,
          'steps_later': lag,
          'share_percent': 100 * float(shares[: num_steps - lag, lag].mean()),
        }
        for lag in range(num_steps)
      ]
  return rows


def tenths(value):
  """A number with one decimal, and no -0.0."""
  return f'{round(value, 1) + 0.0:.1f}'


def draw_reach(rows):
  """A table a run."""
  names = style.values(rows, 'run')
  layers = len(style.values(rows, 'layer'))
  figure, axes = style.panels(len(names), 2, 0.55 + 0.2 * layers)
  scale = colors.Normalize(0, 100)
  for axis, name in zip(axes, names, strict=True):
    mine = style.where(rows, run=name)
    own = style.values(mine, 'layer')
    cells = style.column(mine, 'share_percent').reshape(len(own), -1)
    image = style.table(axis, cells, own, range(cells.shape[1]), tenths, scale)
    axis.set_title(name)
  figure.colorbar(image, ax=list(axes), label='of dL/du (%)')
  figure.supxlabel(
    'timesteps until the spike that the gradient came by', fontsize=9
  )
  return figure


def spectrum(networks, num_matvecs=16):
  """Rows: the spectral density of the Hessian, by few products."""
  rows = []
  for network in networks:
    params = network.variables['params']
    product = curvature.hvp(runs.loss(network), params)
    try:
      found = curvature.density(
        product, params, key=jax.random.key(0), num_vectors=1,
        num_matvecs=num_matvecs,
      )  # fmt: skip
    except ImportError:
      return "it needs matfree: pip install 'dsatgo_jax[analysis]'"
    there = np.asarray(found.nodes)[np.asarray(found.weights) > 0]
    rows += [
      {
        'run': network.name,
        'eigenvalue': float(value),
        'density': float(density),
        'largest': float(there.max()),
        'smallest': float(there.min()),
      }
      for value, density in zip(found.grid, found.density, strict=True)
    ]
  return rows


def draw_spectrum(rows):
  """A line a run; the ends of the spectrum marked."""
  figure = Figure(figsize=(style.WIDE, 3))
  axis = figure.subplots()
  floor, top = style.column(rows, 'density').max() * np.array([1e-6, 2])
  for run, look in style.looks(style.values(rows, 'run')).items():
    mine = style.where(rows, run=run)
    x, y = style.column(mine, 'eigenvalue'), style.column(mine, 'density')
    low, high = mine[0]['smallest'], mine[0]['largest']
    axis.plot(
      x, y, color=look['color'], linestyle=look['linestyle'], linewidth=1.3,
      label=f'{run}: {low:.2g} to {high:.2g}',
    )  # fmt: skip
    axis.plot(
      [low, high], [floor, floor], look['marker'], color=look['color'],
      clip_on=False, markersize=6,
    )  # fmt: skip
  axis.set(
    xlabel='eigenvalue of the Hessian', ylabel='density', yscale='log',
    ylim=(floor, top),
  )  # fmt: skip
  style.legend(figure, axis, 2)
  return figure


def energies(networks):
  """Rows: operations and energy of an inference, beside the ReLU twin."""
  rows = []
  for network in networks:
    found = energy.measure(
      network.model.apply, network.variables, network.images,
      num_steps=network.config.num_steps,
      batch_axis=int(network.images.ndim == 5),
    )  # fmt: skip
    rows += [
      {
        'run': network.name,
        'layer': name.removesuffix('/layer'),
        'kind': layer.kind,
        'rate_percent': 100 * layer.rate,
        'operations': layer.operations,
        'energy_nj': layer.energy / 1e3,
        'relu_energy_nj': layer.relu_energy / 1e3,
      }
      for name, layer in found.layers.items()
    ]
  return rows


def draw_energies(rows):
  """Bars by layer and in total, the ReLU twin first."""
  names = style.values(rows, 'run')
  layers = [*style.values(rows, 'layer'), 'total']
  kinds = {row['layer']: f' ({row["kind"]})' for row in rows}
  columns = {'ReLU twin': ('relu_energy_nj', names[0])}
  columns |= {name: ('energy_nj', name) for name in names}
  figure = Figure(
    figsize=(style.WIDE, 0.9 + 0.11 * (len(columns) + 1) * len(layers))
  )
  axis = figure.subplots()
  height = 0.85 / len(columns)
  looks = style.looks(names) | {'ReLU twin': {'color': '0.6', 'hatch': '----'}}
  for place, (name, (column, run)) in enumerate(columns.items()):
    told = {row['layer']: row[column] for row in style.where(rows, run=run)}
    told['total'] = sum(told.values())
    shift = height * (place - (len(columns) - 1) / 2)
    axis.barh(
      np.arange(len(layers)) + shift,
      [told.get(layer, 0) for layer in layers],
      height=height, label=name, **style.bar(looks[name]),
    )  # fmt: skip
  axis.margins(y=0.01)
  labels = [layer + kinds.get(layer, '') for layer in layers]
  axis.set_yticks(range(len(layers)), labels, fontsize=8)
  axis.invert_yaxis()
  axis.set(xlabel='energy of an inference (nJ)')
  style.legend(figure, axis)
  return figure


NORMS = page.Entry(
  '12_gradient_norm',
  'Gradients by layer and timestep',
  'The norm of the gradient that reaches the membranes, in training mode on a '
  'small batch; colours are the same for all runs, and logarithmic. Rows that '
  'darken towards the input die in depth, columns that darken towards early '
  'timesteps die in time.',
  norms,
  draw_norms,
)
SHARES = page.Entry(
  '13_gradient_paths',
  'The three paths of the gradient',
  'Into a membrane a gradient comes through its own spike (spatial), through '
  'the next membrane (leak), or through the reset. Shares of their norms over '
  'all timesteps.',
  shares,
  draw_shares,
)
REACH = page.Entry(
  '14_gradient_reach',
  'How far gradients reach in time',
  'Of the gradient into a membrane, the part that came by a spike so many '
  'timesteps later; mean over the timesteps from which so many are left. '
  'Projections on the whole: they sum to 100 % from every timestep, and one '
  'that points the other way is negative. What is all at 0 learns from the '
  'present only.',
  reach,
  draw_reach,
)
SPECTRUM = page.Entry(
  '15_spectrum',
  'The spectrum of the Hessian',
  'Density of the eigenvalues of the formal Hessian (that of the '
  'straight-through twin) in training mode on a small batch, by one random '
  'vector and few products: its ends, the markers, are good, its details are '
  'not. The wider, the more curved.',
  spectrum,
  draw_spectrum,
)
ENERGY = page.Entry(
  '16_energy',
  'Energy beside the ReLU twin',
  'Synaptic operations of an inference, at 0.9 pJ for an accumulate and 4.6 pJ '
  'for a multiply-accumulate (45 nm). A layer that takes spikes accumulates '
  '(AC); one that takes images or averages multiplies (MAC). The twin is the '
  'same network with every connection multiplied, once.',
  energies,
  draw_energies,
)
