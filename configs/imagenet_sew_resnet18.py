"""ImageNet-2012: SEW-ResNet-18 with T = 4, on four GPUs.

  pip install '.[train,cuda13]'
  python -m train.main --config=configs/imagenet_sew_resnet18.py \
    --workdir=runs/imagenet_sew_resnet18

`--config.method` and `--config.seed` choose another method and seed.

Published accuracy: 68.86 +- 0.25 % (DS-ATGO, AAAI 2026). Published of the
recipe: network, T, crops of 224 x 224 and cross-entropy. Optimiser, rate,
epochs, batch and half precision are those of SEW-ResNet's program (Fang et al.,
NeurIPS 2021), which is the nearest. 5,004 steps an epoch, 1,601,280 in all.
SEW-ResNet-34: `--config.model=SEWResNet34`. TensorFlow is needed once, to
prepare the data: `pip install tensorflow`.

SEW-ResNet's program has other neurons, IF with the reset detached:

  --config.method=vanilla --config.neuron.learn_decay=False \
    --config.neuron.decay=1.0 --config.neuron.detach_reset=True

It normalises the stem before the repeat in time. So does ours, as if after it:
the stem's running variance, unbiased, counts all T copies.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
  config = ConfigDict()

  # Data.
  config.dataset = 'imagenet2012'
  config.data_path = ''  # The file of dataset = 'npz'.
  config.data_dir = ''  # Where TFDS keeps its datasets; '': its default.
  config.num_classes = placeholder(int)  # None: those that the data have.
  config.validation_fraction = 0.0  # All 1,281,167 train.
  config.normalize = True
  config.mean = (0.485, 0.456, 0.406)  # The customary ones; SEW-ResNet's.
  config.std = (0.229, 0.224, 0.225)
  config.augment = ('random_resized_crop:224', 'flip')  # SEW-ResNet's.
  config.num_workers = 32  # Processes that read and augment; chosen.
  config.batch_size = 256  # Over all devices; SEW-ResNet's 32 on each of eight.

  # Network.
  config.model = 'SEWResNet18'  # A class of dsatgo_jax.models.
  config.model_args = ConfigDict()  # Further attributes, as "{'alpha': 1.0}".
  config.num_steps = 4  # T, published.
  config.method = 'ds_atgo'  # A name of dsatgo_jax.methods.
  config.neuron = ConfigDict(
    {
      'decay': 0.2,  # Retained share of the membrane; where PLIF starts.
      'learn_decay': True,  # PLIF, or LIF.
      'v_th': 1.0,
      'f_c': 1.0,
      'width': 1.0,
      'threshold': 'true',
      'width_signal': 'theta',  # The authors' program: 'sigma'.
      'surrogate': 'rectangular',  # A name of dsatgo_jax.surrogate.
      'reset': 'hard',
      'detach_reset': False,
      'momentum': 0.9,
    }
  )
  config.dtype = 'bfloat16'  # SEW-ResNet trains in half precision too.

  # Optimisation.
  config.seed = 0
  config.init_from = ''  # The workdir of a trained network to start from.
  config.num_epochs = 320  # SEW-ResNet's.
  config.loss = 'cross_entropy'  # Of the mean logits; published.
  config.label_smoothing = 0.0
  config.optimizer = 'sgd'  # Or 'adamw'.
  config.learning_rate = 0.1  # SEW-ResNet's; cosine to 0.
  config.momentum = 0.9  # SEW-ResNet's.
  config.weight_decay = 0.0  # SEW-ResNet's.
  config.warmup_epochs = 0
  config.cosine_per = 'epoch'  # As PyTorch steps it.
  config.grad_clip_norm = 0.0  # None.

  config.select_on = 'validation'  # The authors' program: 'test'.
  config.log_every = 100
  config.watch_every = 0  # Steps; see train/watch.py. 0: never.
  config.save_every_minutes = 10.0  # And after every epoch. 0: then only.
  config.skip_nonfinite = (
    0  # Steps that may be left out, their loss not finite.
  )
  config.hang_minutes = 30.0  # Without a step the run ends. 0: it waits.
  config.profile = False
  return config
