"""Times the row-tiled product beside plain `x @ w`: `python -m pallas_kernels.matmul.bench [--json FILE] [--quick]`."""

import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, main
from pallas_kernels.compat import platform
from pallas_kernels.matmul import matmul, reference
from pallas_kernels.matmul.cases import BENCH_CASES, inputs

IMPLEMENTATIONS = {
    "xla": functools.partial(matmul, implementation="xla"),
    "xla aligned": functools.partial(matmul, aligned=True, implementation="xla"),
    "peer: x @ w": lambda x, w: x @ w,
}
if platform() != "cpu":  # interpreted, a kernel has no speed
    IMPLEMENTATIONS["pallas aligned"] = functools.partial(matmul, aligned=True, implementation="pallas")


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark."""
    for name, case in BENCH_CASES.items():
        num = math.prod(case.rows)
        if quick and num > 1024:
            continue
        product = 2 * num * case.D * case.F
        moved = jnp.dtype(dtype).itemsize * (num * case.D + case.D * case.F + num * case.F)
        yield Problem(
            case=name,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations=IMPLEMENTATIONS,
            truth=reference.matmul,
            flops=(product, 2 * product),
            bytes=(moved, 2 * moved),
        )


if __name__ == "__main__":
    main("matmul", problems)
