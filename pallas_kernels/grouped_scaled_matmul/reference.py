"""The grouped product of the numbers that quantised operands stand for, value * scale of the entry's group of 128.

y[i] = a[i] b[group[i]]^T, zeros for rows of group E (none);    gradient[e] = sum over i of group e of columns[:, i] dy[:, i]^T
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import reference
from pallas_kernels.scaled_matmul.quantized import Quantized
from pallas_kernels.scaled_matmul.reference import dequantize


def grouped_scaled_matmul(a: Quantized, b: Quantized, group: jax.Array) -> jax.Array:
    """Return [rows, N] for a [rows, K], matrices b [E, N, K] and the group of each row."""
    return reference.grouped_matmul(dequantize(a), jnp.swapaxes(jax.vmap(dequantize)(b), 1, 2), group)


def weight_gradient(x: Quantized, dy: Quantized, group: jax.Array, num_groups: int) -> jax.Array:
    """Return [E, D, F] for columns x [D, rows] and dy [F, rows] and the group of each row."""
    own = (group == jnp.arange(num_groups)[:, None]).astype(x.scales.dtype)
    return jnp.einsum("dr,er,fr->edf", dequantize(x), own, dequantize(dy), precision="highest")
