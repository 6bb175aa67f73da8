"""Named shapes of the grouped FP8 products, shared by the tests, the benchmark and the compile gates."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.aot.case import CompileCase
from pallas_kernels.grouped_matmul.cases import ACTIVE, COMPILE_SIZES, EXPERTS, ROUTINGS, ROW_TILE, Case, allotted_rows
from pallas_kernels.scaled_matmul.cases import operand
from pallas_kernels.scaled_matmul.quantized import GROUP, Quantized

TEST_CASES = {routing: Case(70, 2, 256, 128, 5, routing) for routing in ROUTINGS}
TEST_CASES["experts_of_a_model"] = Case(8, ACTIVE, 128, 128, EXPERTS, "skewed")
BENCH_CASES = {f"N{num}": Case(num, 4, 512, 256, 32) for num in (64, 1024)}
BENCH_GPU_CASES = {
    f"{name} {num}": Case(num, ACTIVE, *COMPILE_SIZES[name], EXPERTS) for name in ("mini gate_up", "mini down") for num in (8192, 64)
} | {f"mini gate_up 8192 {routing}": Case(8192, ACTIVE, *COMPILE_SIZES["mini gate_up"], EXPERTS, routing) for routing in ("skewed", "one")}


def matrices(num_groups: int, columns: int, depth: int) -> Quantized:
    """Return the shapes of the groups' matrices."""
    scales = jax.ShapeDtypeStruct((num_groups, depth // GROUP, columns // GROUP), jnp.float32)
    return Quantized(jax.ShapeDtypeStruct((num_groups, columns, depth), jnp.float8_e4m3fn), scales)


def compile_cases() -> Iterator[CompileCase]:
    """Yield the products of the released models' experts, training and decoding, the gradient of x being one, and the gradient of w."""
    for name, (depth, columns) in COMPILE_SIZES.items():
        for num in (8192, 64):
            yield _compile("forward", name, num, (depth, columns), ("h200",))
    for name, num in (("mini gate_up", 8192), ("flash gate_up", 8192), ("mini gate_up", 64)):
        yield _compile("gathered", name, num, COMPILE_SIZES[name], ("h200",))
    yield _compile("input_gradient", "mini gate_up", 8192, (1024, 2048), ("h200",))
    for name in ("mini gate_up", "flash gate_up"):
        yield _compile("weight_gradient", name, 8192, COMPILE_SIZES[name], ("h200",))
    on_tpu = ("v5e", "v5p", "v6e")
    for name in ("mini gate_up", "flash gate_up"):
        yield _compile("forward", name, 8192, COMPILE_SIZES[name], on_tpu)
    yield _compile("forward", "mini down", 64, COMPILE_SIZES["mini down"], on_tpu)
    for name in ("mini down", "flash down"):
        yield _compile("weight_gradient", name, 8192, COMPILE_SIZES[name], on_tpu)


def _compile(kernel: str, name: str, num: int, size: tuple[int, int], targets: tuple[str, ...]) -> CompileCase:
    """A product of so many tokens' rows, each token with 8 of 256 experts."""
    from pallas_kernels.grouped_scaled_matmul.api import grouped_scaled_matmul, grouped_weight_gradient

    (depth, columns), assigned = size, num * ACTIVE
    rows, tiles = allotted_rows(assigned), jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
    how = {"row_tile": ROW_TILE, "out_dtype": jnp.bfloat16, "implementation": "pallas"}
    if kernel == "weight_gradient":
        along_rows = lambda width: Quantized(
            jax.ShapeDtypeStruct((width, rows), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((rows // GROUP, width), jnp.float32)
        )
        program, arguments = grouped_weight_gradient, (along_rows(depth), along_rows(columns), tiles)
        moved = assigned * (depth + columns) + 2 * EXPERTS * depth * columns
    else:
        gathered = kernel == "gathered"
        moves = (jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((num, ACTIVE), jnp.int32)) if gathered else None
        a = operand(num if gathered else rows, depth, False)
        program, arguments = grouped_scaled_matmul, (a, matrices(EXPERTS, columns, depth), tiles, moves)
        moved = (num if gathered else assigned) * depth + 2 * assigned * columns + EXPERTS * depth * columns
    return CompileCase(
        kernel=f"grouped_scaled_matmul.{kernel}",
        shape=f"{name} {num}",
        targets=targets,
        program=functools.partial(program, **how),
        arguments=arguments,
        bytes=moved,
        flops=2 * assigned * depth * columns,
        floor_ratio=2.5 if targets == ("h200",) and kernel != "weight_gradient" else None,
        instruction=r"wgmma\.mma_async.*m64n128k32.*e4m3|vmatmul",
    )
