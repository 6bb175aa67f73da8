"""The scaled product for Hopper GPUs by Mosaic GPU: clusters of programs share the tiles that TMA brings.

A product in FP8 is bound by what its programs read through the L2 cache, and a larger tile than 128 x 128 does not fit in registers twice:
as sum, and as one group's product, which is scaled and added. So of a cluster those programs that want the same tile of an operand fetch a
part each, for all of them. One warpgroup of a program loads; two have 64 rows each: while one scales, the other multiplies.

It stands beside `pallas_gpu` and is chosen by name only: no GPU has run it yet.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles
from pallas_kernels.compat import INTERPRETS_CLUSTERS, device_kind, interpreted, mosaic_gpu_interpreter, mosaic_gpu_load
from pallas_kernels.scaled_matmul import tile
from pallas_kernels.scaled_matmul.quantized import GROUP, Quantized

_LOADER_REGISTERS = 40
_SWIZZLE = 128
"""Bytes of a row of shared memory that matrix instructions and TMA permute."""


def _swizzled(dtype: Any) -> tuple[Any, ...]:
    return plgpu.TilingTransform((8, _SWIZZLE // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(_SWIZZLE)


def _kernel(a, a_scales, b, b_scales, out, *, size: tiles.ScaledMatmulMosaic, grid: tuple[int, int], turned: bool):
    """One program's tile [2 rows, columns] of the result; `turned`: b is [K, N] (see `INTERPRETS_CLUSTERS`)."""
    num_steps, of_blocks = a.shape[1] // GROUP, b_scales.shape[1] < out.shape[1]
    height = 2 * size.rows
    cluster = plgpu.planar_snake(lax.axis_index("cluster"), grid, 0, size.band)
    row, column = (at * n + lax.axis_index(axis) for at, n, axis in zip(cluster, size.cluster, ("row", "column"), strict=True))
    rows, columns = pl.ds(row * height, height), pl.ds(column * size.columns, size.columns)
    group = lax.axis_index("group")
    own, own_rows = (pl.ds(first + group * size.rows, size.rows) for first in (0, row * height))

    def scales(step) -> tuple[jax.Array, jax.Array]:
        """Those of the program's own rows, and of its columns' block or of each column."""
        load = (lambda ref: ref[...]) if interpreted("gpu") else mosaic_gpu_load
        return load(a_scales.at[step, own_rows]), b_scales[step, column] if of_blocks else load(b_scales.at[step, columns])

    def pipeline(body, context):
        along = lambda axis: (axis,) if size.cluster[("row", "column").index(axis)] > 1 else ()
        of_b: Any = {"collective_axes": along("row")}
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(num_steps,),
            memory_registers=_LOADER_REGISTERS,
            in_specs=[
                plgpu.BlockSpec((height, GROUP), lambda step: (0, step), transforms=_swizzled(a.dtype), collective_axes=along("column")),
                plgpu.BlockSpec((GROUP, size.columns), lambda step: (step, 0), **of_b)
                if turned
                else plgpu.BlockSpec((size.columns, GROUP), lambda step: (0, step), transforms=_swizzled(b.dtype), **of_b),
            ],
            wg_axis="group",
            num_compute_wgs=2,
            max_concurrent_steps=size.stages,
            compute_context=context,
        )

    def turn(index, a_tile, b_tile, carry):
        (step,), (total, (of_rows, of_columns)) = index, carry

        def product(sum_ref):
            plgpu.wgmma(sum_ref, a_tile.at[own], b_tile if turned else plgpu.transpose_ref(b_tile, (1, 0)))
            return sum_ref[...]

        following = scales(jnp.minimum(step + 1, num_steps - 1))  # a turn ahead: to load them takes as long as the product
        accumulator = plgpu.ACC(total.shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        one_group = pl.run_scoped(product, accumulator)
        spread = lambda x, axis: lax.broadcast_in_dim(x, total.shape, (axis,))
        both = spread(of_rows * of_columns, 0) if of_blocks else spread(of_rows, 0) * spread(of_columns, 1)
        return tile.multiply_add(one_group, both, total), following

    def whole(allocations, out_tile):
        def context(run):
            total, _ = run((jnp.zeros((size.rows, size.columns), jnp.float32), scales(0)))
            out_tile[own] = total.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile.at[own], out.at[own_rows, columns])
            plgpu.wait_smem_to_gmem(0)

        pipeline(turn, context)(a.at[rows], b.at[:, columns] if turned else b.at[columns], allocations=allocations)

    of_no_effect = lambda *_: None
    allocations = pipeline(of_no_effect, of_no_effect).get_allocations(a, b)
    out_tile = plgpu.SMEM((height, size.columns), out.dtype, transforms=_swizzled(out.dtype))
    pl.run_scoped(whole, allocations, out_tile, collective_axes="group")


def _padded(b: Quantized, columns: int) -> Quantized:
    """B of whole tiles, with a scale for each block or row there is then."""
    a_row, b = b.scales.shape[1] == b.values.shape[0], tile.padded(b, columns)
    missing = 0 if a_row else b.values.shape[0] // GROUP - b.scales.shape[1]
    return b._replace(scales=jnp.pad(b.scales, ((0, 0), (0, missing))))


def scaled_matmul(a, b, *, out_dtype, aligned):
    """See `api.scaled_matmul`; a row does not see how many there are, so it is always aligned."""
    del aligned
    num_rows, num_columns = a.values.shape[0], b.values.shape[0]
    if not interpreted("gpu") and device_kind() != "h200":
        raise NotImplementedError(f"the kernel's instructions are Hopper's, and this is a {device_kind()}")
    size, turned = tiles.of(tiles.SCALED_MATMUL_MOSAIC), interpreted("gpu") and not INTERPRETS_CLUSTERS
    height, width = 2 * size.rows * size.cluster[0], size.columns * size.cluster[1]
    a, b = tile.padded(a, height), _padded(b, width)
    grid = a.values.shape[0] // height, b.values.shape[0] // width
    out = plgpu.kernel(
        functools.partial(_kernel, size=size, grid=grid, turned=turned),
        out_type=jax.ShapeDtypeStruct((a.values.shape[0], b.values.shape[0]), out_dtype),
        grid=(grid[0] * grid[1],),
        grid_names=("cluster",),
        cluster=size.cluster,
        cluster_names=("row", "column"),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="scaled_matmul_mosaic",
        interpret=mosaic_gpu_interpreter() if interpreted("gpu") else None,
    )(a.values, a.scales, b.values.T if turned else b.values, b.scales)
    return out[:num_rows, :num_columns]
