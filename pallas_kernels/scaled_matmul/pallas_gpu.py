"""The scaled product for Hopper GPUs: Pallas with the Triton lowering, on FP8 `wgmma` (see `triton_dot`).

A program computes one tile of the result in a loop over the groups of K, the accumulator in registers. The scales of the next group are
loaded a turn ahead by hand, as Triton pipelines the operands of a product only. Both operands are K-major, as FP8 `wgmma` wants them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels import tiles
from pallas_kernels.compat import interpreted
from pallas_kernels.scaled_matmul import tile
from pallas_kernels.scaled_matmul.quantized import GROUP
from pallas_kernels.triton_dot import dot, fma


def _kernel(a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref):
    num_groups, of_blocks = b_scales_ref.shape[0], b_scales_ref.shape[1] == 1

    def scales(group):
        return a_scales_ref[group, :][:, None], b_scales_ref[group, 0] if of_blocks else b_scales_ref[group, :][None]

    def turn(group, carry):
        acc, now = carry
        following = scales(jnp.minimum(group + 1, num_groups - 1))
        depth = pl.ds(group * GROUP, GROUP)
        acc = tile.step(acc, a_ref[:, depth], b_ref[:, depth], *now, product=lambda a, b: dot(a, b.T), multiply_add=fma)
        return acc, following

    acc = jnp.zeros(out_ref.shape, jnp.float32)
    acc, _ = lax.fori_loop(0, num_groups, turn, (acc, scales(0)))
    out_ref[...] = acc.astype(out_ref.dtype)


def _place(program, num_rows, num_columns, band):
    """The tile of a program: down a band of tiles of rows, then a column on. Those at work together share operands in the L2 cache."""
    first = program // (band * num_columns) * band
    inside, height = program % (band * num_columns), jnp.minimum(num_rows - first, band) if num_rows % band else band
    return first + inside % height, inside // height


def scaled_matmul(a, b, *, out_dtype, aligned):
    """See `api.scaled_matmul`; a row does not see how many there are, so it is always aligned."""
    del aligned
    rows, columns = a.values.shape[0], b.values.shape[0]
    size = tiles.of(tiles.SCALED_MATMUL_GPU)
    a, b = tile.padded(a, size.rows), tile.padded(b, size.columns)
    num_rows, num_columns, num_groups = a.values.shape[0] // size.rows, b.values.shape[0] // size.columns, a.scales.shape[0]
    depth, of_blocks = a.values.shape[1], b.scales.shape[1] < b.values.shape[0]
    if max(x.size for x in (a.values, b.values)) >= 2**31 or a.values.shape[0] * b.values.shape[0] >= 2**31:
        raise NotImplementedError("Pallas' Triton lowering counts an array's entries in 32 bits")
    place = functools.partial(_place, num_rows=num_rows, num_columns=num_columns, band=size.band)
    out = pl.pallas_call(
        _kernel,
        grid=(num_rows * num_columns,),
        in_specs=[
            pl.BlockSpec((size.rows, depth), lambda i: (place(i)[0], 0)),
            pl.BlockSpec((num_groups, size.rows), lambda i: (0, place(i)[0])),
            pl.BlockSpec((size.columns, depth), lambda i: (place(i)[1], 0)),
            pl.BlockSpec((num_groups, 1 if of_blocks else size.columns), lambda i: (0, place(i)[1])),
        ],
        out_specs=pl.BlockSpec((size.rows, size.columns), place),
        out_shape=jax.ShapeDtypeStruct((a.values.shape[0], b.values.shape[0]), out_dtype),
        compiler_params=pltriton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        cost_estimate=tile.cost(a, b, out_dtype),
        interpret=interpreted("gpu"),
        name="scaled_matmul",
    )(a.values, a.scales, b.values, b.scales)
    return out[:rows, :columns]
