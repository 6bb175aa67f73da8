"""The layers on one tile, forward and backward; pieces are [..., width], and a norm's sum is over the last axis.

    norm(x)      = n w,  n = x / sqrt(mean(x^2) + eps)      dx = (dn - n mean(dn n)) / sqrt(mean(x^2) + eps),  dn = dy w,  dw = dy n
    gated(o, g)  = norm(o) sigmoid(g)
    swiglu(g, u) = silu(g) u
    heads(x)_j   = h_j cos_j + h_(j + half) sin_j,  h = norm(x)      for pairs (j, j + half); sin is negative in a pair's first channel

    route(l)     = the A experts of the largest sigmoid(l) + bias in the best groups, their weights, log sum exp(l)

n is rounded to the compute dtype before the weight multiplies it, and so are their product, the rotation, and the gated product. All else
is fp32. `size` is the number of channels of a norm: a tile may be wider, with zeros in the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

F32 = jnp.float32


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return x, fp32, with the precision of a dtype: a product of two such values is then rounded once, in any unit."""
    return x.astype(dtype).astype(F32)


def row_sum(x: jax.Array) -> jax.Array:
    """Return the sums over the last axis, which stays; a backend may bring its own."""
    return jnp.sum(x, axis=-1, keepdims=True)


def _scale(x: jax.Array, size: int, eps: float, row_sum: Callable = row_sum) -> jax.Array:
    return lax.rsqrt(row_sum(x * x) / size + eps)


def _normed(x: jax.Array, scale: jax.Array, weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    return rounded(rounded(x * scale, dtype) * rounded(weight, dtype), dtype)


def norm(x: jax.Array, weight: jax.Array, *, size: int, eps: float, dtype: DTypeLike) -> tuple[jax.Array]:
    """Return x / rms(x) times the weight."""
    x = x.astype(F32)
    return (_normed(x, _scale(x, size, eps), weight, dtype),)


def _norm_gradient(x, d, weight, size, eps, dtype, row_sum=row_sum):
    """The gradients of x and, row by row, of the weight, for that of the normed row."""
    scale = _scale(x, size, eps, row_sum)
    n, dn = x * scale, d * rounded(weight, dtype)
    return scale * (dn - n * (row_sum(dn * n) / size)), d * rounded(n, dtype)


def add_norm(x: jax.Array, y: jax.Array, weight: jax.Array, **how) -> tuple[jax.Array, jax.Array]:
    """Return x + y and its norm."""
    total = x.astype(F32) + y.astype(F32)
    return total, *norm(total, weight, **how)


def norm_gradient(x, d_x, d, weight, *, size, eps, dtype) -> tuple[jax.Array, jax.Array]:
    """Return the gradient of x, whose own one is d_x, and the terms of the weight's, for that of the norm, d."""
    d, terms = _norm_gradient(x.astype(F32), d.astype(F32), weight, size, eps, dtype)
    return d_x.astype(F32) + d, terms


def add_norm_gradient(total, d_total, d, weight, **how) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of x and y, which are one, and the terms of the weight's."""
    d, terms = norm_gradient(total, d_total, d, weight, **how)
    return d, d, terms


def gated(o: jax.Array, gate: jax.Array, weight: jax.Array, *, size: int, eps: float, dtype: DTypeLike) -> tuple[jax.Array]:
    """Return norm(o) sigmoid(gate)."""
    o = o.astype(F32)
    return (_normed(o, _scale(o, size, eps), weight, dtype) * jax.nn.sigmoid(gate.astype(F32)),)


def gated_gradient(o, gate, d, weight, *, size, eps, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of o and the gate, and the terms of the weight's."""
    o, d, sigmoid = o.astype(F32), d.astype(F32), jax.nn.sigmoid(gate.astype(F32))
    d_gate = d * _normed(o, _scale(o, size, eps), weight, dtype) * (sigmoid * (1 - sigmoid))
    d_o, terms = _norm_gradient(o, d * sigmoid, weight, size, eps, dtype)
    return d_o, d_gate, terms


def swiglu(gate: jax.Array, up: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array]:
    """Return silu(gate) up, times the row's weight if it has one."""
    hidden = jax.nn.silu(gate.astype(F32)) * up.astype(F32)
    return (hidden if weight is None else hidden * weight,)


def swiglu_gradient(gate, up, *others) -> tuple[jax.Array, ...]:
    """Return the gradients of gate and up, and with a weight in front of the result's gradient, its part of the weight's."""
    gate, up, d = gate.astype(F32), up.astype(F32), others[-1].astype(F32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_weight = [jnp.sum(d * silu * up, axis=-1, keepdims=True)] if len(others) == 2 else []
    d = d * others[0] if len(others) == 2 else d
    return d * up * (sigmoid * (1 + gate * (1 - sigmoid))), d * silu, *d_weight


def partner(x: jax.Array, half: int) -> jax.Array:
    """Return x with the channels j and j + half of its first 2 half exchanged."""
    a, b, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([b, a, rest], axis=-1)


def _channels(x: jax.Array, half: int) -> jax.Array:
    """Whether a channel is rotated."""
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < 2 * half


class Lanes(NamedTuple):
    """How a backend moves what is in the lanes of a piece x.

    exchanged(f, own=(), other=()) is f(x, *own), where f treats each channel by itself, with the channels j and j + half of the first
    2 half exchanged (what the rest is is not said); `other` are own's values with their channels exchanged. sum is `row_sum`.
    apart(x) is x, a product, which must not be contracted with a sum where the backend's compiler would do so in one program and not in
    another.
    """

    exchanged: Callable
    sum: Callable = row_sum
    apart: Callable = lambda x: x


def heads(x, lanes: Lanes, cos, sin, weight, other_weight, *, half, size, eps, dtype) -> tuple[jax.Array]:
    """Return the norm of x with its first 2 half channels rotated."""
    scale = _scale(x.astype(F32), size, eps, lanes.sum)
    norm = lambda x, weight: _normed(x.astype(F32), scale, weight, dtype)
    normed, other = norm(x, weight), lanes.exchanged(norm, (weight,), (other_weight,))
    return (jnp.where(_channels(x, half), lanes.apart(normed * cos) + lanes.apart(other * sin), normed),)


def heads_gradient(d, lanes: Lanes, x, cos, sin, weight, *, half, size, eps, dtype) -> tuple[jax.Array, jax.Array]:
    """Return the gradient of x and the terms of the weight's, for that of the result."""
    other = lanes.exchanged(lambda d: d.astype(F32))
    d = jnp.where(_channels(d, half), d.astype(F32) * cos - other * sin, d.astype(F32))
    return _norm_gradient(x.astype(F32), d, weight, size, eps, dtype, lanes.sum)


class Routing(NamedTuple):
    """How experts are chosen and weighed."""

    experts: int
    active: int
    groups: int = 1
    active_groups: int = 1
    normalise: bool = True
    factor: float = 1.0


def _along(x: jax.Array, axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim + axis)


def _largest(x: jax.Array, index: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The largest value along the axis and where it stands first; nowhere (at the index's type's end) if it is NaN."""
    largest = jnp.max(x, axis=axis, keepdims=True)
    return largest, jnp.min(jnp.where(x == largest, index, jnp.iinfo(jnp.int32).max), axis=axis, keepdims=True)


def _weigh(logits: jax.Array, how: Routing, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores of the chosen logits, their sum, and their weights."""
    scores = jax.nn.sigmoid(logits)
    total = jnp.sum(scores, axis=axis, keepdims=True) + 1e-20 if how.normalise else jnp.ones_like(logits)
    return scores, total, (scores / total if how.normalise else scores) * how.factor


def _log_total(logits: jax.Array, axis: int) -> jax.Array:
    largest = jnp.max(logits, axis=axis, keepdims=True)
    return jnp.log(jnp.sum(jnp.exp(logits - largest), axis=axis, keepdims=True)) + largest


def route(logits: jax.Array, bias: jax.Array, *, how: Routing, axis: int = -1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the experts of the largest biased scores in the best groups, their weights, and the log-sum-exp of all logits.

    A group counts its two largest. Equal scores go to the lower expert. A row with a NaN is sent nowhere, its experts are `experts`, if
    experts are in one group, else anywhere.
    The experts are at `axis` of the tile, -1 or -2.
    """
    size = how.experts // how.groups
    expert = _along(logits, axis)
    missing = jnp.where(expert < how.experts, 0.0, -jnp.inf)  # a tile may be wider
    ranked = jax.nn.sigmoid(logits) + bias + missing
    if how.groups > 1:
        at = logits.ndim + axis
        if logits.shape[at] % size:
            raise NotImplementedError(f"groups of {size} experts do not divide a tile of {logits.shape[at]}")
        cut = lambda x: x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :])  # there may be more groups, of what is missing
        inside, in_groups = cut(expert), cut(ranked)
        first, best = _largest(in_groups, inside, axis)
        second = jnp.max(jnp.where(inside == best, -jnp.inf, in_groups), axis=axis, keepdims=True) if size > 1 else 0.0
        ranks, kept = first + second, jnp.zeros_like(first)
        group = lax.broadcasted_iota(jnp.int32, ranks.shape, at)
        for _ in range(how.active_groups):
            _, best = _largest(ranks, group, at - ranks.ndim)
            kept, ranks = jnp.where(group == best, 1.0, kept), jnp.where(group == best, -jnp.inf, ranks)
        ranked = jnp.where(kept > 0, in_groups, -jnp.inf).reshape(ranked.shape)
    shape = list(logits.shape)
    shape[axis] = 1 << (how.active - 1).bit_length()  # a GPU wants a power of two: the slots behind have scores of 0, and are not stored
    slot = lax.broadcasted_iota(jnp.int32, shape, logits.ndim + axis)
    experts, chosen = jnp.zeros_like(slot), jnp.full(slot.shape, -jnp.inf, F32)
    for a in range(how.active):
        _, at = _largest(ranked, expert, axis)
        picked = jnp.sum(jnp.where(expert == at, logits, 0.0), axis=axis, keepdims=True)
        experts, chosen = jnp.where(slot == a, jnp.minimum(at, how.experts), experts), jnp.where(slot == a, picked, chosen)
        ranked = jnp.where(expert == at, -jnp.inf, ranked)
    return experts, _weigh(chosen, how, axis)[2], _log_total(logits + missing, axis)


def route_gradient(logits, experts, log_total, d_weights, d_log_total, *, how: Routing, axis: int = -1) -> tuple[jax.Array]:
    """Return the gradient of the logits, for those of the weights and the log-sum-exp: the choice has none."""
    expert, slot = _along(logits, axis), _along(experts, axis)
    at = [jnp.max(jnp.where(slot == a, experts, -1), axis=axis, keepdims=True) for a in range(how.active)]
    chosen = jnp.full(slot.shape, -jnp.inf, F32)
    for a in range(how.active):
        picked = jnp.sum(jnp.where(expert == at[a], logits, 0.0), axis=axis, keepdims=True)
        chosen = jnp.where(slot == a, picked, chosen)
    scores, total, _ = _weigh(chosen, how, axis)
    d = d_weights * how.factor
    if how.normalise:
        d = (d - jnp.sum(d * scores, axis=axis, keepdims=True) / total) / total
    d = d * (scores * (1 - scores))
    d_logits = d_log_total * jnp.exp(logits - log_total)
    for a in range(how.active):
        d_logits += jnp.where(expert == at[a], jnp.sum(jnp.where(slot == a, d, 0.0), axis=axis, keepdims=True), 0.0)
    return (d_logits,)
