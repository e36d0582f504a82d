"""The report: every figure drawn, and one page that needs nothing else."""

import base64
import io
import json
import re

import numpy as np
import pytest

from dsatgo_jax import statistics
from train import metrics, plots, report


def layers_of(names, num_steps, rng):
  return {
    name: {
      key: rng.uniform(0.1, 0.9, num_steps).tolist()
      for key in ('firing_rate', 'gradient_share', 'theta', 'width')
    }
    for name in names
  }


def watched_of(names, num_steps, rng, faint=1.0):
  """What the watch step gives, with a gradient that grows with depth."""
  found = {'activity': {}, 'flow': {}, 'histograms': {}, 'gradient_norm': {}}
  bins = [-np.inf, *statistics.EDGES, np.inf]
  for depth, name in enumerate(names, start=1):
    ones = faint * depth * np.ones(num_steps)
    found['activity'][name] = {
      'width': np.linspace(0.5, 1.5, num_steps),
      'gradient_share': np.full(num_steps, 0.25),
    }
    found['flow'][name] = {
      'u': 2 * ones, 'spatial': 3 * ones, 'leak': ones, 'reset': 0 * ones,
      'cosine_spatial_leak': np.full(num_steps, np.nan),
    }  # fmt: skip
    found['histograms'][name] = [
      np.histogram(rng.normal(-1, 1, 512), bins)[0] / 512 for _ in ones
    ]
    found['gradient_norm'] |= {
      f'{name}/layer/kernel': np.array(3.0 * depth),
      f'{name}/norm/scale': np.array(4.0 * depth),
    }
  found['gradient_norm']['classifier/bias'] = np.array(0.5)
  return metrics.numbers(found)


NAMES = [f'block{i}/conv' for i in range(12)]


@pytest.fixture
def workdir(tmp_path):
  """A run of three epochs of a network of twelve layers, T = 5."""
  rng = np.random.default_rng(0)
  with metrics.writer(tmp_path, 0) as write:
    for epoch in range(1, 4):
      write({'step': 10 * epoch - 5, 'epoch': epoch - 0.5, 'loss': 1.0})
      write(
        {
          'step': 10 * epoch,
          'epoch': float(epoch),
          'train_loss': 1 / epoch,
          'train_accuracy': 1 - 1 / epoch,
          'validation_loss': 1.1 / epoch,
          'validation_accuracy': 0.5,
          'layers': layers_of(NAMES, 5, rng),
        }
      )
  metrics.write_json(
    tmp_path / 'config.json',
    {
      'method': '<at>',
      'model': 'Net',
      'dataset': 'npz',
      'seed': 12345,
      'neuron': {'momentum': 0.9},
    },
  )
  metrics.write_json(
    tmp_path / 'result.json',
    {
      'step': 30,
      'num_examples': 80,
      'accuracy': 0.6125,
      'loss': 0.7,
      'best': {'step': 20, 'accuracy': 0.55},
      'selected_on': 'validation',
      'layers': layers_of(NAMES, 5, rng),
      'confusion': [[30, 10, 0], [5, 19, 16], [0, 0, 0]],
    },
  )
  return tmp_path


def test_the_page_holds_the_plots_and_the_result(workdir):
  path = report.write(workdir)
  assert path == workdir / 'report.html'
  page = path.read_text()
  names = [name for name, *_ in (*plots.FIGURES, *plots.RESULT)]
  drawn = {path.stem: path for path in (workdir / 'plots').glob('*.png')}
  assert set(drawn) == set(names)
  images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
  assert len(images) == len(names)
  for name, image in zip(names, images, strict=True):
    content = drawn[name].read_bytes()
    assert content.startswith(b'\x89PNG')
    assert base64.b64decode(image) == content
  assert not re.search(r'(src|href)="(?!data:)', page)
  assert 'Test accuracy 61.25%' in page and '12345' in page
  assert '<title>&lt;at&gt;, Net, npz</title>' in page
  assert 'class, taken for   0   1   2  examples  right, %\n' in page
  assert 'Warning' not in page


def test_the_page_warns_and_takes_results_of_older_runs(workdir):
  result = metrics.read_json(workdir / 'result.json')
  del result['confusion']
  for layer in NAMES[3:5]:
    result['layers'][layer]['firing_rate'] = [0.0] * 5
  metrics.write_json(workdir / 'result.json', result)
  page = report.write(workdir).read_text()
  assert '<br>Warning: block3/conv, block4/conv: at all 5 timesteps' in page
  assert 'taken for' not in page


def test_confusions_are_counted_and_coloured():
  counts = np.array([[30, 10, 0], [5, 19, 16], [0, 0, 0]])
  axes, _ = plots.confusion({'confusion': counts.tolist()}).axes
  expected = [[75, 25, 0], [12.5, 47.5, 40], [0, 0, 0]]
  np.testing.assert_allclose(axes.images[0].get_array(), expected)
  texts = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
  assert texts == {
    at: str(count) for at, count in np.ndenumerate(counts) if count
  }
  assert axes.get_xlabel() == 'taken for' and axes.get_ylabel() == 'class'
  many = plots.confusion({'confusion': np.eye(100).tolist()}).axes[0]
  assert not many.texts


def test_a_run_that_goes_on_can_be_drawn(workdir):
  (workdir / 'result.json').unlink()
  page = report.write(workdir).read_text()
  assert 'not finished' in page and 'Test accuracy' not in page
  assert len(list((workdir / 'plots').glob('*.png'))) == len(plots.FIGURES)


def test_no_epoch_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='at least one epoch in .*, got none'):
    report.write(tmp_path)


def test_the_headline_says_what_was_chosen_on_what():
  result = {'accuracy': 0.5, 'num_examples': 8, 'step': 9, 'best': None}
  assert report.headline(result) == (
    'Test accuracy 50.00% (8 examples; the last checkpoint, step 9).'
  )
  result |= {'best': {'step': 3, 'accuracy': 0.75}, 'selected_on': 'test'}
  text = report.headline(result)
  assert 'step 3, with 75.00%: chosen on the test split' in text
  result['selected_on'] = 'validation'
  text = report.headline(result)
  assert 'validation' in text and 'chosen' not in text


def test_curves_are_the_metrics(workdir):
  epochs = [line for line in metrics.read(workdir) if 'layers' in line]
  result = metrics.read_json(workdir / 'result.json')
  loss, accuracy = plots.curves(epochs, result).axes
  lines = {line.get_label(): line for line in accuracy.lines}
  assert set(lines) == {'train', 'validation', 'test, last checkpoint'}
  np.testing.assert_allclose(lines['train'].get_ydata(), [0, 50, 200 / 3])
  np.testing.assert_allclose(lines['validation'].get_ydata(), 50)
  assert lines['test, last checkpoint'].get_ydata().item() == pytest.approx(
    61.25
  )
  assert lines['train'].get_xdata().tolist() == [1, 2, 3]
  np.testing.assert_allclose(loss.lines[0].get_ydata(), [1, 1 / 2, 1 / 3])

  threshold, width, _ = plots.over_training(('theta', 'width'), 1)(
    epochs, result
  ).axes
  assert len(threshold.lines) == len(width.lines) == 12
  colours = [line.get_color() for line in threshold.lines]
  assert len({tuple(colour) for colour in colours}) == 12
  np.testing.assert_allclose(
    threshold.lines[3].get_ydata(),
    [np.mean(line['layers']['block3/conv']['theta']) for line in epochs],
  )

  rate = plots.activity(epochs, result).axes[0]
  numbers = np.array([float(text.get_text()) for text in rate.texts])
  expected = [layer['firing_rate'] for layer in result['layers'].values()]
  np.testing.assert_allclose(
    numbers.reshape(12, 5), 100 * np.array(expected), atol=0.051
  )
  labels = [label.get_text() for label in rate.get_yticklabels()]
  assert labels == list(result['layers'])


def test_lines_of_later_steps_and_torn_lines_are_dropped(workdir):
  path = workdir / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 3')
  assert [line['step'] for line in metrics.read(workdir)] == [
    5, 10, 15, 20, 25, 30
  ]  # fmt: skip
  with metrics.writer(workdir, 20) as write:
    write({'step': 21, 'loss': 0.5})
  steps = [json.loads(line)['step'] for line in path.read_text().splitlines()]
  assert steps == [5, 10, 15, 20, 21]


def test_scalars_have_names_for_tensorboard():
  line = {'step': 3, 'layers': {'conv0': {'theta': [1.5, 2.5]}}}
  assert list(metrics.scalars(line)) == [
    ('step', 3),
    ('layers/conv0/theta/t1', 1.5),
    ('layers/conv0/theta/t2', 2.5),
  ]


# What was watched.


def watch(workdir, *lines):
  with metrics.writer(workdir, 30) as write:
    for step, watched in zip((1, 20), lines, strict=True):
      write({'step': step, 'epoch': step / 10, 'watch': watched})


def test_watched_steps_are_drawn_beside_the_rest(workdir):
  rng = np.random.default_rng(0)
  watch(workdir, *(watched_of(NAMES, 5, rng) for _ in range(2)))
  page = report.write(workdir).read_text()
  kinds = plots.FIGURES, plots.RESULT, plots.WATCHED
  names = [name for kind in kinds for name, *_ in kind]
  assert {path.stem for path in (workdir / 'plots').glob('*.png')} == set(names)
  assert page.count('src="data:image/png') == len(names)
  assert 'the last one watched was that of step 20' in page


def test_gradients_are_those_of_the_last_watched_step():
  rng = np.random.default_rng(0)
  watched = [watched_of(NAMES, 5, rng, faint) for faint in (1, 1e-9)]
  lines = [{'epoch': i, 'watch': one} for i, one in enumerate(watched)]
  norms, shares, bar = plots.gradient_flow(lines).axes
  texts = [text.get_text() for text in norms.texts]
  assert texts[:5] == ['2.0e-9'] * 5 and texts[-1] == '2.4e-8'
  labels = [label.get_text() for label in norms.get_yticklabels()]
  assert labels == NAMES
  assert bar.get_yscale() == 'log'
  # A decade or more, so that what is nearly alike looks so.
  low, high = norms.images[0].get_clim()
  assert (low, high) == pytest.approx((2e-9, 2.4e-8))
  assert plots.decades(np.array([1.0, 2.0, 0.0])).vmax / (
    plots.decades(np.array([1.0, 2.0])).vmin
  ) == pytest.approx(10)
  widths = [patch.get_width() for patch in shares.patches]
  np.testing.assert_allclose(widths, [75] * 12 + [25] * 12 + [0] * 12)

  weights, membranes, _ = plots.gradients_over_training(lines).axes
  assert weights.get_yscale() == membranes.get_yscale() == 'log'
  assert len(weights.lines) == 13 and len(membranes.lines) == 12
  assert weights.lines[2].get_ydata().tolist() == [15, 15]
  assert weights.lines[12].get_ydata().tolist() == [0.5, 0.5]
  np.testing.assert_allclose(
    membranes.lines[0].get_ydata(), 2 * 5**0.5 * np.array([1, 1e-9])
  )


def test_names_that_begin_alike_are_layers_of_their_own():
  found = plots.by_layer(
    {
      'flow': {'conv1': {}, 'conv10': {}},
      'gradient_norm': {'conv1/w': 3.0, 'conv1/b': 4.0, 'conv10/w': 7.0},
    }
  )
  assert found == {'conv1': 5, 'conv10': 7}


def test_of_many_timesteps_some_are_named():
  lines = [{'watch': watched_of(['conv'], 35, np.random.default_rng(0))}]
  (legend,) = plots.membranes(lines).legends
  names = [text.get_text() for text in legend.texts]
  assert names == [f't = {t}' for t in range(1, 36, 4)]
  assert not plots.gradient_flow(lines).axes[0].texts


def test_membranes_are_drawn_with_their_window():
  rng = np.random.default_rng(0)
  watched = watched_of(NAMES[:5], 3, rng)
  figure = plots.membranes([{'epoch': 0, 'watch': watched}])
  panels = figure.axes[:5]
  assert [axis.axison for axis in figure.axes] == [True] * 5 + [False] * 3
  for axis, shares in zip(panels, watched['histograms'].values(), strict=True):
    window, *stairs = axis.patches
    assert (window.get_x(), window.get_width()) == (-0.5, 1)
    assert 'block' in axis.get_title() and '25 %' in axis.get_title()
    for percent, stair in zip(shares, stairs, strict=True):
      values, edges, _ = stair.get_data()
      np.testing.assert_allclose(values, 100 * np.array(percent))
      assert edges[:2].tolist() == [-4.125, -4] and edges[-1] == 4.125


@pytest.mark.parametrize('value', [0.0, None])
def test_gradients_that_vanish_or_are_not_finite_can_be_drawn(value):
  watched = watched_of(NAMES[:2], 5, np.random.default_rng(0))
  for kind in 'flow', 'activity':
    for layer in watched[kind].values():
      layer.update({name: [value] * 5 for name in layer})
  norms = watched['gradient_norm']
  norms.update(dict.fromkeys(norms, value))
  lines = [{'epoch': epoch, 'watch': watched} for epoch in range(2)]
  for *_, draw in plots.WATCHED:
    draw(lines).savefig(io.BytesIO())
  texts = {text.get_text() for text in plots.gradient_flow(lines).axes[0].texts}
  assert texts == {'0' if value == 0 else '-'}
