"""Softmax attention of a tile of query rows over one block of keys (online softmax, arXiv 2205.14135), and its gradient.

A block that is wholly masked for a row changes nothing in it: weight 0, rescale 1. So the bits depend on the order of the blocks alone.
Scores are in units of log 2 and the running maximum is rounded up to an integer: the rescale is a power of two and its products are exact,
so that it makes no difference whether a compiler contracts them with the additions that follow.

Rows are pairs of a position and a query head of one key head, in any order: `xla` and the kernels lay them out as suits them. Arrays may
have any equal axes in front ([..., R, K]); each statement does all of them before the next one. `Words` are what a backend says its own
way; the mathematics does not depend on them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import GRID
from pallas_kernels.compat import dot_cast, dot_general

KEY_BLOCK = GRID
MASKED = -3e38
"""Score of a masked key: its weight is an exact 0 for every maximum a row can have, also for that of a row without a key yet."""
UNSEEN = -1e30
"""Maximum of a row that has seen no key: an integer as the others are."""


class Softmax(NamedTuple):
    """Running softmax of a tile of rows: maximum m (an integer) and sum l [..., R], unnormalised output [..., R, V], all fp32."""

    maximum: jax.Array
    total: jax.Array
    out: jax.Array


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0), acc: jax.Array | None = None) -> jax.Array:
    """Return the product of matrices [..., M, N] over axis axes[0] of a and axes[1] of b, added to `acc`, in fp32."""
    lead = a.ndim - 2
    batch = tuple(range(lead))
    y = dot_general(a, b, ((lead + axes[0],), (lead + axes[1],)), (batch, batch))
    return y if acc is None else acc + y


def row_sum(x: jax.Array) -> jax.Array:
    """Return the sum over the last axis, a power of two long, in an order that no compiler chooses."""
    assert x.shape[-1] & (x.shape[-1] - 1) == 0, x.shape
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


class Words(NamedTuple):
    """How a backend takes a product, the largest value and the sum of each row, lays a number a row beside an array, and takes 2**x."""

    dot: Callable = product
    largest: Callable = lambda x: x.max(-1)
    total: Callable = row_sum
    spread: Callable = lambda x, beside: x[..., None]
    exp2: Callable = jnp.exp2


PLAIN = Words()


def block_range(start: jax.Array, stop: jax.Array, *, size: int = KEY_BLOCK) -> tuple[jax.Array, jax.Array]:
    """Return the first and one past the last block of keys that any of the rows sees whose bounds stand on the last axis."""
    none = stop <= start
    first = jnp.where(none, jnp.iinfo(jnp.int32).max, start).min(-1)
    last = jnp.where(none, 0, stop).max(-1) + (size - 1)
    return lax.div(first, jnp.int32(size)), lax.div(last, jnp.int32(size))


def seen(start: jax.Array, stop: jax.Array, first: jax.Array, axis: int = 1, size: int = KEY_BLOCK) -> jax.Array:
    """Return which keys of a block that begins with key `first` the rows see; the keys are on `axis`.

    The bounds are columns [..., R, 1], or as wide as the scores, or rows [..., 1, R] for axis 0.
    """
    key = lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)
    if start.shape[axis - 2] == size:  # bounds as wide as the scores
        return (key + first >= start) & (key + first < stop)
    return (key >= start - first) & (key < stop - first)


def empty(rows: tuple[int, ...], value_size: int) -> Softmax:
    """Return the softmax of rows [..., R] that have seen no key."""
    return Softmax(jnp.full(rows, UNSEEN), jnp.zeros(rows), jnp.zeros((*rows, value_size)))


def scores(q: jax.Array, k: jax.Array, seen: jax.Array, dot: Callable = product) -> jax.Array:
    """Return the masked scores [..., R, S], in units of log 2, of rows q [..., R, K] and keys k [..., S, K].

    With keys and queries in each other's place, and `seen` so, it is the transpose.
    """
    return jnp.where(seen, math.log2(math.e) * q.shape[-1] ** -0.5 * dot(q, k, (1, 1)), MASKED)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Return 2**exponent, exactly, for integers <= 0; what would be subnormal is 0."""
    biased = jnp.maximum(exponent, -127.0) + (127.0 + 2.0**23)  # its last bits are those of exponent + 127
    return lax.bitcast_convert_type(lax.bitcast_convert_type(biased, jnp.int32) << 23, jnp.float32)


def add_block(softmax: Softmax, scores: jax.Array, v: jax.Array, words: Words = PLAIN) -> Softmax:
    """Return the softmax after one more block of keys, with these scores [..., R, S] and values v [..., S, V]."""
    maximum = jnp.maximum(softmax.maximum, jnp.ceil(words.largest(scores)))
    weights = words.exp2(scores - words.spread(maximum, scores))
    rescale = power_of_two(softmax.maximum - maximum)
    out = words.dot(dot_cast(weights, v.dtype), v, (1, 0), words.spread(rescale, softmax.out) * softmax.out)
    return Softmax(maximum, rescale * softmax.total + words.total(weights), out)


def finish(softmax: Softmax, words: Words = PLAIN) -> tuple[jax.Array, jax.Array]:
    """Return the output rows [..., R, V] and the log-sum-exp of their scores [..., R], in units of log 2; 0 and 0 without a key."""
    some = softmax.total > 0
    total = jnp.where(some, softmax.total, 1.0)
    return softmax.out / words.spread(total, softmax.out), jnp.where(some, softmax.maximum + jnp.log2(total), 0.0)


def gradients(scores: jax.Array, d_weights: jax.Array, log_total: jax.Array, delta: jax.Array, words: Words = PLAIN):
    """Return the weights of a block and the gradients of its scaled products, of the shape of the scores, which may be transposed.

    d_weights is dO V^T, delta the rows' sums of dO O; it and log_total are laid beside the keys already. With the weights P and these
    gradients dS, dV = P^T dO, dQ = K**-0.5 dS K and dK = K**-0.5 dS^T Q, summed over the blocks or rows before they are scaled.
    """
    weights = words.exp2(scores - log_total)
    return weights, weights * (d_weights - delta)
