"""Named shapes of the grouped product, shared by the tests and the benchmark."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


class Case(NamedTuple):
    """One problem: tokens, slots a token, width, expert width, experts, and how the load falls on them."""

    N: int
    A: int
    D: int
    F: int
    E: int
    routing: str = "uniform"
    """Or "skewed" (half of the rows to one expert), "one" (all to one), "empty" (half of the experts), "some" (a third to none), "none"."""


TEST_CASES = {
    "one_row": Case(1, 1, 16, 24, 4),
    "uniform": Case(100, 2, 16, 24, 8),
    "skewed": Case(77, 3, 16, 24, 8, "skewed"),
    "one_expert": Case(65, 1, 16, 24, 8, "one"),
    "empty_experts": Case(64, 2, 16, 24, 16, "empty"),
    "some_rows_to_none": Case(50, 2, 16, 24, 8, "some"),
    "all_rows_to_none": Case(5, 2, 16, 24, 4, "none"),
    "more_experts_than_rows": Case(3, 2, 16, 24, 64),
}

BENCH_CASES = {f"N{num}": Case(num, 4, 512, 256, 32) for num in (1, 16, 64, 1024, 4096)} | {
    "N4096_skewed": Case(4096, 4, 512, 256, 32, "skewed"),
    "N4096_one": Case(4096, 4, 512, 256, 32, "one"),
}


def experts(case: Case, seed: int = 0) -> np.ndarray:
    """Return the expert of each token's slots [N, A]; E and above means none."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, case.E, (case.N, case.A))
    if case.routing == "skewed":
        chosen = np.where(rng.random(chosen.shape) < 0.5, case.E // 2, chosen)
    elif case.routing == "one":
        chosen = np.full_like(chosen, case.E - 1)
    elif case.routing == "empty":
        chosen = chosen // 2 * 2
    elif case.routing == "some":
        chosen = np.where(rng.random(chosen.shape) < 1 / 3, case.E + rng.integers(0, 3, chosen.shape), chosen)
    elif case.routing == "none":
        chosen = np.full_like(chosen, case.E)
    return chosen.astype(np.int32)


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return random x [N, D], w [E, D, F] and the experts [N, A]; the products' entries are of order 1."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((case.N, case.D)), dtype)
    w = jnp.asarray(rng.standard_normal((case.E, case.D, case.F)) * case.D**-0.5, dtype)
    return x, w, jnp.asarray(experts(case, seed))
