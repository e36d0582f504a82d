"""Handwritten digits before a simulated event camera: VGGSNN with T = 10.

  python -m train.main --config=configs/digits_dvs.py --workdir=runs/digits_dvs

Must reach a mean test accuracy of 95 % over seeds 0 to 2, in a few minutes a
run on two CPU cores, and more than a linear classifier on the frames summed
over time, whose accuracy is printed below it:

  python -m train.seeds --config=configs/digits_dvs.py --seeds=0,1,2 \
    --workdir=runs/digits_dvs_seeds

The recipe is that of CIFAR10-DVS, made small. 20 steps an epoch, 240 in all.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
  config = ConfigDict()

  # Data.
  config.dataset = 'digits_dvs'
  config.data_path = ''  # The file of dataset = 'npz'.
  config.data_dir = ''  # Where TFDS keeps its datasets; '': its default.
  config.num_classes = placeholder(int)  # None: those that the data have.
  config.validation_fraction = 0.1  # Of the training split, held out.
  config.normalize = False  # Event counts as they are.
  config.mean = placeholder(tuple)
  config.std = placeholder(tuple)
  config.augment = ('roll:1',)  # See train/augment.py.
  config.num_workers = 0  # Processes that read and augment; 0: a thread.
  config.batch_size = 64  # Over all devices.

  # Network.
  config.model = 'VGGSNN'  # A class of dsatgo_jax.models.
  config.model_args = ConfigDict({'stages': ((16, 32), (32, 64))})
  config.num_steps = 10  # T.
  config.method = 'ds_atgo'  # A name of dsatgo_jax.methods.
  config.neuron = ConfigDict(
    {
      'decay': 0.2,  # Retained share of the membrane; where PLIF starts.
      'learn_decay': True,  # PLIF, or LIF.
      'v_th': 1.0,
      'f_c': 1.0,
      'width': 1.0,
      'threshold': 'true',
      'width_signal': 'theta',
      'surrogate': 'rectangular',  # A name of dsatgo_jax.surrogate.
      'reset': 'hard',
      'detach_reset': False,
      'momentum': 0.9,
    }
  )
  config.dtype = 'float32'  # Or 'bfloat16'; the parameters are float32.

  # Optimisation.
  config.seed = 0
  config.init_from = ''  # The workdir of a trained network to start from.
  config.num_epochs = 12
  config.loss = 'tet'  # Or 'cross_entropy', of the mean logits.
  config.label_smoothing = 0.0
  config.optimizer = 'sgd'  # Or 'adamw'.
  config.learning_rate = 0.1
  config.momentum = 0.9
  config.weight_decay = 5e-4
  config.warmup_epochs = 1
  config.cosine_per = 'step'
  config.grad_clip_norm = 0.0

  config.select_on = 'validation'
  config.log_every = 10
  config.watch_every = 20  # Steps; see train/watch.py. 0: never.
  config.save_every_minutes = 10.0  # And after every epoch. 0: then only.
  config.skip_nonfinite = (
    0  # Steps that may be left out, their loss not finite.
  )
  config.hang_minutes = 30.0  # Without a step the run ends. 0: it waits.
  config.profile = False
  return config
