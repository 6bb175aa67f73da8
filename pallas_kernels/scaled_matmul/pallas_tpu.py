"""The scaled product for TPUs (Mosaic): a grid over tiles of the result and groups of K, the accumulator in VMEM.

Before tpu7x the matrix unit does not know e4m3fn, and operands are upcast to bf16 in the kernel. That takes two thirds of the vector
operations that promoting a 1024 x 1024 product takes, and more for smaller tiles. Rows and columns past the result's edge are computed
from whatever stands there and not written; K is padded to whole groups.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles
from pallas_kernels.compat import interpreted
from pallas_kernels.scaled_matmul import tile
from pallas_kernels.scaled_matmul.quantized import GROUP


def _kernel(a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref, acc_ref):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    for group in range(a_ref.shape[1] // GROUP):
        a, b = (tile.upcast(ref[:, group * GROUP : (group + 1) * GROUP]) for ref in (a_ref, b_ref))
        acc_ref[...] = tile.step(acc_ref[...], a, b, a_scales_ref[group, 0][:, None], b_scales_ref[group])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def scaled_matmul(a, b, *, out_dtype, aligned):
    """See `api.scaled_matmul`; aligned, a tile has as many rows however many there are."""
    rows, columns = a.values.shape[0], b.values.shape[0]
    a, b_scales = tile.padded(a), tile.column_scales(b)
    b = tile.padded(b)
    depth = a.values.shape[1]
    size = tiles.of(tiles.SCALED_MATMUL_TPU)
    whole_groups = lambda length: pl.cdiv(length, GROUP) * GROUP
    tile_m = GROUP if aligned else min(size.rows, whole_groups(rows))
    tile_n = min(size.columns, whole_groups(columns))
    groups = tile.divisor(depth // GROUP, size.depth // GROUP)
    tile_k = groups * GROUP
    return pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(rows, tile_m), pl.cdiv(columns, tile_n), depth // tile_k),
        in_specs=[
            pl.BlockSpec((tile_m, tile_k), lambda m, n, k: (m, k)),
            pl.BlockSpec((groups, 1, tile_m), lambda m, n, k: (k, 0, m)),
            pl.BlockSpec((tile_n, tile_k), lambda m, n, k: (n, k)),
            pl.BlockSpec((groups, 1, tile_n), lambda m, n, k: (k, 0, n)),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda m, n, k: (m, n)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), out_dtype),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), disable_bounds_checks=True, vmem_limit_bytes=size.vmem
        ),
        cost_estimate=tile.cost(a, b, out_dtype),
        interpret=interpreted("tpu"),
        name="scaled_matmul",
    )(a.values, a.scales[:, None], b.values, b_scales[:, None])
