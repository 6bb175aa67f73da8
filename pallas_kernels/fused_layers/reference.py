"""The layers' equations, on rows [..., columns], in at least fp32.

residual_rms_norm  (x + y, rms_norm(x + y) w)                  rms_norm(x) = x / sqrt(mean(x^2) + eps)
gated_group_norm   rms_norm of each group of o, times w, times sigmoid(gate)
swiglu             silu(gate) up r                             for gate | up and a row's weight r
qk_norm_rope       q, k = rotate(rms_norm(head) w), v          for q | k | v; rotate turns the pairs (j, j + half)
route              the A experts of the largest sigmoid(l) + bias in the groups whose two largest add up to most,
                   w_a = factor sigmoid(l_a) / (sum_a sigmoid(l_a) + 1e-20), and log sum_e exp(l_e)
"""

import jax
import jax.numpy as jnp
from jax import lax


def _exact(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(x, weight, eps, num_groups=1):
    groups = _exact(x).reshape(*x.shape[:-1], num_groups, -1)
    groups = groups * lax.rsqrt(jnp.mean(groups * groups, axis=-1, keepdims=True) + eps)
    return groups.reshape(x.shape) * _exact(weight)


def residual_rms_norm(x, y, weight, *, eps):
    """Return x + y and its norm; y may be None."""
    total = _exact(x) if y is None else _exact(x) + _exact(y)
    return total, _norm(total, weight, eps)


def gated_group_norm(o, gate, weight, *, num_groups, eps):
    """Return the norm of o over groups of columns, gated."""
    return _norm(o, weight, eps, num_groups) * jax.nn.sigmoid(_exact(gate))


def swiglu(gate_up, weight=None):
    """Return silu(gate) up, times a row's weight."""
    gate, up = jnp.split(_exact(gate_up), 2, axis=-1)
    hidden = jax.nn.silu(gate) * up
    return hidden if weight is None else hidden * _exact(weight)[..., None]


def qk_norm_rope(qkv, cos, sin, query_weight, key_weight, *, num_kv_heads, eps):
    """Return q, k and v [..., heads, K]."""
    size, half = query_weight.shape[0], cos.shape[-1]
    heads = _exact(qkv).reshape(*qkv.shape[:-1], -1, size)
    q, k, v = jnp.split(heads, [heads.shape[-2] - 2 * num_kv_heads, heads.shape[-2] - num_kv_heads], axis=-2)
    cos, sin = _exact(cos)[..., None, :], _exact(sin)[..., None, :]

    def rotated(x):
        a, b, rest = jnp.split(x, [half, 2 * half], axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    return rotated(_norm(q, query_weight, eps)), rotated(_norm(k, key_weight, eps)), v


def route(logits, bias, *, num_active, num_groups=1, num_active_groups=1, normalise=True, factor=1.0):
    """Return the chosen experts, their weights, and the log-sum-exp of the logits."""
    scores = jax.nn.sigmoid(_exact(logits))
    groups = lax.stop_gradient(scores + bias).reshape(*logits.shape[:-1], num_groups, -1)
    best_two, _ = lax.top_k(groups, min(2, groups.shape[-1]))
    _, kept = lax.top_k(best_two.sum(-1), num_active_groups)
    keep = (kept[..., None] == jnp.arange(num_groups)).any(-2)
    ranked = jnp.where(keep[..., None], groups, -jnp.inf).reshape(logits.shape)
    experts = lax.top_k(ranked, num_active)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-20) if normalise else weights
    return experts, factor * weights, jax.nn.logsumexp(_exact(logits), axis=-1)
