"""What is not finite, and where it began."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from train import finite
from train import step as step_lib

FACTS = {'num_classes': 3, 'example_shape': [8, 8, 1], 'mean': [0], 'std': [1]}


@pytest.fixture(scope='module')
def examined():
  """Says what is wrong with a kernel, images and what the loss is times."""
  config = tiny.config()
  model = step_lib.create_model(config, 3)
  images = jnp.ones((8, 8, 8, 1))
  variables = model.init(jax.random.key(0), images, train=True)

  def loss(logits, factor):
    return jnp.sqrt(jnp.sum(jnp.square(logits)) * factor[0])

  @jax.jit
  def run(kernel, images, factor):
    params = variables['params'] | {'classifier': {'kernel': kernel}}
    params['classifier']['bias'] = jnp.ones(3)
    return jax.vmap(
      lambda batch: finite.examine_step(
        variables | {'params': params}, batch,
        model=model, loss=loss, mean=0.0, std=1.0,
      ),
      axis_name=step_lib.AXIS,
    )({'image': images[None], 'label': factor[None]})  # fmt: skip

  def told(kernel=1.0, image=0.5, factor=1.0):
    counts = run(
      jnp.full((16, 3), kernel),
      jnp.full((8, 8, 8, 1), image),
      jnp.full(8, factor),
    )
    return finite.first(*jax.tree.map(np.sum, counts))

  return told


@pytest.mark.parametrize(
  'wrong, where',
  [
    ({}, 'run again, every output and gradient was finite'),
    ({'image': np.nan}, 'those of the images'),
    ({'kernel': np.inf}, 'those of the parameters and running values'),
    ({'kernel': 3e38}, 'those of the output of classifier'),
    ({'factor': np.inf}, 'those of the loss'),
    ({'factor': 0.0}, 'those of the gradient of classifier/bias'),
  ],
)
def test_the_first_that_is_not_finite_is_named(examined, wrong, where):
  assert examined(**wrong).endswith(where)
