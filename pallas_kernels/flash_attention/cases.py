"""Named shapes of flash attention, shared by the tests and the benchmark."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import GRID, tiles
from pallas_kernels.aot.case import CompileCase


class Case(NamedTuple):
    """One problem: batch, tokens, query heads, key heads, head size, value size (0: K); segments packs documents at multiples of GRID."""

    B: int
    T: int
    H: int
    G: int
    K: int
    V: int = 0
    segments: bool = False


TEST_CASES = {
    "one_token": Case(2, 1, 2, 2, 16),
    "odd_length": Case(2, 77, 4, 2, 16),
    "odd_blocks": Case(1, 333, 4, 1, 16),
    "heads_not_power_of_two": Case(2, 130, 6, 3, 8),
    "value_size_differs": Case(2, 70, 4, 2, 16, V=24),
    "segments": Case(2, 384, 4, 2, 16, segments=True),
}

BENCH_CASES = {f"T{length}": Case(1, length, 4, 1, 128) for length in (512, 1024, 4096)}
BENCH_GPU_CASES = {f"({T}, {H}, 128)": Case(1, T, H, 4, 128) for T, H in ((8192, 16), (8192, 32), (32768, 16))}


class CacheCase(NamedTuple):
    """Queries at the end of a cache: slots, tokens of each, keys of each before and with them, heads, whether the keys are in pages."""

    slots: int
    T: int
    S: int
    H: int
    G: int = 4
    K: int = 128
    paged: bool = True


BENCH_DECODE_CASES = {"decode 8 on 4096": CacheCase(8, 1, 4096, 4, 1)}
BENCH_GPU_DECODE_CASES = {
    f"decode {slots} on {S}, {H}": CacheCase(slots, 1, S, H)
    for slots, S, H in ((64, 8192, 16), (64, 8192, 32), (1, 32768, 16), (1, 524288, 16))
}


class Inputs(NamedTuple):
    """Arguments of the op."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    start: jax.Array
    stop: jax.Array


def bounds(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return start and stop [B, T] of causal attention; with segments each row holds two documents, and padding that sees no key."""
    index = np.arange(case.T)
    start, stop = np.zeros((case.B, case.T), np.int32), np.tile(index + 1, (case.B, 1)).astype(np.int32)
    for row in range(case.B if case.segments else 0):
        second = GRID * (1 + row % 2)
        start[row, second:] = second
        padding = (index >= second - 28) & (index < second)
        start[row, padding] = stop[row, padding] = 0
    return start, stop


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> Inputs:
    """Return random queries, keys and values under a causal mask."""
    rng = np.random.default_rng(seed)
    normal = lambda heads, size: jnp.asarray(rng.standard_normal((case.B, case.T, heads, size)).astype(dtype))
    q, k, v = normal(case.H, case.K), normal(case.G, case.K), normal(case.G, case.V or case.K)
    return Inputs(q, k, v, *(jnp.asarray(x) for x in bounds(case)))


def cache_inputs(case: CacheCase, dtype: DTypeLike) -> Inputs:
    """Return random queries that see all keys but those of the tokens behind them; made where they are used."""
    token, keys = (case.slots, case.T, case.H, case.K), (case.slots, case.S, case.G, case.K)
    make = jax.jit(lambda seeds: [jax.random.normal(seed, shape, dtype) for seed, shape in zip(seeds, (token, keys, keys), strict=True)])
    stop = jnp.broadcast_to(case.S - case.T + 1 + jnp.arange(case.T, dtype=jnp.int32), (case.slots, case.T))
    q, k, v = make(jax.random.split(jax.random.key(0), 3))
    return Inputs(q, k, v, jnp.zeros_like(stop), stop)


COMPILE_TRAINING = {
    "small (1, 1024, 2)": Case(1, 1024, 2, 1, 128),
    "mini (1, 8192, 16)": Case(1, 8192, 16, 4, 128),
    "flash (1, 8192, 32)": Case(1, 8192, 32, 4, 128),
    "mini (1, 32768, 16)": Case(1, 32768, 16, 4, 128),
    "flash (1, 32768, 32)": Case(1, 32768, 32, 4, 128),
    "mini (1, 524288, 16)": Case(1, 524288, 16, 4, 128),
    "flash (1, 524288, 32)": Case(1, 524288, 32, 4, 128),
}
COMPILE_CACHE = {
    "mini 64 slots, 8192 keys": CacheCase(64, 1, 8192, 16),
    "flash 64 slots, 8192 keys": CacheCase(64, 1, 8192, 32),
    "mini 1 slot, 524288 keys": CacheCase(1, 1, 524288, 16),
    "mini 64 slots, flat": CacheCase(64, 1, 8192, 16, paged=False),
    "mini 1024 on 32768 keys": CacheCase(1, 1024, 32768, 16),
    "flash 1024 on 32768 keys": CacheCase(1, 1024, 32768, 32),
    "mini 1024 on 524288 keys": CacheCase(1, 1024, 524288, 16),
}
TARGETS = {"pallas_tpu": ("v5e", "v5p", "v6e"), "pallas_gpu": ("h200",)}
WGMMA = r"wgmma\..*m64n128k16"
RATIOS = {
    "v5e": {"forward": 3.9, "backward": 3.9, "decode": 1.3, "prefill": 2.0, "aligned": 6.1, "decode.aligned": 1.7, "prefill.aligned": 3.1},
    "v5p": {"forward": 3.9, "backward": 3.9, "decode": 1.7, "prefill": 2.0, "aligned": 6.1, "decode.aligned": 2.15, "prefill.aligned": 3.1},
    "v6e": {
        "forward": 10.8,
        "backward": 9.6,
        "decode": 1.75,
        "prefill": 5.5,
        "aligned": 22,
        "decode.aligned": 2.9,
        "prefill.aligned": 11.6,
    },
    "h200": {"forward": 1.75, "backward": 1.5, "decode": 1.2, "prefill": 1.75},
}
"""Estimates in bf16, in units of the floor. A TPU's counts the steps that a causal mask skips as if they were not skipped."""


def compile_cases() -> Iterator[CompileCase]:
    """Yield what the compile gates compile."""
    for implementation, target in ((implementation, (target,)) for implementation, targets in TARGETS.items() for target in targets):
        for name, case in COMPILE_TRAINING.items():
            yield _compile_training("forward", name, case, implementation, target)
            if case.T <= 8192:
                yield _compile_training("backward", name, case, implementation, target)
        for name, case in COMPILE_CACHE.items():
            yield _compile_cache(name, case, implementation, target)
    for target in TARGETS["pallas_tpu"]:  # a GPU's kernel is the same
        for name in ("mini (1, 8192, 16)", "flash (1, 32768, 32)"):
            yield _compile_training("aligned", name, COMPILE_TRAINING[name], "pallas_tpu", (target,))
        for name in ("mini 64 slots, 8192 keys", "mini 1024 on 524288 keys"):
            yield _compile_cache(name, COMPILE_CACHE[name], "pallas_tpu", (target,), aligned=True)
    # More than 2^31 entries, whose places are counted in 64 bits; a TPU's scalar memory does not hold such a table.
    yield _compile_cache("mini 64 slots, 524288 keys", CacheCase(64, 1, 524288, 16), "pallas_gpu", TARGETS["pallas_gpu"])
    for kernel in ("forward", "backward"):
        case = Case(1, 8192, 16, 4, 128)
        yield _compile_training(kernel, "mini fp32 (1, 8192, 16)", case, "pallas_gpu", TARGETS["pallas_gpu"], jnp.float32)


def _compile_training(
    kernel: str, name: str, case: Case, implementation: str, targets: tuple[str, ...], dtype: DTypeLike = jnp.bfloat16
) -> CompileCase:
    """One causal sequence. fp32 is compiled where it may not fit: a GPU, whose matrix units take each product as three of TF32."""
    from pallas_kernels.flash_attention.api import flash_attention

    heads = lambda number: jax.ShapeDtypeStruct((case.B, case.T, number, case.K), dtype)
    on_tensor_cores = implementation == "pallas_gpu" and dtype == jnp.bfloat16
    bound, backward = jax.ShapeDtypeStruct((case.B, case.T), jnp.int32), kernel == "backward"
    op = functools.partial(flash_attention, aligned=kernel == "aligned", implementation=implementation)

    def gradients(q, k, v, start, stop, d_out):
        return jax.vjp(lambda q, k, v: op(q, k, v, start, stop), q, k, v)[1](d_out)

    arguments: tuple[Any, ...] = (heads(case.H), heads(case.G), heads(case.G), bound, bound)
    products = 2 * case.B * case.H * case.T * (case.T + 1) / 2 * case.K  # FLOPs of one product under the mask
    moved = 2 * case.B * case.T * case.K * jnp.dtype(dtype).itemsize * (case.H + case.G)
    narrow, fp32 = (tiles.FLASH_GPU_QUERY, tiles.FLASH_GPU_KEY_VALUE), (tiles.FLASH_GPU_FP32_QUERY, tiles.FLASH_GPU_FP32_KEY_VALUE)
    dq, dkv = (table["h200"] for table in (narrow if dtype == jnp.bfloat16 else fp32))
    return CompileCase(
        kernel=f"flash_attention.{'forward' if kernel == 'aligned' else kernel}",
        shape=f"{name}{' aligned' * (kernel == 'aligned')}",
        targets=targets,
        program=gradients if backward else op,
        arguments=(*arguments, heads(case.H)) if backward else arguments,
        bytes=3 * moved if backward else moved,
        flops=(2 + 5 if backward else 2) * products,  # the gradient's program has the forward in it
        floor_ratio=RATIOS[targets[0]].get(kernel) if dtype == jnp.bfloat16 and case.T >= 8192 else None,
        instruction=WGMMA if on_tensor_cores else None,
        turns={
            "flash_forward": case.T // 2 // GRID,
            "flash_dq": case.T // 2 // dq.keys,
            "flash_dkv": case.T // 2 * case.H // case.G // dkv.rows,
        },
    )


def _compile_cache(name: str, case: CacheCase, implementation: str, targets: tuple[str, ...], aligned: bool = False) -> CompileCase:
    """Decoding, or a piece of a prompt."""
    from pallas_kernels.flash_attention.api import flash_attention, flash_attention_paged

    blocks, bf16 = case.S // GRID, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    keys = (case.slots * blocks, GRID) if case.paged else (case.slots, case.S)
    table = [jax.ShapeDtypeStruct((case.slots, blocks), jnp.int32)] if case.paged else []
    kernel = f"{'decode' if case.T == 1 else 'prefill'}{'.aligned' * aligned}"
    bound, q = jax.ShapeDtypeStruct((case.slots, case.T), jnp.int32), bf16(case.slots, case.T, case.H, case.K)
    op, how = flash_attention_paged if case.paged else flash_attention, {"aligned": aligned, "implementation": implementation}
    return CompileCase(
        kernel=f"flash_attention.{kernel.removesuffix('.aligned')}",
        shape=f"{name}{' aligned' * aligned}",
        targets=targets,
        program=functools.partial(op, **how),
        arguments=(q, bf16(*keys, case.G, case.K), bf16(*keys, case.G, case.K), *table, bound, bound),
        bytes=4 * case.slots * case.K * (case.S * case.G + case.T * case.H),
        flops=4 * case.slots * case.T * case.H * case.S * case.K,
        # A lone slot is as many programs as there are key heads: no sum is split.
        floor_ratio=None if case.slots == 1 and case.T == 1 else RATIOS[targets[0]].get(kernel),
        instruction=WGMMA if implementation == "pallas_gpu" else None,
        turns={"flash_forward": blocks},
    )
