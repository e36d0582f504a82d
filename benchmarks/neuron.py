"""One spiking layer beside its floor and other libraries' layers.

  python -m benchmarks.neuron [--keep-pages] [--json FILE] [--repeats N]

Forward and backward of a layer on `[T, 16, 32, 32, 64]` float32, in
milliseconds: medians of interleaved repeats. The floor is what a layer must
move: input, cotangent and one saved array in, spikes, the saved array and the
input's cotangent out; the time of a jitted program that only copies the three
to three others. Each process finds memory in another state, and the ratio to
the floor differs with it; so it is taken in several fresh processes, too. The
other libraries' neurons have a fixed threshold and measure nothing; `pip
install -e '.[bench]'` installs them.
"""

import concurrent.futures
import math
import multiprocessing
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.peers import PEERS, in_jax, there_and_back
from dsatgo_jax import neurons

SHAPE = (16, 32, 32, 64)
STEPS = (2, 4, 10)
PROCESSES = 5


def array(seed, num_steps, shape=SHAPE):
  """A normal array [T, B, H, W, C]."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((num_steps, *shape), np.float32)


def copy(*arrays):
  """A copy of each, written by a program that uses all cores."""
  return [-a for a in arrays]


def layer(**settings):
  """DS-ATGO with PLIF as `layer(x, w)`."""

  def run(x, w):
    parameters = neurons.Parameters(decay=jax.nn.sigmoid(w))
    return neurons.run(x, parameters, **settings)[0]

  return run


def training(num_steps, repeats, peers=PEERS):
  """Milliseconds of forward and backward at T, by name, and who is missing."""
  x, cotangent = array(0, num_steps), array(1, num_steps)
  w = np.float32(neurons.logit(0.2))

  def lif(x, _):
    return neurons.run(x)[0]

  functions = {
    'floor': in_jax(copy, x, cotangent, array(2, num_steps)),
    'dsatgo_jax': in_jax(there_and_back(layer()), x, cotangent, w),
    'forward alone': in_jax(layer(), x, w),
    'decay not learnt': in_jax(there_and_back(lif), x, cotangent, ()),
    'plain scan': in_jax(there_and_back(layer(fused=False)), x, cotangent, w),
  }
  missing = []
  for name, peer in peers.items():
    try:
      functions[name] = peer(x, cotangent)
    except ImportError:
      missing.append(name)
  return timing.medians(functions, repeats), missing


def inference(num_steps, repeats):
  """Milliseconds of inference at T, and of copying the input."""
  x, w = array(0, num_steps), np.float32(neurons.logit(0.2))
  running = neurons.Running(jnp.ones(num_steps))
  return timing.medians(
    {
      'floor': in_jax(copy, x),
      'dsatgo_jax': in_jax(layer(running=running), x, w),
    },
    repeats,
  )


def growth(repeats):
  """How time, compile time and memory grow with T, on a smaller layer."""
  shape, rows = (16, 32, 32, 16), {}
  for num_steps in (4, 32, 64):
    x, cotangent = array(0, num_steps, shape), array(1, num_steps, shape)
    w = np.float32(neurons.logit(0.2))
    functions = {'floor': in_jax(copy, x, cotangent, x)}
    for name, settings in (('layer', {}), ('plain scan', {'fused': False})):
      run = jax.jit(there_and_back(layer(**settings)))
      start = time.perf_counter()
      compiled = run.lower(x, cotangent, w).compile()
      row = rows.setdefault(name, {})
      row[f'compile s, T={num_steps}'] = time.perf_counter() - start
      temporary = compiled.memory_analysis().temp_size_in_bytes
      row[f'arrays, T={num_steps}'] = temporary / (4 * math.prod(shape))
      functions[name] = in_jax(
        there_and_back(layer(**settings)), x, cotangent, w
      )
    for name, value in timing.medians(functions, repeats).items():
      rows.setdefault(name, {})[f'ms, T={num_steps}'] = value
  return rows


def times_the_floor(repeats):
  """What the layer takes in this process, `{(what, T): ratio}`."""
  times = {
    ('training', t): training(t, repeats, peers={})[0] for t in STEPS
  } | {('inference', t): inference(t, repeats) for t in STEPS}
  return {key: ratios(row, 'floor')['dsatgo_jax'] for key, row in times.items()}


def spread(arguments):
  """Median and range of `times_the_floor` in fresh processes."""
  with concurrent.futures.ProcessPoolExecutor(
    max_workers=1,
    mp_context=multiprocessing.get_context('spawn'),
    initializer=timing.keep_pages if arguments.keep_pages else None,
    max_tasks_per_child=1,
  ) as pool:
    found = list(pool.map(times_the_floor, PROCESSES * [arguments.repeats]))
  rows = {}
  for key in found[0]:
    values = [one[key] for one in found]
    rows['{}, T = {}'.format(*key)] = {
      'median': statistics.median(values),
      'least': min(values),
      'most': max(values),
    }
  return rows


def ratios(times, base):
  """Each time in units of another's."""
  return {name: value / times[base] for name, value in times.items()}


def measure(arguments):
  """Measures and prints everything."""
  results = {'training': {}, 'inference': {}}
  for num_steps in STEPS:
    times, missing = training(num_steps, arguments.repeats)
    results['training'][num_steps] = times
    results['missing'] = missing
    results['inference'][num_steps] = inference(num_steps, arguments.repeats)
  for part in ('training', 'inference'):
    times = results[part]
    names = list(times[STEPS[0]])
    for title, unit in (('milliseconds', None), ('times the floor', 'floor')):
      shown = {
        t: ratios(row, unit) if unit else row for t, row in times.items()
      }
      rows = {name: {t: shown[t].get(name) for t in STEPS} for name in names}
      timing.table(f'{part}, {title}, at T =', rows, STEPS)
  results['spread'] = spread(arguments)
  timing.table(
    f'times the floor, in {PROCESSES} processes',
    results['spread'],
    ('median', 'least', 'most'),
  )
  for name in results['missing']:
    print(f'{name}: not installed')
  results['growth'] = growth(arguments.repeats)
  for what in ('ms', 'arrays', 'compile s'):
    columns = [f'{what}, T={t}' for t in (4, 32, 64)]
    timing.table('growth with T', results['growth'], columns)
  return results


if __name__ == '__main__':
  timing.main(__doc__.split('\n')[0], measure)
