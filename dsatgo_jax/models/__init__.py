"""The paper's networks, and a small one for small images (Flax Linen)."""

from dsatgo_jax.models.resnet import ResNet19 as ResNet19
from dsatgo_jax.models.resnet import SEWResNet18 as SEWResNet18
from dsatgo_jax.models.resnet import SEWResNet34 as SEWResNet34
from dsatgo_jax.models.vgg import VGGSNN as VGGSNN
from dsatgo_jax.models.vgg import ConvNet as ConvNet
