"""What the Pallas implementations share: which rows are whose, and the product's gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dot_operand
from pallas_kernels.grouped_matmul import xla


def ranges(tiles: jax.Array, num_rows: int, row_tile: int) -> tuple[jax.Array, jax.Array]:
    """Return the first row of each group and the one behind its last, [E + 1]; the last entry is the rows behind all groups."""
    end = jnp.append(jnp.cumsum(tiles) * row_tile, num_rows).astype(jnp.int32)
    return jnp.append(0, end[:-1]).astype(jnp.int32), end


def listed(counts: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Return (g, i) for a list of `length` entries in which g stands counts[g] times, i counting them; behind them the last g goes on."""
    at, end = jnp.arange(length, dtype=jnp.int32), jnp.cumsum(counts)
    g = jnp.minimum((at[:, None] >= end).sum(1, dtype=jnp.int32), len(counts) - 1)
    return g, at - (end - counts)[g]


def grouped_matmul(product: Callable, weight_gradient: Callable, x, w, tiles, moves, *, row_tile):
    """See `api.grouped_matmul`; with `moves` (token [rows], destination [N, A]) the rows are those of x [N, D] that `token` names.

    product(x, w, tiles, token, contract, row_tile) multiplies rows with their groups' matrices over axis `contract` of those;
    weight_gradient(x, dy, tiles, token, row_tile) sums over each group's rows.
    """
    dtype = x.dtype
    x, w = dot_operand(x), dot_operand(w)  # on a CPU weights are held as products take them
    if x.dtype != w.dtype or x.dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"the operands are {x.dtype} and {w.dtype}, not both bfloat16 or float32")
    token, destination = moves or (None, None)

    @jax.custom_vjp
    def run(x, w, tiles, token, destination):
        del destination
        return product(x, w, tiles, token, 0, row_tile)

    def forward(x, w, tiles, token, destination):
        return run(x, w, tiles, token, destination), (x, w, tiles, token, destination)

    def backward(residuals, dy):
        x, w, tiles, token, destination = residuals
        dx = product(dy, w, tiles, None, 1, row_tile)
        dx = dx if destination is None else xla.sum_rows(dx, destination)
        return dx, weight_gradient(x, dy, tiles, token, row_tile), None, None, None

    run.defvjp(forward, backward)
    return run(x, w, tiles, token, destination).astype(dtype)
