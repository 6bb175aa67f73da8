"""y[m, n] = sum_k a[m, k] b[n, k] of the numbers that quantised operands stand for, value * scale of the entry's group."""

import jax
import jax.numpy as jnp

from pallas_kernels.scaled_matmul.quantized import GROUP, Quantized


def dequantize(x: Quantized) -> jax.Array:
    """Return the numbers [R, K], in the precision of the scales (at least fp32)."""
    rows, depth = x.values.shape
    dtype = jnp.promote_types(x.scales.dtype, jnp.float32)
    scales = jnp.repeat(x.scales, GROUP, axis=0)[:depth]
    if scales.shape[1] < rows:
        scales = jnp.repeat(scales, GROUP, axis=1)[:, :rows]
    return x.values.astype(dtype) * scales.T.astype(dtype)


def scaled_matmul(a: Quantized, b: Quantized) -> jax.Array:
    """Return the product [M, N] of a [M, K] and b [N, K]."""
    return jnp.einsum("mk,nk->mn", dequantize(a), dequantize(b), precision="highest")
