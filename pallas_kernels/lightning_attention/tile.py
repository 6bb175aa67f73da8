"""Lightning attention on one chunk of C positions, for any number of (batch, head) pairs in front.

With i, j counted inside the chunk, g = log_decay and S the state that enters the chunk:

    O      = K**-0.5 [ (Q K^T * M) V + diag(a_q) Q S ]      M_ij = exp(g (i - j)) for i >= j, else 0;  a_q(i) = exp(g (i + 1))
    S_next = exp(g C) S + (diag(a_k) K)^T V                 a_k(j) = exp(g (C - 1 - j))

The exponent is masked and never split, so a strong decay cannot overflow. `chunk_kv` is parallel over chunks, `fold` is the only
sequential part, and `rows` gives the output of any rows of the chunk: training, prefill and decode call the same three.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dot_cast, dot_operand


def decay_powers(log_decay: jax.Array, chunk_size: int) -> jax.Array:
    """Return exp(g n) for n = 0..C, [H, C + 1], fp32: every weight of a chunk is one of these, so all modes select the same bits."""
    return jnp.exp(log_decay.astype(jnp.float32)[:, None] * jnp.arange(chunk_size + 1, dtype=jnp.float32))


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum of two operands (see `compat.dot_operand`, `compat.dot_cast`), accumulated and returned in fp32."""
    return jnp.einsum(equation, dot_operand(a), dot_operand(b), preferred_element_type=jnp.float32)


def chunk_kv(k: jax.Array, v: jax.Array, powers: jax.Array) -> jax.Array:
    """Return what the chunk adds to the state, [B, H, K, V] fp32, from k [B, H, C, K] and v [B, H, C, V]."""
    weights = powers[:, -2::-1, None]  # exp(g (C - 1 - j))
    k = dot_cast(k.astype(jnp.float32) * weights, k.dtype)
    return product("bhck,bhcv->bhkv", k, v)


def fold(state: jax.Array, kv: jax.Array, powers: jax.Array) -> jax.Array:
    """Return the state one chunk later, [B, H, K, V] fp32."""
    return powers[:, -1, None, None] * state + kv


def rows(q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array, powers: jax.Array, first: jax.Array) -> jax.Array:
    """Return the output rows [B, H, R, V] fp32 of q [B, H, R, K], which are rows `first` ([B] or [1]) and on of the chunk."""
    chunk_size, size = k.shape[2], q.shape[-1]
    row = first[:, None] + jnp.arange(q.shape[2])  # [B, R]
    distance = row[:, :, None] - jnp.arange(chunk_size)  # [B, R, C]
    # Weights by selection from the same fp32 table, [B, H, R, C]; rows past the chunk's end are padding of the caller's.
    mask = jnp.where((distance >= 0)[:, None], jnp.moveaxis(powers[:, jnp.clip(distance, 0, chunk_size)], 0, 1), 0.0)
    query_weights = jnp.moveaxis(powers[:, jnp.minimum(row + 1, chunk_size)], 0, 1)[..., None]  # [B, H, R, 1]
    scores = dot_cast(product("bhrk,bhck->bhrc", q, k) * mask, q.dtype)
    inside = product("bhrc,bhcv->bhrv", scores, v)
    before = product("bhrk,bhkv->bhrv", q, dot_cast(state, q.dtype))
    return size**-0.5 * (inside + query_weights * before)
