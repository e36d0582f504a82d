"""ResNet-19 in PyTorch: DS-ATGO written plainly, or ReLU for its neurons.

`training_step` returns a function that runs loss and gradients once, ready to
be timed. The import is inside, so that a missing PyTorch can be told.
"""


def training_step(neuron, num_steps=2, batch_size=8):
  """Loss and gradients of ResNet-19 on images of 32 x 32.

  Args:
    neuron: 'ds_atgo' or 'relu'.
    num_steps: T.
    batch_size: B.

  Returns:
    A function without arguments. Channels are last in memory, which is the
    faster of PyTorch's layouts here.
  """
  import torch
  from torch import nn
  from torch.nn import functional as F

  class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, width):
      ctx.save_for_backward(x, width)
      return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, cotangent):
      x, width = ctx.saved_tensors
      return cotangent * (x.abs() < width / 2) / width, None

  class Neuron(nn.Module):
    def __init__(self):
      super().__init__()
      self.w = nn.Parameter(torch.tensor(0.25).log())

    def forward(self, x):
      v, spikes = torch.zeros_like(x[0]), []
      for x_t in x:
        u = torch.sigmoid(self.w) * v + x_t
        std, mean = torch.std_mean(u.detach())
        theta = mean + std
        spikes.append(Spike.apply(u - theta, 1 + torch.tanh(theta - 1)))
        v = u * (1 - spikes[-1])
      return torch.stack(spikes)

  class Layer(nn.Module):
    """Weights, batch norm and neurons, of [T, B, ...]."""

    def __init__(self, weights, norm):
      super().__init__()
      self.weights, self.norm = weights, norm
      self.neuron = nn.ReLU() if neuron == 'relu' else Neuron()

    def forward(self, x, repeats=1):
      y = self.norm(self.weights(x.flatten(0, 1)))
      y = y.unflatten(0, x.shape[:2])
      return self.neuron(y.expand(len(y) * repeats, *y.shape[1:]))

  def conv(inputs, outputs, kernel, stride=1):
    weights = nn.Conv2d(
      inputs, outputs, kernel, stride, kernel // 2, bias=False
    )
    return Layer(weights, nn.BatchNorm2d(outputs))

  class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
      super().__init__()
      self.residual = nn.Sequential(
        conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)
      )
      self.identity = nn.Identity()
      if inputs != outputs:
        self.identity = conv(inputs, outputs, 1, stride)

    def forward(self, x):
      return self.identity(x) + self.residual(x)

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      self.encode = conv(3, 128, 3)
      planes = (128, 128, 128, 128, 256, 256, 256, 512, 512)
      self.blocks = nn.Sequential(
        *(
          Block(i, o, 1 if i == o else 2)
          for i, o in zip(planes, planes[1:], strict=False)
        )
      )
      head = nn.Linear(512, 256, bias=False)
      self.head = Layer(head, nn.BatchNorm1d(256))
      self.classifier = nn.Linear(256, 10, bias=False)

    def forward(self, x):
      x = self.blocks(self.encode(x[None], repeats=num_steps))
      return self.classifier(self.head(x.mean((-2, -1)))).mean(0)

  net = Net().to(memory_format=torch.channels_last)
  assert neuron == 'relu' or 12_698_260 == sum(
    p.numel() for p in net.parameters()
  )
  images = torch.randn(batch_size, 3, 32, 32)
  images = images.to(memory_format=torch.channels_last)
  labels = torch.zeros(batch_size, dtype=torch.long)

  def step():
    net.zero_grad()
    F.cross_entropy(net(images), labels).backward()

  return step
