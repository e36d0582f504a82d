"""Four virtual CPU devices, and compiled programs kept between runs."""

import gc
import pathlib

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 4)
jax.config.update(
  'jax_compilation_cache_dir',
  str(pathlib.Path(__file__).parent.parent / '.jax_cache'),
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

# Programs traced are millions of objects, which collections go through again
# and again: a sixth of the suite's time.
gc.set_threshold(200_000, 50, 1000)


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  yield
  jax.clear_caches()
  gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """What CI samples of the slow tests is slow."""
  for item in items:
    if item.get_closest_marker('sample'):
      item.add_marker('slow')
