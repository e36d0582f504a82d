"""One example on its way through a network: figure 10's maps, and traces."""

import numpy as np
from matplotlib.figure import Figure

from train.drawn import page, runs, style
from train.drawn.inside import ends


def one_example(network):
  """What the neurons do with the first example: u, v, spikes and theta."""
  return runs.happened(runs.take(network, 1), 'spiking', 'membranes')


def feature_maps(networks, num_maps=4):
  """Rows of figure 10: spikes of a few channels, by timestep."""
  network, rows = networks[0], []
  told = one_example(network)
  for layer in ends(network.layers):
    spikes = told[layer]['spikes'][:, 0]  # [T, H, W, C]
    if spikes.ndim != 4:
      continue
    busiest = np.argsort(-spikes.mean((0, 1, 2)), kind='stable')[:num_maps]
    rows += [
      {
        'layer': layer,
        'channel': int(channel),
        'timestep': t + 1,
        'y': y,
        'x': x,
        'spike': int(spike),
      }
      for channel in busiest
      for t in range(len(spikes))
      for (y, x), spike in np.ndenumerate(spikes[t, ..., channel])
    ]
  return rows or 'no layer of the run has feature maps'


def draw_feature_maps(rows):
  """A line of panels a channel, or half a line where the timesteps are few."""
  kinds = list(dict.fromkeys((row['layer'], row['channel']) for row in rows))
  times = style.values(rows, 'timestep')
  beside = 2 if len(times) <= 5 else 1
  lines = -(-len(kinds) // beside)
  # A column between, for the names.
  columns = beside * len(times) + beside - 1
  height = (style.WIDE - 0.6) / columns
  figure = Figure(figsize=(style.WIDE, 0.3 + lines * height))
  axes = figure.subplots(lines, columns, squeeze=False)
  for axis in axes.flat:
    axis.set_axis_off()
  for place, (layer, channel) in enumerate(kinds):
    line, part = divmod(place, beside)
    start = part * (len(times) + 1)
    for axis, t in zip(axes[line, start:], times, strict=False):
      mine = style.where(rows, layer=layer, channel=channel, timestep=t)
      shape = mine[-1]['y'] + 1, mine[-1]['x'] + 1
      spikes = style.column(mine, 'spike').reshape(shape)
      axis.imshow(spikes, cmap='gray_r', vmin=0, vmax=1)
      axis.set_axis_on()
      axis.set(xticks=[], yticks=[])
      axis.grid(False)
      axis.spines[['top', 'right']].set_visible(True)
      if line == 0:
        axis.set_title(f't = {t}', fontsize=8)
    axes[line, start].set_ylabel(
      f'{layer}\n#{channel}', fontsize=7, rotation=0, ha='right', va='center'
    )
  return figure


def raster(networks, num_neurons=40):
  """Rows: the spikes of some neurons that fire, of a few layers."""
  network, rows = networks[0], []
  told = one_example(network)
  for layer in ends(network.layers):
    spikes = flat(told[layer]['spikes'])
    rows += [
      {
        'layer': layer,
        'fire_at_all_percent': 100 * float(np.mean(spikes.any(0))),
        'neuron': int(neuron),
        'timestep': t + 1,
        'spike': int(spikes[t, neuron]),
      }
      for neuron in sample(spikes, num_neurons)
      for t in range(len(spikes))
    ]
  return rows


def flat(values):
  """[T, 1, ...] as [T, neurons]."""
  return values.reshape(len(values), -1)


def sample(spikes, count):
  """So many neurons of those that fire, from the most active to the least.

  Of all, if none does.
  """
  order = np.argsort(-spikes.sum(0), kind='stable')
  order = order[: np.count_nonzero(spikes.any(0)) or None]
  count = min(count, len(order))
  return order[np.arange(count) * len(order) // count]


def draw_raster(rows):
  """A panel a layer, a line a neuron, a mark a spike."""
  layers = style.values(rows, 'layer')
  figure, axes = style.panels(len(layers), 3, 3.2, sharex=True)
  for axis, layer in zip(axes, layers, strict=True):
    mine = style.where(rows, layer=layer)
    neurons = style.values(mine, 'neuron')
    places = {neuron: place for place, neuron in enumerate(neurons)}
    fired = [row for row in mine if row['spike']]
    axis.scatter(
      style.column(fired, 'timestep'),
      [places[row['neuron']] for row in fired],
      marker='|', s=10, linewidth=1.6, color='black',
    )  # fmt: skip
    axis.set_ylim(len(neurons), -1)
    axis.set_yticks([])
    percent = mine[0]['fire_at_all_percent']
    axis.set_title(f'{layer}: {percent:.0f} % fire')
    times = max(style.values(mine, 'timestep'))
    axis.set_xlim(0.5, times + 0.5)
    style.timesteps(axis, times)
  axes[0].set_ylabel('neuron, most active on top')
  return figure


def traces(networks, num_neurons=4):
  """Rows: membranes of a few neurons of the middle layer, and the threshold."""
  network = networks[0]
  layer = ends(network.layers)[len(ends(network.layers)) // 2]
  told = one_example(network)[layer]
  arrays = {name: flat(told[name]) for name in ('u', 'v', 'spikes')}
  return [
    {
      'layer': layer,
      'neuron': int(neuron),
      'timestep': t + 1,
      'u': float(arrays['u'][t, neuron]),
      'v': float(arrays['v'][t, neuron]),
      'spike': int(arrays['spikes'][t, neuron]),
      'theta': float(np.mean(told['theta'][t])),
      'width': float(np.mean(told['width'][t])),
    }
    for neuron in active(arrays['spikes'], num_neurons)
    for t in range(len(arrays['u']))
  ]


def active(spikes, count):
  """Neurons that fired often, less often, once and never, as they come."""
  totals = spikes.sum(0).astype(int)
  wanted = np.linspace(totals.max(), 0, count).round()
  found = []
  for number in wanted:
    order = np.argsort(np.abs(totals - number), kind='stable')
    found.append(next(i for i in order if i not in found))
  return found


def draw_traces(rows):
  """A panel a neuron."""
  neurons = style.values(rows, 'neuron')
  figure, axes = style.panels(len(neurons), 1, 1.15, sharex=True, sharey=True)
  for axis, neuron in zip(axes, neurons, strict=True):
    mine = style.where(rows, neuron=neuron)
    t, u, v, theta, width, spike = (
      style.column(mine, name)
      for name in ('timestep', 'u', 'v', 'theta', 'width', 'spike')
    )
    edges = np.append(t - 0.5, t[-1] + 0.5)
    axis.bar(
      t, width, bottom=theta - width / 2, width=1, color='0.88', zorder=0,
      label='gradient window',
    )  # fmt: skip
    axis.stairs(
      theta, edges, baseline=None, color=style.COLOURS[1], linestyle='--',
      linewidth=1.4, label='threshold',
    )  # fmt: skip
    axis.plot(
      np.repeat(t, 2), np.stack([u, v], 1).ravel(), color=style.COLOURS[0],
      linewidth=1, label='membrane',
    )  # fmt: skip
    axis.plot(t, u, 'o', color=style.COLOURS[0], markersize=3.5)
    fired = spike > 0
    axis.plot(
      t[fired], u[fired], '*', color='black', markersize=9, label='spike'
    )
    axis.set_title(f'neuron {neuron} of {mine[0]["layer"]}', fontsize=8)
    axis.set_xlabel('')
  style.timesteps(axes[-1], len(t))
  figure.supylabel('membrane potential', fontsize=9)
  style.legend(figure, axes[0], 4)
  return figure


FEATURE_MAPS = page.Entry(
  '10_feature_maps',
  'Figure 10: feature maps by timestep',
  'Spikes (black) of the most active channels of the first, the middle and '
  'the last layer, for one test image of the first run. Maps that stay the '
  'same say that later timesteps add little.',
  feature_maps,
  draw_feature_maps,
)
RASTER = page.Entry(
  '17_raster',
  'Spikes of one example',
  'A mark is a spike, a line a neuron, of those that fire at all at one test '
  'image: evenly from the most active to the least, of the first, the middle '
  'and the last layer of the first run. In the title: how many do.',
  raster,
  draw_raster,
)
TRACES = page.Entry(
  '18_traces',
  'Membranes of one example',
  'Four neurons of the middle layer of the first run, from one that fires '
  'often to one that does not. A dot is the membrane before the reset, the '
  'line falls to where it is after it; above the dashed threshold of the '
  'timestep it fires (star), in the grey window it passes a gradient.',
  traces,
  draw_traces,
)
