"""Logits of a tile of rows against one piece of the vocabulary, and the running log-sum-exp over the pieces."""

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dot_general

VOCAB_PIECE = 8192
"""Columns of a piece: one order of pieces in every mode."""


def logits(hidden: jax.Array, w: jax.Array) -> jax.Array:
    """Return fp32 logits [R, P] of a tile of rows hidden [R, D] against a piece w [D, P]."""
    return dot_general(hidden, w, ((1,), (0,)))


def add_piece(maximum: jax.Array, total: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the running maximum and sum of exponentials [R] after one more piece of logits x [R, P]."""
    new = jnp.maximum(maximum, x.max(-1))
    return new, total * jnp.exp(maximum - new) + jnp.exp(x - new[:, None]).sum(-1)
