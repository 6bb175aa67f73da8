"""The product of one tile of rows."""

import jax

from pallas_kernels.compat import dot_general

ROW_TILE = 24
"""R: rows of a tile in aligned numerics. Fewer rows are padded to it, more are looped over: a decode step pays for R rows."""


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return the fp32 product [R, F] of a tile of rows x [R, D] and w [D, F]."""
    return dot_general(x, w, ((1,), (0,)))


def itself(y: jax.Array, *, aligned: bool, implementation: str) -> jax.Array:
    """Return y: the epilogue of a product that nothing follows."""
    del aligned, implementation
    return y
