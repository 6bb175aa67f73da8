"""Named shapes of flash attention, shared by the tests and the benchmark."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import GRID


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
    normal = lambda heads, size: jnp.asarray(rng.standard_normal((case.B, case.T, heads, size)), dtype)
    q, k, v = normal(case.H, case.K), normal(case.G, case.K), normal(case.G, case.V or case.K)
    return Inputs(q, k, v, *(jnp.asarray(x) for x in bounds(case)))
