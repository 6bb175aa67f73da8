"""Times grouped FP8 products: `python -m pallas_kernels.grouped_scaled_matmul.bench [--json FILE] [--quick]`.

Rows are in their groups' tiles already. Operands are quantised in the call, forward and backward; the peer is the product without FP8, so
the error is what FP8 costs.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, main, native
from pallas_kernels.compat import platform
from pallas_kernels.grouped_matmul import gather_groups, group_rows, grouped_matmul, row_tile_for
from pallas_kernels.grouped_matmul.bench import grouped_truth
from pallas_kernels.grouped_matmul.cases import Case, experts
from pallas_kernels.grouped_matmul.cases import inputs as tokens
from pallas_kernels.grouped_scaled_matmul import fp8_grouped_matmul
from pallas_kernels.grouped_scaled_matmul.api import IMPLEMENTATIONS
from pallas_kernels.grouped_scaled_matmul.cases import BENCH_CASES, BENCH_GPU_CASES

PEER = "peer: grouped_matmul"


def inputs(case: Case, dtype: DTypeLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return rows in their groups' tiles, the groups' matrices and tiles."""
    x, w, chosen = tokens(case, dtype)
    groups = group_rows(chosen.reshape(-1), case.E, _row_tile(case))
    return gather_groups(x, groups, case.A), w, groups.tiles


def _row_tile(case: Case) -> int:
    return row_tile_for(case.N * case.A, case.E, aligned=True)


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark; the bytes count the matrices of the experts that have rows."""
    for name, case in (BENCH_CASES if platform() == "cpu" else BENCH_GPU_CASES).items():
        if quick and case.N > 64:
            continue
        row_tile = _row_tile(case)
        kernels = {
            kernel: functools.partial(fp8_grouped_matmul, row_tile=row_tile, implementation=kernel) for kernel in native(IMPLEMENTATIONS)
        }
        num, used = case.N * case.A, len(np.unique(experts(case)))
        moved = jnp.dtype(dtype).itemsize * (num * (case.D + case.F) + used * case.D * case.F)
        yield Problem(
            case=name,
            tokens=case.N,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations=kernels | {PEER: functools.partial(grouped_matmul, row_tile=row_tile)},
            truth=functools.partial(grouped_truth, row_tile=row_tile),
            flops=(2 * num * case.D * case.F, 4 * num * case.D * case.F),
            bytes=(moved, 2 * moved),
            peer=PEER,
        )


if __name__ == "__main__":
    main("grouped_scaled_matmul", problems)
