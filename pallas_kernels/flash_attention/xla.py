"""Flash attention in plain JAX: a loop over tiles of query rows, inside it a loop over the key blocks the tile sees."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_cast, pin
from pallas_kernels.flash_attention import tile
from pallas_kernels.flash_attention.tile import KEY_BLOCK

ALIGNED_ROWS = 32
"""Query rows of a tile (positions x query heads of a key head) in aligned numerics; a decode step pays for this many."""
FAST_POSITIONS = 128
"""Query positions of a tile in fast numerics."""


def _query_tiles(x: jax.Array, positions: int, groups: int) -> jax.Array:
    """[B, T, H, K] -> [n, B, G, positions * H/G, K]."""
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length // positions, positions, groups, heads // groups, size)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(length // positions, batch, groups, -1, size)


def _from_query_tiles(x: jax.Array, positions: int) -> jax.Array:
    """[n, B, G, positions * H/G, K] -> [B, T, H, K]."""
    num_tiles, batch, groups, rows, size = x.shape
    x = x.reshape(num_tiles, batch, groups, positions, rows // positions, size)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(batch, num_tiles * positions, -1, size)


def _row_bounds(x: jax.Array, positions: int, repeat: int) -> jax.Array:
    """[B, T] -> [n, B, 1, rows, 1]: the bound of each row of each tile."""
    batch, length = x.shape
    tiles = x.reshape(batch, length // positions, positions).transpose(1, 0, 2)
    return jnp.repeat(tiles, repeat, axis=-1)[:, :, None, :, None]


def _positions_per_tile(q: jax.Array, groups: int, aligned: bool) -> int:
    return max(1, ALIGNED_ROWS // (q.shape[2] // groups)) if aligned else min(FAST_POSITIONS, q.shape[1])


def _blocks(x: jax.Array) -> jax.Array:
    """Pad the keys [B, S, G, K] to whole blocks: block size and order never depend on S."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % KEY_BLOCK), (0, 0), (0, 0)))


def _block(x: jax.Array, index: jax.Array) -> jax.Array:
    """The block of padded keys [B, S, G, K] as [B, G, KEY_BLOCK, K]."""
    return lax.dynamic_slice_in_dim(x, index * KEY_BLOCK, KEY_BLOCK, axis=1).swapaxes(1, 2)


def _forward_tiles(q, block_of: Callable, groups: int, value_size: int, start, stop, positions, aligned):
    """Outputs and log-sum-exps of all tiles of q; block_of(index) is a block of keys and one of values, [B, G, KEY_BLOCK, size]."""

    def query_tile(inputs):
        q, start, stop = inputs

        def key_block(index, softmax):
            softmax, q_, (k, v), seen = pin((softmax, q, block_of(index), tile.seen(start, stop, index * KEY_BLOCK)), aligned)
            return pin(tile.add_block(softmax, tile.scores(q_, k, seen), v), aligned)

        first, last = tile.block_range(start.reshape(-1), stop.reshape(-1))
        softmax = lax.fori_loop(first, last, key_block, tile.empty(q.shape[:-1], value_size))
        return pin(tile.finish(pin(softmax, aligned)), aligned)

    bounds = (_row_bounds(x, positions, q.shape[2] // groups) for x in (start, stop))
    return lax.map(query_tile, (_query_tiles(q, positions, groups), *bounds))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q, k, v, start, stop, positions, aligned):
    return _forward(q, k, v, start, stop, positions, aligned)[0]


def _forward(q, k, v, start, stop, positions, aligned):
    keys, values = _blocks(k), _blocks(v)
    block_of = lambda index: (_block(keys, index), _block(values, index))
    out, log_total = _forward_tiles(q, block_of, k.shape[2], v.shape[3], start, stop, positions, aligned)
    out = _from_query_tiles(out, positions).astype(q.dtype)
    return out, (q, k, v, start, stop, out, _from_query_tiles(log_total[..., None], positions))


def _backward(positions, aligned, residuals, d_out):
    q, k, v, start, stop, out, log_total = residuals
    num_keys, groups, repeat = k.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    positions = min(FAST_POSITIONS, q.shape[1])  # the gradient promises no bits: larger tiles
    padding = -q.shape[1] % positions
    grow = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    num_tokens = q.shape[1]
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)  # [B, T, H, 1]
    q, d_out, log_total, delta, start, stop = (grow(x) for x in (q, d_out.astype(q.dtype), log_total, delta, start, stop))
    k, v, scale = _blocks(k), _blocks(v), q.shape[-1] ** -0.5

    def query_tile(carry, inputs):
        q, d_out, log_total, delta, start, stop = inputs

        def key_block(index, carry):
            dq, dk, dv = carry
            keys, values, seen = _block(k, index), _block(v, index), tile.seen(start, stop, index * KEY_BLOCK)
            scores, d_weights = tile.scores(q, keys, seen), tile.product(d_out, values, (1, 1))
            weights, d_scores = (dot_cast(x, q.dtype) for x in tile.gradients(scores, d_weights, log_total, delta))

            def add(total, x):
                x = (_block(total, index) + x).swapaxes(1, 2)
                return lax.dynamic_update_slice_in_dim(total, x, index * KEY_BLOCK, axis=1)

            dk, dv = add(dk, tile.product(d_scores, q, (0, 0))), add(dv, tile.product(weights, d_out, (0, 0)))
            return tile.product(d_scores, keys, (1, 0), dq), dk, dv

        first, last = tile.block_range(start.reshape(-1), stop.reshape(-1))
        dq, dk, dv = lax.fori_loop(first, last, key_block, (jnp.zeros(q.shape), *carry))
        return (dk, dv), (scale * dq).astype(q.dtype)

    per_row = (_query_tiles(x, positions, groups) for x in (q, d_out, log_total, delta))
    bounds = (_row_bounds(x, positions, repeat) for x in (start, stop))
    (dk, dv), dq = lax.scan(query_tile, (jnp.zeros(k.shape), jnp.zeros(v.shape)), (*per_row, *bounds))
    dq = _from_query_tiles(dq, positions)[:, :num_tokens]
    return dq, (scale * dk[:, :num_keys]).astype(k.dtype), dv[:, :num_keys].astype(v.dtype), None, None


_flash.defvjp(_forward, _backward)


def _whole_tiles(q, start, stop, groups, aligned):
    """Queries and bounds padded to whole tiles, and the positions of a tile."""
    positions = _positions_per_tile(q, groups, aligned)
    padding = -q.shape[1] % positions
    grow = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    return grow(q), grow(start), grow(stop), positions


def flash_attention(q, k, v, start, stop, *, aligned):
    """See `api.flash_attention`."""
    *tiles, positions = _whole_tiles(q, start, stop, k.shape[2], aligned)
    out: Any = _flash(tiles[0], k, v, *tiles[1:], positions, aligned)
    return out[:, : q.shape[1]]


def flash_attention_paged(q, key_pages, value_pages, page_table, start, stop, *, aligned):
    """See `api.flash_attention_paged`."""
    groups, value_size = value_pages.shape[2:]
    queries, start, stop, positions = _whole_tiles(q, start, stop, groups, aligned)
    block_of = lambda index: tuple(x[page_table[:, index]].swapaxes(1, 2) for x in (key_pages, value_pages))
    out, _ = _forward_tiles(queries, block_of, groups, value_size, start, stop, positions, aligned)
    return _from_query_tiles(out, positions)[:, : q.shape[1]].astype(q.dtype)
