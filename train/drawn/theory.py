"""What needs no run, figures 1 and 5; and no data of one, figure 4."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage, stats

from dsatgo_jax import neurons, width
from train.drawn import page, style

DEVIATIONS = (1 / 3, 1.0, 3.0)
# Of the paper's figure 5, by the deviation, in percent.
FIXED_WIDTH = {0.5: 47.72, 1.0: 24.17, 2.0: 12.10}
TGO = {0.5: 26.00, 1.0: 24.17, 2.0: 21.30}
# And of its figure 4, about, by the threshold.
SIMILARITY = {'0.25': 0.53, '1.0': 0.11, '2.5': 0.04, 'adaptive': 0.42}
PHOTOGRAPHS = ('china', 'flower')
PIXELS = (120, 80)


def fixed_threshold(_):
  """Rows of figure 1: densities of u ~ N(0, variance), and what fires."""
  return [
    {
      'deviation': deviation,
      'u': u,
      'density': stats.norm.pdf(u, 0, deviation),
      'rate_at_1_percent': 100 * stats.norm.sf(1, 0, deviation),
      'rate_adaptive_percent': 100 * stats.norm.sf(1),
    }
    for deviation in DEVIATIONS
    for u in np.round(np.linspace(-6, 6, 241), 3).tolist()
  ]


def draw_fixed_threshold(rows):
  """Densities, shaded where they fire."""
  figure, axes = style.panels(3, 1, 1.15, sharex=True)
  names = {1 / 3: '1/9', 1.0: '1', 3.0: '9'}
  for axis, (deviation, look) in zip(
    axes, style.looks(DEVIATIONS).items(), strict=True
  ):
    mine = style.where(rows, deviation=deviation)
    u, density = style.column(mine, 'u'), style.column(mine, 'density')
    axis.plot(u, density, color=look['color'], linestyle=look['linestyle'])
    axis.fill_between(
      u, density, where=u >= 1, color=look['color'], alpha=0.35,
      hatch='////', edgecolor=look['color'], linewidth=0,
    )  # fmt: skip
    axis.axvline(1, color='0.2', linestyle='--', linewidth=1)
    axis.axvline(deviation, color='0.2', linestyle=':', linewidth=1.2)
    axis.set_title(
      f'u ~ N(0, {names[deviation]}): {mine[0]["rate_at_1_percent"]:.2f} % '
      f'fire at 1; {mine[0]["rate_adaptive_percent"]:.2f} % at mean + deviation'
    )
    axis.set_ylim(bottom=0)
  axes[1].set_ylabel('density')
  axes[-1].set_xlabel(
    'membrane potential u (dashed: threshold 1; dotted: mean + deviation)'
  )
  return figure


def window(_):
  """Rows of figure 5: u ~ N(0, deviation ** 2) within half a width of theta."""
  rows = []
  parameters = neurons.Parameters()
  for deviation in np.round(np.linspace(0.2, 3, 57), 3).tolist():
    theta = deviation  # The adaptive threshold: mean + deviation.
    tgo = float(width.threshold_driven(jnp.float32(theta), parameters, 0))
    rows.append(
      {
        'deviation': deviation,
        'width_tgo': tgo,
        'fixed_percent': share_inside(theta, 1.0, deviation),
        'tgo_percent': share_inside(theta, tgo, deviation),
        'paper_fixed_percent': FIXED_WIDTH.get(deviation),
        'paper_tgo_percent': TGO.get(deviation),
      }
    )
  return rows


def share_inside(theta, size, deviation):
  """The share of N(0, deviation ** 2) within size / 2 of theta, in percent."""
  edges = np.array([theta - size / 2, theta + size / 2])
  low, high = stats.norm.cdf(edges, 0, deviation)
  return 100 * float(high - low)


def draw_window(rows):
  """A fixed width falls off where TGO does not."""
  figure = Figure(figsize=(style.WIDE, 3))
  axis = figure.subplots()
  x = style.column(rows, 'deviation')
  names = {'fixed': 'width 1 (5a)', 'tgo': 'TGO (5b)'}
  for name, look in style.looks(names).items():
    settings = {'color': look['color'], 'linestyle': look['linestyle']}
    axis.plot(
      x, style.column(rows, f'{name}_percent'), label=names[name], **settings
    )
    axis.plot(
      x, style.column(rows, f'paper_{name}_percent'), look['marker'],
      color=look['color'], label=f'paper, {names[name]}', markersize=6,
      markeredgecolor='black', zorder=3, markeredgewidth=0.6,
    )  # fmt: skip
  axis.set(
    xlabel='deviation of the membrane, $\\sigma$',
    ylabel='neurons in the gradient window (%)',
  )
  axis.set_ylim(bottom=0)
  style.legend(figure, axis, 2)
  return figure


def ssim(a, b, deviation=1.5, span=1.0):
  """Structural similarity of two grey images [H, W] (Wang et al. 2004).

  The mean over the pixels, with a Gaussian window that is cut off at the
  borders of the image.

  Args:
    a: an image.
    b: another.
    deviation: of the window, in pixels.
    span: of the values.
  """

  def blurred(x):
    return ndimage.gaussian_filter(x, deviation, truncate=3.5)

  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
  mean_a, mean_b = blurred(a), blurred(b)
  variance_a = blurred(a * a) - mean_a**2
  variance_b = blurred(b * b) - mean_b**2
  covariance = blurred(a * b) - mean_a * mean_b
  index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
  index /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
  return float(index.mean())


def photograph(name):
  """One of scikit-learn's, smaller, [H, W, 3] in [0, 1]."""
  from sklearn.datasets import load_sample_image

  image = Image.fromarray(load_sample_image(f'{name}.jpg'))
  return np.asarray(image.resize(PIXELS, Image.Resampling.LANCZOS)) / 255


def encoded(layer, image, num_steps, method, v_th=1.0, decay=0.2):
  """What the first layer makes of an image: firing rates [H, W, channels].

  Convolution at every pixel, tdBN with the image's own statistics, neurons.

  Args:
    layer: params of a layer of the networks, `layer`, `norm` and `neuron`.
    image: [H, W, C], of as many channels as the kernel.
    num_steps: T.
    method: of the neurons.
    v_th: their threshold.
    decay: of their membranes.
  """
  kernel = layer['layer']['kernel']
  x = lax.conv_general_dilated(
    jnp.asarray(image, kernel.dtype)[None], kernel, (1, 1), 'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )  # fmt: skip
  axes = (0, 1, 2)
  x = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5)
  if layer['norm']:
    x = x * layer['norm']['scale'] + layer['norm'].get('bias', 0)
  spikes, *_ = neurons.run(
    jnp.broadcast_to(x, (num_steps, *x.shape)),
    neurons.Parameters(decay=decay, v_th=v_th),
    method,
  )
  return np.asarray(spikes.mean((0, 1)))


def first_layer(network):
  """Params of the layer that sees the image; None where it is none of ours."""
  found = [
    layer
    for layer in network.variables['params'].values()
    if {'layer', 'norm', 'neuron'} <= layer.keys()
  ]
  kernels = [layer['layer']['kernel'] for layer in found]
  channels = network.raw.shape[-1]
  return next(
    (
      layer for layer, kernel in zip(found, kernels, strict=True)
      if kernel.ndim == 4 and kernel.shape[2] == channels
    ),
    None,
  )  # fmt: skip


def similarity(networks):
  """Rows of figure 4: the encoding layer's output beside the grey image."""
  network = networks[0]
  layer, channels = first_layer(network), network.raw.shape[-1]
  if layer is None or channels not in (1, 3):
    return (
      'the network takes neither one channel nor three, as photographs have'
    )
  decay, num_steps = network.config.neuron.decay, network.config.num_steps
  if 'w' in layer['neuron']:
    decay = float(jax.nn.sigmoid(layer['neuron']['w']))
  rows = []
  for name in PHOTOGRAPHS:
    colours = photograph(name)
    grey = colours @ np.array([0.299, 0.587, 0.114])
    image = grey[..., None] if channels == 1 else colours
    image = (image - image.mean((0, 1))) / image.std((0, 1))
    for threshold, paper in {'': None, **SIMILARITY}.items():
      output, channel, similar = grey, None, 1.0
      if threshold:
        method = 'at' if threshold == 'adaptive' else 'vanilla'
        v_th = 1.0 if threshold == 'adaptive' else float(threshold)
        maps = encoded(layer, image, num_steps, method, v_th, decay)
        each = [ssim(one, grey) for one in np.moveaxis(maps, -1, 0)]
        channel = int(np.argmax(each))
        output, similar = maps[..., channel], each[channel]
      rows += [
        {
          'photograph': name,
          'threshold': threshold,
          'channel': channel,
          'ssim': similar,
          'paper_ssim': paper,
          'y': y,
        }
        | {f'x{x}': value for x, value in enumerate(line.tolist())}
        for y, line in enumerate(np.round(output.astype(float), 4))
      ]
  return rows


def draw_similarity(rows):
  """The photographs as the network's first layer passes them on."""
  names = style.values(rows, 'photograph')
  thresholds = style.values(rows, 'threshold')
  figure = Figure(figsize=(style.WIDE, 1.75 * len(thresholds) + 0.1))
  axes = figure.subplots(len(thresholds), len(names), squeeze=False)
  across = [name for name in rows[0] if name.startswith('x')]
  for (row, column), axis in np.ndenumerate(axes):
    threshold = thresholds[row]
    mine = style.where(rows, photograph=names[column], threshold=threshold)
    image = np.array([[line[x] for x in across] for line in mine])
    axis.imshow(image, cmap='gray', vmin=0, vmax=1)
    axis.set_axis_off()
    title = 'grey image'
    if threshold:
      fixed = threshold != 'adaptive'
      told, paper = mine[0]['ssim'], mine[0]['paper_ssim']
      title = f'$V_{{th}}$ {threshold}' if fixed else threshold
      title += f': SSIM {told:.2f} (paper {paper:.2f})'
    axis.set_title(title)
  return figure


FIXED_THRESHOLD = page.Entry(
  '01_fixed_threshold',
  'Figure 1: what a fixed threshold does to the firing rate',
  'Membranes of three variances against the threshold 1: the shaded part '
  'fires, from next to none to a third. At the adaptive threshold, mean plus '
  'deviation, it is 15.87 % of each. No run is in it.',
  fixed_threshold,
  draw_fixed_threshold,
)
SIMILARITIES = page.Entry(
  '04_similarity',
  'Figure 4: what the first layer passes on of a photograph',
  'Firing rates, over the timesteps, of that channel of the first layer of the '
  'run that is most like the grey image: structural similarity (SSIM, Wang et '
  'al. 2004), 1 where they are the same. The trained weights and the '
  "photograph's own statistics in tdBN. The paper's values are of its own "
  'network and photographs: to be compared in their order.',
  similarity,
  draw_similarity,
)
WINDOW = page.Entry(
  '05_window',
  'Figure 5: who is inside the gradient window',
  'The share of membranes N(0, deviation squared) that are within half a width '
  'of the adaptive threshold. With a fixed width it falls off as membranes '
  'spread; with TGO it stays. Markers are the numbers of the paper. No run is '
  'in it.',
  window,
  draw_window,
)
