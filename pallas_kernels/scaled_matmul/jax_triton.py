"""The scaled product for Hopper GPUs as a Triton kernel, called through jax-triton (extra `cuda`): operands come by TMA descriptors.

It stands beside `pallas_gpu` and is chosen by name only. Importing this file needs jax-triton, which brings Triton.
"""

import importlib
from typing import Any

import jax
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pallas_kernels import tiles
from pallas_kernels.compat import platform
from pallas_kernels.scaled_matmul import tile
from pallas_kernels.scaled_matmul.quantized import GROUP

jax_triton: Any = importlib.import_module("jax_triton")  # by name, as type checkers take this file for it


@triton.jit
def _kernel(
    a,
    a_scales,
    b,
    b_scales,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    num_groups: tl.constexpr,
    of_blocks: tl.constexpr,
    depth: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    band: tl.constexpr,
):
    """One tile: a and b are descriptors of [M, K] and [N, K], the rest pointers; tiles and groups are walked as in `pallas_gpu`."""
    program = tl.program_id(0)
    first = program // (band * (N // columns)) * band
    inside, height = program % (band * (N // columns)), min(M // rows - first, band)
    row = (first + inside % height) * rows
    column = inside // height * columns
    row_index = row + tl.arange(0, rows)
    column_index = column + tl.arange(0, columns)
    acc = tl.zeros((rows, columns), tl.float32)
    for group in range(num_groups):
        product = tl.dot(a.load([row, group * depth]), b.load([column, group * depth]).T)
        scales = tl.load(a_scales + group * M + row_index)[:, None]
        if of_blocks:
            scales *= tl.load(b_scales + group * (N // columns) + column // columns)
        else:
            scales = scales * tl.load(b_scales + group * N + column_index)[None, :]
        acc = tl.fma(product, tl.broadcast_to(scales, (rows, columns)), acc)
    place = row_index.to(tl.int64)[:, None] * N + column_index[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty))


def scaled_matmul(a, b, *, out_dtype, aligned):
    """See `api.scaled_matmul`; a row does not see how many there are, so it is always aligned."""
    del aligned
    if platform() != "gpu":
        raise NotImplementedError("jax-triton runs on a GPU only")
    version, name = jax_triton.__version_info__[:3], f"jax-triton {jax_triton.__version__}"
    if version < (0, 4, 0):
        raise NotImplementedError(f"{name} cannot pass tensor descriptors (0.4 can)")
    if version <= (0, 4, 1) and jax.__version_info__ >= (0, 12, 0):
        raise NotImplementedError(f"{name} fails under jit with jax {jax.__version__}")
    rows, columns = a.values.shape[0], b.values.shape[0]
    size = tiles.of(tiles.SCALED_MATMUL_GPU)
    a, b = tile.padded(a, size.rows), tile.padded(b, size.columns)
    shape = a.values.shape[0], b.values.shape[0]
    out = jax_triton.triton_call(
        jax_triton.TensorDescriptor.from_array(a.values, (size.rows, GROUP)),
        a.scales,
        jax_triton.TensorDescriptor.from_array(b.values, (size.columns, GROUP)),
        b.scales,
        kernel=_kernel,
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        grid=(shape[0] // size.rows * (shape[1] // size.columns),),
        num_warps=size.warps,
        num_stages=size.stages,
        M=shape[0],
        N=shape[1],
        num_groups=a.scales.shape[0],
        of_blocks=b.scales.shape[1] < shape[1],
        depth=GROUP,
        rows=size.rows,
        columns=size.columns,
        band=size.band,
    )
    return out[:rows, :columns]
