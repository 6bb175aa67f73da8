"""Lightning attention on one chunk of C positions.

With i, j counted inside the chunk, g = log_decay and S the state that enters the chunk:

    O      = (Q K^T * M) V + diag(a_q) Q S          M_ij = K**-0.5 exp(g (i - j)) for i >= j, else 0;  a_q(i) = K**-0.5 exp(g (i + 1))
    S_next = exp(g C) S + K^T diag(a_k) V           a_k(j) = exp(g (C - 1 - j))

and with dO, and dS the gradient of S_next (P = Q K^T * M, dP = dO V^T * M):

    dQ = dP K + diag(a_q) dO S^T        dV = P^T dO + diag(a_k) K dS
    dK = dP^T Q + diag(a_k) V dS^T      dS_prev = exp(g C) dS + Q^T diag(a_q) dO

The exponent is masked and never split, so a strong decay cannot overflow. `fold` is the only sequential part, and `rows` gives the output
of any rows of the chunk: training, prefill and decode call these two, in plain JAX and in the kernels. A product that is added to something
starts from it (`acc`): on a GPU that is the matrix unit's accumulator, and the sum needs no registers of its own. Arrays may have any equal
axes in front ([..., C, K]); each statement does all of them before the next one, which keeps a TPU's matrix units busy over several heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dot_cast, dot_general


class Weights(NamedTuple):
    """What multiplies in a chunk, fp32: M [H, C, C], a_q and a_k [H, C, 1], exp(g C) [H, 1, 1]."""

    mask: jax.Array
    query: jax.Array
    key: jax.Array
    whole: jax.Array


def decay_powers(log_decay: jax.Array, chunk_size: int) -> jax.Array:
    """Return exp(g n) for n = 0..C, [H, C + 1], fp32: every weight of a chunk is one of these, so all modes select the same bits."""
    return jnp.exp(log_decay.astype(jnp.float32)[:, None] * jnp.arange(chunk_size + 1, dtype=jnp.float32))


def weights(powers: jax.Array, key_size: int) -> Weights:
    """Return the weights of a whole chunk from the powers of the decay [H, C + 1]."""
    index, scaled = jnp.arange(powers.shape[1] - 1), key_size**-0.5 * powers
    distance = index[:, None] - index
    mask = jnp.where(distance >= 0, scaled[:, jnp.clip(distance, 0)], 0.0)
    return Weights(mask, scaled[:, 1:, None], powers[:, -2::-1, None], powers[:, -1, None, None])


def row_weights(powers: jax.Array, key_size: int, first: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Return M [B, H, R, C] and a_q [B, H, R, 1] of rows `first` [B] and on; those past the chunk's end are padding of the caller's."""
    chunk_size, scaled = powers.shape[1] - 1, key_size**-0.5 * powers
    row = first[:, None] + jnp.arange(num_rows)  # [B, R]
    distance = row[:, :, None] - jnp.arange(chunk_size)  # [B, R, C]
    mask = jnp.where((distance >= 0)[:, None], jnp.moveaxis(scaled[:, jnp.clip(distance, 0, chunk_size)], 0, 1), 0.0)
    return mask, jnp.moveaxis(scaled[:, jnp.minimum(row + 1, chunk_size)], 0, 1)[..., None]


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0), acc: jax.Array | None = None) -> jax.Array:
    """Return the product of matrices [..., M, N] over axis axes[0] of a and axes[1] of b, added to `acc`, in fp32."""
    lead = a.ndim - 2
    batch = tuple(range(lead))
    y = dot_general(a, b, ((lead + axes[0],), (lead + axes[1],)), (batch, batch))
    return y if acc is None else acc + y


def fold(state: jax.Array, k: jax.Array, v: jax.Array, key_weights: jax.Array, whole: jax.Array, dot: Callable = product) -> jax.Array:
    """Return the state one chunk later, [..., K, V] fp32, from k [..., C, K] and v [..., C, V].

    With q, dO and a_q in the places of k, v and a_k it is the gradient of the state, one chunk earlier.
    """
    return dot(k, dot_cast(v.astype(jnp.float32) * key_weights, v.dtype), (0, 0), whole * state)


def rows(
    q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array, mask: jax.Array, query_weights: jax.Array, dot: Callable = product
) -> jax.Array:
    """Return the output rows [..., R, V] fp32 of q [..., R, K], whose rows of M and a_q are given.

    `state` may be in the products' dtype already: it is rounded to it here.
    """
    scores = dot(q, k, (1, 1))
    before = query_weights * dot(q, dot_cast(state, q.dtype), (1, 0))
    return dot(dot_cast(scores * mask, q.dtype), v, (1, 0), before)


def query_gradient(
    k: jax.Array, v: jax.Array, d_out: jax.Array, state: jax.Array, mask: jax.Array, query_weights: jax.Array, dot: Callable = product
) -> jax.Array:
    """Return dQ [..., C, K] fp32, or the columns of it whose k and rows of the state are given."""
    d_scores = dot(d_out, v, (1, 1))
    before = query_weights * dot(d_out, dot_cast(state, k.dtype), (1, 1))
    return dot(dot_cast(d_scores * mask, k.dtype), k, (1, 0), before)


def value_gradient(
    q: jax.Array, k: jax.Array, d_out: jax.Array, d_state: jax.Array, mask: jax.Array, key_weights: jax.Array, dot: Callable = product
) -> jax.Array:
    """Return dV [..., C, V] fp32, or the columns of it whose dO and columns of dS are given.

    `mask` is M^T: P^T is computed as such, since transposing a product's operand costs more.
    """
    scores = dot(k, q, (1, 1))
    after = key_weights * dot(k, dot_cast(d_state, k.dtype), (1, 0))
    return dot(dot_cast(scores * mask, k.dtype), d_out, (1, 0), after)


def key_gradient(
    q: jax.Array, v: jax.Array, d_out: jax.Array, d_state: jax.Array, mask: jax.Array, key_weights: jax.Array, dot: Callable = product
) -> jax.Array:
    """Return dK [..., C, K] fp32, or the columns of it whose q and rows of dS are given; `mask` is M^T, as in `value_gradient`."""
    d_scores = dot(v, d_out, (1, 1))
    after = key_weights * dot(v, dot_cast(d_state, v.dtype), (1, 1))
    return dot(dot_cast(d_scores * mask, v.dtype), q, (1, 0), after)
