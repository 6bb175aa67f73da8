"""One group of the scaled product: 128 entries of K of one tile of rows of a and of b.

    acc[m, n] += s_a[m] s_b[n] sum_k a[m, k] b[n, k]

The sum is the matrix unit's; its result is scaled and promoted into the fp32 accumulator once a group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.compat import device_kind, dot_general, platform
from pallas_kernels.scaled_matmul.quantized import GROUP, Quantized


def upcast(x: jax.Array) -> jax.Array:
    """Return e4m3 values as plain JAX and the TPU multiply them: in a type in which they and their products are exact.

    Before tpu7x a TPU's FP8 unit knows other types.
    """
    if platform() == "cpu":
        return x.astype(jnp.float32)
    return x if device_kind() == "tpu7x" else x.astype(jnp.bfloat16)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the fp32 product [M, N] of a [M, 128] and b [N, 128]."""
    return dot_general(a, b, ((1,), (1,)))


def multiply_add(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """Return x y + z."""
    return x * y + z


def step(
    acc: jax.Array,
    a: jax.Array,
    b: jax.Array,
    a_scales: jax.Array,
    b_scales: jax.Array,
    product: Callable = product,
    multiply_add: Callable = multiply_add,
) -> jax.Array:
    """Return the fp32 accumulator [M, N] one group later.

    a is [M, 128] and b [N, 128]; a_scales are [M, 1] and b_scales [1, N], or a scalar where all of b shares one. A backend may bring
    its own instructions.
    """
    return multiply_add(a_scales * b_scales, product(a, b), acc)


def column_scales(b: Quantized) -> jax.Array:
    """Return the scales of b's rows, the product's columns: [K / 128, N], those of blocks repeated."""
    columns = b.values.shape[0]
    return b.scales if b.scales.shape[1] == columns else jnp.repeat(b.scales, GROUP, axis=1)[:, :columns]


def divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def padded(x: Quantized, rows: int = 1) -> Quantized:
    """Return the operand with zeros up to a whole number of `rows` rows and of groups."""
    missing = (-x.values.shape[0] % rows, -x.values.shape[1] % GROUP)
    a_row = x.scales.shape[1] == x.values.shape[0]
    values = jnp.pad(x.values, [(0, n) for n in missing])
    return Quantized(values, jnp.pad(x.scales, ((0, 0), (0, missing[0] if a_row else 0))))


def cost(a: Quantized, b: Quantized, out_dtype: DTypeLike) -> pl.CostEstimate:
    """Return what the product computes and moves at least."""
    rows, depth, columns = *a.values.shape, b.values.shape[0]
    moved = sum(x.size * x.dtype.itemsize for x in (*a, *b)) + rows * columns * jnp.dtype(out_dtype).itemsize
    return pl.CostEstimate(flops=2 * rows * columns * depth, transcendentals=0, bytes_accessed=moved)
