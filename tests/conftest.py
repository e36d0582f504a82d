"""Four virtual CPU devices, and compiled programs kept between runs."""

import pathlib

import jax

jax.config.update('jax_num_cpu_devices', 4)
jax.config.update(
  'jax_compilation_cache_dir',
  str(pathlib.Path(__file__).parent.parent / '.jax_cache'),
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
