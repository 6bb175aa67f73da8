"""Softmax attention of a tile of query rows over one block of keys (online softmax, arXiv 2205.14135).

A block that is wholly masked for a row changes nothing in it: weight 0, rescale 1. So the bits depend on the order of the blocks alone.
Scores are in units of log 2 and the running maximum is rounded up to an integer: the rescale is a power of two and its products are exact,
so that it makes no difference whether a compiler contracts them with the additions that follow.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_cast, dot_operand, dot_precision

MASKED = -1e30
"""Score of a masked key: finite, so that a row that has seen no key yet needs no special case."""


class Softmax(NamedTuple):
    """Running softmax of a tile of rows: maximum m (an integer) and sum l [B, G, R], unnormalised output [B, G, R, V], all fp32."""

    maximum: jax.Array
    total: jax.Array
    out: jax.Array


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum of two operands (see `compat.dot_operand`, `compat.dot_cast`), accumulated and returned in fp32."""
    precision = dot_precision(a.dtype)
    return jnp.einsum(equation, dot_operand(a), dot_operand(b), precision=precision, preferred_element_type=jnp.float32)


def empty(q: jax.Array, value_size: int) -> Softmax:
    """Return the softmax of rows q [B, G, R, K] that have seen no key."""
    shape = q.shape[:-1]
    return Softmax(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, value_size)))


def scores(q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
    """Return the masked scores [B, G, R, S], in units of log 2, of rows q [B, G, R, K] and keys k [B, S, G, K]; seen [B, 1, R, S]."""
    return jnp.where(seen, math.log2(math.e) * q.shape[-1] ** -0.5 * product("bgrk,bsgk->bgrs", q, k), MASKED)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Return 2**exponent, exactly, for integers <= 0; what would be subnormal is 0."""
    return lax.bitcast_convert_type((jnp.maximum(exponent, -127).astype(jnp.int32) + 127) << 23, jnp.float32)


def row_sum(x: jax.Array) -> jax.Array:
    """Return the sum over the last axis, a power of two long, in an order that no compiler chooses."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def add_block(softmax: Softmax, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> Softmax:
    """Return the softmax after one more block of keys k [B, S, G, K] and values v [B, S, G, V]."""
    x = scores(q, k, seen)
    maximum = jnp.maximum(softmax.maximum, jnp.ceil(x.max(-1)))
    weights = jnp.where(seen, jnp.exp2(x - maximum[..., None]), 0.0)
    rescale = power_of_two(softmax.maximum - maximum)
    out = rescale[..., None] * softmax.out + product("bgrs,bsgv->bgrv", dot_cast(weights, v.dtype), v)
    return Softmax(maximum, rescale * softmax.total + row_sum(weights), out)


def finish(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """Return the output rows [B, G, R, V] and the log-sum-exp of their scores [B, G, R], in units of log 2; 0 and 0 without a key."""
    some = softmax.total > 0
    total = jnp.where(some, softmax.total, 1.0)
    return softmax.out / total[..., None], jnp.where(some, softmax.maximum + jnp.log2(total), 0.0)
