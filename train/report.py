"""Draws a run: PNG plots, and one HTML page that holds them all.

  python -m train.report --workdir=runs/digits

Works on a run that is still going on, too.
"""

import base64
import html
import io
import json
import pathlib

import matplotlib
import numpy as np
from matplotlib import cm, colors
from matplotlib.figure import Figure

from train import command, metrics

STYLE = {
  'axes.grid': True,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'figure.constrained_layout.use': True,
  'font.size': 9,
  'grid.alpha': 0.3,
}
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto;
  padding: 0 1em}}
img {{max-width: 100%}}
pre {{background: #f4f4f4; padding: 1em; overflow-x: auto}}
</style>
<h1>{title}</h1>
<p>{headline}</p>
<p>Activity is that of inference. At the end: on the {split}. Over training: on
the split that is evaluated after every epoch (on a training batch where there
is none), the mean over the timesteps.</p>
{figures}
<h2>Settings</h2>
<pre>{settings}</pre>
</html>
"""


def headline(result):
  """What came out of a run, in a sentence or two."""
  text = (
    f'Test accuracy {result["accuracy"]:.2%} ({result["num_examples"]} '
    f'examples; the last checkpoint, step {result["step"]}).'
  )
  if best := result['best']:
    on = result['selected_on']
    text += (
      f' The best checkpoint on the {on} split is that of step '
      f'{best["step"]}, with {best["accuracy"]:.2%}'
    )
    text += ': chosen on the test split!' if on == 'test' else '.'
  return text


def write(workdir):
  """Writes `plots/*.png` and `report.html` into the workdir.

  Returns:
    The path of the page.

  Raises:
    ValueError: not a whole epoch has been logged.
  """
  workdir = pathlib.Path(workdir)
  epochs = [line for line in metrics.read(workdir) if 'layers' in line]
  if not epochs:
    raise ValueError(
      f'expected a run with at least one epoch in {workdir}, got none'
    )
  result = metrics.read_json(workdir / 'result.json')
  config = metrics.read_json(workdir / 'config.json')
  (workdir / 'plots').mkdir(exist_ok=True)
  figures = []
  with matplotlib.rc_context(STYLE):
    for name, caption, draw in FIGURES:
      figure = draw(epochs, result)
      buffer = io.BytesIO()
      figure.savefig(buffer, format='png', dpi=130)
      (workdir / 'plots' / f'{name}.png').write_bytes(buffer.getvalue())
      image = base64.b64encode(buffer.getvalue()).decode()
      figures.append(
        f'<h2>{caption}</h2>\n'
        f'<img alt="{caption}" src="data:image/png;base64,{image}">'
      )
  page = PAGE.format(
    title=html.escape(
      f'{config["method"]}, {config["model"]}, {config["dataset"]}'
    ),
    headline=headline(result) if result else 'The run is not finished.',
    split='test split' if result else 'split of the curves over training',
    figures='\n'.join(figures),
    settings=html.escape(json.dumps(config, indent=2)),
  )
  path = workdir / 'report.html'
  path.write_text(page)
  return path


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


def over_training(names, scale):
  """Returns the function that draws measures over the epochs."""

  def draw(epochs, result):
    del result
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots(1, 2)
    layers = list(epochs[0]['layers'])
    x = [line['epoch'] for line in epochs]
    # Depth in a colour that is readable on white at both ends.
    colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(layers)))
    for axis, name in zip(axes, names, strict=True):
      for layer, colour in zip(layers, colours, strict=True):
        y = [scale * np.mean(line['layers'][layer][name]) for line in epochs]
        axis.plot(x, y, color=colour)
      axis.set(title=LABELS[name], xlabel='epoch')
      axis.xaxis.get_major_locator().set_params(integer=True)
    edges = np.arange(len(layers) + 1) - 0.5
    depth = cm.ScalarMappable(
      colors.BoundaryNorm(edges, len(layers)), colors.ListedColormap(colours)
    )
    bar = figure.colorbar(depth, ax=axes, ticks=range(len(layers)))
    bar.ax.set_yticklabels(layers, fontsize=7)
    bar.ax.invert_yaxis()
    bar.ax.minorticks_off()
    return figure

  return draw


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


def main():
  """Writes the report and prints where it is."""
  print(write(command.WORKDIR.value))


if __name__ == '__main__':
  command.run(main, 'workdir')
