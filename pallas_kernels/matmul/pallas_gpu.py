"""The product for GPUs (Pallas with the Triton lowering): a program loops over the terms of one tile's sum, its accumulator in registers.

The tile depends on the number of columns alone, so every row goes through the same instructions in the same order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tiles
from pallas_kernels.compat import interpreted
from pallas_kernels.matmul import pallas

_WIDE = 4096


def _kernel(a_ref, b_ref, out_ref, *, axes, shape, tile):
    num_rows, terms, columns = shape
    row = pl.program_id(0) * tile.rows + jnp.arange(tile.rows)
    column = pl.program_id(1) * tile.columns + jnp.arange(tile.columns)
    exact = (
        None if a_ref.dtype == jnp.bfloat16 else lax.Precision.HIGHEST if interpreted("gpu") else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    )
    # A mask stands only where a tile hangs over.
    inside_rows = (row < num_rows) if num_rows % tile.rows else None
    inside_columns = (column < columns) if columns % tile.columns else None

    def load(ref, axis, inside, part):
        """A tile with the sum's axis at `axis`, zero outside of the matrix."""
        window = pl.ds(part * tile.depth, tile.depth)
        term = part * tile.depth + jnp.arange(tile.depth)
        masks = [jnp.expand_dims(term < terms, 1 - axis)] if terms % tile.depth else []
        masks += [] if inside is None else [jnp.expand_dims(inside, axis)]
        mask = functools.reduce(jnp.logical_and, masks) if masks else None
        return triton.load(ref.at[:, window] if axis else ref.at[window, :], mask=mask, other=None if mask is None else 0)

    def add_part(part, total):
        a, b = load(a_ref, axes[0], inside_rows, part), load(b_ref, axes[1], inside_columns, part)
        return total + lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), precision=exact, preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, pl.cdiv(terms, tile.depth), add_part, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    masks = [
        inside[:, None] if axis == 0 else inside[None] for axis, inside in enumerate((inside_rows, inside_columns)) if inside is not None
    ]
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), total.shape) if masks else None
    triton.store(out_ref, total.astype(out_ref.dtype), mask=mask)


def product(a, b, axes, dtype, aligned):
    """Return the product of two matrices over axis axes[0] of a and axes[1] of b; its tile depends on b alone if aligned."""
    (num_rows, terms), columns = (a.shape[1 - axes[0]], a.shape[axes[0]]), b.shape[1 - axes[1]]
    table = tiles.MATMUL_GPU_NARROW if aligned and columns < _WIDE else tiles.MATMUL_GPU
    tile = tiles.of(table if a.dtype == jnp.bfloat16 else tiles.MATMUL_GPU_FP32)
    a_spec = pl.BlockSpec((tile.rows, terms), lambda m, n: (m, 0)) if axes[0] else pl.BlockSpec((terms, tile.rows), lambda m, n: (0, m))
    b_spec = (
        pl.BlockSpec((tile.columns, terms), lambda m, n: (n, 0)) if axes[1] else pl.BlockSpec((terms, tile.columns), lambda m, n: (0, n))
    )
    out = jax.ShapeDtypeStruct((num_rows, columns), dtype)
    return pl.pallas_call(
        functools.partial(_kernel, axes=axes, shape=(num_rows, terms, columns), tile=tile),
        name="matmul_" + {(1, 0): "forward", (1, 1): "dx", (0, 0): "dw"}[axes],
        grid=(pl.cdiv(num_rows, tile.rows), pl.cdiv(columns, tile.columns)),
        in_specs=[a_spec, b_spec],
        out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda m, n: (m, n)),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * terms * columns,
            bytes_accessed=a.size * a.dtype.itemsize + b.size * b.dtype.itemsize + out.size * out.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpreted("gpu"),
    )(a, b)


matmul = functools.partial(pallas.matmul, product)
