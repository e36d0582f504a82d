"""The digits through a narrow ResNet-19: docs/findings.md.

264 steps of 64 images, test accuracy after every epoch, none of it selected on.
"""

from configs import digits


def get_config():
  config = digits.get_config()
  config.validation_fraction = 0.0
  config.select_on = 'test'
  config.model = 'ResNet19'
  config.model_args = {
    'planes': (16, 32, 64), 'head_width': 64, 'stage_sizes': (3, 3, 2),
    'cut': (),
  }  # fmt: skip
  config.num_epochs = 12
  config.watch_every = 88  # Every fourth epoch.
  return config
