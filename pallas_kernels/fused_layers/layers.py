"""The layers as passes over rows, whatever backend runs them, and their gradients, which are passes too.

`run` (see `rows.Run`) is the backend; rows are flat, [N, columns].
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.fused_layers import tile
from pallas_kernels.fused_layers.rows import Out, Pass, Rows
from pallas_kernels.scaled_matmul import Product, Quantized, QuantizedRows

FORMS = (("plain",), ("rows",), ("columns",), ("plain", "rows"), ("rows", "columns"), ("plain", "rows", "columns"))
"""What a layer in front of a product may emit; `emit` is one of them."""


def _emitted(size: int, dtype: DTypeLike, emit: tuple[str, ...]) -> Out:
    return Out((size,), dtype, plain="plain" in emit, by_rows="rows" in emit, by_columns="columns" in emit)


def _as_rows(arrays: tuple[jax.Array, ...], dtype: DTypeLike, emit: tuple[str, ...]) -> jax.Array | QuantizedRows:
    """The rows of a result's arrays."""
    found = list(arrays)
    plain = found.pop(0) if "plain" in emit else None
    if plain is not None and not found:
        return plain
    values, scales = (found.pop(0), found.pop(0)) if "rows" in emit else (None, None)
    columns = Quantized(*found) if found else None
    carrier = plain if plain is not None or columns is None else jnp.zeros(columns.values.shape[::-1], dtype)
    return QuantizedRows(plain, values, scales, columns, carrier)


def _differentiable(forward: Callable) -> Callable:
    """The forward of a gradient: rows without a carrier have none, and silence would be a gradient of zero."""

    @functools.wraps(forward)
    def checked(*args):
        if args[-1] == ("rows",):
            raise ValueError(
                "a layer that emits its rows in FP8 alone has no gradient: let it emit plain rows or columns, too (Numerics.gradients)"
            )
        return forward(*args)

    return checked


def _gradient(d: jax.Array | QuantizedRows) -> jax.Array:
    """The gradient of a layer's rows: the plain ones may be read, too, and then are the carrier."""
    if not isinstance(d, QuantizedRows):
        return d
    return d.carrier if d.plain is None else d.plain + d.carrier


def plain(x: jax.Array | Product) -> jax.Array:
    """Return the rows that a layer reads: a product's, or any."""
    return x.y if isinstance(x, Product) else x


def _kept(x: jax.Array | Product) -> jax.Array | Product:
    """What of an operand is kept for the gradient: its rows, and whether theirs is wanted in FP8."""
    return x._replace(rows=None, columns=None) if isinstance(x, Product) else x


def _gradient_of(x: jax.Array | Product, pieces: int = 1) -> Out:
    """The gradient of an operand as a result of a pass: in FP8, both ways, where a product takes it so."""
    fp8, y = isinstance(x, Product), plain(x)
    return Out((y.shape[1],), y.dtype, pieces, plain=not fp8, by_rows=fp8, by_columns=fp8)


def _returned(x: jax.Array | Product, arrays: tuple[jax.Array, ...]) -> jax.Array | Product:
    """The gradient of an operand, of its result's arrays."""
    if not isinstance(x, Product):
        return arrays[0]
    return Product(jnp.zeros_like(x.y), Quantized(*arrays[:2]), Quantized(*arrays[2:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5, 6))
def residual_rms_norm(run, x, y, weight, eps, dtype, emit):
    """Return x + y [N, D] fp32 and its norm in `dtype`; y may be None, then the former is x."""
    return _residual_forward(run, x, y, weight, eps, dtype, emit)[0]


def _residual_forward(run, x, y, weight, eps, dtype, emit):
    size = x.shape[1]
    how = {"size": size, "eps": eps, "dtype": dtype}
    normed = _emitted(size, dtype, emit)
    if y is None:
        (out,), _ = run(Pass("rms_norm", functools.partial(tile.norm, **how), (Rows((x,)),), (weight[None],), (normed,)))
        return (x, _as_rows(out, dtype, emit)), (x, weight, None)
    rows, outs = (Rows((x,)), Rows((y,))), (Out((size,), jnp.float32), normed)
    ((total,), out), _ = run(Pass("residual_rms_norm", functools.partial(tile.add_norm, **how), rows, (weight[None],), outs))
    return (total, _as_rows(out, dtype, emit)), (total, weight, (jnp.zeros(0, x.dtype), jnp.zeros(0, y.dtype)))


def _residual_backward(run, eps, dtype, emit, residuals, gradients):
    del emit
    total, weight, like = residuals
    gradients = gradients[0], _gradient(gradients[1])
    size = total.shape[1]
    dtypes = [total.dtype] if like is None else [x.dtype for x in like]
    gradient = functools.partial(tile.norm_gradient if like is None else tile.add_norm_gradient, size=size, eps=eps, dtype=dtype)
    outs = tuple(Out((size,), dtype) for dtype in dtypes)
    rows = tuple(Rows((x,)) for x in (total, *gradients))
    found, (d_weight,) = run(Pass("rms_norm_gradient", gradient, rows, (weight[None],), outs, sums=1, gradient=True))
    (d_x,), d_y = found[0], None if like is None else found[1][0]
    return d_x, d_y, d_weight[0].astype(weight.dtype)


residual_rms_norm.defvjp(_differentiable(_residual_forward), _residual_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5, 6))
def gated_group_norm(run, o, gate, weight, num_groups, eps, emit):
    """Return norm(o) sigmoid(gate) [N, D] of o's dtype, the norm over each of `num_groups` groups of columns."""
    return _gated_forward(run, o, gate, weight, num_groups, eps, emit)[0]


def _gated_forward(run, o, gate, weight, num_groups, eps, emit):
    gated = functools.partial(tile.gated, size=o.shape[1] // num_groups, eps=eps, dtype=o.dtype)
    rows, weights, outs = (Rows((o,)), Rows((plain(gate),))), (weight.reshape(num_groups, -1),), (_emitted(o.shape[1], o.dtype, emit),)
    (out,), _ = run(Pass("gated_norm", gated, rows, weights, outs, parts=num_groups))
    return _as_rows(out, o.dtype, emit), (o, _kept(gate), weight)


def _gated_backward(run, num_groups, eps, emit, residuals, d):
    del emit
    o, gate, weight = residuals
    d = _gradient(d)
    gradient = functools.partial(tile.gated_gradient, size=o.shape[1] // num_groups, eps=eps, dtype=o.dtype)
    rows, weights = tuple(Rows((x,)) for x in (o, plain(gate), d)), (weight.reshape(num_groups, -1),)
    outs = _gradient_of(o), _gradient_of(gate)
    call = Pass("gated_norm_gradient", gradient, rows, weights, outs, sums=1, parts=num_groups, gradient=True)
    ((d_o,), d_gate), (d_weight,) = run(call)
    return d_o, _returned(gate, d_gate), d_weight.reshape(-1).astype(weight.dtype)


gated_group_norm.defvjp(_differentiable(_gated_forward), _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def swiglu(run, gate_up, weight, emit):
    """Return silu(gate) up [N, F] for gate_up = gate | up [N, 2 F], times the row's weight [N, 1] unless that is None."""
    return _swiglu_forward(run, gate_up, weight, emit)[0]


def _swiglu_forward(run, gate_up, weight, emit):
    y = plain(gate_up)
    rows = (Rows((y,), pieces=2), *(() if weight is None else (Rows((weight,), pieces=0),)))
    (out,), _ = run(Pass("swiglu", tile.swiglu, rows, (), (_emitted(y.shape[1] // 2, y.dtype, emit),), parts=0))
    return _as_rows(out, y.dtype, emit), (_kept(gate_up), weight)


def _swiglu_backward(run, emit, residuals, d):
    del emit
    gate_up, weight = residuals
    d = _gradient(d)
    rows, outs = (Rows((plain(gate_up),), pieces=2),), (_gradient_of(gate_up, pieces=2),)
    if weight is not None:
        rows, outs = (*rows, Rows((weight,), pieces=0)), (*outs, Out((), jnp.float32))
    found, _ = run(Pass("swiglu_gradient", tile.swiglu_gradient, (*rows, Rows((d,))), (), outs, parts=0, gradient=True))
    return _returned(gate_up, found[0]), None if weight is None else found[1][0].sum(1, keepdims=True).astype(weight.dtype)


swiglu.defvjp(_differentiable(_swiglu_forward), _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7))
def qk_norm_rope(run, qkv, cos, sin, query_weight, key_weight, num_kv_heads, eps):
    """Return q [N, H K], k and v [N, G K]: the columns of qkv, the heads of q and k normed and rotated."""
    return _heads_forward(run, qkv, cos, sin, query_weight, key_weight, num_kv_heads, eps)[0]


def _head_weights(query_weight, key_weight, num_heads: int, num_kv_heads: int) -> jax.Array:
    """The weight of each head [H + 2 G, K]; those of the values are not read."""
    return jnp.concatenate([jnp.broadcast_to(query_weight, (num_heads, *query_weight.shape)), *[key_weight[None]] * 2 * num_kv_heads])


def _tables(cos, sin, size: int) -> tuple[Rows, Rows]:
    """The rotation of each channel of a head [N, K]: cosines, and sines with their sign; the rest of the channels is left alone."""
    return Rows((cos,), pieces=0, spread=(size, 1)), Rows((sin,), pieces=0, spread=(size, -1))


def _heads_forward(run, qkv, cos, sin, query_weight, key_weight, num_kv_heads, eps):
    size, half, y = query_weight.shape[0], cos.shape[1], plain(qkv)
    heads = y.shape[1] // size
    weights = _head_weights(query_weight, key_weight, heads - 2 * num_kv_heads, num_kv_heads)
    columns = ((heads - 2 * num_kv_heads) * size, num_kv_heads * size, num_kv_heads * size)
    found, _ = run(
        Pass(
            "qk_norm_rope",
            functools.partial(tile.heads, half=half, size=size, eps=eps, dtype=y.dtype),
            (Rows((y,), half=half), *_tables(cos, sin, size)),
            (weights, tile.partner(weights, half)),
            (Out(columns, y.dtype),),
            parts=heads,
            copied=num_kv_heads,
        )
    )
    return found[0], (_kept(qkv), cos, sin, query_weight, key_weight)


def _heads_backward(run, num_kv_heads, eps, residuals, gradients):
    qkv, cos, sin, query_weight, key_weight = residuals
    size, half, y = query_weight.shape[0], cos.shape[1], plain(qkv)
    heads = y.shape[1] // size
    spread = functools.partial(_head_weights, num_heads=heads - 2 * num_kv_heads, num_kv_heads=num_kv_heads)
    weights = spread(query_weight, key_weight)
    _, pull_back = jax.vjp(spread, *(w.astype(jnp.float32) for w in (query_weight, key_weight)))  # a sum over heads, rounded once
    (d_qkv,), (d_weights,) = run(
        Pass(
            "qk_norm_rope_gradient",
            functools.partial(tile.heads_gradient, half=half, size=size, eps=eps, dtype=y.dtype),
            (Rows(gradients, half=half), Rows((y,)), *_tables(cos, sin, size)),
            (weights,),
            (_gradient_of(qkv),),
            sums=1,
            gradient=True,
            parts=heads,
            copied=num_kv_heads,
        )
    )
    d_query_weight, d_key_weight = (d.astype(weights.dtype) for d in pull_back(d_weights))
    return _returned(qkv, d_qkv), jnp.zeros_like(cos), jnp.zeros_like(sin), d_query_weight, d_key_weight


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
