"""The product for TPUs: a column block of w stays in VMEM while the rows pass by; a sum too long for that goes through an accumulator.

The tile of a forward product depends on the sizes of w alone, so every row goes through the same instructions in the same order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles
from pallas_kernels.compat import interpreted
from pallas_kernels.matmul import pallas

_LANES = 128


def _kernel(a_ref, b_ref, out_ref, *scratch, axes, num_parts):
    exact = lax.Precision.HIGHEST if a_ref.dtype == jnp.float32 else None  # the matrix unit's own type is bf16
    product = lax.dot_general(
        a_ref[...], b_ref[...], (((axes[0],), (axes[1],)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )
    if num_parts == 1:
        out_ref[...] = product.astype(out_ref.dtype)
        return
    (total_ref,) = scratch
    part = pl.program_id(2)

    @pl.when(part == 0)
    def _first():
        total_ref[...] = product

    @pl.when(part > 0)
    def _later():
        total_ref[...] += product

    @pl.when(part == num_parts - 1)
    def _last():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _blocks(terms: int, columns: int, itemsize: int, tile: tiles.MatmulTpu) -> tuple[int, int]:
    """Return columns and terms of a block of w: all terms if two blocks of a tile's columns or half of them then fit, else parts."""
    for width in (tile.columns, tile.columns // 2):
        if min(width, columns) * terms * itemsize * 2 <= tile.resident:
            return min(width, columns), terms
    parts = range(tile.depth, tile.depth // 4 - 1, -_LANES)
    return min(tile.columns, columns), min(parts, key=lambda part: -(-terms // part) * part)  # the least padding, then the longest


def product(a, b, axes, dtype, aligned):
    """Return the product of two matrices over axis axes[0] of a and axes[1] of b; its tile depends on b alone if aligned."""
    (num_rows, terms), columns = (a.shape[1 - axes[0]], a.shape[axes[0]]), b.shape[1 - axes[1]]
    tile = tiles.of(tiles.MATMUL_TPU)
    width, depth = _blocks(terms, columns, a.dtype.itemsize, tile)
    height = tile.rows if aligned else tile.gradient_rows
    copies = 4 if a.dtype == jnp.float32 else 2  # two blocks of each operand in turn; of fp32, the parts in bf16 that are multiplied, too
    while height > tile.rows and copies * a.dtype.itemsize * depth * (width + height) > tile.vmem // 2:
        height //= 2
    num_parts = -(-terms // depth)
    pad = lambda x, axis: jnp.pad(x, [(0, (num_parts * depth - terms) * (i == axis)) for i in range(2)])  # rows and columns may hang over
    a, b = pad(a, axes[0]), pad(b, axes[1])
    grid = (pl.cdiv(columns, width), pl.cdiv(num_rows, height), num_parts)
    a_spec = pl.BlockSpec((height, depth), lambda n, m, k: (m, k)) if axes[0] else pl.BlockSpec((depth, height), lambda n, m, k: (k, m))
    b_spec = pl.BlockSpec((width, depth), lambda n, m, k: (n, k)) if axes[1] else pl.BlockSpec((depth, width), lambda n, m, k: (k, n))
    out = jax.ShapeDtypeStruct((num_rows, columns), dtype)
    return pl.pallas_call(
        functools.partial(_kernel, axes=axes, num_parts=num_parts),
        name="matmul_" + {(1, 0): "forward", (1, 1): "dx", (0, 0): "dw"}[axes],
        grid=grid,
        in_specs=[a_spec, b_spec],
        out_specs=pl.BlockSpec((height, width), lambda n, m, k: (m, n)),
        out_shape=out,
        scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)] if num_parts > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tile.vmem, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * terms * columns,
            bytes_accessed=a.size * a.dtype.itemsize + b.size * b.dtype.itemsize + out.size * out.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpreted("tpu"),
    )(a, b)


matmul = functools.partial(pallas.matmul, product)
