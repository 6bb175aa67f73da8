"""y[n, f] = sum_d x[n, d] w[d, f], in fp32."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return the fp32 product of x [..., D] and w [D, F]."""
    return jnp.einsum("...d,df->...f", x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
