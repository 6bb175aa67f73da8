"""Times the grouped product beside `lax.ragged_dot`: `python -m pallas_kernels.grouped_matmul.bench [--json FILE] [--quick]`.

Every implementation does the whole way from tokens [N, D] to slots [N * A, F]: sorting, moving rows, multiplying, moving back.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, main
from pallas_kernels.grouped_matmul import gather_groups, group_rows, grouped_matmul, row_tile_for, scatter_groups
from pallas_kernels.grouped_matmul.cases import BENCH_CASES, experts, inputs


def op(x, w, experts, aligned: bool):
    """Return each slot's product by way of whole tiles of one expert's rows."""
    row_tile = row_tile_for(experts.size, w.shape[0], aligned=aligned)
    groups = group_rows(experts.reshape(-1), w.shape[0], row_tile)
    rows = grouped_matmul(gather_groups(x, groups, experts.shape[1]), w, groups.tiles, row_tile=row_tile)
    return scatter_groups(rows, groups)


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


IMPLEMENTATIONS = {
    "xla": functools.partial(op, aligned=False),
    "xla aligned": functools.partial(op, aligned=True),
    "peer: lax.ragged_dot": ragged_dot,
}


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark; the bytes count the matrices of the experts that have rows."""
    for name, case in BENCH_CASES.items():
        if quick and case.N > 64:
            continue
        num = case.N * case.A
        used = len(np.unique(experts(case)))
        moved = jnp.dtype(dtype).itemsize * (case.N * case.D + used * case.D * case.F + num * case.F)
        yield Problem(
            case=name,
            tokens=case.N,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations=IMPLEMENTATIONS,
            truth=truth,
            flops=(2 * num * case.D * case.F, 4 * num * case.D * case.F),
            bytes=(moved, 2 * moved),
            peer="peer: lax.ragged_dot",
        )


if __name__ == "__main__":
    main("grouped_matmul", problems)
