"""Named shapes of the LM head with cross entropy, shared by the tests and the benchmark."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.aot.case import CompileCase


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


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return random hidden [N, D], w [D, vocab] and targets [N]; logits have a standard deviation of 2."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(2 * rng.standard_normal((case.N, case.D)), dtype)
    w = jnp.asarray(rng.standard_normal((case.D, case.vocab)) * case.D**-0.5, dtype)
    targets = rng.integers(0, case.vocab, case.N)
    edges = np.unique(np.clip([0, 8191, 8192, case.vocab - 8192, 16383, 16384, case.vocab - 1], 0, case.vocab - 1))
    count = min(case.N, len(edges))
    targets[:count] = edges[len(edges) - count :]  # the first and last columns of pieces and of the overlap
    return hidden, w, jnp.asarray(targets, jnp.int32)


RELEASED = {"mini": (2048, 157184), "flash": (4096, 157184)}
"""Width and vocabulary of the released models."""


def compile_cases() -> Iterator[CompileCase]:
    """Yield what the compile gates compile: training and decode rows, all logits of decode rows, and the gradient's kernel."""
    for implementation, targets in {"pallas_tpu": ("v5e", "v5p", "v6e"), "pallas_gpu": ("h200",)}.items():
        for name, sizes in RELEASED.items():
            for kernel, num in (("forward", 8192), ("forward", 64), ("logits", 64), ("backward", 8192)):
                yield _compile(kernel, f"{name} {num}", Case(num, *sizes), implementation, targets)


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
    # Of the gradient one piece's logits count: the products are the library's.
    columns = piece_size(case.N, case.vocab) if kernel == "backward" else case.vocab
    written = {"forward": 0, "logits": 4, "backward": 2}[kernel]
    return CompileCase(
        kernel=f"cross_entropy.{kernel}",
        shape=name,
        targets=targets,
        program=programs.get(kernel, gradients),
        arguments=(hidden, w, *arguments[kernel]),
        bytes=2 * case.D * (case.N + columns) + written * case.N * columns,
        flops=2 * case.N * case.D * columns,
        instruction=r"wgmma\..*m64n256k16" if implementation == "pallas_gpu" else None,
    )
