"""Analysis of any model, as functions of it: Linen, NNX or a plain function."""

from dsatgo_jax.analysis import energy as energy
from dsatgo_jax.analysis import start as start
