"""The grouped products in plain JAX: over the groups that have rows, then over the group's tiles, so a matrix is fetched once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiles as tables
from pallas_kernels.compat import dot_operand, pin, platform, unwritten
from pallas_kernels.fused_layers import swiglu
from pallas_kernels.grouped_matmul import tile


def for_each_group(tiles: jax.Array, body: Callable, init):
    """Return the fold of body(group, first_tile, end_tile, carry) over the groups that have tiles."""
    end = jnp.cumsum(tiles)
    order = jnp.argsort(tiles == 0, stable=True)
    return lax.fori_loop(0, (tiles > 0).sum(), lambda i, carry: body(order[i], end[order[i]] - tiles[order[i]], end[order[i]], carry), init)


def _for_each_tile(first: jax.Array, end: jax.Array, row_tile: int, body: Callable, carry, *, together: int = 1):
    """Return the fold of body(first row, rows, carry) over a group's tiles, `together` of them in a turn while so many are left."""
    for count in sorted({together, 1}, reverse=True):
        turns, rows, at = (end - first) // count, count * row_tile, first * row_tile
        carry = lax.fori_loop(0, turns, lambda i, carry, rows=rows, at=at: body(at + i * rows, rows, carry), carry)
        first += turns * count
    return carry


def _own(w: jax.Array, index: jax.Array) -> jax.Array:
    """A group's matrix."""
    return lax.dynamic_index_in_dim(w, index, keepdims=False)


_rows = lax.dynamic_slice_in_dim


def _put(out: jax.Array, y: jax.Array, first: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(out, dot_operand(y), first, 0)


def _products(x, w, tiles, row_tile, contract):
    """Each tile of x times its group's matrix (contracting its axis `contract`), as the dtype of x."""

    def group(index, first, end, out):
        matrix = _own(w, index)

        def one(at, rows, out):
            return _put(out, tile.product(_rows(x, at, rows), matrix, contract).astype(x.dtype), at)

        return _for_each_tile(first, end, row_tile, one, out)

    # What is written is of an operand's dtype: XLA:CPU converts a whole bf16 array to update a slice of it.
    return for_each_group(tiles, group, dot_operand(jnp.zeros((x.shape[0], w.shape[2 - contract]), x.dtype))).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x, w, tiles, row_tile):
    return _products(x, w, tiles, row_tile, 0)


def _forward(x, w, tiles, row_tile):
    return _grouped(x, w, tiles, row_tile), (x, w, tiles)


def _backward(row_tile, residuals, dy):
    x, w, tiles = residuals
    dy = dy.astype(x.dtype)

    def group(index, first, end, dw):
        def one(at, rows, total):
            return tile.weight_gradient(_rows(x, at, rows), _rows(dy, at, rows), total)

        total = _for_each_tile(first, end, row_tile, one, jnp.zeros(w.shape[1:], jnp.float32))
        return lax.dynamic_update_index_in_dim(dw, total.astype(w.dtype), index, 0)

    return _products(dy, w, tiles, row_tile, 1), for_each_group(tiles, group, jnp.zeros_like(w)), None


_grouped.defvjp(_forward, _backward)


def grouped_matmul(x, w, tiles, moves, *, row_tile):
    """See `api.grouped_matmul`; with `moves` (token [rows], destination [N, A]) the rows are those of x [N, D] that `token` names."""
    x = x if moves is None else take_rows(x, *moves)
    return _grouped(x, w, tiles, row_tile)


def grouped_mlp(x, w_in, w_out, weights, tiles, moves, *, row_tile, aligned):
    """See `api.grouped_mlp`: both products of a tile and the SwiGLU between them in one turn.

    moves: (token [rows], destination [N, A], source [rows]) as of `api.moves_of` and `api.Groups`.
    """
    dtype = x.dtype
    # Where the load is high a tile is a quarter of it, which keeps padding low, but products of few rows are slow.
    high_load = not aligned and row_tile > tables.of(tables.GROUPED_ROWS).low_load
    for_each_tile = functools.partial(_for_each_tile, row_tile=row_tile, together=4 if high_load else 1)

    def gated(y: jax.Array, weight: jax.Array) -> Any:
        return swiglu(y, weight, implementation="xla")

    def tile_of(x, index, at, rows):
        return jnp.take(x, _rows(index, at, rows), axis=0, mode="fill", fill_value=0)

    def products(x, w_in, w_out, weights, tiles, token, source, keep):
        """The tiles' results and, to keep for the gradient, their first products."""
        x = dot_operand(x)

        def group(index, first, end, carry):
            matrices = _own(w_in, index), _own(w_out, index)

            def one(at, rows, carry):
                given = tile_of(x, token, at, rows), tile_of(weights.reshape(-1), source, at, rows), matrices
                tokens, weight, (own_in, own_out) = pin(given, aligned)
                y = pin(tile.product(tokens, own_in).astype(dtype), aligned)
                hidden = pin(gated(y, weight), aligned)
                out = pin(tile.product(hidden, own_out).astype(dtype), aligned)
                return tuple(_put(into, part, at) for into, part in zip(carry, (out, y), strict=False))

            return for_each_tile(first, end, body=one, carry=carry)

        widths = (w_out.shape[2], w_in.shape[2])[: 1 + keep]
        found = for_each_group(tiles, group, tuple(unwritten((token.shape[0], width), dtype, x) for width in widths))
        return [part.astype(dtype) for part in found]

    @jax.custom_vjp
    def run(x, w_in, w_out, weights, tiles, token, destination, source):
        return sum_rows(products(x, w_in, w_out, weights, tiles, token, source, keep=False)[0], destination)

    def forward(x, w_in, w_out, weights, tiles, token, destination, source):
        out, y = products(x, w_in, w_out, weights, tiles, token, source, keep=True)
        return sum_rows(out, destination), (x, y, w_in, w_out, weights, tiles, token, destination, source)

    def backward(residuals, d_out):
        x, y, w_in, w_out, weights, tiles, token, destination, source = residuals
        d_out = dot_operand(d_out.astype(dtype))

        def group(index, first, end, carry):
            own_in, own_out = _own(w_in, index), _own(w_out, index)

            def one(at, rows, carry):
                dx, d_weight, dw_in, dw_out = carry
                d_tile = tile_of(d_out, token, at, rows)
                hidden, pull_back = jax.vjp(gated, _rows(y, at, rows), tile_of(weights.reshape(-1), source, at, rows))
                dy, d_own = pull_back(tile.product(d_tile, own_out, 1).astype(dtype))
                dx = _put(dx, tile.product(dy, own_in, 1).astype(dtype), at)
                dw_in = tile.weight_gradient(tile_of(x, token, at, rows), dy, dw_in)
                return dx, _put(d_weight, d_own.astype(jnp.float32), at), dw_in, tile.weight_gradient(hidden, d_tile, dw_out)

            *by_row, dw_in_all, dw_out_all = carry
            zeros = (jnp.zeros(w.shape[1:], jnp.float32) for w in (w_in, w_out))
            *by_row, dw_in, dw_out = for_each_tile(first, end, body=one, carry=(*by_row, *zeros))
            put = lambda dw, total: lax.dynamic_update_index_in_dim(dw, total.astype(dw.dtype), index, 0)
            return *by_row, put(dw_in_all, dw_in), put(dw_out_all, dw_out)

        num_rows = token.shape[0]
        by_row = unwritten((num_rows, x.shape[1]), dtype, x), jnp.zeros(num_rows, jnp.float32)
        dx, d_weight, dw_in, dw_out = for_each_group(tiles, group, (*by_row, jnp.zeros_like(w_in), jnp.zeros_like(w_out)))
        d_weights = jnp.take(d_weight, destination, mode="fill", fill_value=0).astype(weights.dtype)
        return sum_rows(dx.astype(dtype), destination), dw_in, dw_out, d_weights, None, None, None, None

    run.defvjp(forward, backward)
    return run(x, w_in, w_out, weights, tiles, *moves)


@jax.custom_vjp
def take_rows(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return x[index] with zeros where index is past the end; inverse [N, A] lists where each row of x went (for the gradient)."""
    if platform() == "tpu":  # there to fill is a pass over the result, which is longer than x
        return jnp.take(jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1)), index, axis=0, mode="clip")
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_forward(x, index, inverse):
    return take_rows(x, index, inverse), inverse


def _take_backward(inverse, dy):
    return sum_rows(dy, inverse), None, None


take_rows.defvjp(_take_forward, _take_backward)


def sum_rows(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Return the sum over a of rows[index[:, a]] as `tile.combine` has it, cast once, nothing for an index out of range.

    A gather as well, no scatter-add, whose order would not be fixed.
    """
    slots = [jnp.take(rows, index[:, a], axis=0, mode="fill", fill_value=0) for a in range(index.shape[1])]
    return tile.combine(slots).astype(rows.dtype)
