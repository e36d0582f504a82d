"""Draws the paper's figures, and more, from finished runs.

  python -m train.figures --workdir=runs/ds_atgo --baseline=runs/vanilla

Give --baseline as often as there are runs to draw beside it. Each figure is a
PNG, an SVG and a CSV with its numbers in `workdir/figures/`, and `index.html`
there holds them all, with a sentence on how to read each. What is computed is
computed on a few test examples.
"""

import html
import pathlib

from absl import flags

from train import command

BASELINES = flags.DEFINE_multi_string(
  'baseline', [], 'The folder of another finished run, to be drawn beside it.'
)
EXAMPLES = flags.DEFINE_integer(
  'examples', 64, 'How many test examples gradients and losses are those of.'
)


def entries():
  """The figures in their order, and what each is made of."""
  from train.drawn import example, gradients, inside, theory, training

  curves, rates, shares = training.FIGURES
  return (
    (theory.FIXED_THRESHOLD, 'networks'),
    (inside.MEMBRANES, 'networks'),
    (theory.SIMILARITIES, 'networks'),
    (theory.WINDOW, 'networks'),
    (curves, 'told'),
    (inside.AVERAGES, 'networks'),
    (rates, 'told'),
    (inside.LANDSCAPES, 'networks'),
    (training.RATES_BY_TIMESTEP, 'told'),
    (example.FEATURE_MAPS, 'networks'),
    (shares, 'told'),
    (gradients.NORMS, 'flows'),
    (gradients.SHARES, 'flows'),
    (gradients.REACH, 'flows'),
    (gradients.SPECTRUM, 'networks'),
    (gradients.ENERGY, 'networks'),
    (example.RASTER, 'networks'),
    (example.TRACES, 'networks'),
  )


def write(workdir, baselines=(), examples=64):
  """Draws runs.

  Args:
    workdir: of the run, which gets `figures/`.
    baselines: other runs, drawn beside it.
    examples: how many test examples what is computed is computed on.

  Returns:
    The path of the page.

  Raises:
    ValueError: a run is not finished, its data are not there any more, or there
      is less than one example.
  """
  import tqdm

  from train.drawn import gradients, page, runs

  if examples < 1:
    raise ValueError(f'expected examples of 1 or more, got {examples}')
  told = runs.named([workdir, *baselines])
  made = {'told': told}
  folder = pathlib.Path(workdir) / 'figures'
  sections = []
  with tqdm.tqdm(entries(), unit=' figures', dynamic_ncols=True) as bar:
    bar.set_postfix_str('networks')
    made['networks'] = [runs.network(run, examples) for run in told]
    bar.set_postfix_str('gradients')
    made['flows'] = {
      network.name: gradients.flows(network) for network in made['networks']
    }
    folder.mkdir(exist_ok=True)
    for entry, of in bar:
      bar.set_postfix_str(entry.name)
      sections.append(page.add(folder, entry, made[of]))
  path = folder / 'index.html'
  config = told[0].config
  title = f'{config["method"]}, {config["model"]}, {config["dataset"]}: figures'
  rows = [
    f'{run.name}: test accuracy {run.result["accuracy"]:.2%}, T = '
    f'{run.config["num_steps"]}, seed {run.config["seed"]}, {run.workdir}'
    for run in told
  ]
  intro = (
    '<p>Figures are numbered as in the paper; what follows 11 it does '
    'not have. Grey lines and bands are its own values, of its networks and '
    f'data.</p>\n<pre>{html.escape(chr(10).join(rows))}</pre>'
  )
  page.write(path, title, intro, sections)
  return path


def main():
  """Draws the figures and prints where they are."""
  command.keep_compiled()
  print(write(command.WORKDIR.value, BASELINES.value, EXAMPLES.value))


if __name__ == '__main__':
  command.run(main, 'workdir')
