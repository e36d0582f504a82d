"""The training job: run from a checkout, not part of the wheel."""


def load(workdir, which='latest'):
  """A trained network, for notebooks and programs of one's own.

  Args:
    workdir: of the run.
    which: 'latest', 'best', or a step that is kept.

  Returns:
    The Linen network, its variables as NumPy arrays, and the run's config,
    whose `mean` and `std` normalise its input: `model.apply(variables, images)`
    are logits [T, B, K].

  Raises:
    ValueError: there is no such checkpoint, or it is damaged.
  """
  # Late, so that the commands answer a misspelt flag without these.
  from train import checkpoints, settings, step

  state, info = checkpoints.expect(workdir, which)
  config = settings.trained(info)
  model = step.create_model(config, config.num_classes)
  variables = {name: state[name] for name in ('params', 'batch_stats')}
  return model, variables, config
