"""Lightning attention for GPUs (Pallas with the Triton lowering): a program loops over the chunks of a head, the state in registers.

A program has all of one head size and a block of the other: of V in the forward and for dV, of K for dQ and dK, so that the state and its
accumulator fit in registers. q, k, v and o are read where they lie, [B, T, H, K].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tiles, triton_dot
from pallas_kernels.compat import dot_operand, interpreted
from pallas_kernels.lightning_attention import pallas, tile
from pallas_kernels.lightning_attention.tile import Weights


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0), acc: jax.Array | None = None) -> jax.Array:
    """The product of a program's tiles: which addition the matrix unit's accumulator takes is written, not left to the compiler."""
    a, b = dot_operand(a), dot_operand(b)
    return triton_dot.dot(a.T if axes[0] == 0 else a, b.T if axes[1] == 1 else b, acc)


def _chunks(num_chunks: int, chunk_size: int, state: jax.Array, reverse: bool, chunk) -> jax.Array:
    """The state after chunk(index, rows, state) -> state for all chunks, in time or against it."""

    def turn(i, state):
        index = num_chunks - 1 - i if reverse else i
        return chunk(index, pl.ds(index * chunk_size, chunk_size), state)

    return lax.fori_loop(0, num_chunks, turn, state)


def _forward_kernel(
    last_ref, reset_ref, q_ref, k_ref, v_ref, mask_ref, query_ref, key_ref, whole_ref, start_ref, o_ref, state_ref, *, chunk_size
):
    weights = Weights(mask_ref[...], query_ref[...], key_ref[...], whole_ref[...])

    def chunk(index, at, state):
        q, k, v = q_ref[at, :], k_ref[at, :], v_ref[at, :]
        keep, live = _keep(reset_ref, index), _live(last_ref, index)
        o_ref[at, :] = tile.rows(q, k, v, state, weights.mask, keep * weights.query, _dot).astype(o_ref.dtype)
        return tile.fold(state, k, v, live * weights.key, keep * (live * weights.whole + (1 - live)), _dot)

    state_ref[...] = _chunks(q_ref.shape[0] // chunk_size, chunk_size, start_ref[...], False, chunk)


def _query_kernel(last_ref, reset_ref, k_ref, v_ref, d_out_ref, mask_ref, query_ref, key_ref, whole_ref, start_ref, dq_ref, *, chunk_size):
    """A block of K of dQ, forward in time."""
    del last_ref
    weights = Weights(mask_ref[...], query_ref[...], key_ref[...], whole_ref[...])

    def chunk(index, at, state):
        k, v, d_out = k_ref[at, :], v_ref[at, :], d_out_ref[at, :]
        keep = _keep(reset_ref, index)
        dq_ref[at, :] = tile.query_gradient(k, v, d_out, state, weights.mask, keep * weights.query, _dot).astype(dq_ref.dtype)
        return tile.fold(state, k, v, weights.key, keep * weights.whole, _dot)

    _chunks(v_ref.shape[0] // chunk_size, chunk_size, start_ref[...], False, chunk)


def _value_kernel(
    last_ref, reset_ref, q_ref, k_ref, d_out_ref, mask_ref, query_ref, key_ref, whole_ref, end_ref, dv_ref, d_state_ref, *, chunk_size
):
    """A block of V of dV and of the gradient of the state, backward in time; mask_ref holds M^T."""
    weights = Weights(mask_ref[...], query_ref[...], key_ref[...], whole_ref[...])

    def chunk(index, at, d_state):
        q, k, d_out = q_ref[at, :], k_ref[at, :], d_out_ref[at, :]
        keep, live = _keep(reset_ref, index), _live(last_ref, index)
        dv_ref[at, :] = tile.value_gradient(q, k, d_out, d_state, weights.mask, live * weights.key, _dot).astype(dv_ref.dtype)
        return tile.fold(d_state, q, d_out, keep * weights.query, keep * (live * weights.whole + (1 - live)), _dot)

    d_state_ref[...] = _chunks(q_ref.shape[0] // chunk_size, chunk_size, end_ref[...], True, chunk)


def _key_kernel(last_ref, reset_ref, q_ref, v_ref, d_out_ref, mask_ref, query_ref, key_ref, whole_ref, end_ref, dk_ref, *, chunk_size):
    """A block of K of dK, backward in time; mask_ref holds M^T."""
    weights = Weights(mask_ref[...], query_ref[...], key_ref[...], whole_ref[...])

    def chunk(index, at, d_state):
        q, v, d_out = q_ref[at, :], v_ref[at, :], d_out_ref[at, :]
        keep, live = _keep(reset_ref, index), _live(last_ref, index)
        dk_ref[at, :] = tile.key_gradient(q, v, d_out, d_state, weights.mask, live * weights.key, _dot).astype(dk_ref.dtype)
        return tile.fold(d_state, q, d_out, keep * weights.query, keep * (live * weights.whole + (1 - live)), _dot)

    _chunks(q_ref.shape[0] // chunk_size, chunk_size, end_ref[...], True, chunk)


def _keep(reset_ref, index) -> jax.Array:
    """0 where a document begins, else 1: a factor of weights, since choosing between two states would keep both in registers."""
    return 1 - reset_ref[index].astype(jnp.float32)


def _live(last_ref, index) -> jax.Array:
    """1 for a chunk that is folded into the state, else 0."""
    return (index < last_ref[0]).astype(jnp.float32)


def _at_program(heads: int, index):
    """An index map of (batch, head, block) as one of (batch and head, block): for a single row, of constant index, the compiler spills."""
    return lambda p, n: index(lax.div(p, jnp.int32(heads)), lax.rem(p, jnp.int32(heads)), n)


def _call(kernel, name: str, sequences, split: str, weights: Weights, state, reset, last, outs, choice, flops_per_row: int):
    """Run a kernel; `sequences` and `outs` (arrays or shapes) are [B, T, H, size] with their axis, "k" or "v", or states ("s").

    `split` names the axis of which a program has a block.
    """
    batch, num_tokens, heads = sequences[0][0].shape[:3]
    key_size, value_size = state.shape[2:]
    block = min(choice.block, key_size if split == "k" else value_size)

    at_program = functools.partial(_at_program, heads)

    def spec(axis: str, size: int) -> pl.BlockSpec:
        if axis == "s":
            shape, at = ((block, value_size), lambda n: (n, 0)) if split == "k" else ((key_size, block), lambda n: (0, n))
            return pl.BlockSpec((None, None, *shape), at_program(lambda b, h, n: (b, h, *at(n))))
        if axis == split:
            return pl.BlockSpec((None, num_tokens, None, block), at_program(lambda b, h, n: (b, 0, h, n)))
        return pl.BlockSpec((None, num_tokens, None, size), at_program(lambda b, h, n: (b, 0, h, 0)))

    constant = lambda x: pl.BlockSpec((None, *x.shape[1:]), at_program(lambda b, h, n: (h, 0, 0)))
    moved = sum(x.size * x.dtype.itemsize for x, _ in (*sequences, *outs)) + state.size * 4
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(heads * batch, (key_size if split == "k" else value_size) // block),
        in_specs=[
            pl.BlockSpec((1,), at_program(lambda b, h, n: (b,))),
            pl.BlockSpec((None, reset.shape[1]), at_program(lambda b, h, n: (b, 0))),
            *(spec(axis, x.shape[3]) for x, axis in sequences),
            *map(constant, weights),
            spec("s", 0),
        ],
        out_specs=[spec(axis, x.shape[3]) for x, axis in outs],
        out_shape=[x for x, _ in outs],
        compiler_params=triton.CompilerParams(num_warps=choice.warps, num_stages=choice.stages),
        cost_estimate=pl.CostEstimate(flops=batch * num_tokens * heads * flops_per_row, bytes_accessed=moved, transcendentals=0),
        interpret=interpreted("gpu"),
    )(last, reset, *(x for x, _ in sequences), *weights, state)


def _check(q, v, chunk_size: int) -> None:
    for size in (q.shape[3], v.shape[3]):
        if size & (size - 1) or size < 16:
            raise NotImplementedError(f"a head size of {size} is not a power of two of at least 16")
    if not interpreted("gpu") and chunk_size > 64:
        raise NotImplementedError(f"the tiles of a chunk of {chunk_size} do not fit in shared memory: 64 does")


def _forward(q, k, v, weights, state, reset, last):
    chunk_size, (key_size, value_size) = weights.mask.shape[1], state.shape[2:]
    _check(q, v, chunk_size)
    flops = 2 * chunk_size * (key_size + value_size) + 4 * key_size * value_size
    sequences, outs = ((q, "k"), (k, "k"), (v, "v")), ((jax.ShapeDtypeStruct(v.shape, q.dtype), "v"), (state, "s"))
    kernel = functools.partial(_forward_kernel, chunk_size=chunk_size)
    choice = tiles.of(tiles.LIGHTNING_GPU)
    return _call(kernel, "lightning_forward", sequences, "v", weights, state, reset, last, outs, choice, flops)


def _backward(q, k, v, d_out, weights, state, d_state, reset, last):
    chunk_size, (key_size, value_size) = weights.mask.shape[1], state.shape[2:]
    choice, flops = tiles.of(tiles.LIGHTNING_GPU_BACKWARD_FEW), 2 * chunk_size * (key_size + value_size) + 4 * key_size * value_size
    if math.prod(state.shape[:2]) * max(key_size, value_size) > choice.block * tiles.of(tiles.LIGHTNING_GPU_FEW):
        choice = tiles.of(tiles.LIGHTNING_GPU_BACKWARD)
    transposed = weights._replace(mask=jnp.swapaxes(weights.mask, 1, 2))
    partial = lambda kernel: functools.partial(kernel, chunk_size=chunk_size)
    run = lambda kernel, name, sequences, split, w, state, outs: _call(
        partial(kernel), name, sequences, split, w, state, reset, last, outs, choice, flops
    )
    (dq,) = run(_query_kernel, "lightning_dq", ((k, "k"), (v, "v"), (d_out, "v")), "k", weights, state, ((q, "k"),))
    sequences = ((q, "k"), (k, "k"), (d_out, "v"))
    dv, d_start = run(_value_kernel, "lightning_dv", sequences, "v", transposed, d_state, ((v, "v"), (d_state, "s")))
    (dk,) = run(_key_kernel, "lightning_dk", ((q, "k"), (v, "v"), (d_out, "v")), "k", transposed, d_state, ((k, "k"),))
    return dq, dk, dv, d_start


lightning_attention = functools.partial(pallas.lightning_attention, _forward, _backward)


def _rows_kernel(index_ref, q_ref, k_ref, v_ref, state_ref, key_in, value_in, powers_ref, *refs, chunk_size, num_tokens, behind):
    """A block of V of the rows of tokens that follow the buffers, one after another; the first may be written into them.

    With `behind` it is the tokens that lie in the chunk after the open one: refs then begin with the outputs of the others.
    """
    o_ref, *writes = refs[behind:]
    index, row, scale = index_ref[0], jnp.arange(chunk_size), q_ref.shape[1] ** -0.5

    def tokens(ref, first):
        """The tokens in their rows of a tile, zeros elsewhere. Masked in the load: a tile then lies where one of training lies."""
        shape = (chunk_size, ref.shape[1])
        inside = (row >= first) & (row < first + num_tokens)
        token = jnp.broadcast_to(jnp.clip(row - first, 0, num_tokens - 1)[:, None], shape)
        return triton.load(
            ref.at[token, jnp.broadcast_to(jnp.arange(shape[1]), shape)], mask=jnp.broadcast_to(inside[:, None], shape), other=0
        )

    def on_tile(ref, buffer_ref):
        before = jnp.broadcast_to((row < index)[:, None], buffer_ref.shape)
        return jnp.where(before, triton.load(buffer_ref.at[:, :], mask=before, other=0), tokens(ref, index))

    def outputs(first, keys, values, state):
        mask = jnp.zeros((chunk_size, chunk_size), jnp.float32)
        for i in range(num_tokens):  # a row of M each: the whole of it would be most of what a program reads
            decayed = scale * triton.load(powers_ref.at[chunk_size - jnp.clip(first + i, 0, chunk_size) + row])
            mask = jnp.where((row == first + i)[:, None], decayed[None, :], mask)
        query = scale * triton.load(powers_ref.at[chunk_size - 1 - row])[:, None]
        out = tile.rows(tokens(q_ref, first), keys, values, state, mask, query, _dot)
        for i in range(num_tokens):
            one = jnp.where((row == first + i)[:, None], out, 0.0).sum(0).astype(o_ref.dtype)
            here = (first + i >= 0) & (first + i < chunk_size)
            triton.store(o_ref.at[jnp.int32(i), :], one, mask=jnp.broadcast_to(here, one.shape))

    if behind:

        @pl.when(index + num_tokens > chunk_size)
        def _next_chunk():
            key = triton.load(powers_ref.at[row + 1])[:, None]
            after = tile.fold(state_ref[...], on_tile(k_ref, key_in), on_tile(v_ref, value_in), key, powers_ref[0], _dot)
            outputs(index - chunk_size, tokens(k_ref, index - chunk_size), tokens(v_ref, index - chunk_size), after)

        return
    outputs(index, on_tile(k_ref, key_in), on_tile(v_ref, value_in), state_ref[...])
    at = jnp.minimum(index, chunk_size - 1)
    for out_ref, ref in zip(writes, (k_ref, v_ref), strict=False):  # every block of V writes the same row of k
        triton.store(out_ref.at[at, :], ref[0, :], mask=jnp.broadcast_to(index < chunk_size, ref.shape[1:]))


def _powers(log_decay: jax.Array, chunk_size: int) -> jax.Array:
    """exp(g (C - n)) for n = 0..C, then zeros, [H, 2C]: row i of M is C values from C - i on."""
    return jnp.pad(tile.decay_powers(log_decay, chunk_size)[:, ::-1], ((0, 0), (0, chunk_size - 1)))


def _slot_specs(heads: int, num_paths: int):
    """Block specs of (batch and path and head, block of V): of a slot's part (rows, size, whether split), and of a head's powers."""
    at = lambda f: _at_program(heads, lambda bp, h, n: f(lax.div(bp, jnp.int32(num_paths)), lax.rem(bp, jnp.int32(num_paths)), h, n))
    slot = lambda rows, size, split: pl.BlockSpec((None, None, rows, size), at(lambda b, p, h, n: (b, h, 0, n if split else 0)))
    return at, slot, lambda powers: pl.BlockSpec((None, powers.shape[1]), at(lambda b, p, h, n: (h, 0)))


def _rows(name: str, q, k, v, state, key_buffer, value_buffer, log_decay, index, write: bool = False, before=None):
    """The outputs [B, P, D, H, V] of tokens [B, P, D, H, size] after the buffers, and with `write` the buffers with the first token.

    before: the outputs, when those of the next chunk are added to them.
    """
    batch, num_paths, num_tokens, heads, key_size = q.shape
    chunk_size, value_size = value_buffer.shape[2:]
    choice = tiles.of(tiles.LIGHTNING_GPU_DECODE)
    block = min(choice.block, value_size)
    powers = _powers(log_decay, chunk_size)
    at, slot, head = _slot_specs(heads, num_paths)
    tokens = lambda size, split: pl.BlockSpec((None, None, num_tokens, None, size), at(lambda b, p, h, n: (b, p, 0, h, n if split else 0)))
    buffer_specs = [slot(chunk_size, key_size, False), slot(chunk_size, block, True)]
    out = jax.ShapeDtypeStruct((batch, num_paths, num_tokens, heads, value_size), q.dtype)
    buffers = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key_buffer, value_buffer)] if write else []
    rows = batch * num_paths * heads * chunk_size
    others = [] if before is None else [before]
    moved = sum(x.size * x.dtype.itemsize for x in (q, k, v, state, key_buffer, value_buffer, out, *([k, v] if write else [])))
    return pl.pallas_call(
        functools.partial(_rows_kernel, chunk_size=chunk_size, num_tokens=num_tokens, behind=len(others)),
        name=name,
        grid=(batch * num_paths * heads, value_size // block),
        in_specs=[
            pl.BlockSpec((1,), at(lambda b, p, h, n: (b,))),
            *(tokens(key_size, False), tokens(key_size, False), tokens(block, True)),
            slot(key_size, block, True),
            *buffer_specs,
            head(powers),
            *(tokens(block, True) for _ in others),
        ],
        out_specs=[tokens(block, True), *(buffer_specs if write else [])],
        out_shape=[out, *buffers],
        input_output_aliases={5: 1, 6: 2} if write else {8: 0} if others else {},
        compiler_params=triton.CompilerParams(num_warps=choice.warps, num_stages=choice.stages),
        cost_estimate=pl.CostEstimate(
            flops=rows * 2 * (chunk_size * (key_size + value_size) + key_size * value_size),
            bytes_accessed=moved,
            transcendentals=0,
        ),
        interpret=interpreted("gpu"),
    )(index, q, k, v, state, key_buffer, value_buffer, powers, *others)


def _fold_kernel(index_ref, key_in, value_in, powers_ref, state_ref, *refs, chunk_size):
    """A block of V of the state of a slot whose chunk is full; others are left alone. refs: the copy, which is not read, then outputs."""

    @pl.when(index_ref[0] == chunk_size - 1)
    def _full():
        key = triton.load(powers_ref.at[jnp.arange(chunk_size) + 1])[:, None]
        after = tile.fold(state_ref[...], key_in[...], value_in[...], key, powers_ref[0], _dot)
        for ref in refs[len(refs) // 2 :]:
            ref[...] = after.astype(ref.dtype)


def _fold(state, key_buffer, value_buffer, log_decay, index, state_copy):
    """The states, and their copies, with full buffers folded in: in place."""
    batch, heads, key_size, value_size = state.shape
    chunk_size, choice = key_buffer.shape[2], tiles.of(tiles.LIGHTNING_GPU_DECODE)
    block = min(choice.block, value_size)
    powers = _powers(log_decay, chunk_size)
    at, slot, head = _slot_specs(heads, 1)
    states = [state] if state_copy is None else [state, state_copy]
    rows = batch * heads * chunk_size
    moved = sum(x.size * x.dtype.itemsize for x in (state, key_buffer, value_buffer, *states))
    state_specs = [slot(key_size, block, True)] * len(states)
    result = pl.pallas_call(
        functools.partial(_fold_kernel, chunk_size=chunk_size),
        name="lightning_fold",
        grid=(batch * heads, value_size // block),
        in_specs=[
            pl.BlockSpec((1,), at(lambda b, p, h, n: (b,))),
            *(slot(chunk_size, key_size, False), slot(chunk_size, block, True)),
            head(powers),
            *state_specs,
        ],
        out_specs=state_specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in states],
        input_output_aliases={4 + i: i for i in range(len(states))},
        compiler_params=triton.CompilerParams(num_warps=choice.warps, num_stages=choice.stages),
        # As if every chunk were full; of C steps one folds.
        cost_estimate=pl.CostEstimate(flops=rows * 2 * key_size * value_size, bytes_accessed=moved, transcendentals=0),
        interpret=interpreted("gpu"),
    )(index, key_buffer, value_buffer, powers, *states)
    return (*result, None)[:2]


def lightning_attention_step(q, k, v, state, key_buffer, value_buffer, log_decay, index, *, state_copy, may_fold, aligned):
    """See `api.lightning_attention_step`."""
    del aligned
    _check(q[:, None], v[:, None], key_buffer.shape[2])
    one = lambda x: x[:, None, None]
    read = state if state_copy is None else state_copy
    out, key_buffer, value_buffer = _rows(
        "lightning_decode", one(q), one(k), one(v), read, key_buffer, value_buffer, log_decay, index, write=True
    )
    if may_fold:
        state, state_copy = _fold(state, key_buffer, value_buffer, log_decay, index, state_copy)
    return out[:, 0, 0], state, key_buffer, value_buffer, state_copy


def lightning_attention_verify(q, k, v, state, key_buffer, value_buffer, log_decay, index, *, aligned):
    """See `api.lightning_attention_verify`, which lays the tokens out as paths [B, P, D, H, size]."""
    del aligned
    _check(q[:, 0], v[:, 0], key_buffer.shape[2])
    slots = (state, key_buffer, value_buffer, log_decay, index)
    (out,) = _rows("lightning_verify", q, k, v, *slots)
    return out if q.shape[2] == 1 else _rows("lightning_verify_next", q, k, v, *slots, before=out)[0]
