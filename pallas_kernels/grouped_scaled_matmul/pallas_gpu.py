"""The grouped FP8 products for Hopper GPUs: `grouped_matmul`'s cuts of the rows, `scaled_matmul`'s walk over groups of 128 of the sum.

FP8 `wgmma` wants both operands K-major: so they are, for the gradient of w as well. The scales of the next step are loaded a turn ahead.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tiles as tables
from pallas_kernels.compat import interpreted
from pallas_kernels.grouped_matmul import pallas
from pallas_kernels.scaled_matmul import tile
from pallas_kernels.scaled_matmul.quantized import GROUP
from pallas_kernels.triton_dot import dot, fma

_step = functools.partial(tile.step, product=lambda a, b: dot(a, b.T), multiply_add=fma)


def check(*sizes: int) -> None:
    """Raise NotImplementedError unless all sizes are whole groups."""
    for size in sizes:
        if size % GROUP:
            raise NotImplementedError(f"{size} is not a multiple of {GROUP}")


def _product_kernel(group_ref, start_ref, end_ref, *refs, size):
    *token_ref, a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref = refs
    num_groups, num_steps = b_ref.shape[0], a_scales_ref.shape[0]
    visit, column = pl.program_id(1), pl.program_id(0)
    group, start, end = group_ref[visit], start_ref[visit], end_ref[visit]
    here = start + jnp.arange(size.rows) < end  # what stands in other rows does not matter: they are not stored
    rows, columns = pl.ds(start, size.rows), pl.ds(column * size.columns, size.columns)
    wide = lambda x, axis: jnp.broadcast_to(jnp.expand_dims(x, axis), (size.rows, GROUP))
    row, exists = cast(Any, rows), here
    if token_ref:
        row = triton.load(token_ref[0].at[rows], mask=here, other=a_ref.shape[0])
        exists = row < a_ref.shape[0]

    def scales(step):
        at = (jnp.broadcast_to(step, here.shape), row) if token_ref else (step, row)
        return triton.load(a_scales_ref.at[at], mask=exists, other=0.0)[:, None], b_scales_ref[group, step, column]

    def turn(step, carry):
        acc, now = carry
        following = scales(jnp.minimum(step + 1, num_steps - 1))
        depth = pl.ds(step * GROUP, GROUP)
        at = (wide(row, 1), wide(depth.start + jnp.arange(GROUP), 0)) if token_ref else (row, depth)
        a = triton.load(a_ref.at[at], mask=wide(exists, 1), other=0.0 if token_ref else None)
        return _step(acc, a, b_ref[group, columns, depth], *now), following

    def store(y):
        triton.store(out_ref.at[rows, columns], y.astype(out_ref.dtype), mask=jnp.broadcast_to(here[:, None], y.shape))

    zeros = jnp.zeros((size.rows, size.columns), jnp.float32)

    @pl.when(group < num_groups)
    def _of_a_group():
        store(lax.fori_loop(0, num_steps, turn, (zeros, scales(jnp.int32(0))))[0])

    @pl.when(group == num_groups)
    def _of_none():
        store(zeros)


def product(a, b, tiles, moves, *, row_tile, out_dtype):
    """See `api.grouped_scaled_matmul`; with `moves` (token [rows], destination) rows are loaded from where their tokens' are."""
    depth, columns = a.values.shape[1], b.values.shape[1]
    token = [] if moves is None else [moves[0]]
    num_rows = token[0].shape[0] if token else a.values.shape[0]
    check(depth, columns)
    size = tables.of(tables.SCALED_MATMUL_GPU)
    group, start, end = pallas.cuts(tiles, num_rows, row_tile, size.rows)
    out = jax.ShapeDtypeStruct((num_rows, columns), out_dtype)
    return pl.pallas_call(
        functools.partial(_product_kernel, size=size),
        name="grouped_scaled_matmul" if moves is None else "grouped_scaled_gathered",
        grid=(columns // size.columns, group.shape[0]),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        cost_estimate=cost((*a, *b, out), num_rows * depth * columns),
        interpret=interpreted("gpu"),
    )(group, start, end, *token, *a, *b)


def _gradient_kernel(first_ref, last_ref, x_ref, x_scales_ref, dy_ref, dy_scales_ref, out_ref, *, size):
    group, num_steps = pl.program_id(2), x_scales_ref.shape[0]
    first, last = first_ref[group], last_ref[group]
    across, columns = (pl.ds(pl.program_id(i) * n, n) for i, n in ((1, size.rows), (0, size.columns)))
    begin = lax.div(first, jnp.int32(GROUP))

    def scales(step):
        return x_scales_ref[step, across][:, None], dy_scales_ref[step, columns][None]

    def turn(step, carry):
        acc, now = carry
        following = scales(jnp.minimum(step + 1, num_steps - 1))
        row = step * GROUP + jnp.arange(GROUP)
        own = ((row >= first) & (row < last))[None]
        load = lambda ref, at: triton.load(ref.at[at, pl.ds(step * GROUP, GROUP)], mask=jnp.broadcast_to(own, (at.size, GROUP)), other=0.0)
        return _step(acc, load(x_ref, across), load(dy_ref, columns), *now), following

    carry = jnp.zeros((size.rows, size.columns), jnp.float32), scales(jnp.minimum(begin, num_steps - 1))
    # A group without rows begins behind its end, or at it.
    total, _ = lax.fori_loop(begin, jnp.where(last > first, lax.div(last + GROUP - 1, jnp.int32(GROUP)), begin), turn, carry)
    out_ref[group, across, columns] = total.astype(out_ref.dtype)


def weight_gradient(x, dy, tiles, *, row_tile, out_dtype):
    """See `api.grouped_weight_gradient`."""
    (terms, num_rows), columns = x.values.shape, dy.values.shape[0]
    check(terms, columns)
    size = tables.of(tables.SCALED_MATMUL_GPU)
    out = jax.ShapeDtypeStruct((tiles.shape[0], terms, columns), out_dtype)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, size=size),
        name="grouped_scaled_dw",
        grid=(columns // size.columns, terms // size.rows, tiles.shape[0]),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        cost_estimate=cost((*x, *dy, out), num_rows * terms * columns),
        interpret=interpreted("gpu"),
    )(*(end[:-1] for end in pallas.ranges(tiles, num_rows, row_tile)), *x, *dy)


def cost(arrays, products: int) -> pl.CostEstimate:
    """Return what a product computes and moves at least."""
    return pl.CostEstimate(flops=2 * products, bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays), transcendentals=0)
