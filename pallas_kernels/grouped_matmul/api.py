"""The grouped product and the moves of rows around it: their implementations behind one signature.

groups = group_rows(expert_ids.reshape(-1), num_experts, row_tile)      # where each (token, slot) goes
rows = gather_groups(x, groups, num_slots)                             # tokens -> rows sorted by expert, in whole tiles
rows = grouped_matmul(rows, w, groups.tiles, row_tile=row_tile)
slots = scatter_groups(rows, groups)                                   # back to the order of expert_ids
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import tile, xla
from pallas_kernels.grouped_matmul.xla import take_rows

__all__ = ["Groups", "gather_groups", "group_rows", "grouped_matmul", "row_tile_for", "scatter_groups", "take_rows"]

IMPLEMENTATIONS = {"xla": xla.grouped_matmul}


class Groups(NamedTuple):
    """Where rows go: each group's rows stand together, in their order, from a tile boundary on.

    source [rows]: the assignment that a padded row holds, M for padding. destination [M]: the padded row of an assignment, the number
    of padded rows for an assignment of no group. tiles [E]: tiles of each group.
    """

    source: Int[Array, " rows"]
    destination: Int[Array, " M"]
    tiles: Int[Array, " E"]


def row_tile_for(num_rows: int, num_groups: int, *, aligned: bool) -> int:
    """Return the rows of a tile: one size in aligned numerics, else one with little padding for a group's mean load.

    That is a quarter of the load where it is high, and where it is low so many that most groups fill one tile: a group's matrix is
    fetched once, however many tiles it has.
    """
    if aligned:
        return tile.EXPERT_TILE
    load = num_rows / num_groups
    return 1 << max(0, math.ceil(math.log2(min(max(load / 4, min(2 * load, tile.SMALL_TILE)), tile.LARGEST_TILE))))


def group_rows(group: Int[Array, " M"], num_groups: int, row_tile: int) -> Groups:
    """Return where each of M assignments goes, sorted stably by group; group E and above means none."""
    num = group.shape[0]
    num_rows = min(num, num // row_tile + num_groups) * row_tile
    group = jnp.minimum(group, num_groups)
    order = jnp.argsort(group, stable=True)
    counts = jnp.bincount(group, length=num_groups + 1)
    tiles = -(-counts[:num_groups] // row_tile)
    first_row = jnp.concatenate([(jnp.cumsum(tiles) - tiles) * row_tile, jnp.array([num_rows])])
    rank = jnp.arange(num) - (jnp.cumsum(counts) - counts)[group[order]]
    row = jnp.where(group[order] == num_groups, num_rows, first_row[group[order]] + rank)
    source = jnp.full(num_rows, num, jnp.int32).at[row].set(order.astype(jnp.int32), mode="drop")
    destination = jnp.zeros(num, jnp.int32).at[order].set(row.astype(jnp.int32))
    return Groups(source, destination, tiles.astype(jnp.int32))


def gather_groups(x: Float[Array, "N D"], groups: Groups, num_slots: int) -> Float[Array, "rows D"]:
    """Return the rows of x in their groups' tiles; assignment n * num_slots + a is slot a of row n. Padding rows are zero."""
    num = x.shape[0]
    token = jnp.where(groups.source < num * num_slots, groups.source // num_slots, num)
    return xla.take_rows(x, token, groups.destination.reshape(num, num_slots))


def scatter_groups(rows: Float[Array, "rows F"], groups: Groups) -> Float[Array, "M F"]:
    """Return the row of each assignment; zeros for an assignment of no group."""
    return xla.take_rows(rows, groups.destination, groups.source[:, None])


def grouped_matmul(
    x: Float[Array, "rows D"], w: Float[Array, "E D F"], tiles: Int[Array, " E"], *, row_tile: int, implementation: str = "auto"
) -> Float[Array, "rows F"]:
    """Return each row of x times the matrix of its group, accumulated in fp32, as the dtype of x.

    Rows lie as `group_rows` places them: `tiles[e]` tiles of `row_tile` rows for group e, one group after the other; rows past the
    last tile give zeros. Differentiable in x and w.
    """
    return dispatch.call("grouped_matmul", IMPLEMENTATIONS, implementation, x, w, tiles, row_tile=row_tile)
