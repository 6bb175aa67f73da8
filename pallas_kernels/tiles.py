"""Tile sizes of the kernels: a table an op and backend, by kind of chip; nothing is tuned at run time.

They were chosen with the compile gates (`python -m pallas_kernels.aot`). The first entry stands in for kinds a table lacks; "cpu" is for
interpreted kernels: small, so that tests see several tiles.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from pallas_kernels.compat import device_kind

Tile = TypeVar("Tile")


def of(table: Mapping[str, Tile]) -> Tile:
    """Return the table's entry for the chip the program is being compiled for."""
    return table.get(device_kind(), next(iter(table.values())))


class MatmulTpu(NamedTuple):
    """Rows of a tile (in the forward; in gradients, which need no aligned rows), at most so many columns and terms of a sum.

    `resident`: bytes that two blocks of w may take to stay for all rows, `vmem`: bytes of VMEM in all.
    """

    rows: int
    gradient_rows: int
    columns: int
    depth: int
    resident: int
    vmem: int


_MIB = 1 << 20
MATMUL_TPU = MappingProxyType(
    {
        "v5e": MatmulTpu(128, 512, 1024, 2048, 20 * _MIB, 48 * _MIB),
        "v5p": MatmulTpu(128, 512, 1024, 2048, 20 * _MIB, 48 * _MIB),
        "v6e": MatmulTpu(512, 512, 1024, 2048, 40 * _MIB, 96 * _MIB),
        "cpu": MatmulTpu(16, 16, 128, 128, 64 * 160 * 4 * 2, 48 * _MIB),
    }
)


class MatmulGpu(NamedTuple):
    """A program's tile of the result, the terms of a sum it takes in at a time, its warps and its pipeline's stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


MATMUL_GPU = MappingProxyType({"h200": MatmulGpu(128, 256, 64, 8, 3), "cpu": MatmulGpu(16, 32, 16, 4, 1)})
MATMUL_GPU_NARROW = MappingProxyType({"h200": MatmulGpu(128, 128, 64, 8, 3), "cpu": MatmulGpu(16, 16, 16, 4, 1)})
"""For a forward product with few columns, of which wide tiles would leave most of the chip idle in decoding."""
MATMUL_GPU_FP32 = MappingProxyType({"h200": MatmulGpu(64, 64, 64, 4, 3), "cpu": MatmulGpu(16, 16, 16, 4, 1)})
"""The router's: with tiles of 128 columns training would be 1.3 times as fast, decoding half as fast, and dw too."""


class LightningTpu(NamedTuple):
    """Heads a program computes at most (in decoding), tokens of a grid step at most, cores that share the programs, bytes of VMEM."""

    heads: int
    decode_heads: int
    rows: int
    cores: int
    vmem: int


LIGHTNING_TPU = MappingProxyType(
    {
        "v5e": LightningTpu(8, 16, 256, 1, 64 * _MIB),
        "v5p": LightningTpu(8, 16, 256, 2, 64 * _MIB),
        "v6e": LightningTpu(8, 16, 512, 1, 64 * _MIB),
        "cpu": LightningTpu(2, 2, 128, 1, 64 * _MIB),
    }
)


class ScaledMatmulTpu(NamedTuple):
    """Rows, columns and terms of a sum of a step at most (whole groups of 128), and VMEM for all of it."""

    rows: int
    columns: int
    depth: int
    vmem: int


SCALED_MATMUL_TPU = MappingProxyType(
    {
        "v5p": ScaledMatmulTpu(1024, 1024, 512, 32 * _MIB),
        "v6e": ScaledMatmulTpu(1024, 1024, 512, 32 * _MIB),
        "v5e": ScaledMatmulTpu(1024, 1024, 512, 32 * _MIB),
        "cpu": ScaledMatmulTpu(128, 128, 256, 32 * _MIB),
    }
)


class LightningGpu(NamedTuple):
    """Columns of the state a program has, its warps and its pipeline's stages."""

    block: int
    warps: int
    stages: int


LIGHTNING_GPU = MappingProxyType({"h200": LightningGpu(64, 4, 3), "cpu": LightningGpu(16, 4, 1)})
LIGHTNING_GPU_BACKWARD = MappingProxyType({"h200": LightningGpu(64, 4, 3), "cpu": LightningGpu(32, 4, 1)})
LIGHTNING_GPU_BACKWARD_FEW = MappingProxyType({"h200": LightningGpu(32, 4, 3), "cpu": LightningGpu(16, 4, 1)})
LIGHTNING_GPU_FEW = MappingProxyType({"h200": 132, "cpu": 8})
"""Programs up to which narrower blocks pay, since all are at work at once: the multiprocessors of a chip."""
LIGHTNING_GPU_DECODE = MappingProxyType({"h200": LightningGpu(64, 4, 1), "cpu": LightningGpu(16, 4, 1)})


class ScaledMatmulGpu(NamedTuple):
    """A program's tile of the result (128 columns, so that blocks have one scale), its warps and stages, tiles of rows of a band."""

    rows: int
    columns: int
    warps: int
    stages: int
    band: int


SCALED_MATMUL_GPU = MappingProxyType(
    {
        "h200": ScaledMatmulGpu(rows=128, columns=128, warps=8, stages=3, band=8),
        "cpu": ScaledMatmulGpu(rows=128, columns=128, warps=8, stages=3, band=2),
    }
)


class ScaledMatmulMosaic(NamedTuple):
    """Rows of either warpgroup and columns of a program (128, so that blocks have one scale), the programs of a cluster along rows and
    columns, groups of terms in flight, clusters of rows of a band.
    """

    rows: int
    columns: int
    cluster: tuple[int, int]
    stages: int
    band: int


SCALED_MATMUL_MOSAIC = MappingProxyType(
    {
        "h200": ScaledMatmulMosaic(rows=64, columns=128, cluster=(2, 2), stages=5, band=8),
        "cpu": ScaledMatmulMosaic(rows=64, columns=128, cluster=(1, 1), stages=2, band=2),
    }
)


class CrossEntropyTpu(NamedTuple):
    """Rows of a tile, columns of a block of w at most, bytes that two such blocks may take, and bytes of VMEM in all."""

    rows: int
    columns: int
    resident: int
    vmem: int


CROSS_ENTROPY_TPU = MappingProxyType(
    {
        "v5e": CrossEntropyTpu(128, 1024, 20 * _MIB, 64 * _MIB),
        "v5p": CrossEntropyTpu(128, 1024, 20 * _MIB, 64 * _MIB),
        "v6e": CrossEntropyTpu(512, 1024, 40 * _MIB, 96 * _MIB),
        "cpu": CrossEntropyTpu(128, 256, 20 * _MIB, 64 * _MIB),
    }
)


class CrossEntropyGpu(NamedTuple):
    """A program's tile of logits, the terms of a sum it takes in at a time, its warps and its pipeline's stages.

    `band`: tiles of rows that share columns of w in the L2 cache; `lines`: rows of a program that takes the pieces together.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int
    lines: int


CROSS_ENTROPY_GPU = MappingProxyType(
    {"h200": CrossEntropyGpu(128, 256, 64, 8, 3, band=16, lines=8), "cpu": CrossEntropyGpu(16, 128, 16, 4, 1, band=2, lines=16)}
)
CROSS_ENTROPY_GPU_FP32 = MappingProxyType(
    {"h200": CrossEntropyGpu(64, 128, 32, 4, 3, band=16, lines=8), "cpu": CrossEntropyGpu(16, 128, 16, 4, 1, band=2, lines=16)}
)


class FlashTpu(NamedTuple):
    """Rows of a tile (positions x query heads of a key head), a program's key heads and tiles of queries at most, key blocks of a step.

    `decode_blocks` where there is one tile. `wide`: instead of either, those of a step that takes them in at once: in gradients, and in
    fast numerics; in aligned ones all backends take one block after another. `cores` share the programs, `vmem`: bytes of VMEM in all.
    """

    rows: int
    heads: int
    tiles: int
    blocks: int
    decode_blocks: int
    wide: int
    cores: int
    vmem: int


FLASH_TPU = MappingProxyType(
    {
        "v5e": FlashTpu(128, 4, 2, 4, 8, 8, 1, 64 * _MIB),
        "v5p": FlashTpu(128, 4, 2, 4, 8, 8, 2, 64 * _MIB),
        "v6e": FlashTpu(128, 4, 2, 4, 8, 8, 1, 64 * _MIB),
        "cpu": FlashTpu(32, 2, 2, 2, 3, 3, 1, 64 * _MIB),
    }
)
FLASH_TPU_BACKWARD = MappingProxyType(
    {
        "v5e": FlashTpu(128, 4, 8, 4, 4, 4, 1, 64 * _MIB),
        "v5p": FlashTpu(128, 4, 8, 4, 4, 4, 2, 64 * _MIB),
        "v6e": FlashTpu(128, 4, 8, 4, 4, 4, 1, 64 * _MIB),
        "cpu": FlashTpu(32, 2, 3, 2, 1, 2, 1, 64 * _MIB),
    }
)


class FlashGpu(NamedTuple):
    """Rows of a tile (positions x query heads of a key head), a program's warps, its pipeline's stages, and keys of a turn.

    The forward takes whole key blocks.
    """

    rows: int
    warps: int
    stages: int
    keys: int = 128


FLASH_GPU = MappingProxyType({"h200": FlashGpu(128, 8, 2), "cpu": FlashGpu(32, 4, 1)})
FLASH_GPU_QUERY = MappingProxyType({"h200": FlashGpu(64, 4, 2, keys=64), "cpu": FlashGpu(32, 4, 1, keys=64)})
FLASH_GPU_KEY_VALUE = MappingProxyType({"h200": FlashGpu(32, 4, 2, keys=64), "cpu": FlashGpu(32, 4, 1, keys=64)})
FLASH_GPU_FP32 = MappingProxyType({"h200": FlashGpu(16, 8, 1)})
FLASH_GPU_FP32_QUERY = MappingProxyType({"h200": FlashGpu(16, 8, 1, keys=64)})
FLASH_GPU_FP32_KEY_VALUE = MappingProxyType({"h200": FlashGpu(32, 8, 1, keys=16)})
"""Whole products of fp32 leave no room for larger tiles: these are the fastest (by estimate) that spill nothing."""


class GroupedRows(NamedTuple):
    """Rows of a tile, to which groups are padded: in aligned numerics; in fast ones at least, at a low load, and at most."""

    aligned: int
    least: int
    low_load: int
    most: int


GROUPED_ROWS = MappingProxyType({"accelerator": GroupedRows(16, 16, 16, 16), "cpu": GroupedRows(20, 1, 8, 256)})
"""The kernels cut groups into tiles of their own (below), whatever the padding: here little of it counts. Plain JAX takes these tiles."""


class GroupedTpu(NamedTuple):
    """Rows of a block, columns at most, bytes that two blocks of w may take, the side of a block of dw at most, bytes of VMEM in all."""

    rows: int
    columns: int
    resident: int
    gradient: int
    vmem: int


GROUPED_TPU = MappingProxyType(
    {
        "v5e": GroupedTpu(128, 1024, 40 * _MIB, 1024, 96 * _MIB),
        "v5p": GroupedTpu(128, 512, 20 * _MIB, 1024, 48 * _MIB),
        "v6e": GroupedTpu(256, 1024, 40 * _MIB, 1024, 96 * _MIB),
        "cpu": GroupedTpu(32, 128, 20 * _MIB, 128, 48 * _MIB),
    }
)
GROUPED_GPU = MappingProxyType({"h200": MatmulGpu(128, 256, 64, 8, 3), "cpu": MatmulGpu(32, 32, 16, 4, 1)})
GROUPED_GPU_GRADIENT = MappingProxyType({"h200": MatmulGpu(128, 256, 64, 8, 3), "cpu": MatmulGpu(16, 32, 16, 4, 1)})
"""A block of dw, and the rows that are added at a time."""
GROUPED_GPU_FP32 = MappingProxyType({"h200": MatmulGpu(64, 128, 32, 4, 3), "cpu": MatmulGpu(16, 16, 16, 4, 1)})


class CombineGpu(NamedTuple):
    """Rows and columns of a program's tile, and its warps."""

    rows: int
    columns: int
    warps: int


COMBINE_GPU = MappingProxyType({"h200": CombineGpu(4, 512, 4), "cpu": CombineGpu(16, 32, 4)})


class GroupedScaledTpu(NamedTuple):
    """Rows of a block, columns at most, the side of a block of dw at most (whole groups of 128), bytes of VMEM in all."""

    rows: int
    columns: int
    gradient: int
    vmem: int


GROUPED_SCALED_TPU = MappingProxyType(
    {
        "v5e": GroupedScaledTpu(128, 2048, 1024, 64 * _MIB),
        "v5p": GroupedScaledTpu(128, 512, 1024, 64 * _MIB),  # blocks of columns for both cores
        "v6e": GroupedScaledTpu(128, 2048, 1024, 64 * _MIB),
        "cpu": GroupedScaledTpu(128, 128, 128, 64 * _MIB),
    }
)


class FusedLayersTpu(NamedTuple):
    """Rows of a grid step at most, bytes of its blocks at most, entries and least rows of a strip's piece, columns of a piece that may be
    cut anywhere, rows of a step that has a row in each lane, bytes of VMEM.
    """

    rows: int
    block: int
    entries: int
    strip: int
    columns: int
    turned_rows: int
    vmem: int


FUSED_LAYERS_TPU = MappingProxyType(
    {
        "v5e": FusedLayersTpu(256, 12 * _MIB, 16384, 16, 1024, 128, 48 * _MIB),
        "v5p": FusedLayersTpu(256, 12 * _MIB, 32768, 16, 1024, 128, 48 * _MIB),
        "v6e": FusedLayersTpu(256, 24 * _MIB, 32768, 16, 1024, 128, 96 * _MIB),
        "cpu": FusedLayersTpu(16, 4 * _MIB, 1024, 8, 128, 16, 48 * _MIB),
    }
)


class FusedLayersGpu(NamedTuple):
    """Entries and parts of a piece that a program has at a time at most, rows it walks if it sums over them, its warps."""

    entries: int
    parts: int
    rows: int
    warps: int


FUSED_LAYERS_GPU = MappingProxyType({"h200": FusedLayersGpu(4096, 32, 32, 8), "cpu": FusedLayersGpu(128, 8, 8, 4)})
FUSED_LAYERS_GPU_HEADS = MappingProxyType({"h200": FusedLayersGpu(2048, 4, 32, 4), "cpu": FusedLayersGpu(512, 2, 8, 4)})
"""Where channels of a head are exchanged."""
FUSED_LAYERS_GPU_COLUMNS = MappingProxyType({kind: FusedLayersGpu(2048, 1, 128, 4) for kind in ("h200", "cpu")})
"""Where columns of 128 rows share a scale in FP8: a program walks 128 rows of 128 columns."""
FUSED_LAYERS_GPU_REDUCING = MappingProxyType({"h200": FusedLayersGpu(256, 1, 32, 1), "cpu": FusedLayersGpu(128, 1, 8, 4)})
"""Where a row is reduced many times: it is in one warp, and a program has no other, so that nothing goes through shared memory."""
