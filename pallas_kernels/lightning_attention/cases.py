"""Named shapes of Lightning attention, shared by the tests and the benchmark."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import GRID


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
    "value_size_differs": Case(2, 70, 2, 16, 48),
    "initial_state": Case(2, 150, 2, 16, 16, state=True),
    "segments": Case(2, 384, 2, 16, 16, segments=True),
    "segments_and_state": Case(2, 320, 2, 16, 32, state=True, segments=True),
    "chunk_128": Case(1, 300, 2, 16, 16, C=128, state=True),
    "strong_decay": Case(1, 300, 2, 16, 16, C=128, decay=20.0),
    "no_decay": Case(1, 200, 2, 16, 16, decay=0.0, state=True),
}

BENCH_CASES = {f"T{length}": Case(1, length, 4, 128, 128) for length in (512, 1024, 4096, 16384)}


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
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, k = (normal(case.B, case.T, case.H, case.K) for _ in range(2))
    v = normal(case.B, case.T, case.H, case.V)
    log_decay = jnp.asarray(-case.decay * 2.0 ** (-8 * (np.arange(case.H) + 1) / case.H), jnp.float32)
    state = jnp.asarray(rng.standard_normal((case.B, case.H, case.K, case.V)), jnp.float32) if case.state else None
    chunk, per_grid = np.arange(-(-case.T // case.C)), GRID // case.C
    starts = (chunk % per_grid == 0) & (chunk // per_grid % 2 == np.arange(case.B)[:, None] % 2)
    return Inputs(q, k, v, log_decay, state, jnp.asarray(starts) if case.segments else None)
