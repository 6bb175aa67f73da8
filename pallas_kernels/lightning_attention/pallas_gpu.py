"""Lightning attention for GPUs (Pallas with the Triton lowering): a program loops over the chunks of a head, the state in registers.

A program has all of one head size and a block of the other: of V in the forward and for dV, of K for dQ and dK, so that the state and its
accumulator fit in registers. q, k, v and o are read where they lie, [B, T, H, K].
"""

import functools

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


def _forward_kernel(last_ref, reset_ref, q_ref, k_ref, v_ref, mask_ref, query_ref, key_ref, whole_ref, start_ref, o_ref, state_ref, *, chunk_size):
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


def _call(kernel, name: str, sequences, split: str, weights: Weights, state, reset, last, outs, choice, flops_per_row: int):
    """Run a kernel; `sequences` and `outs` (arrays or shapes) are [B, T, H, size] with their axis, "k" or "v", or states ("s").

    `split` names the axis of which a program has a block.
    """
    batch, num_tokens, heads = sequences[0][0].shape[:3]
    key_size, value_size = state.shape[2:]
    block = min(choice.block, key_size if split == "k" else value_size)

    def at_program(index):
        # One axis for batch and heads: for a single row, whose index would be a constant, the compiler spills.
        return lambda p, n: index(lax.div(p, jnp.int32(heads)), lax.rem(p, jnp.int32(heads)), n)

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
    choice, flops = tiles.of(tiles.LIGHTNING_GPU_BACKWARD), 2 * chunk_size * (key_size + value_size) + 4 * key_size * value_size
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
