"""Whether seeds train faster as one program than one after the other.

  python -m benchmarks.seeds [--json FILE] [--repeats N]

The job's own step of the networks of docs/findings.md on one device, on random
images: five states one after the other, and the same five by `jax.vmap`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from configs.findings import digits, events, mnist
from train import step as step_lib

SEEDS = 5
RUNS = {
  'digits': (digits, (8, 8, 1)),
  'mnist': (mnist, (28, 28, 1)),
  'events': (events, (10, 16, 16, 2)),
}


def of_run(config, shape, repeats):
  """Times of both, in milliseconds for all seeds."""
  rng = np.random.default_rng(0)
  facts = {
    'num_classes': 10,
    'example_shape': shape,
    'mean': np.zeros(shape[-1:], np.float32),
    'std': np.ones(shape[-1:], np.float32),
  }
  states, batches = [], []
  for seed in range(SEEDS):
    config.seed = seed
    state, step = step_lib.create_train_step(
      config, facts, 20, jax.local_devices()[:1]
    )
    states.append(state)
    size = config.batch_size
    images = rng.normal(size=(1, size, *shape)).astype(np.float32)
    batches.append({'image': images, 'label': rng.integers(0, 10, (1, size))})
  alone = step.__wrapped__
  together = jax.vmap(alone)
  state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  batch = jax.tree.map(lambda *a: np.stack(a, axis=1), *batches)

  def program(step, *arguments):
    mapped = step_lib.pmapped(step, devices=jax.local_devices()[:1])
    return step_lib.compile_step(mapped.lower(*arguments))

  each = program(alone, states[0], batches[0])
  all_ = program(together, state, batch)
  times = timing.medians(
    {
      'one after the other': lambda: jax.block_until_ready(
        [each(*pair) for pair in zip(states, batches, strict=True)]
      ),
      'vmap': lambda: jax.block_until_ready(all_(state, batch)),
    },
    repeats,
  )
  first = times['one after the other']
  return {
    name: {'ms': ms, 'of one after the other': ms / first}
    for name, ms in times.items()
  }


def measure(arguments):
  """Measures and prints everything."""
  results = {}
  for title, (module, shape) in RUNS.items():
    rows = of_run(module.get_config(), shape, arguments.repeats)
    timing.table(title, rows, ('ms', 'of one after the other'))
    results[title] = rows
  return results


if __name__ == '__main__':
  timing.main(__doc__.split('\n')[0], measure)
