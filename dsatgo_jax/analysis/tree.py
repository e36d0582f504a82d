"""Names in trees of variables."""

import jax


def keys(path) -> list[str]:
  """The parts of a path, as `jax.tree_util` gives it.

  Args:
    path: a tuple of keys.

  Returns:
    Strings: ['conv0', 'layer', 'kernel']. The `value` that stands behind each
    of NNX's variables is left out.
  """
  if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey('value'):
    path = path[:-1]
  return [jax.tree_util.keystr((key,), simple=True) for key in path]


def name(path) -> str:
  """The path of a leaf, 'conv0/layer/kernel'.

  Args:
    path: a tuple of keys.

  Returns:
    A string.
  """
  return '/'.join(keys(path))
