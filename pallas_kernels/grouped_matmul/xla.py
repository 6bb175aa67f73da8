"""The grouped product in plain JAX: over the groups that have rows, then over the group's tiles, so a matrix is fetched once."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_operand
from pallas_kernels.grouped_matmul import tile


def for_each_group(tiles: jax.Array, body, init):
    """Return the fold of body(group, first_tile, end_tile, carry) over the groups that have tiles."""
    end = jnp.cumsum(tiles)
    order = jnp.argsort(tiles == 0, stable=True)
    return lax.fori_loop(0, (tiles > 0).sum(), lambda i, carry: body(order[i], end[order[i]] - tiles[order[i]], end[order[i]], carry), init)


def _rows(x: jax.Array, index: jax.Array, row_tile: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * row_tile, row_tile)


def _products(x, w, tiles, row_tile, contract):
    """Each tile of x times its group's matrix (contracting its axis `contract`), as the dtype of x."""

    def group(index, first, end, out):
        matrix = lax.dynamic_index_in_dim(w, index, keepdims=False)

        def one(t, out):
            y = tile.product(_rows(x, t, row_tile), matrix, contract)
            return lax.dynamic_update_slice_in_dim(out, dot_operand(y.astype(x.dtype)), t * row_tile, 0)

        return lax.fori_loop(first, end, one, out)

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
        def one(t, total):
            return tile.weight_gradient(_rows(x, t, row_tile), _rows(dy, t, row_tile), total)

        total = lax.fori_loop(first, end, one, jnp.zeros(w.shape[1:], jnp.float32))
        return lax.dynamic_update_index_in_dim(dw, total.astype(w.dtype), index, 0)

    return _products(dy, w, tiles, row_tile, 1), for_each_group(tiles, group, jnp.zeros_like(w)), None


_grouped.defvjp(_forward, _backward)


def grouped_matmul(x, w, tiles, moves, *, row_tile):
    """See `api.grouped_matmul`; with `moves` (token [rows], destination [N, A]) the rows are those of x [N, D] that `token` names."""
    x = x if moves is None else take_rows(x, *moves)
    return _grouped(x, w, tiles, row_tile)


@jax.custom_vjp
def take_rows(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return x[index] with zeros where index is out of range; inverse [N, A] lists where each row of x went (for the gradient)."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_forward(x, index, inverse):
    return take_rows(x, index, inverse), inverse


def _take_backward(inverse, dy):
    return sum_rows(dy, inverse), None, None


take_rows.defvjp(_take_forward, _take_backward)


def sum_rows(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Return the fp32 sum over a of rows[index[:, a]], cast once: a gather as well, no scatter-add, whose order would not be fixed."""
    return functools.reduce(jnp.add, [part.astype(jnp.float32) for part in _slots(rows, index)]).astype(rows.dtype)


def _slots(rows: jax.Array, index: jax.Array) -> list[jax.Array]:
    """The rows [N, D] of each slot of index [N, A], zeros where it is out of range."""
    return [jnp.take(rows, index[:, a], axis=0, mode="fill", fill_value=0) for a in range(index.shape[1])]


def combine_groups(rows, weights, destination, source, *, aligned):
    """See `api.combine_groups`."""
    num_slots = weights.shape[1]

    @jax.custom_vjp
    def run(rows, weights, destination, source):
        slots = _slots(rows, destination)
        return tile.combine(slots, [weights[:, a, None] for a in range(num_slots)], aligned).astype(rows.dtype)

    def forward(rows, weights, destination, source):
        return run(rows, weights, destination, source), (rows, weights, destination, source)

    def backward(residuals, dy):
        rows, weights, destination, source = residuals
        token = source // num_slots  # out of range for padding
        weight = jnp.take(weights.reshape(-1), source, mode="fill", fill_value=0)[:, None]
        d_rows = tile.weighted(jnp.take(dy, token, axis=0, mode="fill", fill_value=0), weight, aligned).astype(rows.dtype)
        wide = dy.astype(jnp.float32)
        d_weights = jnp.stack([(wide * slot.astype(jnp.float32)).sum(-1) for slot in _slots(rows, destination)], axis=1)
        return d_rows, d_weights.astype(weights.dtype), None, None

    run.defvjp(forward, backward)
    return run(rows, weights, destination, source)
