"""Times the grouped product beside `lax.ragged_dot`: `python -m pallas_kernels.grouped_matmul.bench [--json FILE] [--quick]`.

"all" is the whole way from tokens [N, D] to slots [N * A, F]: sorting, moving rows, multiplying, moving back; torch has no part in it.
"experts" is what a model calls: that way, SwiGLU, the product behind it, and the weighted sum of a token's slots. The others are the
product alone, of rows that are sorted already.
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
from pallas_kernels.grouped_matmul import (
    combine_groups,
    gather_grouped_matmul,
    gather_groups,
    group_rows,
    grouped_matmul,
    grouped_mlp,
    row_tile_for,
)
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
    """Return the reference's products."""
    return by_expert(jnp.repeat(x, experts.shape[1], 0), w, experts.reshape(-1))


def by_expert(rows, w, flat):
    """Return the reference's products of rows, one expert at a time: it would pick a matrix for every row at once."""
    add = lambda total, e: (total + jnp.where((flat == e)[:, None], rows, 0) @ w[e], None)
    return lax.scan(jax.checkpoint(add), jnp.zeros((len(flat), w.shape[2]), rows.dtype), jnp.arange(w.shape[0]))[0]


def experts_op(x, w_in, w_out, weights, experts, aligned: bool, implementation: str):
    """Return each token's weighted sum of its experts."""
    how = {"row_tile": row_tile_for(experts.size, w_in.shape[0], aligned=aligned), "aligned": aligned, "implementation": implementation}
    return grouped_mlp(x, w_in, w_out, group_rows(experts.reshape(-1), w_in.shape[0], how["row_tile"]), weights, **how)


def _swiglu(gate_up, dtype):
    gate, up = jnp.split(gate_up.astype(jnp.promote_types(dtype, jnp.float32)), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def ragged_experts(x, w_in, w_out, weights, experts):
    """Return the same by rows sorted by expert, and the weights at the sum."""
    flat = experts.reshape(-1)
    order, sizes = jnp.argsort(flat, stable=True), jnp.bincount(flat, length=w_in.shape[0])
    hidden = _swiglu(lax.ragged_dot(x[order // experts.shape[1]], w_in, sizes), x.dtype)
    slots = lax.ragged_dot(hidden, w_out, sizes)[jnp.argsort(order)].reshape(*experts.shape, -1)
    return (slots.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)


def torch_experts(x, w_in, w_out, weights, experts):
    """Return the same by torch."""
    import torch  # pyright: ignore[reportMissingImports]

    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.cumsum(torch.bincount(flat, minlength=w_in.shape[0]), 0).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // experts.shape[1]], w_in, offs=ends).float().chunk(2, dim=-1)
    slots = torch._grouped_mm((torch.nn.functional.silu(gate) * up).to(x.dtype), w_out, offs=ends)
    slots = slots[torch.argsort(order)].reshape(*experts.shape, -1)
    return (slots.float() * weights[..., None]).sum(1).to(x.dtype)


def experts_truth(x, w_in, w_out, weights, experts):
    """Return the same by the reference's products."""
    hidden = _swiglu(truth(x, w_in, experts), x.dtype)
    return (by_expert(hidden, w_out, experts.reshape(-1)).reshape(*experts.shape, -1) * weights[..., None]).sum(1)


def experts_inputs(case: Case, dtype: DTypeLike) -> tuple[jax.Array, ...]:
    """Return x [N, D], both matrices of each expert, [E, D, F] with gate and up in it and [E, F / 2, D], weights and experts [N, A]."""
    x, w_in, chosen = inputs(case, dtype)
    rng = np.random.default_rng(1)
    w_out = jnp.asarray(rng.standard_normal((case.E, case.F // 2, case.D)) * (case.F / 2) ** -0.5, dtype)
    return x, w_in, w_out, jnp.asarray(rng.random((case.N, case.A)) / case.A, jnp.float32), chosen


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
        if case.N <= 1024 if on_cpu else "gate_up" in name:  # ragged_dot takes a CPU many seconds
            ours = {
                label: functools.partial(experts_op, aligned=label.endswith("aligned"), implementation=label.split()[0]) for label in ways
            }
            sizes = jnp.dtype(dtype).itemsize * (2 * case.N * case.D + used * 3 * case.D * case.F // 2)
            yield Problem(
                case=f"{name} experts",
                tokens=case.N,
                inputs=functools.partial(experts_inputs, case, dtype),
                differentiable=(0, 1, 2, 3),
                implementations=ours | {PEER: ragged_experts},
                truth=experts_truth,
                flops=(3 * num * case.D * case.F, 6 * num * case.D * case.F),
                bytes=(sizes, 2 * sizes),
                torch={TORCH: torch_experts} if platform() == "gpu" else {},
                peer=PEER,
                targets={} if on_cpu else {"forward": TARGETS, "both": TARGETS},
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
