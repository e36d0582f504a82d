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

from train import command, health, metrics, plots, tables

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
{settings}
</html>
"""


WATCHED = """<p>Gradients and membranes are those of training batches, with the
batch's own thresholds; the last one watched was that of step {step}. Into a
membrane u (before the reset) a gradient comes by three paths: spatial, through
the spike of this timestep; leak, through the next membrane; reset, through the
reset by the spike. Their shares are those of their norms, over all timesteps.
Around the threshold theta grey marks the window in which the surrogate passes a
gradient, |u - theta| &lt; width / 2, and the number is the share of neurons in
it; what is beyond the outermost bins is in them.</p>"""


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
  lines = metrics.read(workdir)
  epochs = [line for line in lines if 'layers' in line]
  watched = [line for line in lines if 'watch' in line]
  if not epochs:
    raise ValueError(
      f'expected a run with at least one epoch in {workdir}, got none'
    )
  result = metrics.read_json(workdir / 'result.json')
  config = metrics.read_json(workdir / 'config.json')
  (workdir / 'plots').mkdir(exist_ok=True)
  with matplotlib.rc_context(plots.STYLE):
    parts = [
      embed(workdir, name, caption, draw(epochs, result))
      for name, caption, draw in plots.FIGURES
    ]
    if result and 'confusion' in result:  # The run may be older than it.
      parts += [
        embed(workdir, name, caption, draw(result))
        for name, caption, draw in plots.RESULT
      ]
      parts.append(preformatted(tables.class_tables(result['confusion'])))
    if watched:
      parts += [WATCHED.format(step=watched[-1]['step'])] + [
        embed(workdir, name, caption, draw(watched))
        for name, caption, draw in plots.WATCHED
      ]
  page = PAGE.format(
    title=html.escape(
      f'{config["method"]}, {config["model"]}, {config["dataset"]}'
    ),
    headline='<br>'.join(map(html.escape, told(result, config))),
    split='test split' if result else 'split of the curves over training',
    figures='\n'.join(parts),
    settings=preformatted([json.dumps(config, indent=2)]),
  )
  path = workdir / 'report.html'
  path.write_text(page)
  return path


def told(result, config):
  """Yields what the page says first: the headline, and what is wrong."""
  if not result:
    yield 'The run is not finished.'
    return
  yield headline(result)
  momentum = config['neuron'].get('momentum')
  for line in health.complaints(result, result['step'], momentum).values():
    yield f'Warning: {line}.'


def preformatted(lines):
  """Lines of text as they are, as HTML."""
  return f'<pre>{html.escape(chr(10).join(lines))}</pre>'


def embed(workdir, name, caption, figure):
  """Writes a figure's PNG, and returns it as HTML."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=130)
  (workdir / 'plots' / f'{name}.png').write_bytes(buffer.getvalue())
  image = base64.b64encode(buffer.getvalue()).decode()
  return (
    f'<h2>{caption}</h2>\n'
    f'<img alt="{caption}" src="data:image/png;base64,{image}">'
  )


def main():
  """Writes the report and prints where it is."""
  print(write(command.WORKDIR.value))


if __name__ == '__main__':
  command.run(main, 'workdir')
