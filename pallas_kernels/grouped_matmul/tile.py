"""The products of one tile of rows of one group, and the sum over a token's slots."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dot_general


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], acc: jax.Array | None = None) -> jax.Array:
    """Return the fp32 product of a and b over axis axes[0] of a and axes[1] of b, added to `acc`."""
    y = dot_general(a, b, ((axes[0],), (axes[1],)))
    return y if acc is None else acc + y


def product(x: jax.Array, w: jax.Array, contract: int = 0, acc: jax.Array | None = None, dot: Callable = dot) -> jax.Array:
    """Return the fp32 product [R, F] of a tile of rows x [R, D] and their group's matrix w [D, F]; `contract` 1: of x [R, F] and w^T."""
    return dot(x, w, (1, contract), acc)


def weight_gradient(x: jax.Array, dy: jax.Array, acc: jax.Array | None = None, dot: Callable = dot) -> jax.Array:
    """Return x^T dy [D, F] of a tile of rows in fp32: its group's matrix gets the sum over the group's tiles."""
    return dot(x, dy, (0, 0), acc)


def combine(slots: Sequence[jax.Array]) -> jax.Array:
    """Return the sum of a token's slots in fp32, in their order: no product is in it that a compiler could contract with a sum."""
    return functools.reduce(jnp.add, [rows.astype(jnp.float32) for rows in slots])
