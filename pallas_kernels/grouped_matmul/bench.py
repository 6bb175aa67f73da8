"""Times the grouped product beside `lax.ragged_dot`: `python -m pallas_kernels.grouped_matmul.bench [--json FILE] [--quick]`.

"all" is the whole way from tokens [N, D] to slots [N * A, F]: sorting, moving rows, multiplying, moving back; torch has no part in it.
The others are the product alone, of rows that are sorted already.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, Target, main, native
from pallas_kernels.compat import platform
from pallas_kernels.grouped_matmul import combine_groups, gather_grouped_matmul, gather_groups, group_rows, grouped_matmul, row_tile_for
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS
from pallas_kernels.grouped_matmul.cases import BENCH_CASES, BENCH_GPU_CASES, Case, experts, inputs

PEER = "peer: lax.ragged_dot"
TORCH = "peer: torch._grouped_mm"
TARGETS = (Target(1, PEER, "not slower than ragged_dot"), Target(1, TORCH, "not slower than torch"))


def op(x, w, experts, aligned: bool, implementation: str):
    """Return each slot's product by way of whole tiles of one expert's rows."""
    how = {"row_tile": row_tile_for(experts.size, w.shape[0], aligned=aligned), "implementation": implementation}
    groups = group_rows(experts.reshape(-1), w.shape[0], how["row_tile"])
    return combine_groups(gather_grouped_matmul(x, w, groups, experts.shape[1], **how), groups, 1, implementation=implementation)


def ragged_dot(x, w, experts):
    """Return the same by rows sorted by expert."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=w.shape[0])
    return lax.ragged_dot(x[order // experts.shape[1]], w, sizes)[jnp.argsort(order)]


def truth(x, w, experts):
    """Return the reference's products, one expert at a time: it would pick a matrix for every row at once."""
    rows, flat = jnp.repeat(x, experts.shape[1], 0), experts.reshape(-1)
    add = lambda total, e: (total + jnp.where((flat == e)[:, None], rows, 0) @ w[e], None)
    return lax.scan(jax.checkpoint(add), jnp.zeros((len(flat), w.shape[2]), x.dtype), jnp.arange(w.shape[0]))[0]


def grouped_truth(x, w, tiles, row_tile: int):
    """Return the reference's products of rows in their groups' tiles, one group at a time."""
    end = jnp.cumsum(tiles) * row_tile
    row = jnp.arange(len(x))[:, None]

    def add(total, e):
        own = (row >= end[e] - tiles[e] * row_tile) & (row < end[e])
        return total + jnp.where(own, x, 0) @ w[e], None

    return lax.scan(jax.checkpoint(add), jnp.zeros((len(x), w.shape[2]), x.dtype), jnp.arange(w.shape[0]))[0]


def sorted_inputs(case: Case, dtype: DTypeLike, row_tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return rows in their groups' tiles, the matrices and the groups' tiles."""
    x, w, chosen = inputs(case, dtype)
    groups = group_rows(chosen.reshape(-1), case.E, row_tile)
    return gather_groups(x, groups, case.A), w, groups.tiles


def torch_grouped_mm(x, w, tiles, row_tile: int):
    """Return the product by torch, which leaves rows behind the last group unwritten: they are zero, and the last group takes them."""
    import torch  # pyright: ignore[reportMissingImports]

    ends = (torch.cumsum(tiles, 0) * row_tile).to(torch.int32)
    ends[-1] = x.shape[0]
    return torch._grouped_mm(x, w, offs=ends)


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark; the bytes count the matrices of the experts that have rows."""
    on_cpu, names = platform() == "cpu", native(IMPLEMENTATIONS)
    for name, case in (BENCH_CASES if on_cpu else BENCH_GPU_CASES).items():
        if quick and case.N > 64:
            continue
        num = case.N * case.A
        used = len(np.unique(experts(case)))
        moved = jnp.dtype(dtype).itemsize * (case.N * case.D + used * case.D * case.F + num * case.F)
        flops = (2 * num * case.D * case.F, 4 * num * case.D * case.F)
        ways = {kernel: functools.partial(op, aligned=False, implementation=kernel) for kernel in names}
        if on_cpu:  # a kernel is the same in both
            ways |= {f"{kernel} aligned": functools.partial(op, aligned=True, implementation=kernel) for kernel in names}
        yield Problem(
            case=f"{name} all",
            tokens=case.N,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations=ways | {PEER: ragged_dot},
            truth=truth,
            flops=flops,
            bytes=(moved, 2 * moved),
            peer=PEER,
        )
        if on_cpu:
            continue
        row_tile = row_tile_for(num, case.E, aligned=True)
        moved = jnp.dtype(dtype).itemsize * (num * (case.D + case.F) + used * case.D * case.F)
        products = {kernel: functools.partial(grouped_matmul, row_tile=row_tile, implementation=kernel) for kernel in names}
        yield Problem(
            case=name,
            tokens=case.N,
            inputs=functools.partial(sorted_inputs, case, dtype, row_tile),
            differentiable=(0, 1),
            implementations=products | {PEER: lambda x, w, tiles, row_tile=row_tile: lax.ragged_dot(x, w, tiles * row_tile)},
            truth=functools.partial(grouped_truth, row_tile=row_tile),
            flops=flops,
            bytes=(moved, 2 * moved),
            torch={TORCH: functools.partial(torch_grouped_mm, row_tile=row_tile)} if platform() == "gpu" else {},
            peer=PEER,
            targets={"forward": TARGETS, "both": TARGETS},
        )


if __name__ == "__main__":
    main("grouped_matmul", problems)
