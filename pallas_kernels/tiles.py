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
MATMUL_GPU_FP32 = MappingProxyType({"h200": MatmulGpu(64, 128, 32, 4, 3), "cpu": MatmulGpu(16, 16, 16, 4, 1)})


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
LIGHTNING_GPU_BACKWARD = MappingProxyType({"h200": LightningGpu(64, 4, 3), "cpu": LightningGpu(16, 4, 1)})
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


class FlashTpu(NamedTuple):
    """Rows of a tile (positions x query heads of a key head), a program's key heads and tiles of queries at most, key blocks of a step.

    `decode_blocks` where there is one tile. `cores` share the programs, `vmem`: bytes of VMEM in all.
    """

    rows: int
    heads: int
    tiles: int
    blocks: int
    decode_blocks: int
    cores: int
    vmem: int


FLASH_TPU = MappingProxyType(
    {
        "v5e": FlashTpu(128, 4, 2, 4, 8, 1, 64 * _MIB),
        "v5p": FlashTpu(128, 4, 2, 4, 8, 2, 64 * _MIB),
        "v6e": FlashTpu(128, 4, 2, 4, 8, 1, 64 * _MIB),
        "cpu": FlashTpu(32, 2, 2, 2, 3, 1, 64 * _MIB),
    }
)
FLASH_TPU_BACKWARD = MappingProxyType(
    {
        "v5e": FlashTpu(128, 4, 4, 4, 4, 1, 64 * _MIB),
        "v5p": FlashTpu(128, 4, 4, 4, 4, 2, 64 * _MIB),
        "v6e": FlashTpu(128, 4, 4, 4, 4, 1, 64 * _MIB),
        "cpu": FlashTpu(32, 2, 3, 1, 1, 1, 64 * _MIB),
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
FLASH_GPU_FP32 = MappingProxyType({"h200": FlashGpu(32, 8, 1)})
"""Of all passes: whole products of fp32 leave no room for larger tiles."""
