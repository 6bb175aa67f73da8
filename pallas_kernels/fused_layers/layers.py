"""The layers as passes over rows, whatever backend runs them, and their gradients, which are passes too.

`run` (see `rows.Run`) is the backend; rows are flat, [N, columns].
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.fused_layers import tile
from pallas_kernels.fused_layers.rows import Out, Pass, Rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def residual_rms_norm(run, x, y, weight, eps, dtype):
    """Return x + y [N, D] fp32 and its norm in `dtype`; y may be None, then the former is x."""
    return _residual_forward(run, x, y, weight, eps, dtype)[0]


def _residual_forward(run, x, y, weight, eps, dtype):
    size = x.shape[1]
    how = {"size": size, "eps": eps, "dtype": dtype}
    normed = Out((size,), dtype)
    if y is None:
        ((out,),), _ = run(Pass("rms_norm", functools.partial(tile.norm, **how), (Rows((x,)),), (weight[None],), (normed,)))
        return (x, out), (x, weight, None)
    rows, outs = (Rows((x,)), Rows((y,))), (Out((size,), jnp.float32), normed)
    ((total,), (out,)), _ = run(Pass("residual_rms_norm", functools.partial(tile.add_norm, **how), rows, (weight[None],), outs))
    return (total, out), (total, weight, (jnp.zeros(0, x.dtype), jnp.zeros(0, y.dtype)))


def _residual_backward(run, eps, dtype, residuals, gradients):
    total, weight, like = residuals
    size = total.shape[1]
    dtypes = [total.dtype] if like is None else [x.dtype for x in like]
    gradient = functools.partial(tile.norm_gradient if like is None else tile.add_norm_gradient, size=size, eps=eps, dtype=dtype)
    outs = tuple(Out((size,), dtype) for dtype in dtypes)
    rows = tuple(Rows((x,)) for x in (total, *gradients))
    found, (d_weight,) = run(Pass("rms_norm_gradient", gradient, rows, (weight[None],), outs, sums=1, gradient=True))
    (d_x,), d_y = found[0], None if like is None else found[1][0]
    return d_x, d_y, d_weight[0].astype(weight.dtype)


residual_rms_norm.defvjp(_residual_forward, _residual_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def gated_group_norm(run, o, gate, weight, num_groups, eps):
    """Return norm(o) sigmoid(gate) [N, D] of o's dtype, the norm over each of `num_groups` groups of columns."""
    return _gated_forward(run, o, gate, weight, num_groups, eps)[0]


def _gated_forward(run, o, gate, weight, num_groups, eps):
    gated = functools.partial(tile.gated, size=o.shape[1] // num_groups, eps=eps, dtype=o.dtype)
    weights = (weight.reshape(num_groups, -1),)
    ((out,),), _ = run(Pass("gated_norm", gated, (Rows((o,)), Rows((gate,))), weights, (Out((o.shape[1],), o.dtype),), parts=num_groups))
    return out, (o, gate, weight)


def _gated_backward(run, num_groups, eps, residuals, d):
    o, gate, weight = residuals
    gradient = functools.partial(tile.gated_gradient, size=o.shape[1] // num_groups, eps=eps, dtype=o.dtype)
    rows, weights = tuple(Rows((x,)) for x in (o, gate, d)), (weight.reshape(num_groups, -1),)
    outs = tuple(Out((x.shape[1],), x.dtype) for x in (o, gate))
    call = Pass("gated_norm_gradient", gradient, rows, weights, outs, sums=1, parts=num_groups, gradient=True)
    ((d_o,), (d_gate,)), (d_weight,) = run(call)
    return d_o, d_gate, d_weight.reshape(-1).astype(weight.dtype)


gated_group_norm.defvjp(_gated_forward, _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu(run, gate_up, weight):
    """Return silu(gate) up [N, F] for gate_up = gate | up [N, 2 F], times the row's weight [N, 1] unless that is None."""
    return _swiglu_forward(run, gate_up, weight)[0]


def _swiglu_forward(run, gate_up, weight):
    rows = (Rows((gate_up,), pieces=2), *(() if weight is None else (Rows((weight,), pieces=0),)))
    ((out,),), _ = run(Pass("swiglu", tile.swiglu, rows, (), (Out((gate_up.shape[1] // 2,), gate_up.dtype),), parts=0))
    return out, (gate_up, weight)


def _swiglu_backward(run, residuals, d):
    gate_up, weight = residuals
    rows, outs = (Rows((gate_up,), pieces=2),), (Out((gate_up.shape[1],), gate_up.dtype, pieces=2),)
    if weight is not None:
        rows, outs = (*rows, Rows((weight,), pieces=0)), (*outs, Out((), jnp.float32))
    found, _ = run(Pass("swiglu_gradient", tile.swiglu_gradient, (*rows, Rows((d,))), (), outs, parts=0, gradient=True))
    return found[0][0], None if weight is None else found[1][0].sum(1, keepdims=True).astype(weight.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7))
def qk_norm_rope(run, qkv, cos, sin, query_weight, key_weight, num_kv_heads, eps):
    """Return q [N, H K], k and v [N, G K]: the columns of qkv, the heads of q and k normed and rotated."""
    return _heads_forward(run, qkv, cos, sin, query_weight, key_weight, num_kv_heads, eps)[0]


def _head_weights(query_weight, key_weight, num_heads: int, num_kv_heads: int) -> jax.Array:
    """The weight of each head [H + 2 G, K]; those of the values are not read."""
    return jnp.concatenate([jnp.broadcast_to(query_weight, (num_heads, *query_weight.shape)), *[key_weight[None]] * 2 * num_kv_heads])


def _tables(cos, sin, size: int) -> tuple[Rows, Rows]:
    """The rotation of each channel of a head [N, K]: cosines, and sines with their sign; the rest of the channels is left alone."""
    rest = jnp.zeros((cos.shape[0], size - 2 * cos.shape[1]), cos.dtype)
    full = (jnp.concatenate([cos, cos, rest], axis=1), jnp.concatenate([-sin, sin, rest], axis=1))
    return Rows((full[0],), pieces=0), Rows((full[1],), pieces=0)


def _heads_forward(run, qkv, cos, sin, query_weight, key_weight, num_kv_heads, eps):
    size, half = query_weight.shape[0], cos.shape[1]
    heads = qkv.shape[1] // size
    weights = _head_weights(query_weight, key_weight, heads - 2 * num_kv_heads, num_kv_heads)
    columns = ((heads - 2 * num_kv_heads) * size, num_kv_heads * size, num_kv_heads * size)
    found, _ = run(
        Pass(
            "qk_norm_rope",
            functools.partial(tile.heads, half=half, size=size, eps=eps, dtype=qkv.dtype),
            (Rows((qkv,), half=half), *_tables(cos, sin, size)),
            (weights, tile.partner(weights, half)),
            (Out(columns, qkv.dtype),),
            parts=heads,
            copied=num_kv_heads,
        )
    )
    return found[0], (qkv, cos, sin, query_weight, key_weight)


def _heads_backward(run, num_kv_heads, eps, residuals, gradients):
    qkv, cos, sin, query_weight, key_weight = residuals
    size, half = query_weight.shape[0], cos.shape[1]
    heads = qkv.shape[1] // size
    spread = functools.partial(_head_weights, num_heads=heads - 2 * num_kv_heads, num_kv_heads=num_kv_heads)
    weights = spread(query_weight, key_weight)
    _, pull_back = jax.vjp(spread, *(w.astype(jnp.float32) for w in (query_weight, key_weight)))  # a sum over heads, rounded once
    ((d_qkv,),), (d_weights,) = run(
        Pass(
            "qk_norm_rope_gradient",
            functools.partial(tile.heads_gradient, half=half, size=size, eps=eps, dtype=qkv.dtype),
            (Rows(gradients, half=half), Rows((qkv,)), *_tables(cos, sin, size)),
            (weights,),
            (Out((qkv.shape[1],), qkv.dtype),),
            sums=1,
            gradient=True,
            parts=heads,
            copied=num_kv_heads,
        )
    )
    d_query_weight, d_key_weight = (d.astype(weights.dtype) for d in pull_back(d_weights))
    return d_qkv, jnp.zeros_like(cos), jnp.zeros_like(sin), d_query_weight, d_key_weight


qk_norm_rope.defvjp(_heads_forward, _heads_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def route(run, logits, bias, how):
    """Return the experts [N, A] that `how` chooses of logits [N, E] fp32 and bias [E], their weights, and the log-sum-exp [N, 1]."""
    return _route_forward(run, logits, bias, how)[0]


def _route_forward(run, logits, bias, how):
    outs = (Out((how.active,), jnp.int32), Out((how.active,), jnp.float32), Out((1,), jnp.float32))
    found, _ = run(Pass("route", functools.partial(tile.route, how=how), (Rows((logits,)),), (bias[None],), outs, turns=True))
    experts, weights, log_total = (x for (x,) in found)
    return (experts, weights, log_total), (logits, bias, experts, log_total)


def _route_backward(run, how, residuals, gradients):
    logits, bias, experts, log_total = residuals
    _, d_weights, d_log_total = gradients
    rows = tuple(Rows((x,)) for x in (logits, experts, log_total, d_weights, d_log_total))
    outs = (Out((logits.shape[1],), logits.dtype),)
    gradient = functools.partial(tile.route_gradient, how=how)
    ((d_logits,),), _ = run(Pass("route_gradient", gradient, rows, (), outs, turns=True, gradient=True))
    return d_logits, jnp.zeros_like(bias)


route.defvjp(_route_forward, _route_backward)
