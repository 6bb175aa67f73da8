"""Flash attention in plain JAX: a loop over tiles of query rows, inside it a loop over the key blocks the tile sees."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import GRID
from pallas_kernels.compat import dot_cast, pin
from pallas_kernels.flash_attention import tile

ALIGNED_ROWS = 32
"""Query rows of a tile (positions x query heads of a key head) in aligned numerics; a decode step pays for this many."""
KEY_BLOCK = GRID
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
    """[B, T] -> [n, B, 1, rows]: the bound of each row of each tile."""
    batch, length = x.shape
    tiles = x.reshape(batch, length // positions, positions).transpose(1, 0, 2)
    return jnp.repeat(tiles, repeat, axis=-1)[:, :, None]


def _positions_per_tile(q: jax.Array, k: jax.Array, aligned: bool) -> int:
    repeat = q.shape[2] // k.shape[2]
    return max(1, ALIGNED_ROWS // repeat) if aligned else min(FAST_POSITIONS, q.shape[1])


def _blocks(x: jax.Array) -> jax.Array:
    """Pad the keys [B, S, G, K] to whole blocks: block size and order never depend on S."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % KEY_BLOCK), (0, 0), (0, 0)))


def _block_range(start: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and one past the last key block that any row of the tile sees."""
    none = stop <= start
    first = jnp.where(none, jnp.iinfo(jnp.int32).max, start).min() // KEY_BLOCK
    return first, -(-jnp.where(none, 0, stop).max() // KEY_BLOCK)


def _seen(start: jax.Array, stop: jax.Array, index: jax.Array) -> jax.Array:
    key = index * KEY_BLOCK + jnp.arange(KEY_BLOCK)
    return (key >= start[..., None]) & (key < stop[..., None])


def _forward_tiles(q, k, v, start, stop, positions, aligned):
    groups, repeat = k.shape[2], q.shape[2] // k.shape[2]
    k, v = _blocks(k), _blocks(v)

    def query_tile(inputs):
        q, start, stop = inputs

        def key_block(index, softmax):
            at = lambda x: lax.dynamic_slice_in_dim(x, index * KEY_BLOCK, KEY_BLOCK, axis=1)
            return pin(tile.add_block(*pin((softmax, q, at(k), at(v), _seen(start, stop, index)), aligned)), aligned)

        first, last = _block_range(start, stop)
        return pin(tile.finish(pin(lax.fori_loop(first, last, key_block, tile.empty(q, v.shape[-1])), aligned)), aligned)

    bounds = (_row_bounds(x, positions, repeat) for x in (start, stop))
    return lax.map(query_tile, (_query_tiles(q, positions, groups), *bounds))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q, k, v, start, stop, positions, aligned):
    out, _ = _forward_tiles(q, k, v, start, stop, positions, aligned)
    return _from_query_tiles(out, positions).astype(q.dtype)


def _forward(q, k, v, start, stop, positions, aligned):
    out, log_total = _forward_tiles(q, k, v, start, stop, positions, aligned)
    out = _from_query_tiles(out, positions).astype(q.dtype)
    log_total = _from_query_tiles(log_total[..., None], positions)[..., 0]
    return out, (q, k, v, start, stop, out, log_total)


def _backward(positions, aligned, residuals, d_out):
    q, k, v, start, stop, out, log_total = residuals
    num_keys, groups, repeat = k.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    positions = min(FAST_POSITIONS, q.shape[1])  # the gradient promises no bits: larger tiles
    padding = -q.shape[1] % positions
    grow = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    num_tokens = q.shape[1]
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [B, T, H]
    q, d_out, log_total, delta, start, stop = (grow(x) for x in (q, d_out.astype(q.dtype), log_total, delta, start, stop))
    k, v = _blocks(k), _blocks(v)
    scale = q.shape[-1] ** -0.5

    def query_tile(carry, inputs):
        q, d_out, log_total, delta, start, stop = inputs

        def key_block(index, carry):
            dq, dk, dv = carry
            at = lambda x: lax.dynamic_slice_in_dim(x, index * KEY_BLOCK, KEY_BLOCK, axis=1)
            add = lambda total, x: lax.dynamic_update_slice_in_dim(total, at(total) + x, index * KEY_BLOCK, axis=1)
            seen = _seen(start, stop, index)
            weights = jnp.where(seen, jnp.exp2(tile.scores(q, at(k), seen) - log_total[..., None]), 0.0)
            d_weights = tile.product("bgrv,bsgv->bgrs", d_out, at(v))
            d_scores = dot_cast(scale * weights * (d_weights - delta[..., None]), q.dtype)
            dq = dq + tile.product("bgrs,bsgk->bgrk", d_scores, at(k))
            dk = add(dk, tile.product("bgrs,bgrk->bsgk", d_scores, q))
            return dq, dk, add(dv, tile.product("bgrs,bgrv->bsgv", dot_cast(weights, q.dtype), d_out))

        first, last = _block_range(start, stop)
        dq, dk, dv = lax.fori_loop(first, last, key_block, (jnp.zeros(q.shape), *carry))
        return (dk, dv), dq.astype(q.dtype)

    per_row = (_query_tiles(x[..., None], positions, groups)[..., 0] for x in (log_total, delta))
    bounds = (_row_bounds(x, positions, repeat) for x in (start, stop))
    tiles = (_query_tiles(q, positions, groups), _query_tiles(d_out, positions, groups), *per_row, *bounds)
    (dk, dv), dq = lax.scan(query_tile, (jnp.zeros(k.shape), jnp.zeros(v.shape)), tiles)
    dq = _from_query_tiles(dq, positions)[:, :num_tokens]
    return dq, dk[:, :num_keys].astype(k.dtype), dv[:, :num_keys].astype(v.dtype), None, None


_flash.defvjp(_forward, _backward)


def flash_attention(q, k, v, start, stop, *, aligned):
    """See `api.flash_attention`."""
    num_tokens, positions = q.shape[1], _positions_per_tile(q, k, aligned)
    padding = -num_tokens % positions
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    start, stop = (jnp.pad(x, ((0, 0), (0, padding))) for x in (start, stop))
    out: Any = _flash(q, k, v, start, stop, positions, aligned)
    return out[:, :num_tokens]
