"""Named shapes of the LM head with cross entropy, shared by the tests and the benchmark."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.aot.case import PLATFORMS, CompileCase


class Case(NamedTuple):
    """One problem: rows, width and vocabulary."""

    N: int
    D: int
    vocab: int


TEST_CASES = {
    "one_row": Case(1, 16, 33),
    "odd_rows": Case(77, 16, 100),
    "several_tiles": Case(600, 16, 256),
    "exact_pieces": Case(40, 8, 16384),
    "pieces_with_overlap": Case(70, 8, 20001),
}

BENCH_CASES = {"demo": Case(4096, 256, 4096), "wide": Case(1024, 512, 8192)}
RELEASED = {"mini": (2048, 157184), "flash": (4096, 157184)}
"""Width and vocabulary of the released models."""
BENCH_GPU_CASES = {f"{name} {num}": Case(num, *sizes) for name, sizes in RELEASED.items() for num in (8192, 64)}


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return random hidden [N, D], w [D, vocab] and targets [N]; logits have a standard deviation of 2."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray((2 * rng.standard_normal((case.N, case.D), np.float32)).astype(dtype))
    w = jnp.asarray((rng.standard_normal((case.D, case.vocab), np.float32) * np.float32(case.D**-0.5)).astype(dtype))
    targets = rng.integers(0, case.vocab, case.N)
    edges = np.unique(np.clip([0, 8191, 8192, case.vocab - 8192, 16383, 16384, case.vocab - 1], 0, case.vocab - 1))
    count = min(case.N, len(edges))
    targets[:count] = edges[len(edges) - count :]  # the first and last columns of pieces and of the overlap
    return hidden, w, jnp.asarray(targets.astype(np.int32))


COMPILE_CASES = {
    "small 64": (Case(64, 512, 4096), dict.fromkeys(("forward", "backward"), ("v5e", "v5p", "v6e", "h200"))),
    "mini 64": (Case(64, *RELEASED["mini"]), {"forward": ("v5p", "v6e", "h200"), "logits": ("v5e", "v5p", "v6e", "h200")}),
    "mini 8192": (Case(8192, *RELEASED["mini"]), {"forward": ("v5p", "v6e", "h200"), "backward": ("v5e", "v5p", "v6e", "h200")}),
    "flash 64": (Case(64, *RELEASED["flash"]), {"forward": ("h200",), "logits": ("h200",)}),
    "flash 8192": (Case(8192, *RELEASED["flash"]), {"forward": ("v5p", "v6e", "h200"), "backward": ("v5p", "h200")}),
}
"""What the compile gates compile, and for which chips. A backward has the forward's kernels in it, which take a TPU's compiler long."""


def compile_cases() -> Iterator[CompileCase]:
    """Yield what the compile gates compile: training and decode rows, all logits of decode rows, and gradients."""
    for name, (case, kernels) in COMPILE_CASES.items():
        for kernel, targets in kernels.items():
            for implementation, platform in {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}.items():
                yield _compile(kernel, name, case, implementation, tuple(x for x in targets if PLATFORMS[x] == platform))


def _compile(kernel: str, name: str, case: Case, implementation: str, targets: tuple[str, ...]) -> CompileCase:
    from pallas_kernels.cross_entropy.api import head_logits, token_logprobs
    from pallas_kernels.cross_entropy.pallas import piece_size

    logprobs = functools.partial(token_logprobs, implementation=implementation)

    def gradients(hidden, w, targets, *cotangents):
        return jax.vjp(lambda hidden, w: logprobs(hidden, w, targets), hidden, w)[1](cotangents)

    programs: dict[str, Callable] = {"forward": logprobs, "logits": functools.partial(head_logits, implementation=implementation)}
    hidden, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((case.N, case.D), (case.D, case.vocab)))
    targets_, row = (jax.ShapeDtypeStruct((case.N,), dtype) for dtype in (jnp.int32, jnp.float32))
    arguments: dict[str, tuple[Any, ...]] = {"forward": (targets_,), "logits": (), "backward": (targets_, row, row)}
    # Behind the forward one piece of the gradient counts; its products are the library's.
    piece = piece_size(case.N, case.vocab) if kernel == "backward" else 0
    columns = case.vocab + piece
    written = 4 * case.vocab if kernel == "logits" else 2 * piece
    return CompileCase(
        kernel=f"cross_entropy.{kernel}",
        shape=name,
        targets=targets,
        program=programs.get(kernel, gradients),
        arguments=(hidden, w, *arguments[kernel]),
        bytes=2 * case.D * (case.N + columns) + case.N * written,
        flops=2 * case.N * case.D * columns,
        floor_ratio=None if name.startswith("small") else 1.35 if case.N > 64 else 1.25,
        instruction=r"wgmma\..*m64n256k16" if implementation == "pallas_gpu" else None,
    )
