"""Named shapes of the row-tiled product, shared by the tests and the benchmark."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.matmul.tile import ROW_TILE


class Case(NamedTuple):
    """One problem: leading axes of x, width, columns of w."""

    rows: tuple[int, ...]
    D: int
    F: int


TEST_CASES = {
    "one_row": Case((1,), 16, 24),
    "less_than_a_tile": Case((5,), 48, 40),
    "one_tile": Case((ROW_TILE,), 32, 64),
    "odd_rows": Case((77,), 33, 7),
    "few_columns": Case((200,), 64, 8),
    "leading_axes": Case((2, 3, 37), 16, 48),
}

BENCH_CASES = {f"N{num}": Case((num,), 1024, 1024) for num in (1, 16, 64, 1024, 4096)} | {"router": Case((4096,), 1024, 8)}


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Return random x [*rows, D] and w [D, F]; the product's entries are of order 1."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*case.rows, case.D))
    return jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal((case.D, case.F)) * case.D**-0.5, dtype)
