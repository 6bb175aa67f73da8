"""The grouped product for TPUs: blocks of rows at fixed places; a block that holds several groups' rows is visited once for each.

A list of visits (group, block) in the order of the rows is known before the kernel runs and names the blocks that a step wants: a matrix
stays in VMEM through the consecutive visits of its group, a block of rows through those of its groups. Visits that have nothing to
compute name the blocks of the last one that had, so nothing moves.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles as tables
from pallas_kernels.compat import interpreted
from pallas_kernels.grouped_matmul import pallas, tile, xla

_LANES = 128


def is_new(ref, visit) -> jax.Array:
    """Return whether the block that a list names is another one than that of the visit before."""
    return (visit == 0) | (ref[visit] != ref[jnp.maximum(visit - 1, 0)])


def is_over(ref, visit, num) -> jax.Array:
    """Return whether this is the last of `num` visits, or the block that a list names is another one than that of the next."""
    return (visit == num - 1) | (ref[visit] != ref[jnp.minimum(visit + 1, num - 1)])


def own(visits: pallas.Visits, visit, shape: tuple[int, ...], rows_at: int = 0) -> jax.Array:
    """Return which entries of a block of rows, which stand along axis `rows_at`, are the group's."""
    row = visits.source[visit] * shape[rows_at] + jax.lax.broadcasted_iota(jnp.int32, shape, rows_at)
    return (row >= visits.first[visit]) & (row < visits.last[visit])


def _product_kernel(*refs, contract):
    visits, (x_ref, w_ref, out_ref) = pallas.Visits(*refs[:5]), refs[5:]
    visit = pl.program_id(1)
    opens, has_rows = is_new(visits.target, visit), visits.first[visit] < visits.last[visit]

    @pl.when(has_rows)
    def _multiply():
        y = tile.product(x_ref[...], w_ref[0], contract)
        others = jnp.where(opens, 0.0, out_ref[...].astype(jnp.float32))
        out_ref[...] = jnp.where(own(visits, visit, y.shape), y, others).astype(out_ref.dtype)

    @pl.when(opens & ~has_rows)
    def _clear():
        out_ref[...] = jnp.zeros_like(out_ref)


def divided(length: int, most: int) -> int:
    """Return the whole lanes of a block at most `most` wide: as few blocks as then are needed, of about one width."""
    blocks = pl.cdiv(length, most)
    return min(length, pl.cdiv(length, blocks * _LANES) * _LANES)


def product(x, w, tiles, token, contract, row_tile):
    """Return each row times its group's matrix, contracting axis `contract` of that; the tile depends on the matrices alone."""
    del token
    (num_rows, terms), num_columns = x.shape, w.shape[2 - contract]
    size = tables.of(tables.GROUPED_TPU)
    width = min(size.columns, size.resident // (2 * terms * w.dtype.itemsize) // _LANES * _LANES)
    if not width:
        raise NotImplementedError(f"{_LANES} columns of {terms} terms do not fit in VMEM twice")
    width = divided(num_columns, width)
    visits = pallas.visits(tiles, num_rows, row_tile, size.rows, False)
    at = lambda f: lambda n, v, *refs: f(n, v, pallas.Visits(*refs))
    w_shape, w_index = (
        ((1, width, terms), lambda n, v, of: (of.group[v], n, 0))
        if contract
        else (
            (1, terms, width),
            lambda n, v, of: (of.group[v], 0, n),
        )
    )
    out = jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype)
    return pl.pallas_call(
        functools.partial(_product_kernel, contract=contract),
        name="grouped_matmul_" + ("dx" if contract else "forward"),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(num_columns, width), visits.group.shape[0]),
            in_specs=[pl.BlockSpec((size.rows, terms), at(lambda n, v, of: (of.source[v], 0))), pl.BlockSpec(w_shape, at(w_index))],
            out_specs=pl.BlockSpec((size.rows, width), at(lambda n, v, of: (of.target[v], n))),
        ),
        out_shape=out,
        compiler_params=params(("parallel", "arbitrary"), size.vmem),
        cost_estimate=_cost((x, w, out), num_rows * terms * num_columns),
        interpret=interpreted("tpu"),
    )(*visits, x, w)


def _gradient_kernel(*refs):
    visits, (x_ref, dy_ref, out_ref, total_ref) = pallas.Visits(*refs[:5]), refs[5:]
    visit = pl.program_id(2)

    @pl.when(is_new(visits.group, visit))
    def _clear():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(visits.first[visit] < visits.last[visit])
    def _add():
        # Behind the last row a block may hold anything, also NaN: both sides are masked.
        x, dy = (jnp.where(own(visits, visit, ref.shape), ref[...].astype(jnp.float32), 0.0).astype(ref.dtype) for ref in (x_ref, dy_ref))
        total_ref[...] = tile.weight_gradient(x, dy, total_ref[...])

    @pl.when(is_over(visits.group, visit, pl.num_programs(2)))
    def _write():
        out_ref[0] = total_ref[...].astype(out_ref.dtype)


def weight_gradient(x, dy, tiles, tokens, row_tile):
    """Return the sum of x^T dy over each group's rows [E, D, F], zeros for a group without rows."""
    del tokens
    (num_rows, terms), num_columns = x.shape, dy.shape[1]
    size = tables.of(tables.GROUPED_TPU)
    height, width = divided(terms, size.gradient), divided(num_columns, size.gradient)
    visits = pallas.visits(tiles, num_rows, row_tile, size.rows, True)
    at = lambda f: lambda m, n, v, *refs: f(m, n, v, pallas.Visits(*refs))
    out = jax.ShapeDtypeStruct((tiles.shape[0], terms, num_columns), x.dtype)
    return pl.pallas_call(
        _gradient_kernel,
        name="grouped_matmul_dw",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(terms, height), pl.cdiv(num_columns, width), visits.group.shape[0]),
            in_specs=[
                pl.BlockSpec((size.rows, height), at(lambda m, n, v, of: (of.source[v], m))),
                pl.BlockSpec((size.rows, width), at(lambda m, n, v, of: (of.source[v], n))),
            ],
            out_specs=pl.BlockSpec((1, height, width), at(lambda m, n, v, of: (of.group[v], m, n))),
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        ),
        out_shape=out,
        compiler_params=params(("parallel", "parallel", "arbitrary"), size.vmem),
        cost_estimate=_cost((x, dy, out), num_rows * terms * num_columns),
        interpret=interpreted("tpu"),
    )(*visits, x, dy)


def params(semantics: tuple[str, ...], vmem: int) -> pltpu.CompilerParams:
    """Return the compiler's parameters of a kernel with these grid axes."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem, disable_bounds_checks=True)  # pyright: ignore


def _cost(arrays, products: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=2 * products, bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays), transcendentals=0)


def grouped_matmul(x, w, tiles, moves, *, row_tile):
    """See `api.grouped_matmul`. Rows are gathered before the kernel: a TPU moves single rows of a tiled array slowly."""
    x = x if moves is None else xla.take_rows(x, *moves)
    return pallas.grouped_matmul(product, weight_gradient, x, w, tiles, None, row_tile=row_tile)
