"""matmul: its implementations behind one signature."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.matmul import pallas_gpu, pallas_tpu, tile, xla
from pallas_kernels.matmul.xla import map_row_tiles

__all__ = ["map_row_tiles", "matmul", "row_tiled"]

IMPLEMENTATIONS = {"xla": xla.matmul, "pallas_tpu": pallas_tpu.matmul, "pallas_gpu": pallas_gpu.matmul}


def matmul(
    x: Float[Array, "*rows D"],
    w: Float[Array, "D F"],
    epilogue: Callable = tile.itself,
    rows: Sequence[jax.Array] = (),
    weights: Sequence[jax.Array] = (),
    *,
    aligned: bool = False,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Any:
    """Return epilogue(y, *rows, *weights) for y = x @ w [N, F], accumulated in fp32, cast once to `out_dtype` (default: that of x).

    The epilogue treats each row by itself; it sees N rows of y and of `rows` (arrays [*rows, ...]) and returns a tree of arrays [N, ...],
    which come back as [*rows, ...]. Without one the result is y [*rows, F]. With `aligned` a row of the result has the same bits
    whatever rows stand beside it (numerics contract, rule 4); only the forward promises that. Differentiable in x, w, rows and weights.
    """
    lead = x.shape[:-1]
    x, *rows = (r.reshape(-1, *r.shape[len(lead) :]) for r in (x, *rows))
    if implementation == "auto" and not aligned:
        implementation = "xla"  # the platform's library: faster where the tile may depend on the number of rows
    how = {"aligned": aligned, "out_dtype": out_dtype or x.dtype}
    out = dispatch.call("matmul", IMPLEMENTATIONS, implementation, x, w, epilogue, tuple(rows), tuple(weights), **how)
    return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), out)


def row_tiled(f: Callable, rows: Sequence[jax.Array], weights: Sequence[jax.Array] = ()) -> Any:
    """Return f(*rows, *weights) for an f that treats each row by itself, computed tile by tile.

    So norms, gates and the router's choice, too, do not depend on how many rows stand beside a row: their reductions and fused
    multiply-adds are compiled once, for one shape. Differentiable in rows [N, ...] and weights; the gradient is that of f on all rows.
    """
    return xla.row_tiled(f, rows, weights)
