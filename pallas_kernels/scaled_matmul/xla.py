"""The scaled product in plain JAX: a scan over groups of K on upcast tiles, in which e4m3 values and their products are exact."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pin
from pallas_kernels.matmul import map_row_tiles
from pallas_kernels.scaled_matmul import tile
from pallas_kernels.scaled_matmul.quantized import GROUP


def _groups(x: jax.Array) -> jax.Array:
    """[R, K] -> [K / 128, R, 128], upcast."""
    rows, depth = x.shape
    x = jnp.pad(x, ((0, 0), (0, -depth % GROUP)))
    return tile.upcast(jnp.moveaxis(x.reshape(rows, -1, GROUP), 1, 0))


def scaled_matmul(a, b, *, out_dtype, aligned):
    """See `api.scaled_matmul`; aligned, the product is a loop over the row-tiled product's tiles of rows."""
    columns = b.values.shape[0]
    b_groups, b_scales = pin((_groups(b.values), tile.column_scales(b)[:, None]), aligned)

    def rows(values, scales):
        def turn(acc, group):
            a, a_scales, b, b_scales = group
            return tile.step(acc, a, b, a_scales, b_scales), None

        acc = jnp.zeros((values.shape[0], columns), jnp.float32)
        return lax.scan(turn, acc, (_groups(values), scales.T[..., None], b_groups, b_scales))[0].astype(out_dtype)

    return map_row_tiles(rows, a.values, a.scales.T) if aligned else rows(a.values, a.scales.T)
