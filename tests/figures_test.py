"""The figures: numbers by hand, and files that hold what was computed."""

import csv
import re

import numpy as np
import pytest

from tests import tiny
from train import figures, loop, metrics
from train.drawn import (
  example,
  gradients,
  inside,
  page,
  runs,
  style,
  theory,
  training,
)


def read(path):
  return list(csv.DictReader(path.read_text().splitlines()))


def near(found, expected):
  np.testing.assert_allclose(np.array(found, float), expected, rtol=1e-6)


# Those that need no run.


def test_figure_1_is_the_normal_distribution():
  rows = theory.fixed_threshold(None)
  for deviation, rate in (1 / 3, 0.135), (1.0, 15.866), (3.0, 36.944):
    mine = style.where(rows, deviation=deviation)
    assert mine[0]['rate_at_1_percent'] == pytest.approx(rate, abs=1e-3)
    assert mine[0]['rate_adaptive_percent'] == pytest.approx(15.866, abs=1e-3)
    (middle,) = style.where(mine, u=0.0)
    assert middle['density'] == pytest.approx(0.398942 / deviation, rel=1e-5)
  assert len(theory.draw_fixed_threshold(rows).axes) == 3


def test_figure_5_has_the_papers_numbers():
  rows = theory.window(None)
  told = [row for row in rows if row['paper_fixed_percent'] is not None]
  assert [row['deviation'] for row in told] == [0.5, 1, 2]
  for row in told:
    for name in 'fixed', 'tgo':
      paper = row[f'paper_{name}_percent']
      assert row[f'{name}_percent'] == pytest.approx(paper, abs=0.03)


def test_ssim_by_hand():
  rng = np.random.default_rng(0)
  image = rng.uniform(size=(20, 30))
  assert theory.ssim(image, image) == pytest.approx(1)
  # Of constants a and b only the means count: (2 a b + c) / (a^2 + b^2 + c).
  a, b = np.full((9, 9), 0.2), np.full((9, 9), 0.6)
  expected = (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
  assert theory.ssim(a, b) == pytest.approx(expected, rel=1e-6)
  assert theory.ssim(image, 1 - image) < 0 < theory.ssim(image, image**2) < 1


def test_the_first_layer_of_a_photograph():
  image = np.random.default_rng(0).normal(size=(12, 10, 1))
  layer = {
    'layer': {'kernel': np.array([[[[1, -1]]]], np.float32)},
    'norm': {},
  }
  rates = theory.encoded(layer, image, 3, 'vanilla', v_th=1.0, decay=0.0)
  normal = (image[..., 0] - image.mean()) / image.std()
  near(rates, np.stack([normal >= 1, normal <= -1], -1))
  adaptive = theory.encoded(layer, image, 3, 'at', decay=0.0)
  assert 0.08 < adaptive.mean() < 0.25  # Theorem 1: 0.1587.


# What runs wrote.


def told(name, seed, rates, accuracy=0.9):
  return runs.Told(
    name,
    None,
    {'seed': seed, 'select_on': 'test', 'method': name},
    [
      {'epoch': epoch, 'train_loss': 1 / epoch, 'test_accuracy': 0.3 * epoch}
      for epoch in (1.0, 2.0)
    ],
    {
      'accuracy': accuracy,
      'layers': {
        f'conv{i}': {'firing_rate': rate, 'gradient_share': rate}
        for i, rate in enumerate(rates)
      },
    },
  )


def test_curves_and_layers_over_seeds_by_hand():
  both = [
    told('at', 0, [[0.1, 0.2], [0.3, 0.4]]),
    told('at', 1, [[0.3, 0.4], [0.3, 0.4]]),
  ]
  rows = training.curves(both)
  assert [row['accuracy'] for row in rows] == [30, 60, 30, 60]
  assert [row['test_accuracy'] for row in rows] == [None, 90, None, 90]
  rows = training.of_layers('firing_rate')(both)
  assert len(rows) == 8 and rows[1]['firing_rate_percent'] == 20
  layers, mean, deviation = training.by_layer(rows, 'firing_rate_percent', 'at')
  assert layers == ['conv0', 'conv1']
  near(mean, [25, 35])
  near(deviation, [20 / 2**0.5, 0])
  axis = training.draw_rates(rows).axes[0]
  line = axis.containers[0].lines[0]
  near(line.get_ydata(), [25, 35])
  assert axis.get_ylabel() == 'firing rate (%)' and axis.get_ylim()[0] == 0


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
  line = {'step': 1, 'epoch': 1.0, 'layers': {}}
  folders = [tmp_path / name for name in ('a', 'b', 'c', 'at+f_c=2/seed_3')]
  for folder, method in zip(folders, ('at', 'at', 'tgo', 'at'), strict=True):
    with metrics.writer(folder, 1) as write:
      write(line)
    metrics.write_json(folder / 'config.json', {'method': method})
    metrics.write_json(folder / 'result.json', {'accuracy': 1})
  names = [run.name for run in runs.named(folders)]
  assert names == ['at, a', 'at, b', 'tgo', 'at+f_c=2']
  with pytest.raises(ValueError, match='different names, got at, a twice'):
    runs.named([folders[0], folders[0]])
  with pytest.raises(ValueError, match='a run with a result in .*, got none'):
    runs.named([tmp_path])


def test_files_and_a_page_that_hold_them(tmp_path):
  rows = [{'name': 'a, "b"', 'value': 0.1}, {'name': 'c', 'value': None}]
  entry = page.Entry(
    'one', 'A < B', 'Read it.', lambda rows: rows, lambda rows: style.Figure()
  )
  section = page.add(tmp_path, entry, rows)
  assert read(tmp_path / 'one.csv') == [
    {'name': 'a, "b"', 'value': '0.1'}, {'name': 'c', 'value': ''},
  ]  # fmt: skip
  assert (tmp_path / 'one.png').read_bytes().startswith(b'\x89PNG')
  svg = (tmp_path / 'one.svg').read_text()
  assert '<svg' in svg
  page.add(tmp_path, entry, rows)
  assert (tmp_path / 'one.svg').read_text() == svg  # No date in it.
  left_out = page.add(tmp_path, entry, 'there is nothing')
  assert 'Not drawn: there is nothing.' in left_out
  page.write(tmp_path / 'page.html', '<T>', '', [section, left_out])
  text = (tmp_path / 'page.html').read_text()
  assert '<title>&lt;T&gt;</title>' in text and 'A &lt; B' in text
  assert 'width=device-width' in text
  for name in re.findall(r'href="([^"]+)"', text):
    assert (tmp_path / name).exists()


def test_neurons_of_a_sample_are_in_order():
  spikes = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]])
  assert example.sample(spikes, 4).tolist() == [1, 2, 3]
  assert example.sample(spikes, 2).tolist() == [1, 2]
  assert example.sample(0 * spikes, 2).tolist() == [0, 2]
  assert example.active(spikes, 4) == [1, 2, 3, 0]


def test_ends_of_layers():
  assert inside.ends(['a']) == ['a'] and inside.ends(['a', 'b']) == ['a', 'b']
  assert inside.ends(list('abcd')) == ['a', 'b', 'd']


# What needs networks.


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  """Two tiny runs, and the figures of both."""
  folder = tmp_path_factory.mktemp('runs')
  data_path = tiny.save(folder / 'data.npz', train=64, test=16)
  for method in 'ds_atgo', 'vanilla':
    config = tiny.config(data_path=data_path, method=method, num_epochs=2)
    loop.train(config, folder / method)
  path = figures.write(folder / 'ds_atgo', [folder / 'vanilla'], examples=8)
  return folder, path


@pytest.mark.sample
def test_every_figure_of_runs_is_there_and_has_its_numbers(drawn):
  folder, path = drawn
  names = [entry.name for entry, _ in figures.entries()]
  assert len(set(names)) == len(names) == 18
  text = path.read_text()
  assert text.count('<section>') == 18 and 'Not drawn' not in text
  assert len(re.findall('src="data:image/png', text)) == 18
  for name in names:
    rows = read(path.parent / f'{name}.csv')
    assert rows and None not in rows[0].values()
    for kind in 'png', 'svg':
      assert (path.parent / f'{name}.{kind}').stat().st_size > 1000

  told = runs.named([folder / 'ds_atgo', folder / 'vanilla'])
  networks = [runs.network(run, 8) for run in told]
  assert [network.name for network in networks] == ['ds_atgo', 'vanilla']
  result = metrics.read_json(folder / 'vanilla' / 'result.json')
  rows = style.where(read(path.parent / '08_firing_rate.csv'), run='vanilla')
  near(
    [row['firing_rate_percent'] for row in rows],
    100 * np.ravel([x['firing_rate'] for x in result['layers'].values()]),
  )
  flows = {network.name: gradients.flows(network) for network in networks}
  for name, expected in (
    ('02_membranes', inside.membranes(networks)),
    ('12_gradient_norm', gradients.norms(flows)),
    ('14_gradient_reach', gradients.reach(flows)),
    ('16_energy', gradients.energies(networks)),
    ('18_traces', example.traces(networks)),
  ):
    found = read(path.parent / f'{name}.csv')
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
      for key, value in other.items():
        if isinstance(value, str):
          assert one[key] == value
        else:
          assert float(one[key]) == pytest.approx(value, rel=1e-4, abs=1e-9)


@pytest.mark.sample
def test_what_is_drawn_is_true_of_the_networks(drawn):
  folder, path = drawn
  # Shares of the paths, and of the reach from the first timestep, are whole.
  for row in read(path.parent / '13_gradient_paths.csv'):
    parts = [float(row[f'{p}_percent']) for p in ('spatial', 'leak', 'reset')]
    assert sum(parts) == pytest.approx(100, rel=1e-5)
  # At the centre the landscape is the loss of the network.
  network = runs.network(runs.told(folder / 'vanilla'), 8)
  logits = network.model.apply(network.variables, network.images, train=False)
  expected = float(network.loss(logits, network.labels).mean())
  rows = style.where(read(path.parent / '09_landscape.csv'), run='vanilla')
  (centre,) = style.where(rows, first='0.0', second='0.0')
  assert float(centre['loss']) == pytest.approx(expected, rel=1e-5)
  # Traces fire where they reach the threshold.
  for row in read(path.parent / '18_traces.csv'):
    assert int(row['spike']) == (float(row['u']) >= float(row['theta']))
    assert float(row['v']) == (0 if int(row['spike']) else float(row['u']))
  # The vanilla run keeps no average.
  rows = read(path.parent / '07_averages.csv')
  assert [row['thresholds'] for row in rows] == ['running', 'of the batch']
  result = metrics.read_json(folder / 'ds_atgo' / 'result.json')
  assert float(rows[0]['accuracy']) == pytest.approx(100 * result['accuracy'])


@pytest.mark.sample
def test_a_batch_fires_by_its_own_thresholds(drawn):
  folder, _ = drawn
  network = runs.network(runs.told(folder / 'ds_atgo'), 8)
  own = inside.with_own_thresholds(network.model)
  _, told = own.apply(
    network.variables, network.images, train=False,
    mutable=['batch_stats', 'spiking'],
  )  # fmt: skip
  for layer in told['spiking'].values():
    near(
      layer['neuron']['theta'], layer['neuron']['mean'] + layer['neuron']['std']
    )
    assert (layer['neuron']['theta'] != 0).all()


@pytest.mark.sample
def test_no_examples_is_an_error(drawn):
  folder, _ = drawn
  with pytest.raises(ValueError, match='examples of 1 or more, got 0'):
    figures.write(folder / 'vanilla', examples=0)
