"""The grouped product, the experts of tokens and the moves of rows around them: their implementations behind one signature.

groups = group_rows(expert_ids.reshape(-1), num_experts, row_tile)                  # where each (token, slot) goes
y = grouped_mlp(x, w_in, w_out, groups, weights, row_tile=row_tile)                 # tokens -> the weighted sums of their experts

or a step at a time:

rows = gather_grouped_matmul(x, w_in, groups, num_slots, row_tile=row_tile)         # tokens -> products of rows sorted by expert
rows = swiglu(rows, gather_weights(weights, groups))
rows = grouped_matmul(rows, w_out, groups.tiles, row_tile=row_tile)
y = combine_groups(rows, groups, num_slots)                                         # back to the tokens
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import dispatch
from pallas_kernels import tiles as tables
from pallas_kernels.fused_layers import swiglu
from pallas_kernels.grouped_matmul import pallas_gpu, pallas_tpu, xla
from pallas_kernels.grouped_matmul.xla import take_rows

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

IMPLEMENTATIONS = {"xla": xla.grouped_matmul, "pallas_tpu": pallas_tpu.grouped_matmul, "pallas_gpu": pallas_gpu.grouped_matmul}
COMBINE_IMPLEMENTATIONS = {"xla": xla.sum_rows, "pallas_tpu": xla.sum_rows, "pallas_gpu": pallas_gpu.sum_rows}
"""A TPU moves single rows of a tiled array slowly: what gathers rows is XLA's there."""


class Groups(NamedTuple):
    """Where rows go: each group's rows stand together, in their order, from a tile boundary on.

    source [rows]: the assignment that a padded row holds, M for padding. destination [M]: the padded row of an assignment, the number
    of padded rows for an assignment of no group. tiles [E]: tiles of each group.
    """

    source: Int[Array, " rows"]
    destination: Int[Array, " M"]
    tiles: Int[Array, " E"]


def row_tile_for(num_rows: int, num_groups: int, *, aligned: bool) -> int:
    """Return the rows of a tile: one size in aligned numerics, else one that leaves little padding for a group's mean load.

    That is a quarter of the load where it is high, and where it is low so many that most groups fill one tile: a group's matrix is
    fetched once, however many tiles it has.
    """
    sizes = tables.of(tables.GROUPED_ROWS)
    if aligned:
        return sizes.aligned
    load = num_rows / num_groups
    rows = max(load / 4, min(2 * load, sizes.low_load))
    return 1 << math.ceil(math.log2(min(max(rows, sizes.least), sizes.most)))


def group_rows(group: Int[Array, " M"], num_groups: int, row_tile: int) -> Groups:
    """Return where each of M assignments goes, sorted stably by group; group E and above means none."""
    num = group.shape[0]
    num_rows = min(num, num // row_tile + num_groups) * row_tile
    group = jnp.minimum(group, num_groups)
    order = _stable_order(group, num_groups)
    counts = jnp.bincount(group, length=num_groups + 1)
    tiles = -(-counts[:num_groups] // row_tile)
    first_row = jnp.concatenate([(jnp.cumsum(tiles) - tiles) * row_tile, jnp.array([num_rows])])
    rank = jnp.arange(num) - (jnp.cumsum(counts) - counts)[group[order]]
    row = jnp.where(group[order] == num_groups, num_rows, first_row[group[order]] + rank)
    source = jnp.full(num_rows, num, jnp.int32).at[row].set(order.astype(jnp.int32), mode="drop")
    destination = jnp.zeros(num, jnp.int32).at[order].set(row.astype(jnp.int32))
    return Groups(source, destination, tiles.astype(jnp.int32))


def _stable_order(group: Int[Array, " M"], most: int) -> Int[Array, " M"]:
    """`jnp.argsort(group, stable=True)` of groups up to `most`: numbers that carry their place sort several times as fast as pairs."""
    num = group.shape[0]
    if (most + 1) * num > 1 << 32:
        return jnp.argsort(group, stable=True)
    placed = group.astype(jnp.uint32) * num + jnp.arange(num, dtype=jnp.uint32)
    return (jnp.sort(placed, stable=False) % num).astype(jnp.int32)


def gather_groups(x: Shaped[Array, "N D"], groups: Groups, num_slots: int) -> Shaped[Array, "rows D"]:
    """Return the rows of x in their groups' tiles; assignment n * num_slots + a is slot a of row n. Padding rows are zero."""
    return xla.take_rows(x, *moves_of(x.shape[0], groups, num_slots))


def moves_of(num: int, groups: Groups, num_slots: int) -> tuple[Int[Array, " rows"], Int[Array, "N A"]]:
    """Return the token of each row, `num` for padding, and each token's rows."""
    token = jnp.where(groups.source < num * num_slots, groups.source // num_slots, num)
    return token, groups.destination.reshape(num, num_slots)


def gather_weights(weights: Float[Array, "N A"], groups: Groups) -> Float[Array, " rows"]:
    """Return the weight of each row in its groups' tiles, that of its token's slot; padding rows have weight zero."""
    return xla.take_rows(weights.reshape(-1), groups.source, groups.destination[:, None])


def combine_groups(rows: Float[Array, "rows D"], groups: Groups, num_slots: int, *, implementation: str = "auto") -> Float[Array, "N D"]:
    """Return each token's rows summed in the order of its slots, in fp32, cast once; an assignment of no group adds nothing.

    With one slot: the row of each assignment. Differentiable in rows, whose gradient is a gather. Rows that a kernel or a loop has left
    are summed with one set of bits; a product right in front may be contracted with the sum.
    """
    token, destination = moves_of(groups.destination.shape[0] // num_slots, groups, num_slots)

    @jax.custom_vjp
    def run(rows, token, destination):
        return dispatch.call("combine_groups", COMBINE_IMPLEMENTATIONS, implementation, rows, destination)

    run.defvjp(lambda *given: (run(*given), given[1:]), lambda moves, dy: (xla.take_rows(dy, *moves), None, None))
    return run(rows, token, destination)


def grouped_matmul(
    x: Float[Array, "rows D"], w: Float[Array, "E D F"], tiles: Int[Array, " E"], *, row_tile: int, implementation: str = "auto"
) -> Float[Array, "rows F"]:
    """Return each row of x times the matrix of its group, accumulated in fp32, as the dtype of x.

    Rows lie as `group_rows` places them: `tiles[e]` tiles of `row_tile` rows for group e, one group after the other; rows past the
    last tile give zeros. Differentiable in x and w.
    """
    return dispatch.call("grouped_matmul", IMPLEMENTATIONS, implementation, x, w, tiles, None, row_tile=row_tile)


def gather_grouped_matmul(
    x: Float[Array, "N D"], w: Float[Array, "E D F"], groups: Groups, num_slots: int, *, row_tile: int, implementation: str = "auto"
) -> Float[Array, "rows F"]:
    """Return `grouped_matmul(gather_groups(x, groups, num_slots), w, groups.tiles)`; on a GPU without writing the gathered rows."""
    moves = moves_of(x.shape[0], groups, num_slots)
    return dispatch.call("grouped_matmul", IMPLEMENTATIONS, implementation, x, w, groups.tiles, moves, row_tile=row_tile)


def _chained(x, w_in, w_out, groups, weights, *, row_tile, aligned):
    """A TPU's kernel for each product, and one between them, or plain JAX where that refuses the experts' width."""
    num_slots = weights.shape[1]
    product = functools.partial(pallas_tpu.grouped_matmul, tiles=groups.tiles, row_tile=row_tile)
    gate_up = product(x, w_in, moves=moves_of(x.shape[0], groups, num_slots))
    hidden = swiglu(gate_up, gather_weights(weights, groups), aligned=aligned, implementation="pallas")
    return combine_groups(product(hidden, w_out, moves=None), groups, num_slots, implementation="pallas_tpu")


def _placed(implementation, x, w_in, w_out, groups, weights, **how):
    """An implementation that takes the lists of `moves_of` and where each row's assignment is."""
    moves = moves_of(x.shape[0], groups, weights.shape[1])
    return implementation(x, w_in, w_out, weights, groups.tiles, (*moves, groups.source), **how)


def _fused(*args, aligned, **how):
    """A GPU's kernels, whose tile is the same in fast numerics."""
    del aligned
    return pallas_gpu.grouped_mlp(*args, **how)


MLP_IMPLEMENTATIONS = {
    "xla": functools.partial(_placed, xla.grouped_mlp),
    "pallas_tpu": _chained,
    "pallas_gpu": functools.partial(_placed, _fused),
}


def grouped_mlp(
    x: Float[Array, "N D"],
    w_in: Float[Array, "E D two_F"],
    w_out: Float[Array, "E F D_out"],
    groups: Groups,
    weights: Float[Array, "N A"],
    *,
    row_tile: int,
    aligned: bool = False,
    implementation: str = "auto",
) -> Float[Array, "N D_out"]:
    """Return each token's experts, swiglu(x w_in) w_out, summed by weight in the order of its slots in fp32, cast once.

    Assignment n * A + a is slot a of token n, and has weight weights[n, a]; one of no group adds nothing. The weight multiplies the
    SwiGLU, in fp32 before that is cast: so a gradient wants no expert's result, and a weight's is a sum over the expert's width
    (arXiv 2512.14080). With `aligned` a token's bits do not depend on the others. Differentiable in x, both matrices and the weights.
    """
    how = {"row_tile": row_tile, "aligned": aligned}
    return dispatch.call("grouped_mlp", MLP_IMPLEMENTATIONS, implementation, x, w_in, w_out, groups, weights, **how)
