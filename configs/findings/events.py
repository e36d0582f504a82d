"""The event digits through a narrow VGGSNN: docs/findings.md.

176 steps of 64 recordings, test accuracy after every epoch, none of it selected
on.
"""

from configs import digits_dvs


def get_config():
  config = digits_dvs.get_config()
  config.validation_fraction = 0.0
  config.select_on = 'test'
  config.num_epochs = 8
  config.watch_every = 88
  return config
