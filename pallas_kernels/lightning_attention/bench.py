"""Times Lightning attention beside its peers: `python -m pallas_kernels.lightning_attention.bench [--json FILE] [--quick]`.

On a CPU the peers are the recurrence and fla's naive chunked form in plain torch, on a GPU fla's Triton kernels. "decode" cases are one
token of so many slots, whose open chunks are filled to every degree, beside the recurrent step, which reads and writes an fp32 state.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.benchmark import InPlace, Problem, Target, main, native
from pallas_kernels.compat import platform
from pallas_kernels.lightning_attention import lightning_attention, lightning_attention_step, reference
from pallas_kernels.lightning_attention.api import IMPLEMENTATIONS, STEP_IMPLEMENTATIONS
from pallas_kernels.lightning_attention.cases import (
    BENCH_CASES,
    BENCH_DECODE_CASES,
    BENCH_GPU_CASES,
    BENCH_GPU_DECODE_CASES,
    Case,
    DecodeCase,
    decode_inputs,
    inputs,
)

BLOCK = 128
"""Tokens between the recurrence's stored states: its gradient recomputes the others, which would not fit into memory."""
RECURRENCE, STEP = "peer: fp32 recurrence", "peer: fp32 recurrent step"
FLA_NAIVE, FLA_CHUNK, FLA_RECURRENT = "peer: fla naive (torch)", "peer: fla chunk_simple_gla", "peer: fla fused_recurrent"
PREFILL_TARGETS = {"forward": (Target(0.5, FLA_CHUNK), Target(1.5, "floor")), "both": (Target(0.6, FLA_CHUNK),)}


def recurrence(q, k, v, log_decay):
    """Return the reference's outputs; T is a multiple of BLOCK."""
    state = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), jnp.promote_types(q.dtype, jnp.float32))
    blocks = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]), 1, 0)
    step = jax.checkpoint(lambda state, block: reference.lightning_attention(block[0], block[1], block[2], log_decay, state)[::-1])
    _, out = lax.scan(step, state, (blocks(q), blocks(k), blocks(v)))
    return jnp.moveaxis(out, 0, 1).reshape(v.shape)


def fla_naive(q, k, v, log_decay, chunk_size: int):
    """Return the outputs of fla's naive chunked form."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return naive_chunk_simple_gla(q, k, v, log_decay.expand(q.shape[:3]), chunk_size=chunk_size)[0]


def fla_chunk(q, k, v, log_decay):
    """Return the outputs of fla's chunked kernels, which take a constant decay for each head."""
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return chunk_simple_gla(q, k, v, g_gamma=log_decay)[0]


def op(q, k, v, log_decay, case: Case, **how):
    """Return the op's outputs without its state."""
    return lightning_attention(q, k, v, log_decay, chunk_size=case.C, **how)[0]


def sequences(name: str, case: Case, dtype: DTypeLike) -> Problem:
    """Return the problem of whole sequences; the FLOPs are those of the chunked form."""
    per_head, on_cpu = case.B * case.T * case.H, platform() == "cpu"
    flops = 2 * case.C * (case.K + case.V) + 4 * case.K * case.V
    moved = jnp.dtype(dtype).itemsize * per_head * 2 * (case.K + case.V)
    implementations: dict[str, Any] = {x: functools.partial(op, case=case, implementation=x) for x in native(IMPLEMENTATIONS)}
    if on_cpu:  # elsewhere the recurrence takes T steps of a few microseconds
        implementations |= {"xla aligned": functools.partial(op, case=case, aligned=True, implementation="xla"), RECURRENCE: recurrence}
    return Problem(
        case=name,
        tokens=case.B * case.T,
        inputs=lambda: inputs(case, dtype)[:4],
        differentiable=(0, 1, 2),
        implementations=implementations,
        truth=recurrence,
        flops=(per_head * flops, per_head * 2.5 * flops),
        bytes=(moved, 2 * moved),
        torch={FLA_NAIVE: functools.partial(fla_naive, chunk_size=case.C)} if on_cpu else {FLA_CHUNK: fla_chunk},
        peer=RECURRENCE if on_cpu else FLA_CHUNK,
        targets=PREFILL_TARGETS if platform() == "gpu" else {},
    )


def step(q, k, v, state, key_buffer, value_buffer, log_decay, index, state_copy, now, *, copied: bool, **how):
    """Return a decode step's output and its slots."""
    table = (state, key_buffer, value_buffer, log_decay, index)
    done = lightning_attention_step(q, k, v, *table, state_copy=state_copy if copied else None, **how)
    return done.out, done.state, done.key_buffer, done.value_buffer, *([done.state_copy] if copied else [])


def recurrent_step(q, k, v, state, key_buffer, value_buffer, log_decay, index, state_copy, now):
    """Return the output of a step of the recurrence and its state; `now` is the state after the open chunk's tokens."""
    keys, values = (x.astype(now.dtype) for x in (k, v))
    now = jnp.exp(log_decay)[:, None, None] * now + keys[..., :, None] * values[..., None, :]
    return q.shape[-1] ** -0.5 * jnp.einsum("bhk,bhkv->bhv", q.astype(now.dtype), now, precision="highest").astype(q.dtype), now


def fla_recurrent(q, k, v, state, key_buffer, value_buffer, log_decay, index, state_copy, now):
    """Return the output of fla's recurrent step; its new state is an array of its own."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla  # pyright: ignore[reportMissingImports]

    one = lambda x: x[:, None]
    out, _ = fused_recurrent_simple_gla(one(q), one(k), one(v), g_gamma=log_decay, initial_state=now, output_final_state=True)
    return out[:, 0]


def decode(name: str, case: DecodeCase, dtype: DTypeLike) -> Problem:
    """Return the problem of a decode step. The bytes are those of the open rows, a state in `dtype`, and every C-th slot's fold."""
    slots, heads, size, rows = case.slots, case.heads, case.size, case.index().mean() + 1
    # A caller knows when a lone slot's chunk becomes full; of many slots some are folded in every step.
    fold, on_cpu = bool((case.index() == case.C - 1).any()), platform() == "cpu"
    itemsize = jnp.dtype(dtype).itemsize
    moved = itemsize * (2 * rows * size + size**2 + 6 * size) + (fold * (2 * 4 + itemsize) * size**2) / case.C
    implementations: dict[str, Any] = {}
    for kernel in native(STEP_IMPLEMENTATIONS):
        for aligned, copied in ((False, False), (True, False)) if on_cpu else ((False, True), (False, False)):
            how = {"implementation": kernel, "aligned": aligned, "copied": copied, "may_fold": fold}
            label = f"{kernel}{' aligned' * aligned}{', bf16 state copy' * copied}"
            implementations[label] = InPlace(functools.partial(step, **how), (3, 4, 5, 8) if copied else (3, 4, 5))
    return Problem(
        case=name,
        tokens=slots,
        inputs=lambda: decode_inputs(case, dtype),
        differentiable=(),
        implementations=implementations | {STEP: InPlace(recurrent_step, (9,))},
        truth=lambda *arguments: recurrent_step(*arguments)[0],
        flops=(slots * heads * 2 * (2 * rows * size + size**2), 0),
        bytes=(slots * heads * moved, 0),
        torch={} if on_cpu else {FLA_RECURRENT: fla_recurrent},
        peer=STEP if on_cpu else FLA_RECURRENT,
        targets={"forward": (Target(0.5 if slots >= 64 else 1.0, FLA_RECURRENT),)} if platform() == "gpu" else {},
    )


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark."""
    on_cpu = platform() == "cpu"
    for name, case in (BENCH_CASES if on_cpu else BENCH_GPU_CASES).items():
        if not quick or case.T <= 1024:
            yield sequences(name, case, dtype)
    for name, case in (BENCH_DECODE_CASES if on_cpu else BENCH_GPU_DECODE_CASES).items():
        if not quick or case.slots == 1:
            yield decode(name, case, dtype)


if __name__ == "__main__":
    main("lightning_attention", problems)
