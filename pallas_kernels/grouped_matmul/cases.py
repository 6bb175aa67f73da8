"""Named shapes of the grouped product, shared by the tests and the benchmark."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.aot.case import CompileCase


class Case(NamedTuple):
    """One problem: tokens, slots a token, width, expert width, experts, and how the load falls on them."""

    N: int
    A: int
    D: int
    F: int
    E: int
    routing: str = "uniform"
    """Or "skewed" (half of the rows to one expert), "one" (all to one), "empty" (half of the experts), "some" (a third to none), "none"."""


ROUTINGS = ("uniform", "skewed", "one", "empty", "some", "none")
TEST_CASES = {"more_experts_than_rows": Case(1, 2, 16, 24, 64)} | {routing: Case(77, 3, 48, 40, 8, routing) for routing in ROUTINGS}
TEST_CASES["experts_of_a_model"] = Case(16, 8, 16, 24, 256, "skewed")
"""The last one has as many experts, and as many for a token, as the released models."""

BENCH_CASES = {f"N{num}": Case(num, 4, 512, 256, 32) for num in (1, 16, 64, 1024, 4096)} | {
    "N4096_skewed": Case(4096, 4, 512, 256, 32, "skewed"),
    "N4096_one": Case(4096, 4, 512, 256, 32, "one"),
}


def experts(case: Case, seed: int = 0) -> np.ndarray:
    """Return the expert of each token's slots [N, A]; E and above means none."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, case.E, (case.N, case.A))
    if case.routing == "skewed":
        chosen = np.where(rng.random(chosen.shape) < 0.5, case.E // 2, chosen)
    elif case.routing == "one":
        chosen = np.full_like(chosen, case.E - 1)
    elif case.routing == "empty":
        chosen = chosen // 2 * 2
    elif case.routing == "some":
        chosen = np.where(rng.random(chosen.shape) < 1 / 3, case.E + rng.integers(0, 3, chosen.shape), chosen)
    elif case.routing == "none":
        chosen = np.full_like(chosen, case.E)
    return chosen.astype(np.int32)


def inputs(case: Case, dtype: DTypeLike, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return random x [N, D], w [E, D, F] and the experts [N, A]; the products' entries are of order 1."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((case.N, case.D)).astype(dtype))
    w = jnp.asarray((rng.standard_normal((case.E, case.D, case.F)) * case.D**-0.5).astype(dtype))
    return x, w, jnp.asarray(experts(case, seed))


COMPILE_SIZES = {
    "mini gate_up": (2048, 1024),
    "mini down": (512, 2048),
    "flash gate_up": (4096, 2048),
    "flash down": (1024, 4096),
}
"""Terms and columns of the released models' experts, of which there are 256; a token has 8."""
TARGETS = {"pallas_tpu": ("v5e", "v5p", "v6e"), "pallas_gpu": ("h200",)}
EXPERTS, ACTIVE, ROW_TILE = 256, 8, 16
BENCH_GPU_CASES = {f"{name} {num}": Case(num, ACTIVE, *size, EXPERTS) for name, size in COMPILE_SIZES.items() for num in (8192, 64)} | {
    f"mini gate_up 8192 {routing}": Case(8192, ACTIVE, *COMPILE_SIZES["mini gate_up"], EXPERTS, routing) for routing in ("skewed", "one")
}


def compile_cases() -> Iterator[CompileCase]:
    """Yield what the compile gates compile: training and decoding, with the gather of tokens where it is fused, and the gradients."""
    for implementation in TARGETS:
        for name in COMPILE_SIZES:
            for num in (8192, 64):
                yield _compile("forward", name, num, implementation)
    for name in ("mini gate_up", "flash gate_up"):
        yield _compile("gathered", name, 8192, "pallas_gpu")
        yield _compile("backward", name, 8192, "pallas_gpu")
    yield _compile("backward", "mini gate_up", 8192, "pallas_tpu")
    for num in (8192, 64):
        yield _compile_combine(num)
    for name in ("mini", "flash"):
        yield _compile_experts(name, 8192)
    yield _compile_experts("mini", 64)


def _compile_combine(num: int) -> CompileCase:
    """The way back of so many tokens of the larger model; its gradient is a gather, which products of that do as they load."""
    from pallas_kernels.grouped_matmul.api import combine_groups

    width, assigned = 4096, num * ACTIVE
    return CompileCase(
        kernel="grouped_matmul.combine",
        shape=f"flash {num}",
        targets=("h200",),
        program=lambda rows, groups: combine_groups(rows, groups, ACTIVE, implementation="pallas_gpu"),
        arguments=(jax.ShapeDtypeStruct((allotted_rows(assigned), width), jnp.bfloat16), _groups(assigned)),
        bytes=2 * width * (assigned + num),
        flops=assigned * width,
        floor_ratio=1.05 if num > 64 else None,
    )


class Experts(NamedTuple):
    """The experts of a released model over so many tokens, with gradients: `program`, the products in it alone, and the arguments of both.

    These are x, both matrices, the weights, the groups, and for the products alone the hidden rows and the gradient of the first product;
    then that of the result.
    """

    program: Callable[..., Any]
    products: Callable[..., Any]
    arguments: tuple[Any, ...]


def experts_of(name: str, num: int) -> Experts:
    """Return the experts of "mini" or "flash" on a GPU."""
    from pallas_kernels.grouped_matmul import pallas_gpu
    from pallas_kernels.grouped_matmul.api import grouped_mlp, moves_of

    (D, two_F), (F, _) = COMPILE_SIZES[f"{name} gate_up"], COMPILE_SIZES[f"{name} down"]
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    num_rows = allotted_rows(num * ACTIVE)

    def program(x, w_in, w_out, weights, groups, hidden, d_gate_up, d_out):
        op = functools.partial(grouped_mlp, row_tile=ROW_TILE, implementation="pallas_gpu")
        out, pull_back = jax.vjp(lambda x, w_in, w_out, weights: op(x, w_in, w_out, groups, weights), x, w_in, w_out, weights)
        return out, pull_back(d_out)

    def products(x, w_in, w_out, weights, groups, hidden, d_gate_up, d_out):
        token, _ = moves_of(num, groups, ACTIVE)
        product, gradient = (
            functools.partial(f, tiles=groups.tiles, row_tile=ROW_TILE) for f in (pallas_gpu.product, pallas_gpu.weight_gradient)
        )
        forward = product(x, w_in, token=token, contract=0), product(hidden, w_out, token=None, contract=0)
        of_rows = product(d_out, w_out, token=token, contract=1), product(d_gate_up, w_in, token=None, contract=1)
        return *forward, *of_rows, gradient(x, d_gate_up, tokens=(token, None)), gradient(hidden, d_out, tokens=(None, token))

    matrices = array(num, D), array(EXPERTS, D, two_F), array(EXPERTS, F, D)
    weights, rows = array(num, ACTIVE, dtype=jnp.float32), (array(num_rows, size) for size in (F, two_F))
    return Experts(program, products, (*matrices, weights, _groups(num * ACTIVE), *rows, array(num, D)))


def _compile_experts(name: str, num: int) -> CompileCase:
    """The experts whole, weighted SwiGLU in the first product; in training with gradients, that of SwiGLU in the second's."""
    from pallas_kernels.grouped_matmul.api import grouped_mlp

    experts, how = experts_of(name, num), {"row_tile": ROW_TILE, "implementation": "pallas_gpu"}
    forward = lambda x, w_in, w_out, weights, groups: grouped_mlp(x, w_in, w_out, groups, weights, **how)
    (D, two_F), (F, _) = COMPILE_SIZES[f"{name} gate_up"], COMPILE_SIZES[f"{name} down"]
    decode, assigned, matrices = num == 64, num * ACTIVE, EXPERTS * D * (two_F + F)
    # Forward: x, gate_up, hidden and the results written and read, y. Gradient: what is kept, read for two products each, the gradients of
    # y (twice) and of gate_up (written and read twice), and rows' ones of x, written and read.
    rows = 2 * num * D + assigned * (two_F + 2 * F + 2 * D) + (0 if decode else 4 * num * D + assigned * (4 * two_F + F + 2 * D))
    return CompileCase(
        kernel="grouped_matmul.experts",
        shape=f"{name} {num}",
        targets=("h200",),
        program=forward if decode else experts.program,
        arguments=experts.arguments[:5] if decode else experts.arguments,
        bytes=2 * (rows + (1 if decode else 3) * matrices),
        flops=2 * (1 if decode else 3) * assigned * D * (two_F + F),
        floor_ratio=1.5 if decode else 2.5,
        instruction=r"wgmma\..*m64n128k16",
    )


def allotted_rows(assigned: int) -> int:
    """Return the rows that `group_rows` allots."""
    return min(assigned, assigned // ROW_TILE + EXPERTS) * ROW_TILE


def _groups(assigned: int) -> Any:
    """The shapes of where so many assignments go."""
    from pallas_kernels.grouped_matmul.api import Groups

    return Groups(*(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (allotted_rows(assigned), assigned, EXPERTS)))  # pyright: ignore


def _compile(kernel: str, name: str, num: int, implementation: str) -> CompileCase:
    """A product of so many tokens' rows, each token with 8 of 256 experts."""
    from pallas_kernels.grouped_matmul.api import gather_grouped_matmul, grouped_matmul

    terms, columns = COMPILE_SIZES[name]
    assigned = num * ACTIVE
    num_rows = allotted_rows(assigned)
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    how = {"row_tile": ROW_TILE, "implementation": implementation}
    w, tiles = array(EXPERTS, terms, columns), array(EXPERTS, dtype=jnp.int32)
    if kernel == "gathered":
        program = lambda x, w, groups: gather_grouped_matmul(x, w, groups, ACTIVE, **how)
        arguments = array(num, terms), w, _groups(assigned)
    elif kernel == "backward":
        product = lambda x, w, tiles: grouped_matmul(x, w, tiles, **how)
        program = lambda x, w, tiles, dy: jax.vjp(lambda x, w: product(x, w, tiles), x, w)[1](dy)
        arguments = array(num_rows, terms), w, tiles, array(num_rows, columns)
    else:
        program = lambda x, w, tiles: grouped_matmul(x, w, tiles, **how)
        arguments = array(num_rows, terms), w, tiles
    passes = 2 if kernel == "backward" else 1
    rows = (num if kernel == "gathered" else assigned) * terms + assigned * columns
    # The estimates count every step of the list, also those that have nothing to do; a TPU's, that each step fetches its blocks.
    ratios = {"pallas_tpu": {64: 1.9}, "pallas_gpu": {64: 1.5, 8192: 2.5}}[implementation]
    return CompileCase(
        kernel=f"grouped_matmul.{kernel}",
        shape=f"{name} {num}",
        targets=TARGETS[implementation],
        program=program,
        arguments=arguments,
        bytes=2 * passes * (rows + EXPERTS * terms * columns),
        flops=2 * passes * assigned * terms * columns,
        floor_ratio=ratios.get(num),
        instruction=r"wgmma\..*m64n256k16" if implementation == "pallas_gpu" else None,
    )
