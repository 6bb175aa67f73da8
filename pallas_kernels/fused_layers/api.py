"""The fused layers: their implementations behind one signature each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.fused_layers import layers, pallas_gpu, pallas_tpu, xla
from pallas_kernels.fused_layers.layers import FORMS
from pallas_kernels.fused_layers.tile import Routing
from pallas_kernels.scaled_matmul import Product, QuantizedRows

PLAIN = ("plain",)

IMPLEMENTATIONS = {
    "xla": lambda aligned: functools.partial(xla.run, aligned=aligned),
    "pallas_tpu": lambda aligned: pallas_tpu.run,
    "pallas_gpu": lambda aligned: pallas_gpu.run,
}
"""The ways through the rows. A kernel's rows have the same bits in every mode, aligned or not."""


def _table(layer) -> dict[str, Any]:
    """The implementations of a layer."""
    return {name: lambda *args, aligned, run=run: layer(run(aligned), *args) for name, run in IMPLEMENTATIONS.items()}


def _flat(x: jax.Array, num_axes: int = 1) -> jax.Array:
    """The rows, flat: the last `num_axes` axes are a row's."""
    return x.reshape(-1, *x.shape[x.ndim - num_axes :])


def _flat_product(x: jax.Array | Product) -> jax.Array | Product:
    """The rows, flat, of a product or any."""
    return x._replace(y=_flat(x.y)) if isinstance(x, Product) else _flat(x)


def _shaped(rows: jax.Array | QuantizedRows, lead: tuple[int, ...]) -> Any:
    """Flat rows with their leading axes."""
    return rows.shaped(*lead) if isinstance(rows, QuantizedRows) else rows.reshape(*lead, rows.shape[-1])


def _form(emit: tuple[str, ...]) -> tuple[str, ...]:
    if emit not in FORMS:
        raise ValueError(f"a layer cannot emit {emit}; it can emit {', '.join(map(str, FORMS))}")
    return emit


def residual_rms_norm(
    x: Float[Array, "*rows D"],
    y: Float[Array, "*rows D"] | None,
    weight: Float[Array, " D"],
    *,
    eps: float,
    dtype: DTypeLike,
    emit: tuple[str, ...] = PLAIN,
    aligned: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"] | QuantizedRows]:
    """Return x + y in fp32 (x itself if y is None) and its RMS norm, rounded to `dtype`, times the weight.

    With `aligned` a row has the same bits whatever rows stand beside it, here and in all layers; only the forward promises that.
    emit: what the normed rows are written as: "plain", "rows" (the plain numbers in FP8 with a scale for each row and 128 columns, for a
    product), "columns" (with a scale for each column and 128 rows, for the gradient of its weight), or those of `layers.FORMS`
    together; but for "plain" the result is `QuantizedRows`, as products in FP8 take them. Raises ValueError for another.
    Differentiable in x, y and weight; but where they emit ("rows",) alone a gradient raises ValueError.
    """
    flat = _flat(x), None if y is None else _flat(y)
    arguments = *flat, weight, eps, jnp.dtype(dtype), _form(emit)
    total, normed = dispatch.call("residual_rms_norm", _table(layers.residual_rms_norm), implementation, *arguments, aligned=aligned)
    return total.reshape(x.shape), _shaped(normed, x.shape[:-1])


def gated_group_norm(
    o: Float[Array, "*rows D"],
    gate: Float[Array, "*rows D"] | Product,
    weight: Float[Array, " D"],
    *,
    num_groups: int,
    eps: float,
    emit: tuple[str, ...] = PLAIN,
    aligned: bool = False,
    implementation: str = "auto",
) -> Float[Array, "*rows D"] | QuantizedRows:
    """Return the RMS norm of o over each of `num_groups` groups of channels, times the weight, times sigmoid(gate).

    The result has o's dtype, and so have the normed channels and their product with the weight. Differentiable in all three.
    emit: see `residual_rms_norm`. A gate that is a product's in FP8 gets its gradient so, here and in the layers below.
    Raises ValueError if the groups do not divide the channels.
    """
    if o.shape[-1] % num_groups:
        raise ValueError(f"{num_groups} groups do not divide {o.shape[-1]} channels")
    arguments = _flat(o), _flat_product(gate), weight, num_groups, eps, _form(emit)
    out = dispatch.call("gated_group_norm", _table(layers.gated_group_norm), implementation, *arguments, aligned=aligned)
    return _shaped(out, o.shape[:-1])


def swiglu(
    gate_up: Float[Array, "*rows two_F"] | Product,
    weight: Float[Array, "*rows"] | None = None,
    *,
    emit: tuple[str, ...] = PLAIN,
    aligned: bool = False,
    implementation: str = "auto",
) -> Float[Array, "*rows F"] | QuantizedRows:
    """Return silu(gate) * up for gate_up = gate | up, times each row's weight if there is one, in fp32 and cast once to gate_up's dtype.

    Differentiable in both. emit: see `residual_rms_norm`.
    """
    per_row = None if weight is None else weight.reshape(-1, 1)
    out = dispatch.call("swiglu", _table(layers.swiglu), implementation, _flat_product(gate_up), per_row, _form(emit), aligned=aligned)
    return _shaped(out, layers.plain(gate_up).shape[:-1])


def qk_norm_rope(
    qkv: Float[Array, "*rows F"] | Product,
    cos: Float[Array, "*rows half"],
    sin: Float[Array, "*rows half"],
    query_weight: Float[Array, " K"],
    key_weight: Float[Array, " K"],
    *,
    num_kv_heads: int,
    eps: float,
    aligned: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "*rows H K"], Float[Array, "*rows G K"], Float[Array, "*rows G K"]]:
    """Return the queries, keys and values of qkv = q | k | v, each head of q and k normed and rotated, v as it is.

    The first 2 half channels are rotated in pairs (j, j + half), the rest passes. Differentiable in qkv and the weights; cos and sin are
    constants. Raises ValueError if qkv is no such row.
    """
    size, (*lead, columns) = query_weight.shape[0], layers.plain(qkv).shape
    if columns % size or columns // size <= 2 * num_kv_heads:
        raise ValueError(f"{columns} columns are not the queries, keys and values of {num_kv_heads} key-value heads of {size}")
    if 2 * cos.shape[-1] > size:
        raise ValueError(f"{cos.shape[-1]} pairs do not fit a head of {size} channels")
    q, k, v = dispatch.call(
        "qk_norm_rope",
        _table(layers.qk_norm_rope),
        implementation,
        _flat_product(qkv),
        _flat(cos),
        _flat(sin),
        query_weight,
        key_weight,
        num_kv_heads,
        eps,
        aligned=aligned,
    )
    return q.reshape(*lead, -1, size), k.reshape(*lead, -1, size), v.reshape(*lead, -1, size)


def route(
    logits: Float[Array, "*rows E"],
    bias: Float[Array, " E"],
    *,
    num_active: int,
    num_groups: int = 1,
    num_active_groups: int = 1,
    normalise: bool = True,
    factor: float = 1.0,
    aligned: bool = False,
    implementation: str = "auto",
) -> tuple[Int[Array, "*rows A"], Float[Array, "*rows A"], Float[Array, "*rows"]]:
    """Return the A experts of the largest sigmoid(logits) + bias, best first, their weights, and the log-sum-exp of all logits.

    Experts are taken from the `num_active_groups` groups whose two largest biased scores add up to most; equal ones go to the lower index.
    Weights are the unbiased scores, with `normalise` over their sum, times `factor`. Differentiable in the logits, through the weights
    and the log-sum-exp. Raises ValueError if the groups do not divide the experts or have too few.
    """
    num_experts = logits.shape[-1]
    if num_experts % num_groups or not num_active <= num_experts // num_groups * num_active_groups <= num_experts:
        raise ValueError(f"{num_active} of {num_experts} experts cannot be in {num_active_groups} of {num_groups} groups")
    how = Routing(num_experts, num_active, num_groups, num_active_groups, normalise, factor)
    experts, weights, log_total = dispatch.call("route", _table(layers.route), implementation, _flat(logits), bias, how, aligned=aligned)
    lead = logits.shape[:-1]
    return experts.reshape(*lead, -1), weights.reshape(*lead, -1), log_total.reshape(lead)
