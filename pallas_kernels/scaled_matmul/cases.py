"""Named shapes of the scaled product, shared by the tests, the benchmark and the compile gates."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.aot.case import CompileCase
from pallas_kernels.matmul.cases import COMPILE_SIZES
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
    return jnp.asarray(x.astype(dtype)), jnp.asarray((rng.standard_normal((case.K, case.N)) * case.K**-0.5).astype(dtype))


def operand(rows: int, depth: int, block: bool) -> Quantized:
    """Return the shapes of a quantised operand, whole groups."""
    scales = jax.ShapeDtypeStruct((depth // GROUP, rows // GROUP if block else rows), jnp.float32)
    return Quantized(jax.ShapeDtypeStruct((rows, depth), jnp.float8_e4m3fn), scales)


WITH_GRADIENTS = [f"{model} {name}" for model in ("mini", "flash") for name in ("qkv", "ffn up", "shared up")]
"""Compiled for all chips, with gradients and over a decode step's rows; the other products, forward, for the one with FP8 units."""

RATIOS = {"v5e": 1.35, "v5p": 1.35, "v6e": 3.3, "h200": 1.1, "h200.mosaic": 0.5}
"""Estimates over a training step's rows, in units of the floor, whose FLOPs are at the bf16 rate."""
SHORT = 1.3
"""How much more it may be for sums of 512 terms: bytes then count as much as products."""


def compile_cases() -> Iterator[CompileCase]:
    """Yield the products of both released models over a training step's rows: of rows with blocks (y and dx), and of rows with rows (dw).

    And over a decode step's: y. The small gradients are for quick gates: compilers take as long as a tile is large.
    """
    slots = 64
    for name, (K, N) in ({"small": (256, 256)} | COMPILE_SIZES).items():
        if name.endswith("head"):  # bf16
            continue
        small = name == "small"
        M = 512 if small else 8192
        products = (
            ("forward", (M, K, N), True, jnp.bfloat16),
            ("input_gradient", (M, N, K), True, jnp.bfloat16),
            ("weight_gradient", (K, M, N), False, jnp.float32),
            ("forward", (slots, K, N), True, jnp.bfloat16),
        )
        everywhere = small or name in WITH_GRADIENTS
        wanted = products[1:3] if small else products if everywhere else products[:1]
        on = [(target, "") for target in (("v5e", "v5p", "v6e") if everywhere else ())] + [("h200", ""), ("h200", ".mosaic")]
        for kernel, (rows, depth, columns), block, out_dtype in wanted:
            for target, suffix in on if rows != slots else on[:-1]:
                yield CompileCase(
                    kernel=f"scaled_matmul.{kernel}{suffix}",
                    shape=f"{name} {slots if rows == slots else M}",
                    targets=(target,),
                    program=functools.partial(scaled_matmul, out_dtype=out_dtype, implementation="mosaic_gpu" if suffix else "pallas"),
                    arguments=(operand(rows, depth, False), operand(columns, depth, block)),
                    bytes=(rows + columns) * depth + rows * columns * jnp.dtype(out_dtype).itemsize,
                    flops=2 * rows * depth * columns,
                    floor_ratio=None if small or rows == slots else RATIOS[target + suffix] * (SHORT if depth == 512 else 1),
                    instruction=r"wgmma\.mma_async.*m64n128k32.*e4m3|vmatmul",
                )
