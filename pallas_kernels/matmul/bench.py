"""Times the row-tiled product beside the libraries' `x @ w`: `python -m pallas_kernels.matmul.bench [--json FILE] [--quick]`."""

import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, main, native
from pallas_kernels.compat import platform
from pallas_kernels.matmul import matmul, reference
from pallas_kernels.matmul.api import IMPLEMENTATIONS
from pallas_kernels.matmul.cases import BENCH_CASES, BENCH_GPU_CASES, inputs

PEER = "peer: x @ w"


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark. Off the CPU the aligned product is the kernel: plain JAX would walk the rows 16 at a time."""
    on_cpu = platform() == "cpu"
    fast = {"xla": functools.partial(matmul, implementation="xla")}
    aligned = {
        f"{name} aligned": functools.partial(matmul, aligned=True, implementation=name)
        for name in native(IMPLEMENTATIONS)
        if on_cpu or name != "xla"
    }
    for name, case in (BENCH_CASES if on_cpu else BENCH_GPU_CASES).items():
        num = math.prod(case.rows)
        if quick and num > 1024:
            continue
        product = 2 * num * case.D * case.F
        moved = jnp.dtype(dtype).itemsize * (num * case.D + case.D * case.F + num * case.F)
        yield Problem(
            case=name,
            tokens=num,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations=fast | aligned | {PEER: lambda x, w: x @ w},
            truth=reference.matmul,
            flops=(product, 2 * product),
            bytes=(moved, 2 * moved),
            torch={"peer: torch x @ w": lambda x, w: x @ w},
            peer=PEER,
        )


if __name__ == "__main__":
    main("matmul", problems)
