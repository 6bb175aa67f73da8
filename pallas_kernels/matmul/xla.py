"""The row-tiled product in plain JAX: a loop over tiles of R rows, equal by construction for any number of rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_general, dot_operand, pin, unwritten
from pallas_kernels.matmul import tile


def map_row_tiles(f: Callable, *rows: jax.Array, row_tile: int = tile.ROW_TILE, aligned: bool = True) -> Any:
    """Return f of each tile of R = `row_tile` rows: f maps arrays [R, ...] to a tree of arrays [R, ...]; inputs are [N, ...].

    Fewer than R rows are padded with zeros, aligned to R + 1 where they are R or fewer. Else the last tile is moved to fit: rows that it
    shares with the one before get the same bits again. Aligned, a tile's bits must not depend on the number of tiles, so a single turn has
    to stay a loop, which would else be fused with what stands around it: the number of turns is hidden from the compiler, and since a tile
    is never all rows, its turn reads it at an index and cannot be moved in front of the loop. Not differentiable: ops define their own
    gradients.
    """
    num_rows = rows[0].shape[0]
    num_tiles = -(-num_rows // row_tile)
    padding = max(row_tile + aligned - num_rows, 0)
    rows = tuple(jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) for x in rows)

    def turn(index, out):
        first = jnp.minimum(index * row_tile, num_rows + padding - row_tile)
        y = pin(f(*pin([lax.dynamic_slice_in_dim(x, first, row_tile) for x in rows])))
        return jax.tree.map(lambda o, y: lax.dynamic_update_slice_in_dim(o, dot_operand(y), first, 0), out, y)

    one_tile = jax.eval_shape(f, *(jax.ShapeDtypeStruct((row_tile, *x.shape[1:]), x.dtype) for x in rows))
    out = jax.tree.map(lambda y: unwritten((num_rows + padding, *y.shape[1:]), y.dtype, rows[0]), one_tile)
    out = lax.fori_loop(0, lax.optimization_barrier(jnp.int32(num_tiles)), turn, out)
    return jax.tree.map(lambda y, like: y[:num_rows].astype(like.dtype), out, one_tile)


def _tiled(x, w, epilogue, rows, weights, out_dtype):
    """Each tile's product and what follows it in one loop, so that the product is not written and read again in between."""

    def one_tile(x, *rows, w, weights):
        y = pin(tile.product(x, w).astype(out_dtype))
        return epilogue(y, *rows, *weights), y

    @jax.custom_vjp
    def run(x, w, rows, weights):
        return map_row_tiles(lambda *tiles: one_tile(*tiles, w=w, weights=weights)[0], x, *rows)

    def forward(x, w, rows, weights):
        out, y = map_row_tiles(lambda *tiles: one_tile(*tiles, w=w, weights=weights), x, *rows)
        return out, (x, w, y, rows, weights)

    def backward(residuals, gradients):
        """Plain products: gradients promise no bits across layouts (numerics contract, rule 4)."""
        x, w, y, rows, weights = residuals
        dy, d_rows, d_weights = jax.vjp(lambda y, rows, weights: epilogue(y, *rows, *weights), y, rows, weights)[1](gradients)
        dy = dy.astype(x.dtype)
        dx = dot_general(dy, w, ((1,), (1,))).astype(x.dtype)
        dw = dot_general(x, dy, ((0,), (0,))).astype(w.dtype)
        return dx, dw, d_rows, d_weights

    run.defvjp(forward, backward)
    return run(x, w, rows, weights)


def matmul(x, w, epilogue, rows, weights, *, aligned, out_dtype):
    """See `api.matmul`."""
    if aligned:
        in_a_tile = functools.partial(epilogue, aligned=False, implementation="xla")
        return _tiled(x, w, in_a_tile, rows, weights, out_dtype)
    return epilogue(tile.product(x, w).astype(out_dtype), *rows, *weights)
