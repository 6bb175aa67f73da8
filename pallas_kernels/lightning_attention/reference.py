"""The recurrence of Lightning attention (arXiv 2510.19338, section 2; arXiv 2401.04658):

S_t = exp(g) S_{t-1} + k_t^T v_t        o_t = K**-0.5 q_t S_t
"""

import jax
import jax.numpy as jnp
from jax import lax


def lightning_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array | None = None, reset: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs [B, T, H, V] and the state after the last token [B, H, K, V], in the inputs' precision (at least fp32).

    q and k are [B, T, H, K], v is [B, T, H, V], log_decay (g <= 0) is [H], and reset [B, T] marks tokens that start from a zero state.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v, log_decay = (x.astype(dtype) for x in (q, k, v, log_decay))
    batch, length, heads, size = q.shape
    state = jnp.zeros((batch, heads, size, v.shape[-1]), dtype) if state is None else state.astype(dtype)
    reset = jnp.zeros((batch, length), bool) if reset is None else reset

    def step(state, token):
        q, k, v, reset = token
        state = jnp.where(reset[:, None, None, None], 0, state)
        state = jnp.exp(log_decay)[:, None, None] * state + k[..., :, None] * v[..., None, :]
        return state, size**-0.5 * jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

    state, out = lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, reset)))
    return jnp.moveaxis(out, 0, 1), state
