"""Named shapes of the LM head with cross entropy, shared by the tests and the benchmark."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


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
