"""What neurons did: rates, thresholds, windows and membranes by layer and time.

The neurons tell it of themselves, pooled over devices, in training and in
inference; nothing is computed where nothing asks for it. Linen:

    logits, told = net.apply(
      variables, images, train=False, mutable=['spiking', 'histograms']
    )
    activity.by_layer(told['spiking'])     # {layer: {'firing_rate': [T], ...}}
    activity.by_layer(told['histograms'])  # {layer: {'membrane': [T, bins]}}

NNX:

    capture = nnx.capture(net, nnx.Intermediate, snn.Histogram)
    logits, scalars, histograms = capture(images)
    activity.by_layer(scalars)

`membranes` (`snn.Membrane`) has u, v and spikes themselves, [T, B, ...]; under
`jit` what is not returned of them is not kept.
"""

from collections.abc import Mapping

import jax
from flax import nnx, traverse_util

from dsatgo_jax.statistics import EDGES as EDGES


def by_layer(tree) -> dict[str, dict[str, jax.Array]]:
  """What layers told, or any tree of a model, by layer and name.

  Args:
    tree: a collection of Linen, or an `nnx.State`.

  Returns:
    `{layer: {name: value}}`, a layer being the path of its module with slashes;
    in the order in which the layers were called, where Linen keeps it.
  """
  if isinstance(tree, nnx.State):
    flat = {
      path: variable.get_value() for path, variable in nnx.to_flat_state(tree)
    }
  else:
    flat = traverse_util.flatten_dict(tree)
  layers: dict[str, dict[str, jax.Array]] = {}
  for (*path, name), value in flat.items():
    layers.setdefault('/'.join(map(str, path)), {})[str(name)] = value
  return layers


def rates(told: Mapping[str, Mapping]) -> dict[str, jax.Array]:
  """The firing rate of every layer, the mean over time.

  Args:
    told: `by_layer` of the activity.

  Returns:
    `{layer: scalar}`.
  """
  return {name: layer['firing_rate'].mean(-1) for name, layer in told.items()}
