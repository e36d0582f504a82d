"""MNIST's 5,000 images through a narrow SEW-ResNet-18: docs/findings.md.

620 steps of 64 images, test accuracy after every epoch, none of it selected on.
"""

from configs.findings import digits


def get_config():
  config = digits.get_config()
  config.dataset = 'mnist_5000'
  config.model = 'SEWResNet18'
  config.model_args = {'planes': (8, 16, 32, 64), 'cut': ()}
  config.num_epochs = 10
  config.watch_every = 310
  return config
