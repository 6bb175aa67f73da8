"""Grouped FP8 products: the op on quantised operands, and the differentiable product built on it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import Groups, gather_groups
from pallas_kernels.grouped_scaled_matmul import pallas_gpu, pallas_tpu, xla
from pallas_kernels.scaled_matmul import Product, Quantized, QuantizedRows, quantize, quantize_rows
from pallas_kernels.scaled_matmul.quantized import GROUP, as_bytes, as_values, columns_of, gradient_in_fp8, result_dtype

IMPLEMENTATIONS = {"xla": xla.product, "pallas_tpu": pallas_tpu.product, "pallas_gpu": pallas_gpu.product}
GRADIENT_IMPLEMENTATIONS = {"xla": xla.weight_gradient, "pallas_tpu": pallas_tpu.weight_gradient, "pallas_gpu": pallas_gpu.weight_gradient}


def quantize_groups(w: Float[Array, "E K N"], *, transpose: bool = True, power_of_two: bool = False) -> Quantized:
    """Return each group's matrix in FP8 by blocks of 128 x 128, to be contracted along K: [E, N, K], scales [E, K / 128, N / 128].

    Not transposed it is contracted along N, as for the gradient of rows: [E, K, N], scales [E, N / 128, K / 128].
    """
    return jax.vmap(functools.partial(quantize, block=True, transpose=transpose, power_of_two=power_of_two))(w)


def gather_quantized(x: QuantizedRows, groups: Groups, num_slots: int) -> QuantizedRows:
    """Return tokens [N, K] in their groups' tiles, as `gather_groups` does: a token is quantised once, not once for each of its slots.

    Raises ValueError for tokens that have a gradient but are not plain (too).
    """
    return x.moved(lambda rows: gather_groups(rows, groups, num_slots))


def grouped_scaled_matmul(
    a: Quantized,
    b: Quantized,
    tiles: Int[Array, " E"],
    *,
    row_tile: int,
    out_dtype: DTypeLike = jnp.float32,
    implementation: str = "auto",
) -> Float[Array, "rows N"]:
    """Return each row of a [rows, K] times the matrix of its group, b [E, N, K], accumulated in fp32 and cast once.

    a has a scale for each row and 128 columns, b one for each 128 x 128 block of a matrix. Rows lie as in `grouped_matmul`, and a row
    has the same bits whatever other rows there are. Sums over 128 columns are the matrix unit's; they are scaled and added up in fp32.
    Not differentiable: see `fp8_grouped_matmul`.
    """
    (rows, depth), (num_groups, columns) = a.values.shape, b.values.shape[:2]
    groups = -(-depth // GROUP)
    wanted = (groups, rows), (num_groups, groups, -(-columns // GROUP)), (num_groups, columns, depth)
    if (a.scales.shape, b.scales.shape, b.values.shape) != wanted:
        raise ValueError(
            f"a is {a.values.shape} with scales {a.scales.shape}, b {b.values.shape} with scales {b.scales.shape}; "
            f"expected scales {wanted[0]}, b {wanted[2]} with scales {wanted[1]}"
        )
    return dispatch.call("grouped_scaled_matmul", IMPLEMENTATIONS, implementation, a, b, tiles, row_tile=row_tile, out_dtype=out_dtype)


def grouped_weight_gradient(x: Quantized, dy: Quantized, tiles, *, row_tile: int, out_dtype: DTypeLike, implementation: str = "auto"):
    """Return the sum of x^T dy [E, D, F] over each group's rows, for columns x [D, rows] and dy [F, rows], which are contracted along rows.

    Their scales are one for 128 rows, counted from the first one, and a column; such rows may be several groups'.
    """
    table = GRADIENT_IMPLEMENTATIONS
    return dispatch.call("grouped_weight_gradient", table, implementation, x, dy, tiles, row_tile=row_tile, out_dtype=out_dtype)


def fp8_grouped_matmul(
    x: Float[Array, "rows K"] | QuantizedRows,
    w: Float[Array, "E K N"],
    tiles: Int[Array, " E"],
    *,
    row_tile: int,
    out_dtype: DTypeLike | None = None,
    power_of_two: bool = False,
    returns_fp8: bool = False,
    implementation: str = "auto",
) -> Float[Array, "rows N"] | Product:
    """Return `grouped_matmul(x, w, tiles)` of operands quantised to FP8: x per row and 128 columns, w per 128 x 128 block.

    Its gradients are FP8 products as well, as those of `scaled_matmul.fp8_matmul`: dx of dy by rows and the forward's blocks of w, dw of
    x and dy quantised along the rows. The forward keeps x in FP8 only, and w as it is. Rows of padding must be zero, as `gather_groups` and
    `gather_quantized` leave them. x may be in FP8 already, and the gradient come back so, as for `fp8_matmul`.
    """
    rows = quantize_rows(x, power_of_two=power_of_two)
    dtype = result_dtype(rows, out_dtype)
    operands = rows.carrier, *lax.stop_gradient((rows.quantized, rows.columns and as_bytes(rows.columns))), w, tiles
    y: Any = _fp8(*operands, row_tile, dtype, power_of_two, returns_fp8, implementation)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def _fp8(x, rows, columns, w, tiles, row_tile, out_dtype, power_of_two, returns_fp8, implementation):
    """The product of `rows` and w; x, their carrier, and their columns are there for the gradients."""
    del x, columns
    blocks = quantize_groups(w, power_of_two=power_of_two)
    y = grouped_scaled_matmul(rows, blocks, tiles, row_tile=row_tile, out_dtype=out_dtype, implementation=implementation)
    return Product.of(y) if returns_fp8 else y


def _forward(x, rows, columns, w, tiles, *how):
    return _fp8(x, rows, columns, w, tiles, *how), (columns_of(x, columns, how[2]), w, tiles, jnp.zeros(0, x.dtype))


def _backward(row_tile, out_dtype, power_of_two, returns_fp8, implementation, residuals, dy):
    columns, w, tiles, like = residuals
    how = {"row_tile": row_tile, "implementation": implementation}
    dy_rows, dy_columns = gradient_in_fp8(dy, power_of_two)
    dx = grouped_scaled_matmul(dy_rows, quantize_groups(w, transpose=False, power_of_two=power_of_two), tiles, out_dtype=like.dtype, **how)
    return dx, None, None, grouped_weight_gradient(as_values(columns), dy_columns, tiles, out_dtype=w.dtype, **how), None


_fp8.defvjp(_forward, _backward)
