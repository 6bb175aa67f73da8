"""The grouped FP8 products for TPUs: `grouped_matmul`'s visits of blocks of rows, values upcast in the kernel before tpu7x."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles as tables
from pallas_kernels.compat import interpreted
from pallas_kernels.grouped_matmul import pallas
from pallas_kernels.grouped_matmul.pallas_tpu import divided, is_new, is_over, own, params
from pallas_kernels.grouped_scaled_matmul.pallas_gpu import check, cost
from pallas_kernels.grouped_scaled_matmul.xla import gathered
from pallas_kernels.scaled_matmul import tile
from pallas_kernels.scaled_matmul.quantized import GROUP


def _product_kernel(*refs):
    visits, (a_ref, a_scales_ref, b_ref, b_scales_ref, out_ref, acc_ref) = pallas.Visits(*refs[:5]), refs[5:]
    visit = pl.program_id(1)
    opens, has_rows = is_new(visits.target, visit), visits.first[visit] < visits.last[visit]

    @pl.when(has_rows)
    def _multiply():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for group in range(a_scales_ref.shape[0]):
            depth = slice(group * GROUP, (group + 1) * GROUP)
            a, b = tile.upcast(a_ref[:, depth]), tile.upcast(b_ref[0, :, depth])
            acc_ref[...] = tile.step(acc_ref[...], a, b, a_scales_ref[group, 0][:, None], b_scales_ref[0, group])
        others = jnp.where(opens, 0.0, out_ref[...].astype(jnp.float32))
        out_ref[...] = jnp.where(own(visits, visit, acc_ref.shape), acc_ref[...], others).astype(out_ref.dtype)

    @pl.when(opens & ~has_rows)
    def _clear():
        out_ref[...] = jnp.zeros_like(out_ref)


def product(a, b, tiles, moves, *, row_tile, out_dtype):
    """See `api.grouped_scaled_matmul`; `moves` as in `xla.gathered`: single rows of a tiled array are slow to move."""
    a = gathered(a, moves)
    (num_rows, depth), columns = a.values.shape, b.values.shape[1]
    check(depth, columns)
    size, groups = tables.of(tables.GROUPED_SCALED_TPU), depth // GROUP
    width = divided(columns, size.columns)
    visits = pallas.visits(tiles, num_rows, row_tile, size.rows, False)
    at = lambda f: lambda n, v, *refs: f(n, v, pallas.Visits(*refs))
    b_scales = jnp.repeat(b.scales, GROUP, axis=2)[:, :, None]  # [E, K / 128, 1, N]
    out = jax.ShapeDtypeStruct((num_rows, columns), out_dtype)
    return pl.pallas_call(
        _product_kernel,
        name="grouped_scaled_matmul",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(columns, width), visits.group.shape[0]),
            in_specs=[
                pl.BlockSpec((size.rows, depth), at(lambda n, v, of: (of.source[v], 0))),
                pl.BlockSpec((groups, 1, size.rows), at(lambda n, v, of: (0, 0, of.source[v]))),
                pl.BlockSpec((1, width, depth), at(lambda n, v, of: (of.group[v], n, 0))),
                pl.BlockSpec((1, groups, 1, width), at(lambda n, v, of: (of.group[v], 0, 0, n))),
            ],
            out_specs=pl.BlockSpec((size.rows, width), at(lambda n, v, of: (of.target[v], n))),
            scratch_shapes=[pltpu.VMEM((size.rows, width), jnp.float32)],
        ),
        out_shape=out,
        compiler_params=params(("parallel", "arbitrary"), size.vmem),
        cost_estimate=cost((*a, *b, out), num_rows * depth * columns),
        interpret=interpreted("tpu"),
    )(*visits, a.values, a.scales[:, None], b.values, b_scales)


def _gradient_kernel(*refs):
    visits, (x_ref, x_scales_ref, dy_ref, dy_scales_ref, out_ref, acc_ref) = pallas.Visits(*refs[:5]), refs[5:]
    visit = pl.program_id(2)

    @pl.when(is_new(visits.group, visit))
    def _clear():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(visits.first[visit] < visits.last[visit])
    def _add():
        x, dy = (_own_rows(visits, visit, ref) for ref in (x_ref, dy_ref))
        acc_ref[...] = tile.step(acc_ref[...], x, dy, x_scales_ref[0, 0][:, None], dy_scales_ref[0])

    @pl.when(is_over(visits.group, visit, pl.num_programs(2)))
    def _write():
        out_ref[0] = acc_ref[...].astype(out_ref.dtype)


def _own_rows(visits: pallas.Visits, visit, ref) -> jax.Array:
    """A block of columns [D, 128 rows], upcast, zeros in other groups' rows and behind the last one."""
    x = tile.upcast(ref[...])
    return jnp.where(own(visits, visit, x.shape, rows_at=1), x.astype(jnp.float32), 0.0).astype(x.dtype)


def weight_gradient(x, dy, tiles, *, row_tile, out_dtype):
    """See `api.grouped_weight_gradient`."""
    (terms, num_rows), columns = x.values.shape, dy.values.shape[0]
    check(terms, columns)
    size = tables.of(tables.GROUPED_SCALED_TPU)
    height, width = divided(terms, size.gradient), divided(columns, size.gradient)
    visits = pallas.visits(tiles, num_rows, row_tile, GROUP, True)
    at = lambda f: lambda m, n, v, *refs: f(m, n, v, pallas.Visits(*refs))
    out = jax.ShapeDtypeStruct((tiles.shape[0], terms, columns), out_dtype)
    return pl.pallas_call(
        _gradient_kernel,
        name="grouped_scaled_dw",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(terms, height), pl.cdiv(columns, width), visits.group.shape[0]),
            in_specs=[
                pl.BlockSpec((height, GROUP), at(lambda m, n, v, of: (m, of.source[v]))),
                pl.BlockSpec((1, 1, height), at(lambda m, n, v, of: (of.source[v], 0, m))),
                pl.BlockSpec((width, GROUP), at(lambda m, n, v, of: (n, of.source[v]))),
                pl.BlockSpec((1, 1, width), at(lambda m, n, v, of: (of.source[v], 0, n))),
            ],
            out_specs=pl.BlockSpec((1, height, width), at(lambda m, n, v, of: (of.group[v], m, n))),
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        ),
        out_shape=out,
        compiler_params=params(("parallel", "parallel", "arbitrary"), size.vmem),
        cost_estimate=cost((*x, *dy, out), num_rows * terms * columns),
        interpret=interpreted("tpu"),
    )(*visits, x.values, x.scales[:, None], dy.values, dy.scales[:, None])
