"""Times FP8 products beside the libraries' products: `python -m pallas_kernels.scaled_matmul.bench [--json FILE] [--quick]`.

"quantised" cases time the kernel alone on operands quantised ahead; their error is against the product of the dequantised operands. The
others quantise in the call, forward and backward; their error is against x @ w, so it is what FP8 costs. torch's row-wise product has a
scale a row and column only, so its operands are others.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, Target, main, native
from pallas_kernels.compat import platform
from pallas_kernels.scaled_matmul import fp8_matmul, quantize, reference, scaled_matmul
from pallas_kernels.scaled_matmul.api import IMPLEMENTATIONS
from pallas_kernels.scaled_matmul.cases import BENCH_CASES, BENCH_GPU_CASES, Case, inputs
from pallas_kernels.scaled_matmul.quantized import LARGEST, to_e4m3

PEER = "peer: x @ w"
TARGETS = (Target(1 / 1.3, PEER, "1.3x the bf16 rate"), Target(1, "second", "1300 TFLOP/s"))
"""Of a product of operands quantised ahead, on an H200; the second one in seconds, for the case at hand."""


def quantised_inputs(case: Case, dtype: DTypeLike) -> tuple:
    """Return both operands quantised, then what peers take: their numbers in `dtype`, blocks' scales [N / 128, K / 128], `torch_rows`'."""

    @jax.jit
    def make(x, w):
        operands = quantize(x), quantize(w, block=True, transpose=True)
        rows = []
        for y in (x, w.T):
            scales = jnp.maximum(jnp.abs(y).max(1, keepdims=True).astype(jnp.float32), 1e-30) / LARGEST
            rows.append((to_e4m3(y, scales), scales))
        return *operands, *(reference.dequantize(q).astype(dtype) for q in operands), operands[1].scales.T, rows

    return make(*inputs(case, dtype))


def torch_blocks(a, b, x, w, block_scales, rows):
    """Return the product by torch with our operands: rows have scales for 128 columns, blocks one each."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch._scaled_mm(a.values, b.values.t(), a.scales.t(), block_scales.t(), out_dtype=x.dtype)


def torch_rows(a, b, x, w, block_scales, rows):
    """Return the product by torch with one scale a row and column."""
    import torch  # pyright: ignore[reportMissingImports]

    (x8, x_scales), (w8, w_scales) = rows
    return torch._scaled_mm(x8, w8.t(), x_scales, w_scales.t(), out_dtype=x.dtype, use_fast_accum=True)


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark."""
    size, names, on_gpu = jnp.dtype(dtype).itemsize, native(IMPLEMENTATIONS), platform() == "gpu"
    for name, case in (BENCH_CASES if platform() == "cpu" else BENCH_GPU_CASES).items():
        if quick and case.K > 1024:
            continue
        operands, result = case.M * case.K + case.K * case.N, case.M * case.N
        flops = 2 * case.M * case.K * case.N
        targets = (TARGETS[0], TARGETS[1]._replace(ratio=flops / 1300e12))
        yield Problem(
            case=f"{name} quantised",
            tokens=case.M,
            inputs=functools.partial(quantised_inputs, case, dtype),
            differentiable=(),
            implementations={
                kernel: lambda a, b, *_, kernel=kernel: scaled_matmul(a, b, out_dtype=dtype, implementation=kernel) for kernel in names
            }
            | {PEER: lambda a, b, x, w, *_: x @ w.T},
            truth=lambda a, b, *_: reference.scaled_matmul(a, b),
            flops=(flops, 0),
            bytes=(operands + result * size, 0),
            torch={"peer: torch x @ w": lambda a, b, x, w, *_: x @ w.t()}
            | ({"peer: torch._scaled_mm blocks": torch_blocks, "peer: torch._scaled_mm rows": torch_rows} if on_gpu else {}),
            peer=PEER,
            targets={"forward": targets} if on_gpu and case.M == case.K == case.N else {},
        )
        yield Problem(
            case=name,
            tokens=case.M,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations={kernel: functools.partial(fp8_matmul, implementation=kernel) for kernel in names} | {PEER: lambda x, w: x @ w},
            truth=lambda x, w: x @ w,
            flops=(flops, 2 * flops),
            bytes=((operands + result) * size, 2 * (operands + result) * size),
            torch={"peer: torch x @ w": lambda x, w: x @ w},
            peer=PEER,
        )


if __name__ == "__main__":
    main("scaled_matmul", problems)
