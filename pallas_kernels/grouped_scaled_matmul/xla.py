"""The grouped FP8 products in plain JAX: over the groups that have rows, then over their tiles, on upcast values, which are exact."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_operand
from pallas_kernels.grouped_matmul.xla import for_each_group, take_rows
from pallas_kernels.scaled_matmul import tile
from pallas_kernels.scaled_matmul.quantized import GROUP, Quantized, moved_rows


def _groups(values: jax.Array) -> jax.Array:
    """[R, K] -> [K / 128, R, 128], upcast."""
    values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % GROUP)))
    return tile.upcast(jnp.moveaxis(values.reshape(values.shape[0], -1, GROUP), 1, 0))


def gathered(a: Quantized, moves: tuple[jax.Array, jax.Array] | None) -> Quantized:
    """Return the rows of a product: with `moves` (see `grouped_matmul.moves_of`) those of the tokens a."""
    return a if moves is None else moved_rows(a, lambda x: take_rows(x, *moves))


def product(a, b, tiles, moves, *, row_tile, out_dtype):
    """See `api.grouped_scaled_matmul`; `moves` as in `gathered`."""
    a = gathered(a, moves)
    columns = b.values.shape[1]

    def group(index, first, end, out):
        matrix = Quantized(*(lax.dynamic_index_in_dim(x, index, keepdims=False) for x in b))
        steps = _groups(matrix.values), tile.column_scales(matrix)[:, None]

        def one(t, out):
            values = lax.dynamic_slice_in_dim(a.values, t * row_tile, row_tile)
            scales = lax.dynamic_slice_in_dim(a.scales, t * row_tile, row_tile, axis=1)
            turn = lambda acc, step: (tile.step(acc, step[0], step[2], step[1], step[3]), None)
            acc = jnp.zeros((row_tile, columns), jnp.float32)
            y = lax.scan(turn, acc, (_groups(values), scales[..., None], *steps))[0]
            return lax.dynamic_update_slice_in_dim(out, dot_operand(y.astype(out_dtype)), t * row_tile, 0)

        return lax.fori_loop(first, end, one, out)

    return for_each_group(tiles, group, dot_operand(jnp.zeros((a.values.shape[0], columns), out_dtype))).astype(out_dtype)


def weight_gradient(x, dy, tiles, *, row_tile, out_dtype):
    """See `api.grouped_weight_gradient`: a step is a group of 128 rows, those of other groups masked."""
    x_steps, dy_steps = _groups(x.values), _groups(dy.values)
    out = jnp.zeros((tiles.shape[0], x.values.shape[0], dy.values.shape[0]), out_dtype)

    def group(index, first, end, out):
        def one(i, acc):
            row = i * GROUP + jnp.arange(GROUP)
            own = (row >= first * row_tile) & (row < end * row_tile)
            return tile.step(acc, jnp.where(own, x_steps[i], 0), jnp.where(own, dy_steps[i], 0), x.scales[i][:, None], dy.scales[i][None])

        acc = lax.fori_loop(first * row_tile // GROUP, -(-end * row_tile // GROUP), one, jnp.zeros(out.shape[1:], jnp.float32))
        return lax.dynamic_update_index_in_dim(out, acc.astype(out_dtype), index, 0)

    return for_each_group(tiles, group, out)
