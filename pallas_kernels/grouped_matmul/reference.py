"""y[i] = x[i] w[group[i]]; rows of group E (none) give zeros. combined[n] = sum_a weights[n, a] y[n, a]."""

import jax
import jax.numpy as jnp


def grouped_matmul(x: jax.Array, w: jax.Array, group: jax.Array) -> jax.Array:
    """Return [M, F] for rows x [M, D], matrices w [E, D, F] and the group of each row [M], in the inputs' precision (at least fp32)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    picked = jnp.where((group < w.shape[0])[:, None, None], w[jnp.minimum(group, w.shape[0] - 1)], 0)
    return jnp.einsum("md,mdf->mf", x.astype(dtype), picked.astype(dtype), precision="highest")


def combine(slots: jax.Array, weights: jax.Array) -> jax.Array:
    """Return [N, F], the weighted sum of slots [N, A, F], in at least fp32."""
    return jnp.einsum("naf,na->nf", slots.astype(jnp.promote_types(slots.dtype, jnp.float32)), weights, precision="highest")
