"""matmul: its implementations behind one signature."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.matmul import pallas_gpu, pallas_tpu, tile, xla
from pallas_kernels.matmul.xla import map_row_tiles

__all__ = ["map_row_tiles", "matmul"]

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

    The epilogue is an op that treats each row by itself, as those of `fused_layers` do: it sees N rows of y and of `rows` (arrays
    [*rows, ...]), takes `aligned` and `implementation` itself, and returns a tree of arrays [N, ...], which come back as [*rows, ...].
    Where the product is a loop over tiles of rows it is a part of the tile. Without one the result is y [*rows, F]. With `aligned` a row
    of the result has the same bits whatever rows stand beside it (numerics contract, rule 4); only the forward promises that.
    Differentiable in x, w, rows and weights.
    """
    lead = x.shape[:-1]
    x, *rows = (r.reshape(-1, *r.shape[len(lead) :]) for r in (x, *rows))
    followed = functools.partial(epilogue, aligned=aligned, implementation=implementation)
    if implementation == "auto" and not aligned:
        implementation = "xla"  # the platform's library: faster where the tile may depend on the number of rows
    how = {"aligned": aligned, "out_dtype": out_dtype or x.dtype}
    out = dispatch.call("matmul", IMPLEMENTATIONS, implementation, x, w, followed, tuple(rows), tuple(weights), **how)
    return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), out)
