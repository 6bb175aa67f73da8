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
    """The rows of a block [1, T, heads x size], as [heads, rows, size]."""
    return jnp.stack([ref[0, rows, h * size : (h + 1) * size] for h in range(ref.shape[2] // size)])


def _write_heads(ref, rows: slice, x: jax.Array) -> None:
    size = x.shape[2]
    for h in range(x.shape[0]):
        ref[0, rows, h * size : (h + 1) * size] = x[h].astype(ref.dtype)


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


def _forward_kernel(last_ref, reset_ref, q_ref, k_ref, v_ref, mask_ref, query_ref, key_ref, whole_ref, start_ref, o_ref, state_ref, *, sizes):
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


def _query_kernel(last_ref, reset_ref, k_ref, v_ref, d_out_ref, mask_ref, query_ref, key_ref, whole_ref, start_ref, dq_ref, state_ref, *, sizes):
    """dQ, forward in time."""
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
    last_ref, reset_ref, q_ref, k_ref, v_ref, d_out_ref, mask_ref, query_ref, key_ref, whole_ref, end_ref, dk_ref, dv_ref, d_state_ref, *, sizes
):
    """dK and dV, backward in time; mask_ref holds M^T."""
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


def _largest_divisor(n: int, most: int) -> int:
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _call(kernel, name: str, sequences, weights: Weights, state, reset, last, out_sizes, dtype, flops_per_row: int, reverse: bool = False):
    """Run a kernel over the sequences [B, T, H, size]; returns arrays [B, T, H, size] of `out_sizes` and the state at the end."""
    batch, num_tokens, heads = sequences[0].shape[:3]
    key_size, value_size = state.shape[2:]
    chunk_size = weights.mask.shape[1]
    choice = tiles.of(tiles.LIGHTNING_TPU)
    group = _largest_divisor(heads, choice.heads)
    if group * batch % choice.cores and heads % choice.cores == 0:  # every core gets as many programs as the others
        group = _largest_divisor(heads // choice.cores, choice.heads)
    num_chunks = _largest_divisor(num_tokens // chunk_size, max(1, choice.rows // chunk_size))
    rows, steps = num_chunks * chunk_size, num_tokens // (num_chunks * chunk_size)
    at = (lambda b, h, t, *_: (b, steps - 1 - t, h)) if reverse else (lambda b, h, t, *_: (b, t, h))
    sequence = lambda size: pl.BlockSpec((1, rows, group * size), at)
    constant = lambda x: pl.BlockSpec((group, *x.shape[1:]), lambda b, h, t, *_: (h, 0, 0))
    state_spec = pl.BlockSpec((1, group, key_size, value_size), lambda b, h, t, *_: (b, h, 0, 0))
    # A column of weights would be spread over the lanes again in every step.
    lanes = key_size if key_size == value_size else 1
    constants = (weights.mask, *(jnp.broadcast_to(x, (*x.shape[:2], lanes)) for x in weights[1:]))
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
