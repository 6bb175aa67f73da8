"""o_t = softmax_s(K**-0.5 q_t k_s + mask) v_s over the keys start_t <= s < stop_t."""

import jax
import jax.numpy as jnp


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Return [B, T, H, V] for q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]; a query without keys gives zeros."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    batch, length, heads, size = q.shape
    grouped = q.astype(dtype).reshape(batch, length, k.shape[2], -1, size)
    scores = size**-0.5 * jnp.einsum("btgrk,bsgk->btgrs", grouped, k.astype(dtype), precision="highest")
    key = jnp.arange(k.shape[1])
    seen = (key >= start[..., None]) & (key < stop[..., None])  # [B, T, S]
    seen = seen[:, :, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), 0.0)
    out = jnp.einsum("btgrs,bsgv->btgrv", weights, v.astype(dtype), precision="highest")
    return out.reshape(batch, length, heads, -1)
