"""Kinds of variables of the NNX modules, and a setting of theirs."""

from flax import nnx


class Histogram(nnx.Variable):
  """Captured: histograms of the membranes, as Linen's `histograms`."""


class Membrane(nnx.Variable):
  """Captured: membranes and spikes, as Linen's `membranes`."""


class Probe(nnx.Variable):
  """Zeros whose gradients tell of gradients; see `analysis.flow`."""


# By which kind of variable the modules are captured for which collection.
CAPTURED = {
  'spiking': nnx.Intermediate,
  'histograms': Histogram,
  'membranes': Membrane,
}


def chosen(use_running_average, module) -> bool:
  """The call's setting, else the module's.

  Args:
    use_running_average: that of the call, or None.
    module: has an attribute of this name.

  Raises:
    ValueError: both are None.
  """
  if use_running_average is None:
    use_running_average = module.use_running_average
  if use_running_average is None:
    raise ValueError(
      f'Expected use_running_average for {type(module).__name__}, as its '
      'attribute, in the call, or by train(), eval() or nnx.view, got None.'
    )
  return use_running_average
