"""Logits of a tile of rows against one piece of the vocabulary, their statistics, and what these are over all pieces.

Rows are vectors [R]; `target` is the column of a row's target, counted from the piece's first, and may lie outside of the piece.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_general

VOCAB_PIECE = 8192
"""Columns of a piece in plain JAX; kernels have their own. One order of pieces in every mode."""


NOTHING = float(jnp.finfo(jnp.float32).min)
"""In place of a logit that does not count; finite, so that a part of nothing but these has finite statistics, which weigh nothing."""


def logits(hidden: jax.Array, w: jax.Array) -> jax.Array:
    """Return fp32 logits [R, P] of a tile of rows hidden [R, D] against a piece w [D, P]."""
    return dot_general(hidden, w, ((1,), (0,)))


def columns(x: jax.Array) -> jax.Array:
    """Return the column [R, P] of each logit in its piece."""
    return lax.broadcasted_iota(jnp.int32, x.shape, 1)


def only(x: jax.Array, count: int | jax.Array) -> jax.Array:
    """Return a piece's logits without those from column `count` on, which weigh nothing then: NOTHING is in their place."""
    return jnp.where(columns(x) < count, x, NOTHING)


def statistics(x: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Return the maximum and the sum of exponentials, relative to it, of logits along an axis."""
    maximum = x.max(axis)
    return maximum, jnp.exp(x - jnp.expand_dims(maximum, axis)).sum(axis)


def merged(maxima: jax.Array, totals: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the statistics [R] of all logits from those of their parts [parts, R]."""
    maximum = maxima.max(0)
    return maximum, (totals * jnp.exp(maxima - maximum)).sum(0)


def log_sum_exp(maxima: jax.Array, totals: jax.Array) -> jax.Array:
    """Return the log-sum-exp [R] of all logits from the statistics of their parts [parts, R]."""
    maximum, total = merged(maxima, totals)
    return maximum + jnp.log(total)


def at_target(x: jax.Array, target: jax.Array) -> jax.Array:
    """Return a piece's logits, 0 but for the target's: their sum along a row is the target's logit, or 0 if the piece does not have it."""
    return jnp.where(columns(x) == target[:, None], x, 0.0)


def d_logits(x: jax.Array, target: jax.Array, total: jax.Array, d_logprob: jax.Array, d_total: jax.Array) -> jax.Array:
    """Return the gradient [R, P] of a piece's logits: of logprob = x[target] - total and of total, the log-sum-exp of all pieces."""
    weights = (d_total - d_logprob)[:, None] * jnp.exp(x - total[:, None])
    return weights + jnp.where(columns(x) == target[:, None], d_logprob[:, None], 0.0)
