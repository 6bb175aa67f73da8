"""The product of one tile of rows."""

import jax

from pallas_kernels.compat import dot_general

ROW_TILE = 16
"""R: rows of a product's tile in aligned numerics. Fewer rows are padded to it, more are looped over: a decode step pays for R rows."""
LIGHT_TILE = 64
"""Rows of a tile of the light work between products (norms, gates, rotary embedding), where a turn of the loop costs more than rows."""


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return the fp32 product [R, F] of a tile of rows x [R, D] and w [D, F]."""
    return dot_general(x, w, ((1,), (0,)))
