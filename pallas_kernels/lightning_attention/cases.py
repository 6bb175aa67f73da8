"""Named shapes of Lightning attention, shared by the tests and the benchmark."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import GRID
from pallas_kernels.aot.case import CompileCase


class Case(NamedTuple):
    """One problem: batch, tokens, heads, head sizes, chunk, and what of the interface it uses."""

    B: int
    T: int
    H: int
    K: int
    V: int
    C: int = 64
    state: bool = False
    segments: bool = False
    decay: float = 1.0  # multiplies the family's slopes


TEST_CASES = {
    "one_token": Case(2, 1, 2, 16, 16),
    "odd_length": Case(1, 77, 3, 16, 16),
    "exact_chunks": Case(2, 128, 2, 16, 16),
    "long_odd": Case(1, 333, 2, 32, 32),
    "value_size_differs": Case(2, 70, 2, 16, 32),
    "initial_state": Case(2, 150, 2, 16, 16, state=True),
    "segments": Case(2, 384, 2, 16, 16, segments=True),
    "segments_and_state": Case(2, 320, 2, 16, 32, state=True, segments=True),
    "chunk_128": Case(1, 300, 2, 16, 16, C=128, state=True),
    "strong_decay": Case(1, 300, 2, 16, 16, C=128, decay=20.0),
    "no_decay": Case(1, 200, 2, 16, 16, decay=0.0, state=True),
}

BENCH_CASES = {f"T{length}": Case(1, length, 4, 128, 128) for length in (512, 1024, 4096, 16384)}
BENCH_GPU_CASES = {
    f"({B}, {T}, {H}, 128)": Case(B, T, H, 128, 128) for B, T, H in ((1, 16384, 64), (2, 4096, 16), (1, 4096, 16), (8, 2048, 32))
}


class DecodeCase(NamedTuple):
    """One decode step: slots, heads, head size, chunk."""

    slots: int
    heads: int
    size: int = 128
    C: int = 64

    def index(self) -> np.ndarray:
        """Return the row each slot's token takes: every row of a chunk in turn, from the middle on."""
        return (self.C // 2 + np.arange(self.slots)) % self.C


BENCH_DECODE_CASES = {f"decode {slots}x4": DecodeCase(slots, 4) for slots in (1, 64, 256)}
BENCH_GPU_DECODE_CASES = {f"decode {slots}x{heads}": DecodeCase(slots, heads) for heads in (16, 32, 64) for slots in (1, 64, 256)}


class Inputs(NamedTuple):
    """Arguments of the op."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    state: jax.Array | None
    reset: jax.Array | None


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> Inputs:
    """Return random inputs; log_decay is minus the ALiBi slopes, and documents start at multiples of GRID, elsewhere in each row."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(dtype))
    q, k = (normal(case.B, case.T, case.H, case.K) for _ in range(2))
    v = normal(case.B, case.T, case.H, case.V)
    log_decay = jnp.asarray((-case.decay * 2.0 ** (-8 * (np.arange(case.H) + 1) / case.H)).astype(np.float32))
    state = jnp.asarray(rng.standard_normal((case.B, case.H, case.K, case.V)).astype(np.float32)) if case.state else None
    chunk, per_grid = np.arange(-(-case.T // case.C)), GRID // case.C
    starts = (chunk % per_grid == 0) & (chunk // per_grid % 2 == np.arange(case.B)[:, None] % 2)
    return Inputs(q, k, v, log_decay, state, jnp.asarray(starts) if case.segments else None)


def decode_inputs(case: DecodeCase, dtype: DTypeLike) -> tuple[jax.Array, ...]:
    """Return the arguments of a step, made where they are used: q, k, v, states, buffers, log_decay, index.

    Behind them are the states in `dtype`, and the states after the open chunks' tokens, which a recurrent step starts from.
    """
    slots, heads, size, index = case.slots, case.heads, case.size, case.index()
    log_decay = -(2.0 ** (-8 * (np.arange(heads) + 1) / heads))

    @jax.jit
    def make(keys):
        token, state = (slots, heads, size), (slots, heads, size, size)
        q, k, v, *buffers = (
            jax.random.normal(key, shape, dtype) for key, shape in zip(keys, [token] * 3 + [(slots, heads, case.C, size)] * 2, strict=True)
        )
        before = jax.random.normal(keys[0], state, jnp.float32)
        age = index[:, None] - 1 - np.arange(case.C)  # tokens since a buffer's row
        weights = np.where(age[:, None] >= 0, np.exp(log_decay[:, None] * np.maximum(age, 0)[:, None]), 0)  # [slots, heads, C]
        keys, values = (x.astype(jnp.float32) for x in buffers)
        added = jnp.einsum("bhc,bhck,bhcv->bhkv", weights.astype(np.float32), keys, values, precision="highest")
        now = np.exp(log_decay * index[:, None])[:, :, None, None].astype(np.float32) * before + added
        return q, k, v, before, *buffers, jnp.asarray(log_decay, jnp.float32), jnp.asarray(index, jnp.int32), before.astype(dtype), now

    return make(jax.random.split(jax.random.key(0), 5))


COMPILE_SIZES = {
    "mini (1, 4096, 16)": Case(1, 4096, 16, 128, 128, C=128),
    "mini (2, 4096, 16) C64": Case(2, 4096, 16, 128, 128),
    "flash (1, 16384, 32)": Case(1, 16384, 32, 128, 128, C=128),
    "flash (1, 16384, 32) C64": Case(1, 16384, 32, 128, 128),
    "long (1, 16384, 64)": Case(1, 16384, 64, 128, 128),
    "small (1, 1024, 1)": Case(1, 1024, 1, 128, 128),
}
"""Training and prefill of the released models, the shape that others have published times of, and one that compiles quickly."""


TARGETS = {"pallas_tpu": ("v5e", "v5p", "v6e"), "pallas_gpu": ("h200",)}


def compile_cases() -> Iterator[CompileCase]:
    """Yield what the compile gates compile."""
    for implementation, targets in TARGETS.items():
        for name, case in COMPILE_SIZES.items():
            if implementation == "pallas_gpu" and (case.C > 64 or case.H == 1):
                continue
            for kernel in ("forward", "backward"):
                yield _compile(kernel, name, case, implementation, targets)
        yield _compile_verify(1, implementation, targets)
        for heads in (16, 32):
            for slots in (1, 64, 256):
                yield _compile_decode(slots, heads, implementation, targets)
            yield _compile_verify(heads, implementation, targets)
            yield _compile_fold(heads, implementation, targets)


def _slots(slots: int, heads: int, chunk: int = 64, size: int = 128) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A slot table: states, buffers, decay, rows taken."""
    buffer = jax.ShapeDtypeStruct((slots, heads, chunk, size), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((slots, heads, size, size), jnp.float32)
    return state, buffer, buffer, jax.ShapeDtypeStruct((heads,), jnp.float32), jax.ShapeDtypeStruct((slots,), jnp.int32)


def _compile_decode(slots: int, heads: int, implementation: str, targets: tuple[str, ...]) -> CompileCase:
    """A step that reads the bf16 copies of the states and folds nothing, as 63 of 64 do."""
    from pallas_kernels.lightning_attention.api import lightning_attention_step

    token, (state, *table) = jax.ShapeDtypeStruct((slots, heads, 128), jnp.bfloat16), _slots(slots, heads)

    def program(q, k, v, state, key_buffer, value_buffer, log_decay, index, copy):
        step = functools.partial(lightning_attention_step, may_fold=False, implementation=implementation)
        return step(q, k, v, state, key_buffer, value_buffer, log_decay, index, state_copy=copy)

    per_slot = 2 * (2 * 64 * 128 + 128 * 128 + 6 * 128)
    return CompileCase(
        kernel="lightning_attention.decode",
        shape=f"{slots} slots, {heads} heads",
        targets=targets,
        program=program,
        arguments=(token, token, token, state, *table, jax.ShapeDtypeStruct(state.shape, jnp.bfloat16)),
        bytes=slots * heads * per_slot,
        flops=slots * heads * 64 * 2 * (2 * 64 * 128 + 128 * 128),
        # A TPU writes the tile of 16 rows that holds the token's.
        floor_ratio=None if slots == 1 else 1.15 if implementation == "pallas_tpu" else 1.05,
        donate=(3, 4, 5, 8),
    )


def _compile_fold(heads: int, implementation: str, targets: tuple[str, ...]) -> CompileCase:
    """A step in which every chunk may become full, with the bf16 copies of the states, as a model has them."""
    from pallas_kernels.lightning_attention.api import lightning_attention_step

    token, (state, *table) = jax.ShapeDtypeStruct((64, heads, 128), jnp.bfloat16), _slots(64, heads)

    def program(q, k, v, state, key_buffer, value_buffer, log_decay, index, copy):
        step = functools.partial(lightning_attention_step, implementation=implementation)
        return step(q, k, v, state, key_buffer, value_buffer, log_decay, index, state_copy=copy)

    return CompileCase(
        kernel="lightning_attention.fold",
        shape=f"64 slots, {heads} heads",
        targets=targets,
        program=program,
        arguments=(token, token, token, state, *table, jax.ShapeDtypeStruct(state.shape, jnp.bfloat16)),
        # The copy is read and written, as is the state; the buffers are read for the outputs and for the fold.
        bytes=64 * heads * (2 * (2 + 4) * 128 * 128 + 2 * 2 * 2 * 64 * 128),
        flops=64 * heads * 64 * 2 * (2 * 64 * 128 + 2 * 128 * 128),
        floor_ratio=1.1,
        donate=(3, 4, 5, 8),
    )


def _compile_verify(heads: int, implementation: str, targets: tuple[str, ...]) -> CompileCase:
    """Eight draft tokens on four paths of at most four."""
    from pallas_kernels.lightning_attention.api import lightning_attention_verify

    nodes, table = jax.ShapeDtypeStruct((64, 8, heads, 128), jnp.bfloat16), _slots(64, heads)
    return CompileCase(
        kernel="lightning_attention.verify",
        shape=f"64 slots, {heads} heads, 8 tokens",
        targets=targets,
        program=functools.partial(lightning_attention_verify, implementation=implementation),
        arguments=(nodes, nodes, nodes, *table, jax.ShapeDtypeStruct((4, 4), jnp.int32)),
        bytes=64 * heads * (4 * 128 * 128 + 2 * (2 * 64 * 128 + 4 * 8 * 128)),
        flops=64 * heads * 4 * 64 * 2 * (2 * 64 * 128 + 128 * 128),
    )


def _compile(kernel: str, name: str, case: Case, implementation: str, targets: tuple[str, ...]) -> CompileCase:
    from pallas_kernels.lightning_attention.api import lightning_attention

    bf16 = lambda size: jax.ShapeDtypeStruct((case.B, case.T, case.H, size), jnp.bfloat16)
    q, k, v, log_decay = bf16(case.K), bf16(case.K), bf16(case.V), jax.ShapeDtypeStruct((case.H,), jnp.float32)
    op = functools.partial(lightning_attention, chunk_size=case.C, implementation=implementation)

    def gradients(q, k, v, log_decay, d_out):
        return jax.vjp(lambda q, k, v: op(q, k, v, log_decay)[0], q, k, v)[1](d_out)

    per_head, backward = case.B * case.T * case.H, kernel == "backward"
    arrays = 3 * (case.K + case.V) + case.V + 2 * case.K + case.V if backward else 2 * (case.K + case.V)
    square = 4 * case.K * case.V + 2 * case.C * (case.K + case.V)
    arguments: tuple[Any, ...] = (q, k, v, log_decay)
    # A GPU's loop over chunks is bound by its latency unless there are programs for every SM, and a head alone everywhere.
    bound_by_bytes = case.H > 1 if implementation == "pallas_tpu" else case.H == 64 and not backward
    return CompileCase(
        kernel=f"lightning_attention.{kernel}",
        shape=name,
        targets=targets,
        program=gradients if backward else op,
        arguments=(*arguments, v) if backward else arguments,
        bytes=2 * per_head * arrays,
        flops=per_head * square * (2.5 if backward else 1),
        floor_ratio=(1.2 if implementation == "pallas_tpu" else 1.12) if bound_by_bytes else None,
        instruction=r"wgmma\..*m64n64k16" if implementation == "pallas_gpu" else None,
    )
