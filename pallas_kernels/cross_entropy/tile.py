"""Logits of a tile of rows against one piece of the vocabulary, their statistics, and what these are over all pieces.

Rows are vectors [R]; `target` is the column of a row's target, counted from the piece's first, and may lie outside of the piece.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_general

VOCAB_PIECE = 8192
"""Columns of a piece in plain JAX; kernels have their own. One order of pieces in every mode."""


def logits(hidden: jax.Array, w: jax.Array) -> jax.Array:
    """Return fp32 logits [R, P] of a tile of rows hidden [R, D] against a piece w [D, P]."""
    return dot_general(hidden, w, ((1,), (0,)))


def columns(x: jax.Array) -> jax.Array:
    """Return the column [R, P] of each logit in its piece."""
    return lax.broadcasted_iota(jnp.int32, x.shape, 1)


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the maximum [R] and the sum of exponentials [R], relative to it, of a piece's logits; -inf is a column that does not count."""
    maximum = x.max(-1)
    return maximum, jnp.exp(x - maximum[:, None]).sum(-1)


def log_sum_exp(maxima: jax.Array, totals: jax.Array) -> jax.Array:
    """Return the log-sum-exp [R] of all pieces from the statistics of each [pieces, R]; -inf and any finite total is no piece."""
    maximum = maxima.max(0)
    return maximum + jnp.log((totals * jnp.exp(maxima - maximum)).sum(0))


def picked(x: jax.Array, target: jax.Array) -> jax.Array:
    """Return the target's logit [R], and 0 where the piece does not have it."""
    return jnp.where(columns(x) == target[:, None], x, 0.0).sum(-1)


def d_logits(x: jax.Array, target: jax.Array, total: jax.Array, d_logprob: jax.Array, d_total: jax.Array) -> jax.Array:
    """Return the gradient [R, P] of a piece's logits: of logprob = x[target] - total and of total, the log-sum-exp of all pieces."""
    weights = (d_total - d_logprob)[:, None] * jnp.exp(x - total[:, None])
    return weights + jnp.where(columns(x) == target[:, None], d_logprob[:, None], 0.0)
