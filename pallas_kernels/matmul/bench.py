"""Times the row-tiled product beside the libraries' `x @ w`: `python -m pallas_kernels.matmul.bench [--json FILE] [--quick]`."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, Target, main, native
from pallas_kernels.compat import dot_precision, platform
from pallas_kernels.matmul import matmul, reference
from pallas_kernels.matmul.api import IMPLEMENTATIONS
from pallas_kernels.matmul.cases import BENCH_CASES, BENCH_GPU_CASES, BENCH_GPU_FP32_CASES, inputs

PEER = "peer: x @ w"


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return the library's product, as exact as ours."""
    return jnp.matmul(x, w, precision=dot_precision(x.dtype))


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark. Off the CPU the aligned product is the kernel: plain JAX would walk them in its tiles of rows."""
    on_cpu = platform() == "cpu"
    routers = not on_cpu and not quick and dtype == jnp.float32
    fast = {"xla": functools.partial(matmul, implementation="xla")}
    aligned = {
        f"{name} aligned": functools.partial(matmul, aligned=True, implementation=name)
        for name in native(IMPLEMENTATIONS)
        if on_cpu or name != "xla"
    }
    for name, case in (BENCH_CASES if on_cpu else BENCH_GPU_FP32_CASES if routers else BENCH_GPU_CASES).items():
        num = math.prod(case.rows)
        if quick and num > 1024:
            continue
        flops = 2 * num * case.D * case.F
        moved = jnp.dtype(dtype).itemsize * (num * case.D + case.D * case.F + num * case.F)
        yield Problem(
            case=name,
            tokens=num,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations=fast | aligned | {PEER: product},
            truth=reference.matmul,
            flops=(flops, 2 * flops),
            bytes=(moved, 2 * moved),
            torch={"peer: torch x @ w": lambda x, w: x @ w},
            peer=PEER,
            targets={"forward": (Target(1.3, "floor"),)} if routers else {},
        )


if __name__ == "__main__":
    main("matmul", problems, ("bf16", "fp32"))
