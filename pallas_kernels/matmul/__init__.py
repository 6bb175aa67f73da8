"""Row-tiled product: a row of the result does not depend on how many rows stand beside it."""

from pallas_kernels.matmul.api import map_row_tiles, matmul
from pallas_kernels.matmul.tile import ROW_TILE, itself

__all__ = ["ROW_TILE", "itself", "map_row_tiles", "matmul"]
