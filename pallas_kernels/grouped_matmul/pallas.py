"""What the Pallas implementations share: which rows are whose, and the product's gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import dot_operand
from pallas_kernels.grouped_matmul import xla


def ranges(tiles: jax.Array, num_rows: int, row_tile: int) -> tuple[jax.Array, jax.Array]:
    """Return the first row of each group and the one behind its last, [E + 1]; the last entry is the rows behind all groups."""
    end = jnp.append(jnp.cumsum(tiles) * row_tile, num_rows).astype(jnp.int32)
    return jnp.append(0, end[:-1]).astype(jnp.int32), end


def listed(counts: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Return (g, i) for a list of `length` entries in which g stands counts[g] times, i counting them; behind them the last g goes on."""
    at, end = jnp.arange(length, dtype=jnp.int32), jnp.cumsum(counts)
    g = jnp.minimum((at[:, None] >= end).sum(1, dtype=jnp.int32), len(counts) - 1)
    return g, at - (end - counts)[g]


def cuts(tiles: jax.Array, num_rows: int, row_tile: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (group, first row, row behind the last) of blocks that groups are cut into from their first rows on.

    The rows behind all groups are cut as if they were another group's, and those behind the list are empty.
    """
    first, last = ranges(tiles, num_rows, row_tile)
    most = min(num_rows // row_tile * pl.cdiv(row_tile, block), num_rows // block + tiles.shape[0] + 1)
    group, index = listed(pl.cdiv(last - first, block), most)
    return group, jnp.minimum(first[group] + index * block, num_rows), last[group]


class Visits(NamedTuple):
    """What each visit reads and writes: its group's matrix, a block of rows, a block of the result, and the rows that are the group's."""

    group: jax.Array
    source: jax.Array
    target: jax.Array
    first: jax.Array
    last: jax.Array


def visits(tiles: jax.Array, num_rows: int, row_tile: int, block: int, every_group: bool) -> Visits:
    """Return the visits of all blocks by all groups that have rows in them; with `every_group` one, too, of a group that has none.

    Without it the rows behind all groups are visited as if they were another group's: their blocks are written, by visits without rows.
    """
    first, last = ranges(tiles, num_rows, row_tile)
    num_groups, num_blocks = tiles.shape[0], pl.cdiv(num_rows, block)
    if every_group:
        first, last = first[:-1], last[:-1]
    counts = jnp.where(last > first, (last - 1) // block - first // block + 1, int(every_group))
    most = num_blocks + num_groups if every_group else min(num_blocks + num_groups, num_blocks + pl.cdiv(num_rows, row_tile))
    group, index = listed(counts, most)
    own = (index < counts[group]) & (first[group] < last[group]) & (group < num_groups)
    at = jnp.arange(most, dtype=jnp.int32)
    latest = jnp.maximum(lax.cummax(jnp.where(own, at, -1)), 0)  # the last visit up to this one that computes something
    target = jnp.minimum(first[group] // block + index, num_blocks - 1)
    source = jnp.where(own.any(), target[latest], 0)
    matrix = group if every_group else jnp.minimum(group[latest], num_groups - 1)
    return Visits(matrix, source, target, jnp.where(own, first[group], num_rows), jnp.where(own, last[group], 0))


def _operands(*given: jax.Array) -> list[jax.Array]:
    """The operands as products take them: on a CPU weights are held so."""
    arrays = [dot_operand(x) for x in given]
    if len({x.dtype for x in arrays}) > 1 or arrays[0].dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"the operands are {' and '.join(str(x.dtype) for x in arrays)}, not all bfloat16 or float32")
    return arrays


def grouped_matmul(product: Callable, weight_gradient: Callable, x, w, tiles, moves, *, row_tile):
    """See `api.grouped_matmul`; with `moves` (token [rows], destination [N, A]) the rows are those of x [N, D] that `token` names.

    product(x, w, tiles, token, contract, row_tile) multiplies rows with their groups' matrices over axis `contract` of those;
    weight_gradient(x, dy, tiles, tokens, row_tile) sums over each group's rows. A product's rows may be named by `token`, or by either of
    `tokens`.
    """
    dtype = x.dtype
    x, w = _operands(x, w)
    token, destination = moves or (None, None)

    @jax.custom_vjp
    def run(x, w, tiles, token, destination):
        del destination
        return product(x, w, tiles, token, 0, row_tile)

    def forward(x, w, tiles, token, destination):
        return run(x, w, tiles, token, destination), (x, w, tiles, token, destination)

    def backward(residuals, dy):
        x, w, tiles, token, destination = residuals
        dx = product(dy, w, tiles, None, 1, row_tile)
        dx = dx if destination is None else xla.sum_rows(dx, destination)
        return dx, weight_gradient(x, dy, tiles, (token, None), row_tile), None, None, None

    run.defvjp(forward, backward)
    return run(x, w, tiles, token, destination).astype(dtype)


def grouped_mlp(
    product: Callable,
    gated: Callable,
    gated_gradient: Callable,
    weight_gradient: Callable,
    sum_rows: Callable,
    x,
    w_in,
    w_out,
    weights,
    tiles,
    moves,
    *,
    row_tile,
):
    """See `api.grouped_mlp`; product and weight_gradient as in `grouped_matmul`, `moves` as in `xla.grouped_mlp`.

    gated(x, w_in, weight, tiles, token, row_tile) returns the first product and its SwiGLU times each row's weight;
    gated_gradient(dy, w_out, first product, weight, tiles, token, row_tile) the gradients of the former and of the weight, for the tokens'
    gradient dy; sum_rows is `xla.sum_rows`.
    """
    dtype, weights_dtype = x.dtype, weights.dtype
    x, w_in, w_out = _operands(x, w_in, w_out)

    @jax.custom_vjp
    def run(*given):
        return forward(*given)[0]

    def forward(x, w_in, w_out, weights, tiles, token, destination, source):
        weight = jnp.take(weights.reshape(-1), source, mode="fill", fill_value=0)
        gate_up, hidden = gated(x, w_in, weight, tiles, token, row_tile)
        rows = product(hidden, w_out, tiles, None, 0, row_tile).astype(dtype)
        return sum_rows(rows, destination), (x, gate_up, hidden, w_in, w_out, weight, tiles, token, destination)

    def backward(residuals, dy):
        x, gate_up, hidden, w_in, w_out, weight, tiles, token, destination = residuals
        dy = dy.astype(x.dtype)
        d_gate_up, d_weight = gated_gradient(dy, w_out, gate_up, weight, tiles, token, row_tile)
        dx = sum_rows(product(d_gate_up, w_in, tiles, None, 1, row_tile), destination)
        d_w_in = weight_gradient(x, d_gate_up, tiles, (token, None), row_tile)
        d_w_out = weight_gradient(hidden, dy, tiles, (None, token), row_tile)
        d_weights = jnp.take(d_weight, destination, mode="fill", fill_value=0).astype(weights_dtype)
        return dx, d_w_in, d_w_out, d_weights, None, None, None, None

    run.defvjp(forward, backward)
    return run(x, w_in, w_out, weights, tiles, *moves)
