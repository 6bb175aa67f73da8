"""Lightning attention for TPUs: a grid of (batch row, group of heads, step of a few chunks), the state in VMEM between the steps.

q, k, v and o are read and written once, as [B, T, H K]: a head is a slice of lanes. The heads of a group go through each statement of the
tile functions together, so that the matrix units find independent work.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles
from pallas_kernels.compat import interpreted
from pallas_kernels.lightning_attention import pallas, tile
from pallas_kernels.lightning_attention.tile import Weights


def _heads(ref, rows: slice, size: int) -> jax.Array:
    """The rows of a block [..., T, heads x size], as [heads, rows, size]."""
    front = (0,) * (len(ref.shape) - 2)
    return jnp.stack([ref[*front, rows, h * size : (h + 1) * size] for h in range(ref.shape[-1] // size)])


def _write_heads(ref, rows: slice, x: jax.Array) -> None:
    front, size = (0,) * (len(ref.shape) - 2), x.shape[2]
    for h in range(x.shape[0]):
        ref[*front, rows, h * size : (h + 1) * size] = x[h].astype(ref.dtype)


def _steps(state_ref, start, num_chunks: int, reverse: bool, chunk):
    """Run chunk(index, rows, state) -> state for the chunks of a grid step, in time or against it, with `start` in the first step.

    `state_ref` is a block of the output that stays in VMEM through the steps of a sequence.
    """
    step, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 0)
    def _first():
        state_ref[...] = start[...]

    first = (last - step if reverse else step) * num_chunks
    for i in reversed(range(num_chunks)) if reverse else range(num_chunks):
        state_ref[0] = chunk(first + i, i, state_ref[0])


def _forward_kernel(
    last_ref, reset_ref, q_ref, k_ref, v_ref, mask_ref, query_ref, key_ref, whole_ref, start_ref, o_ref, state_ref, *, sizes
):
    chunk_size, num_chunks, key_size, value_size = sizes
    row = pl.program_id(0)

    def chunk(index, i, state):
        at = slice(i * chunk_size, (i + 1) * chunk_size)
        q, k, v = _heads(q_ref, at, key_size), _heads(k_ref, at, key_size), _heads(v_ref, at, value_size)
        state = jnp.where(reset_ref[row, index] > 0, 0.0, state)
        _write_heads(o_ref, at, tile.rows(q, k, v, state, mask_ref[...], query_ref[...]))
        after = tile.fold(state, k, v, key_ref[...], whole_ref[...])
        return jnp.where(index < last_ref[row], after, state)

    _steps(state_ref, start_ref, num_chunks, False, chunk)


def _query_kernel(
    last_ref, reset_ref, k_ref, v_ref, d_out_ref, mask_ref, query_ref, key_ref, whole_ref, start_ref, dq_ref, state_ref, *, sizes
):
    """The gradient of q, forward in time."""
    del last_ref
    chunk_size, num_chunks, key_size, value_size = sizes
    row = pl.program_id(0)

    def chunk(index, i, state):
        at = slice(i * chunk_size, (i + 1) * chunk_size)
        k, v, d_out = _heads(k_ref, at, key_size), _heads(v_ref, at, value_size), _heads(d_out_ref, at, value_size)
        state = jnp.where(reset_ref[row, index] > 0, 0.0, state)
        _write_heads(dq_ref, at, tile.query_gradient(k, v, d_out, state, mask_ref[...], query_ref[...]))
        return tile.fold(state, k, v, key_ref[...], whole_ref[...])

    _steps(state_ref, start_ref, num_chunks, False, chunk)


def _key_value_kernel(
    last_ref,
    reset_ref,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    mask_ref,
    query_ref,
    key_ref,
    whole_ref,
    end_ref,
    dk_ref,
    dv_ref,
    d_state_ref,
    *,
    sizes,
):
    """The gradients of k and v, backward in time; mask_ref holds M^T."""
    chunk_size, num_chunks, key_size, value_size = sizes
    row = pl.program_id(0)

    def chunk(index, i, d_state):
        at = slice(i * chunk_size, (i + 1) * chunk_size)
        q, k = _heads(q_ref, at, key_size), _heads(k_ref, at, key_size)
        v, d_out = _heads(v_ref, at, value_size), _heads(d_out_ref, at, value_size)
        live = index < last_ref[row]
        d_after = jnp.where(live, d_state, 0.0)
        _write_heads(dv_ref, at, tile.value_gradient(q, k, d_out, d_after, mask_ref[...], key_ref[...]))
        _write_heads(dk_ref, at, tile.key_gradient(q, v, d_out, d_after, mask_ref[...], key_ref[...]))
        whole = jnp.where(live, whole_ref[...], 1.0)
        d_before = tile.fold(d_state, q, d_out, query_ref[...], whole)
        return jnp.where(reset_ref[row, index] > 0, 0.0, d_before)

    _steps(d_state_ref, end_ref, num_chunks, True, chunk)


def _spread(weights: Weights, key_size: int, value_size: int) -> Weights:
    """The weights, columns as wide as what they multiply: they would be spread over the lanes again in every step."""
    lanes = key_size if key_size == value_size else 1
    return Weights(weights.mask, *(jnp.broadcast_to(x, (*x.shape[:2], lanes)) for x in weights[1:]))


def _largest_divisor(n: int, most: int) -> int:
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _group(heads: int, batch: int, choice: tiles.LightningTpu) -> int:
    """The heads of a program: the most with which every core gets as many programs as the others, or if none do, the most."""
    divisors = [d for d in range(min(heads, choice.heads), 0, -1) if heads % d == 0]
    return next((d for d in divisors if heads // d * batch % choice.cores == 0), divisors[0])


def _call(kernel, name: str, sequences, weights: Weights, state, reset, last, out_sizes, dtype, flops_per_row: int, reverse: bool = False):
    """Run a kernel over the sequences [B, T, H, size]; returns arrays [B, T, H, size] of `out_sizes` and the state at the end."""
    batch, num_tokens, heads = sequences[0].shape[:3]
    key_size, value_size = state.shape[2:]
    chunk_size = weights.mask.shape[1]
    choice = tiles.of(tiles.LIGHTNING_TPU)
    group = _group(heads, batch, choice)
    num_chunks = _largest_divisor(num_tokens // chunk_size, max(1, choice.rows // chunk_size))
    rows, steps = num_chunks * chunk_size, num_tokens // (num_chunks * chunk_size)
    at = (lambda b, h, t, *_: (b, steps - 1 - t, h)) if reverse else (lambda b, h, t, *_: (b, t, h))
    sequence = lambda size: pl.BlockSpec((1, rows, group * size), at)
    constant = lambda x: pl.BlockSpec((group, *x.shape[1:]), lambda b, h, t, *_: (h, 0, 0))
    state_spec = pl.BlockSpec((1, group, key_size, value_size), lambda b, h, t, *_: (b, h, 0, 0))
    constants = _spread(weights, key_size, value_size)
    flat = [x.reshape(batch, num_tokens, -1) for x in sequences]
    outs = [jax.ShapeDtypeStruct((batch, num_tokens, heads * size), dtype) for size in out_sizes]
    moved = sum(x.size * x.dtype.itemsize for x in (*flat, *outs)) + 2 * state.size * 4
    result: Any = pl.pallas_call(
        functools.partial(kernel, sizes=(chunk_size, num_chunks, key_size, value_size)),
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // group, steps),
            in_specs=[*(sequence(x.shape[3]) for x in sequences), *map(constant, constants), state_spec],
            out_specs=[*map(sequence, out_sizes), state_spec],
        ),
        out_shape=[*outs, jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=choice.vmem, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(flops=batch * num_tokens * heads * flops_per_row, bytes_accessed=moved, transcendentals=0),
        interpret=interpreted("tpu"),
    )(last, reset, *flat, *constants, state)
    return *(x.reshape(batch, num_tokens, heads, -1) for x in result[:-1]), result[-1]


def _check(q, v) -> None:
    if not interpreted("tpu") and (q.shape[3] % 128 or v.shape[3] % 128):
        raise NotImplementedError(f"head sizes {q.shape[3]} and {v.shape[3]} are not whole lanes of 128")


def _forward(q, k, v, weights, state, reset, last):
    _check(q, v)
    chunk_size, (key_size, value_size) = weights.mask.shape[1], state.shape[2:]
    flops = 2 * chunk_size * (key_size + value_size) + 4 * key_size * value_size
    return _call(_forward_kernel, "lightning_forward", (q, k, v), weights, state, reset, last, (value_size,), q.dtype, flops)


def _backward(q, k, v, d_out, weights, state, d_state, reset, last):
    chunk_size, (key_size, value_size) = weights.mask.shape[1], state.shape[2:]
    flops = 2 * chunk_size * (key_size + value_size) + 4 * key_size * value_size
    dq, _ = _call(_query_kernel, "lightning_dq", (k, v, d_out), weights, state, reset, last, (key_size,), q.dtype, flops)
    transposed = weights._replace(mask=jnp.swapaxes(weights.mask, 1, 2))
    flops = 4 * chunk_size * (key_size + value_size) + 6 * key_size * value_size
    sequences, sizes = (q, k, v, d_out), (key_size, value_size)
    dk, dv, d_state = _call(_key_value_kernel, "lightning_dkv", sequences, transposed, d_state, reset, last, sizes, q.dtype, flops, True)
    return dq, dk, dv, d_state


lightning_attention = functools.partial(pallas.lightning_attention, _forward, _backward)


ROW_BLOCK = 16
"""Rows of a buffer that a decode step writes: what a tile of bf16 holds."""


def _on_tile(tokens: jax.Array, buffer: jax.Array | None, first: jax.Array, chunk_size: int) -> jax.Array:
    """A chunk's tile [heads, C, size]: rows before `first` from the buffer, then the tokens [heads, D, size], zeros behind."""
    heads, num_tokens, size = tokens.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (heads, chunk_size, size), 1)
    wide = tokens.astype(jnp.float32)  # masks fit 32-bit lanes
    tile = jnp.zeros(row.shape, jnp.float32) if buffer is None else jnp.where(row < first, buffer.astype(jnp.float32), 0.0)
    for i in range(num_tokens):
        tile = jnp.where(row == first + i, wide[:, i : i + 1], tile)
    return tile.astype(tokens.dtype)


def _rows_kernel(
    index_ref, q_ref, k_ref, v_ref, state_ref, key_in, value_in, mask_ref, query_ref, key_ref, whole_ref, o_ref, *writes, sizes
):
    """Rows of tokens that follow the buffers, one after another; the first may be written into them."""
    chunk_size, num_tokens, key_size, value_size = sizes
    index, every = index_ref[pl.program_id(1)], slice(None)
    q, k, v = _heads(q_ref, every, key_size), _heads(k_ref, every, key_size), _heads(v_ref, every, value_size)
    state, weights = state_ref[0], (mask_ref[...], query_ref[...])
    keys, values = _on_tile(k, key_in[0], index, chunk_size), _on_tile(v, value_in[0], index, chunk_size)

    def outputs(first, keys, values, state):
        """The tokens' rows of a tile whose row `first` is the first token's."""
        out = tile.rows(_on_tile(q, None, first, chunk_size), keys, values, state, *weights)
        row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)
        one = [jnp.where(row == first + i, out, 0.0).sum(1, keepdims=True) for i in range(num_tokens)]
        return jnp.concatenate(one, axis=1)  # zero for tokens of another tile

    _write_heads(o_ref, every, outputs(index, keys, values, state))
    if num_tokens > 1:

        @pl.when(index + num_tokens > chunk_size)
        def _next_chunk():
            after, first = tile.fold(state, keys, values, key_ref[...], whole_ref[...]), index - chunk_size
            behind = outputs(first, _on_tile(k, None, first, chunk_size), _on_tile(v, None, first, chunk_size), after)
            _write_heads(o_ref, every, _heads(o_ref, every, value_size).astype(jnp.float32) + behind)

    start = pl.multiple_of(jnp.minimum(index, chunk_size - 1) // ROW_BLOCK * ROW_BLOCK, ROW_BLOCK)
    for out_ref, buffer_ref, token in zip(writes, (key_in, value_in), (k, v), strict=False):
        old = buffer_ref[0, :, pl.ds(start, ROW_BLOCK), :].astype(jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
        out_ref[0] = jnp.where(row == index - start, token.astype(jnp.float32), old).astype(out_ref.dtype)


def _rows(name: str, q, k, v, state, key_buffer, value_buffer, log_decay, index, write: bool):
    """The outputs [B, P, D, H, V] of tokens [B, P, D, H, size] after the buffers, and with `write` the buffers with the first token."""
    batch, num_paths, num_tokens, heads, key_size = q.shape
    chunk_size, value_size = value_buffer.shape[2:]
    choice = tiles.of(tiles.LIGHTNING_TPU)
    group = _largest_divisor(heads, choice.decode_heads)
    constants = _spread(tile.weights(tile.decay_powers(log_decay, chunk_size), key_size), key_size, value_size)
    tokens = lambda size: pl.BlockSpec((1, 1, num_tokens, group * size), lambda h, b, p, index: (b, p, 0, h))
    slot = lambda *shape: pl.BlockSpec((1, group, *shape), lambda h, b, p, index: (b, h, 0, 0))
    constant = lambda x: pl.BlockSpec((group, *x.shape[1:]), lambda h, b, p, index: (h, 0, 0))
    written = lambda size: pl.BlockSpec(
        (1, group, ROW_BLOCK, size), lambda h, b, p, index: (b, h, jnp.minimum(index[b], chunk_size - 1) // ROW_BLOCK, 0)
    )
    flat = [x.reshape(*x.shape[:3], -1) for x in (q, k, v)]
    out = jax.ShapeDtypeStruct((batch, num_paths, num_tokens, heads * value_size), q.dtype)
    buffers = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key_buffer, value_buffer)] if write else []
    moved = sum(x.size * x.dtype.itemsize for x in (*flat, state, key_buffer, value_buffer))
    rows = batch * num_paths * heads * chunk_size
    result: Any = pl.pallas_call(
        functools.partial(_rows_kernel, sizes=(chunk_size, num_tokens, key_size, value_size)),
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads // group, batch, num_paths),  # a group's weights are fetched once
            in_specs=[
                *(tokens(size) for size in (key_size, key_size, value_size)),
                slot(key_size, value_size),
                slot(chunk_size, key_size),
                slot(chunk_size, value_size),
                *map(constant, constants),
            ],
            out_specs=[tokens(value_size), *([written(key_size), written(value_size)] if write else [])],
        ),
        out_shape=[out, *buffers],
        input_output_aliases={5: 1, 6: 2} if write else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=choice.vmem, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=rows * 2 * (chunk_size * (key_size + value_size) + key_size * value_size), bytes_accessed=moved, transcendentals=0
        ),
        interpret=interpreted("tpu"),
    )(index, *flat, state, key_buffer, value_buffer, *constants)
    return result[0].reshape(batch, num_paths, num_tokens, heads, value_size), *result[1:]


def _fold_kernel(order_ref, count_ref, state_ref, key_in, value_in, key_ref, whole_ref, out_ref, *copy_ref):
    del order_ref
    i, count = pl.program_id(1), count_ref[0]

    @pl.when(i < count)
    def _fold():
        after = tile.fold(state_ref[0], key_in[0], value_in[0], key_ref[...], whole_ref[...])
        out_ref[0] = after
        for ref in copy_ref:
            ref[0] = after.astype(ref.dtype)

    @pl.when((i == 0) & (count == 0))
    def _nothing_to_fold():
        out_ref[0] = state_ref[0]
        for ref in copy_ref:
            ref[0] = state_ref[0].astype(ref.dtype)


def _fold(state, key_buffer, value_buffer, log_decay, full, state_copy):
    """The states with the buffers folded in where `full` [B]: in place, and only those states are read and written."""
    batch, heads, key_size, value_size = state.shape
    chunk_size, choice = key_buffer.shape[2], tiles.of(tiles.LIGHTNING_TPU)
    group = _largest_divisor(heads, choice.decode_heads)
    constants = _spread(tile.weights(tile.decay_powers(log_decay, chunk_size), key_size), key_size, value_size)[2:]
    # Full slots come first; behind them the index does not change, so nothing moves.
    at = lambda h, i, order, count: (order[jnp.minimum(i, jnp.maximum(count[0] - 1, 0))], h, 0, 0)
    slot = lambda x: pl.BlockSpec((1, group, *x.shape[2:]), at)
    copies = [] if state_copy is None else [state_copy]
    arrays = (state, key_buffer, value_buffer)
    # The copy's old values are never read: it is passed so that the new ones take its place.
    unread = [pl.BlockSpec(memory_space=pl.ANY)] * len(copies)
    result: Any = pl.pallas_call(
        (lambda order, count, s, k, v, a, w, _, *outs: _fold_kernel(order, count, s, k, v, a, w, *outs)) if copies else _fold_kernel,
        name="lightning_fold",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads // group, batch),
            in_specs=[
                *map(slot, arrays),
                *(pl.BlockSpec((group, *x.shape[1:]), lambda h, i, order, count: (h, 0, 0)) for x in constants),
                *unread,
            ],
            out_specs=[slot(state) for _ in (state, *copies)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (state, *copies)],
        input_output_aliases={2: 0, 7: 1} if copies else {2: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=choice.vmem, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=0, transcendentals=0),  # most steps fold nothing
        interpret=interpreted("tpu"),
    )(jnp.argsort(~full).astype(jnp.int32), full.sum(dtype=jnp.int32)[None], *arrays, *constants, *copies)
    return result[0], result[1] if copies else None


def lightning_attention_step(q, k, v, state, key_buffer, value_buffer, log_decay, index, *, state_copy, may_fold, aligned):
    """See `api.lightning_attention_step`."""
    del aligned
    _check(q[:, None], v[:, None])
    one = lambda x: x[:, None, None]
    read = state if state_copy is None else state_copy
    out, key_buffer, value_buffer = _rows(
        "lightning_decode", one(q), one(k), one(v), read, key_buffer, value_buffer, log_decay, index, write=True
    )
    if may_fold:
        full = index == key_buffer.shape[2] - 1
        state, state_copy = _fold(state, key_buffer, value_buffer, log_decay, full, state_copy)
    return out[:, 0, 0], state, key_buffer, value_buffer, state_copy


def lightning_attention_verify(q, k, v, state, key_buffer, value_buffer, log_decay, index, *, aligned):
    """See `api.lightning_attention_verify`, which lays the tokens out as paths [B, P, D, H, size]."""
    del aligned
    _check(q[:, 0], v[:, 0])
    return _rows("lightning_verify", q, k, v, state, key_buffer, value_buffer, log_decay, index, write=False)[0]
