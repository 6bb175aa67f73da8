"""Grouped FP8 products: the op on quantised operands, and the differentiable product built on it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import Groups, moves_of, take_rows
from pallas_kernels.grouped_matmul.xla import sum_rows
from pallas_kernels.grouped_scaled_matmul import pallas_gpu, pallas_tpu, xla
from pallas_kernels.scaled_matmul import Product, Quantized, QuantizedRows, quantize_rows, quantize_weights
from pallas_kernels.scaled_matmul.quantized import (
    GROUP,
    as_bytes,
    as_values,
    blocks_of,
    check_gradient,
    columns_of,
    gradient_in_fp8,
    result_dtype,
)

IMPLEMENTATIONS = {"xla": xla.product, "pallas_tpu": pallas_tpu.product, "pallas_gpu": pallas_gpu.product}
GRADIENT_IMPLEMENTATIONS = {"xla": xla.weight_gradient, "pallas_tpu": pallas_tpu.weight_gradient, "pallas_gpu": pallas_gpu.weight_gradient}


def grouped_scaled_matmul(
    a: Quantized,
    b: Quantized,
    tiles: Int[Array, " E"],
    moves: tuple[Int[Array, " rows"], Int[Array, "tokens A"]] | None = None,
    *,
    row_tile: int,
    out_dtype: DTypeLike = jnp.float32,
    implementation: str = "auto",
) -> Float[Array, "rows N"]:
    """Return each row of a [rows, K] times the matrix of its group, b [E, N, K], accumulated in fp32 and cast once.

    With `moves` (of `grouped_matmul.moves_of`) a is tokens, and the rows are theirs; on a GPU these are not written. a has a
    scale for each row and 128 columns, b one for each 128 x 128 block of a matrix. Rows lie as in `grouped_matmul`, and a row has the same
    bits whatever other rows there are. Sums over 128 columns are the matrix unit's; they are scaled and added up in fp32. Not
    differentiable: see `fp8_grouped_matmul`.
    """
    (rows, depth), (num_groups, columns) = a.values.shape, b.values.shape[:2]
    groups = -(-depth // GROUP)
    wanted = (groups, rows), (num_groups, groups, -(-columns // GROUP)), (num_groups, columns, depth)
    if (a.scales.shape, b.scales.shape, b.values.shape) != wanted:
        raise ValueError(
            f"a is {a.values.shape} with scales {a.scales.shape}, b {b.values.shape} with scales {b.scales.shape}; "
            f"expected scales {wanted[0]}, b {wanted[2]} with scales {wanted[1]}"
        )
    how = {"row_tile": row_tile, "out_dtype": out_dtype}
    return dispatch.call("grouped_scaled_matmul", IMPLEMENTATIONS, implementation, a, b, tiles, moves, **how)


def grouped_weight_gradient(x: Quantized, dy: Quantized, tiles, *, row_tile: int, out_dtype: DTypeLike, implementation: str = "auto"):
    """Return the sum of x^T dy [E, D, F] over each group's rows, for columns x [D, rows] and dy [F, rows], which are contracted along rows.

    Their scales are one for 128 rows, counted from the first one, and a column; such rows may be several groups'.
    """
    table = GRADIENT_IMPLEMENTATIONS
    return dispatch.call("grouped_weight_gradient", table, implementation, x, dy, tiles, row_tile=row_tile, out_dtype=out_dtype)


def fp8_grouped_matmul(
    x: Float[Array, "rows K"] | QuantizedRows,
    w: Float[Array, "E K N"] | Quantized,
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
    x and dy quantised along the rows. The forward keeps x in FP8 only, and w as it is. Rows of padding must be zero, as `gather_groups`
    leaves them. x may be in FP8 already, and the gradient come back so, as for `fp8_matmul`; so may w, without a gradient then.
    """
    rows = quantize_rows(x, power_of_two=power_of_two)
    return _differentiable(rows, w, tiles, None, row_tile, out_dtype, power_of_two, returns_fp8, implementation)


def fp8_gather_grouped_matmul(
    x: Float[Array, "tokens K"] | QuantizedRows,
    w: Float[Array, "E K N"] | Quantized,
    groups: Groups,
    num_slots: int,
    *,
    row_tile: int,
    out_dtype: DTypeLike | None = None,
    power_of_two: bool = False,
    returns_fp8: bool = False,
    implementation: str = "auto",
) -> Float[Array, "rows N"] | Product:
    """Return `fp8_grouped_matmul` of the tokens' rows in their groups' tiles: a token is quantised once, not once for each of its slots.

    On a GPU the rows in FP8 are not written. The gradient of w wants them quantised along the rows: for that they are gathered as they are.
    Raises ValueError for tokens that have a gradient but are not plain (too).
    """
    rows = quantize_rows(x, power_of_two=power_of_two)
    if rows.plain is None and rows.carrier is not None:
        raise ValueError("tokens in FP8 whose layer emitted no plain ones cannot be gathered where there is a gradient")
    moves = moves_of(rows.values.shape[0], groups, num_slots)
    rows = rows._replace(columns=None)  # of 128 tokens: 128 rows of the groups are others
    return _differentiable(rows, w, groups.tiles, moves, row_tile, out_dtype, power_of_two, returns_fp8, implementation)


def _differentiable(rows: QuantizedRows, w, tiles, moves, row_tile, out_dtype, *how) -> Any:
    operands = rows.carrier, *lax.stop_gradient((rows.quantized, rows.columns and as_bytes(rows.columns))), w, tiles, moves
    return _fp8(*operands, row_tile, result_dtype(rows, out_dtype), *how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10))
def _fp8(x, rows, columns, w, tiles, moves, row_tile, out_dtype, power_of_two, returns_fp8, implementation):
    """The product of `rows` and w; x, their carrier, and their columns are there for the gradients."""
    del x, columns
    blocks = blocks_of(w, power_of_two)
    y = grouped_scaled_matmul(rows, blocks, tiles, moves, row_tile=row_tile, out_dtype=out_dtype, implementation=implementation)
    return Product.of(y) if returns_fp8 else y


def _forward(x, rows, columns, w, tiles, moves, *how):
    check_gradient(w)
    move = lambda x: x if moves is None else take_rows(x, *moves)
    kept = columns_of(x, columns, how[2], move), w, tiles, moves, jnp.zeros(0, x.dtype)
    return _fp8(x, rows, columns, w, tiles, moves, *how), kept


def _backward(row_tile, out_dtype, power_of_two, returns_fp8, implementation, residuals, dy):
    columns, w, tiles, moves, like = residuals
    how = {"row_tile": row_tile, "implementation": implementation}
    dy_rows, dy_columns = gradient_in_fp8(dy, power_of_two)
    blocks = quantize_weights(w, transpose=False, power_of_two=power_of_two)
    dx = grouped_scaled_matmul(dy_rows, blocks, tiles, out_dtype=like.dtype, **how)
    dx = dx if moves is None else sum_rows(dx, moves[1])
    return dx, None, None, grouped_weight_gradient(as_values(columns), dy_columns, tiles, out_dtype=w.dtype, **how), None, None


_fp8.defvjp(_forward, _backward)
