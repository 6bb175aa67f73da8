"""Named shapes of the row-tiled product, shared by the tests and the benchmark."""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.aot.case import CompileCase
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
    "several_tiles": Case((150,), 300, 200),
}

BENCH_CASES = {f"N{num}": Case((num,), 1024, 1024) for num in (1, 16, 64, 1024, 4096)} | {"router": Case((4096,), 1024, 8)}


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Return random x [*rows, D] and w [D, F]; the product's entries are of order 1."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*case.rows, case.D))
    return jnp.asarray(x.astype(dtype)), jnp.asarray((rng.standard_normal((case.D, case.F)) * case.D**-0.5).astype(dtype))


COMPILE_SIZES = {
    "mini qkv": (2048, 6144),
    "mini softmax qkv": (2048, 3072),
    "mini out": (2048, 2048),
    "mini ffn up": (2048, 10240),
    "mini ffn down": (5120, 2048),
    "mini shared up": (2048, 1024),
    "mini shared down": (512, 2048),
    "mini head": (2048, 157184),
    "flash qkv": (4096, 12288),
    "flash softmax qkv": (4096, 5120),
    "flash out": (4096, 4096),
    "flash ffn up": (4096, 18432),
    "flash ffn down": (9216, 4096),
    "flash shared up": (4096, 2048),
    "flash shared down": (1024, 4096),
    "flash head": (4096, 157184),
}
"""Terms and columns of the released models' products; "up" is gate and up, "out" a linear mixer's gate, too."""

BENCH_GPU_CASES = {"square": Case((8192,), 8192, 8192)} | {
    f"{name} {num}": Case((num,), *size) for name, size in COMPILE_SIZES.items() for num in (8192, 64) if num * size[1] < 2**30
}
"""Without training's LM head: `cross_entropy` never has all logits at once."""
BENCH_GPU_FP32_CASES = {"mini router 8192": Case((8192,), 2048, 256), "flash router 8192": Case((8192,), 4096, 256)}


def compile_cases() -> Iterator[CompileCase]:
    """Yield what the compile gates compile: training and decode rows, the gradients, and the router's fp32."""
    for name, (terms, columns) in COMPILE_SIZES.items():
        for num in (8192, 64):
            yield from _compile("forward", f"{name} {num}", (num, terms, columns), jnp.bfloat16)
    for name in ("mini qkv", "flash ffn down"):
        yield from _compile("backward", f"{name} 8192", (8192, *COMPILE_SIZES[name]), jnp.bfloat16)
    for name, num in (("mini", 8192), ("mini", 64), ("flash", 8192), ("flash", 64)):
        yield from _compile("forward", f"{name} router {num} fp32", (num, {"mini": 2048, "flash": 4096}[name], 256), jnp.float32)
    for num in (8192, 4096):  # the sum of a weight's gradient in parts, and at once
        yield from _compile("backward", f"mini router {num} fp32", (num, 2048, 256), jnp.float32)
    yield from _compile("backward", "small 512", (512, 256, 256), jnp.bfloat16)  # for quick gates: small tiles compile in a second


def _compile(kernel: str, name: str, sizes: tuple[int, int, int], dtype: DTypeLike):
    """Yield the case of a product of these rows, terms and columns for TPUs and for GPUs."""
    from pallas_kernels.matmul.api import matmul

    num, terms, columns = sizes
    shapes = {"x": (num, terms), "w": (terms, columns), "dy": (num, columns)}
    size = {name: jnp.dtype(dtype).itemsize * math.prod(shape) for name, shape in shapes.items()}
    backward = kernel == "backward"
    exact = dtype == jnp.float32
    # A decode step's few rows are at the time of a tile's instructions on a GPU, and everywhere in fp32. Of short sums a tile's operands
    # and result take as long as its products, and of few columns a GPU's tile is narrow.
    on_gpu = (1.35 if columns >= 4096 else 1.8) * (1.2 if terms <= 1024 else 1)
    on_tpu = 1.25 if exact or (terms > 1024 and columns > 1024) else 1.35
    ratios = {"pallas_tpu": None if exact and num <= 64 else on_tpu, "pallas_gpu": on_gpu if num > 64 else None}
    for implementation, targets in {"pallas_tpu": ("v5e", "v5p", "v6e"), "pallas_gpu": ("h200",)}.items():
        product = functools.partial(matmul, aligned=True, implementation=implementation)
        yield CompileCase(
            kernel=f"matmul.{kernel}",
            shape=name,
            targets=targets,
            program=(lambda x, w, dy, product=product: jax.vjp(product, x, w)[1](dy)) if backward else product,
            arguments=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in list(shapes.values())[: 2 + backward]),
            bytes=(2 if backward else 1) * sum(size.values()),
            # fp32 operands take six passes of bf16 ones, or three of TF32 ones at half the rate.
            flops=(4 if backward else 2) * (6 if exact else 1) * math.prod(sizes),
            floor_ratio=None if name.startswith("small") else ratios[implementation],
            instruction=(r"wgmma\..*tf32" if exact else r"wgmma\..*m64n(128|256)k16") if targets == ("h200",) else None,
        )
