"""Spiking networks with adaptive thresholds and surrogate widths in JAX."""

from dsatgo_jax.version import __version__ as __version__
