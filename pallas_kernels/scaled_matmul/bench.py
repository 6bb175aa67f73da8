"""Times FP8 products beside `x @ w`: `python -m pallas_kernels.scaled_matmul.bench [--json FILE] [--quick]`.

"quantised" cases time the kernel alone on operands quantised ahead; their error is against the product of the dequantised operands. The
others quantise in the call, forward and backward; their error is against x @ w, so it is what FP8 costs.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, main
from pallas_kernels.scaled_matmul import fp8_matmul, quantize, reference, scaled_matmul
from pallas_kernels.scaled_matmul.cases import BENCH_CASES, BENCH_GPU_CASES, Case, inputs, operand


def kernels() -> list[str]:
    """Return the implementations of this machine; interpreted kernels are not timed."""
    names = {"cpu": ("xla",), "gpu": ("pallas_gpu", "jax_triton", "xla"), "tpu": ("pallas_tpu", "xla")}[jax.default_backend()]
    return [name for name in names if runs(name)]


def runs(name: str) -> bool:
    """Return whether an implementation does not refuse."""
    try:
        jax.eval_shape(functools.partial(scaled_matmul, implementation=name), operand(128, 128, False), operand(128, 128, True))
    except NotImplementedError:
        return False
    return True


def quantised_inputs(case: Case, dtype: DTypeLike, seed: int) -> tuple:
    """Return both operands quantised, then what a peer takes instead: their numbers in `dtype`."""
    x, w = inputs(case, dtype, seed)
    operands = quantize(x), quantize(w, block=True, transpose=True)
    return *operands, *(reference.dequantize(q).astype(dtype) for q in operands)


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark."""
    size, names = jnp.dtype(dtype).itemsize, kernels()
    for name, case in (BENCH_CASES if jax.default_backend() == "cpu" else BENCH_GPU_CASES).items():
        if quick and case.K > 1024:
            continue
        operands, result = case.M * case.K + case.K * case.N, case.M * case.N
        flops = 2 * case.M * case.K * case.N
        yield Problem(
            case=f"{name} quantised",
            inputs=functools.partial(quantised_inputs, case, dtype),
            differentiable=(),
            implementations={
                kernel: lambda a, b, x, w, kernel=kernel: scaled_matmul(a, b, out_dtype=dtype, implementation=kernel) for kernel in names
            }
            | {"peer: x @ w": lambda a, b, x, w: x @ w.T},
            truth=lambda a, b, x, w: reference.scaled_matmul(a, b),
            flops=(flops, 0),
            bytes=(operands + result * size, 0),
        )
        yield Problem(
            case=name,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations={kernel: functools.partial(fp8_matmul, implementation=kernel) for kernel in names}
            | {"peer: x @ w": lambda x, w: x @ w},
            truth=lambda x, w: x @ w,
            flops=(flops, 2 * flops),
            bytes=((operands + result) * size, 2 * (operands + result) * size),
        )


if __name__ == "__main__":
    main("scaled_matmul", problems)
