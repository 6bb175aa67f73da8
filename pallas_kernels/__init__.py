"""Kernels of the Ring-linear family: each op in one folder, every backend built on the op's one tile function."""

GRID = 128
"""Positions: packed documents, prefix-cache cuts and KV pages start at multiples of it; chunks and key blocks divide it."""
CHUNK_SIZES = (16, 32, 64, 128)
"""Positions that a chunk of Lightning attention may have: whole tiles of rows that divide `GRID`."""
