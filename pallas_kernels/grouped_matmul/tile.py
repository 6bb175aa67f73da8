"""The product of one tile of rows of one group."""

import jax

from pallas_kernels.compat import dot_general

EXPERT_TILE = 12
"""Rows of a tile in aligned numerics, whatever the load; a decode step pays for this many a chosen expert."""
SMALL_TILE, LARGEST_TILE = 8, 256
"""Rows of a tile in fast numerics, at most, at low and at high load."""


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return the fp32 product [R, F] of a tile of rows x [R, D] and their group's matrix w [D, F]."""
    return dot_general(x, w, ((1,), (0,)))
