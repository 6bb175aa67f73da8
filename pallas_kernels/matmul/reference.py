"""y[n, f] = sum_d x[n, d] w[d, f]."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return the product of x [..., D] and w [D, F], in the inputs' precision (at least fp32)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...d,df->...f", x.astype(dtype), w.astype(dtype), precision="highest")
