"""Analysis as pure functions of any model with these neurons in it.

Its modules are loaded when they are first named. `curvature` needs matfree,
`pip install 'dsatgo_jax[analysis]'`, for what it estimates.
"""

import importlib
import pkgutil

_MODULES = [module.name for module in pkgutil.iter_modules(__path__)]


def __getattr__(name):
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return [*globals(), *_MODULES]
