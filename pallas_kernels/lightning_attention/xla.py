"""Lightning attention in plain JAX: a scan over chunks with the tile functions, forward and backward.

The gradient is one pass forward in time for S (dQ) and one backward for dS (dK, dV); only the inputs are stored. The decay is constant: no
gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_operand, pin, unwritten
from pallas_kernels.lightning_attention import tile

QUERY_TILE = 8
"""Rows of q a tile computes in aligned numerics: a decode step pays for this many rows, so it is smaller than a chunk."""


def _chunk(x: jax.Array, index: jax.Array, chunk_size: int) -> jax.Array:
    """The chunk of [B, T, H, K] as [B, H, C, K]."""
    return lax.dynamic_slice_in_dim(x, index * chunk_size, chunk_size, axis=1).swapaxes(1, 2)


def _put(x: jax.Array, chunk: jax.Array, index: jax.Array) -> jax.Array:
    """Put a chunk [B, H, C, K] into x [B, T, H, K], of an operand's dtype."""
    return lax.dynamic_update_slice_in_dim(x, dot_operand(chunk.swapaxes(1, 2)), index * chunk.shape[2], axis=1)


def _chunk_rows(q, k, v, state, powers, aligned):
    """All C rows of a chunk: at once, or in aligned numerics as a loop over the tiles that decode uses."""
    batch, heads, chunk_size, size = q.shape
    if not aligned:
        return tile.rows(q, k, v, state, *tile.weights(powers, size)[:2])
    num_tiles = chunk_size // QUERY_TILE
    tiles = jnp.moveaxis(q.reshape(batch, heads, num_tiles, QUERY_TILE, size), 2, 0)
    starts = QUERY_TILE * jnp.arange(num_tiles, dtype=jnp.int32)[:, None]

    def rows(inputs):
        q, keys, values, entering, weights = pin((inputs[0], k, v, state, powers))
        return pin(tile.rows(q, keys, values, entering, *tile.row_weights(weights, size, inputs[1], QUERY_TILE)))

    out = lax.map(rows, (tiles, starts))
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, chunk_size, -1)


def _scan_forward(q, k, v, powers, state, reset, last, chunk_size, aligned):
    """Outputs of all chunks, and the state after the first `last[b]` of them."""

    def step(carry, chunk):
        state, out = carry
        index, reset = chunk
        queries, keys, values = (_chunk(x, index, chunk_size) for x in (q, k, v))
        state = jnp.where(reset[:, None, None, None], 0.0, state)
        out = _put(out, _chunk_rows(queries, keys, values, state, powers, aligned).astype(q.dtype), index)
        state = jnp.where((index < last)[:, None, None, None], _after(state, keys, values, powers, aligned), state)
        return (state, out), None

    (state, out), _ = lax.scan(step, (state, unwritten(v.shape, q.dtype, q)), (jnp.arange(reset.shape[1]), reset.T))
    return out.astype(q.dtype), state


def _after(state, k, v, powers, aligned=True):
    """The state one chunk later."""
    weights = tile.weights(powers, k.shape[-1])
    return pin(tile.fold(*pin((state, k, v, weights.key, weights.whole), aligned)), aligned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _lightning(q, k, v, log_decay, state, reset, last, chunk_size, aligned):
    return _scan_forward(q, k, v, tile.decay_powers(log_decay, chunk_size), state, reset, last, chunk_size, aligned)


def _forward(q, k, v, log_decay, state, reset, last, chunk_size, aligned):
    out = _lightning(q, k, v, log_decay, state, reset, last, chunk_size, aligned)
    return out, (q, k, v, log_decay, state, reset, last)


def _backward(chunk_size, aligned, residuals, gradients):
    del aligned  # gradients promise no bits across layouts
    q, k, v, log_decay, state, reset, last = residuals
    d_out, d_state = gradients
    weights = tile.weights(tile.decay_powers(log_decay, chunk_size), q.shape[-1])
    transposed = jnp.swapaxes(weights.mask, 1, 2)
    dtype, index = q.dtype, jnp.arange(reset.shape[1])
    keep = jnp.where(reset, 0.0, 1.0).T[:, :, None, None, None]  # [n, B, 1, 1, 1]
    live = (index[:, None] < last)[:, :, None, None, None]
    chunks = lambda index: (_chunk(x, index, chunk_size) for x in (q, k, v, d_out))
    d_out = d_out.astype(dtype)

    def backward_in_time(carry, chunk):
        """d_state: gradient of the state that leaves the chunk."""
        d_state, dk, dv = carry
        index, keep, live = chunk
        queries, keys, values, d_rows = chunks(index)
        d_after = jnp.where(live, d_state, 0.0)
        dv = _put(dv, tile.value_gradient(queries, keys, d_rows, d_after, transposed, weights.key).astype(dtype), index)
        dk = _put(dk, tile.key_gradient(queries, values, d_rows, d_after, transposed, weights.key).astype(dtype), index)
        d_before = tile.fold(d_state, queries, d_rows, weights.query, jnp.where(live, weights.whole, 1.0))
        return (keep * d_before, dk, dv), None

    gradients = d_state, unwritten(k.shape, dtype, k), unwritten(v.shape, dtype, v)
    (d_state, dk, dv), _ = lax.scan(backward_in_time, gradients, (index, keep, live), reverse=True)

    def forward_in_time(carry, chunk):
        state, dq = carry
        index, keep = chunk
        _, keys, values, d_rows = chunks(index)
        state = keep * state
        dq = _put(dq, tile.query_gradient(keys, values, d_rows, state, weights.mask, weights.query).astype(dtype), index)
        return (tile.fold(state, keys, values, weights.key, weights.whole), dq), None

    (_, dq), _ = lax.scan(forward_in_time, (state, unwritten(q.shape, dtype, q)), (index, keep))
    dq, dk, dv = (x.astype(dtype) for x in (dq, dk, dv))
    return dq, dk, dv, jnp.zeros_like(log_decay), d_state, None, None


_lightning.defvjp(_forward, _backward)


def lightning_attention(q, k, v, log_decay, *, state, reset, length, chunk_size, aligned):
    """See `api.lightning_attention`."""
    batch, num_tokens, heads, size = q.shape
    num_chunks = -(-num_tokens // chunk_size)
    q, k, v = (jnp.pad(x, ((0, 0), (0, num_chunks * chunk_size - num_tokens), (0, 0), (0, 0))) for x in (q, k, v))
    state = jnp.zeros((batch, heads, size, v.shape[-1]), jnp.float32) if state is None else state
    reset = jnp.zeros((batch, num_chunks), bool) if reset is None else reset
    length = jnp.full(batch, num_tokens, jnp.int32) if length is None else length
    result: Any = _lightning(q, k, v, log_decay, state, reset, length // chunk_size, chunk_size, aligned)
    return result[0][:, :num_tokens], result[1]


def _token_row(q, keys, values, state, powers, row, aligned):
    """The output [N, H, V] of a token q [N, H, K] at a row [N] of its chunk's tile."""
    padding = QUERY_TILE - 1 if aligned else 0
    tile_q = jnp.pad(q[:, :, None], ((0, 0), (0, 0), (0, padding), (0, 0)))
    tile_q, keys, values, state, powers = pin((tile_q, keys, values, state, powers), aligned)
    weights = tile.row_weights(powers, q.shape[-1], row, tile_q.shape[2])
    return pin(tile.rows(tile_q, keys, values, state, *weights), aligned)[:, :, 0].astype(q.dtype)


def _fold_full(state, key_buffer, value_buffer, powers, full, state_copy):
    """The states, and their copies, with the buffers folded in where `full`; other slots are not touched."""
    slots = jnp.argsort(~full)  # slots whose chunk is full come first

    def fold_slot(i, states):
        one = lambda x: lax.dynamic_slice_in_dim(x, slots[i], 1)
        after = _after(one(states[0]), one(key_buffer), one(value_buffer), powers)
        return jax.tree.map(lambda x: lax.dynamic_update_slice_in_dim(x, after.astype(x.dtype), slots[i], 0), states)

    return lax.fori_loop(0, full.sum(), fold_slot, (state, state_copy))


def lightning_attention_step(q, k, v, state, key_buffer, value_buffer, log_decay, index, *, state_copy, may_fold, aligned):
    """See `api.lightning_attention_step`."""
    chunk_size, slot = key_buffer.shape[2], jnp.arange(q.shape[0])
    powers = tile.decay_powers(log_decay, chunk_size)
    key_buffer = key_buffer.at[slot, :, index].set(k.astype(key_buffer.dtype), mode="drop")
    value_buffer = value_buffer.at[slot, :, index].set(v.astype(value_buffer.dtype), mode="drop")
    out = _token_row(q, key_buffer, value_buffer, state if state_copy is None else state_copy, powers, index, aligned)
    if may_fold:
        state, state_copy = _fold_full(state, key_buffer, value_buffer, powers, index == chunk_size - 1, state_copy)
    return out, state, key_buffer, value_buffer, state_copy


def lightning_attention_verify(q, k, v, state, key_buffer, value_buffer, log_decay, index, *, aligned):
    """See `api.lightning_attention_verify`, which lays the tokens out as paths [B, P, D, H, size]."""
    batch, num_paths, num_tokens = q.shape[:3]
    chunk_size, powers = key_buffer.shape[2], tile.decay_powers(log_decay, key_buffer.shape[2])
    each = lambda x: jnp.repeat(x, num_paths, axis=0)
    row = each(index)[:, None] - jnp.arange(2 * chunk_size)  # how far a row of two chunks stands before the first token

    def on_tiles(tokens, buffer):
        """Buffer rows, then the path's tokens, on the tiles of two chunks: two arrays [B P, H, C, size]."""
        tokens = tokens.reshape(batch * num_paths, *tokens.shape[2:]).swapaxes(1, 2)  # [B P, H, D, size]
        both = jnp.concatenate([each(buffer), tokens.astype(buffer.dtype)], axis=2)
        source = jnp.where(row > 0, jnp.arange(2 * chunk_size), chunk_size - row)
        taken = jnp.take_along_axis(both, jnp.clip(source, 0, both.shape[2] - 1)[:, None, :, None], axis=2)
        return jnp.split(jnp.where((row > -num_tokens)[:, None, :, None], taken, 0), 2, axis=2)

    (keys, next_keys), (values, next_values) = on_tiles(k, key_buffer), on_tiles(v, value_buffer)
    state = each(state)
    after = _after(state.astype(jnp.float32), keys, values, powers, aligned).astype(state.dtype)

    def one(token):
        i, q = token
        at = each(index) + i
        pick = lambda here, there: jnp.where((at >= chunk_size)[:, None, None, None], there, here)
        tiles = pick(keys, next_keys), pick(values, next_values), pick(state, after)
        return _token_row(q, *tiles, powers, at % chunk_size, aligned)

    queries = jnp.moveaxis(q.reshape(batch * num_paths, *q.shape[2:]), 1, 0)
    out = lax.map(one, (jnp.arange(num_tokens), queries))  # [D, B P, H, V]
    return jnp.moveaxis(out, 0, 1).reshape(batch, num_paths, num_tokens, *out.shape[2:])
