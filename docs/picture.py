"""Draws the README's picture: `python -m docs.picture docs/picture.svg`."""

import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from docs.pages import STYLE
from dsatgo_jax import linen as snn

METHODS = {
  'vanilla': ('fixed threshold and width', '#c44e52', '--'),
  'ds_atgo': ('DS-ATGO', '#4c72b0', '-'),
}


def shares(method, spread):
  """Which shares of a layer fire and are in the window, over 4 timesteps."""
  x = spread * jax.random.normal(jax.random.key(0), (4, 64, 1024))
  neuron = snn.SpikingNeuron(method, use_running_average=False)
  variables = neuron.init(jax.random.key(1), x)
  _, told = neuron.apply(variables, x, mutable=['batch_stats', 'spiking'])
  told = told['spiking']
  return jnp.stack([told['firing_rate'], told['gradient_share']]).mean(1)


def main(path):
  """Writes the picture."""
  matplotlib.use('svg')
  from matplotlib import pyplot as plt

  spreads = np.geomspace(0.25, 4, 25)
  with plt.rc_context(STYLE | {'svg.fonttype': 'path'}):
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.7), sharex=True)
    for method, (label, color, line) in METHODS.items():
      drawn = np.array([shares(method, spread) for spread in spreads]).T
      for ax, values in zip(axes, 100 * drawn, strict=True):
        ax.plot(spreads, values, line, color=color, label=label, lw=2)
    axes[0].set_title('neurons that fire, %', loc='left')
    axes[1].set_title('neurons that pass a gradient, %', loc='left')
    for ax in axes:
      ax.set(xscale='log', ylim=(0, None))
      ax.set_xlabel("deviation of a layer's input")
      ax.set_xticks([0.25, 0.5, 1, 2, 4], ['¼', '½', '1', '2', '4'])
      ax.minorticks_off()
    axes[0].legend()
    figure.savefig(path, metadata={'Date': None})


if __name__ == '__main__':
  main(*sys.argv[1:])
