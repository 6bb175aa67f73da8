"""Dropless grouped product: each row of x times the matrix of its group (its expert), in tiles of one size."""

from pallas_kernels.grouped_matmul.api import (
    Groups,
    combine_groups,
    gather_grouped_matmul,
    gather_groups,
    gather_weights,
    group_rows,
    grouped_matmul,
    grouped_mlp,
    moves_of,
    row_tile_for,
    take_rows,
)

__all__ = [
    "Groups",
    "combine_groups",
    "gather_grouped_matmul",
    "gather_groups",
    "gather_weights",
    "group_rows",
    "grouped_matmul",
    "grouped_mlp",
    "moves_of",
    "row_tile_for",
    "take_rows",
]
