"""Spiking networks with adaptive thresholds and surrogate widths in JAX.

Its modules are loaded when they are first named, so that `import dsatgo_jax as
ds` is quick and a Linen user does not load NNX.
"""

import importlib
import pkgutil

from dsatgo_jax.version import __version__ as __version__

_MODULES = [module.name for module in pkgutil.iter_modules(__path__)]


def __getattr__(name):
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return [*globals(), *_MODULES]
