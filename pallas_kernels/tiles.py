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
