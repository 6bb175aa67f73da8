"""Named shapes of the scaled product, shared by the tests, the benchmark and the compile gates."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.aot.case import CompileCase
from pallas_kernels.scaled_matmul import Quantized, scaled_matmul
from pallas_kernels.scaled_matmul.quantized import GROUP


class Case(NamedTuple):
    """One product x [M, K] @ w [K, N]."""

    M: int
    K: int
    N: int


TEST_CASES = {
    "one_row": Case(1, 128, 128),
    "one_column": Case(130, 256, 1),
    "whole_tiles": Case(256, 384, 256),
    "short_group": Case(20, 16, 24),
    "odd_depth": Case(40, 200, 128),
    "all_odd": Case(150, 300, 270),
}

BENCH_CASES = {f"N{n}": Case(n, n, n) for n in (1024, 2048)}
"""On a CPU."""
BENCH_GPU_CASES = {
    "square": Case(8192, 8192, 8192),
    "mini_qkv": Case(8192, 2048, 6144),
    "flash_ffn": Case(8192, 4096, 9216),
    "mini_expert": Case(8192, 2048, 512),
}


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Return random x [M, K] and w [K, N], with outliers and rows of zeros in x; the product's entries are of order 1."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.M, case.K))
    x[rng.random(x.shape) < 1e-3] *= 1000
    x[5::11] = 0
    return jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal((case.K, case.N)) * case.K**-0.5, dtype)


def operand(rows: int, depth: int, block: bool) -> Quantized:
    """Return the shapes of a quantised operand, whole groups."""
    scales = jax.ShapeDtypeStruct((depth // GROUP, rows // GROUP if block else rows), jnp.float32)
    return Quantized(jax.ShapeDtypeStruct((rows, depth), jnp.float8_e4m3fn), scales)


PROJECTIONS = {
    "mini": (("qkv", 2048, 6144), ("ffn", 2048, 5120), ("expert", 2048, 512)),
    "flash": (("qkv", 4096, 12288), ("ffn", 4096, 9216), ("expert", 4096, 1024)),
}
"""Name, K and N of the projections of ring-mini-linear-2.0 and ring-flash-linear-2.0. The way back out of an FFN is its input gradient."""


def compile_cases() -> Iterator[CompileCase]:
    """Yield the products of both released models over a training step's rows: of rows with blocks (y and dx), and of rows with rows (dw).

    And over a decode step's: y.
    """
    M, slots = 8192, 64
    for model, (name, K, N) in ((model, projection) for model, projections in PROJECTIONS.items() for projection in projections):
        for kernel, (rows, depth, columns), block, out_dtype in (
            ("forward", (M, K, N), True, jnp.bfloat16),
            ("input_gradient", (M, N, K), True, jnp.bfloat16),
            ("weight_gradient", (K, M, N), False, jnp.float32),
            ("forward", (slots, K, N), True, jnp.bfloat16),
        ):
            for suffix, implementation, targets in (("", "pallas", ("v5e", "v5p", "v6e", "h200")), (".mosaic", "mosaic_gpu", ("h200",))):
                if suffix and rows == slots:
                    continue
                yield CompileCase(
                    kernel=f"scaled_matmul.{kernel}{suffix}",
                    shape=f"{model} {name} {K}x{N}{f' {slots}' * (rows == slots)}",
                    targets=targets,
                    program=functools.partial(scaled_matmul, out_dtype=out_dtype, implementation=implementation),
                    arguments=(operand(rows, depth, False), operand(columns, depth, block)),
                    bytes=(rows + columns) * depth + rows * columns * jnp.dtype(out_dtype).itemsize,
                    flops=2 * rows * depth * columns,
                    instruction=r"wgmma\.mma_async.*e4m3|vmatmul",
                    quick=(model, name) == ("mini", "expert") and rows != slots,
                )
