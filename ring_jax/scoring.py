"""Log-probabilities of tokens and the training loss: one function for training, evaluation, scoring and RL."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cross_entropy import token_logprobs as head_logprobs
from ring_jax import cache as caches
from ring_jax import sharding
from ring_jax.model import Ring, RingOutput
from ring_jax.numerics import BalanceBias, Table, name, round_weights


class Batch(NamedTuple):
    """Packed rows: segment 0 is padding (position -1), positions restart at 0 with each document."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


class LossStats(NamedTuple):
    """Sums over the whole batch: negative log-likelihood, scored tokens; router statistics in the layer pattern."""

    nll: Float[Array, ""]
    num_tokens: Float[Array, ""]
    router: Any


def _next(x: jax.Array) -> jax.Array:
    """x one position earlier. The last column wraps around: it is masked, never sliced off, so that row tiles keep their shapes."""
    return jnp.roll(x, -1, axis=1)


def _scored(batch: Batch, ahead: int = 1) -> Bool[Array, "B T"]:
    """Positions whose token `ahead` further is of the same document."""
    same = (batch.segment_ids == jnp.roll(batch.segment_ids, -ahead, axis=1)) & (batch.segment_ids > 0)
    return same & (jnp.arange(batch.tokens.shape[1]) < batch.tokens.shape[1] - ahead)


def _target_logprobs(model: Ring, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    rows = hidden.reshape(-1, hidden.shape[-1])
    logprobs, _ = head_logprobs(rows, model.head_weight(), targets.reshape(-1), **model.numerics.ops)
    return name(logprobs, "logprobs").reshape(targets.shape)


def next_token_logprobs(model: Ring, batch: Batch) -> tuple[Float[Array, "B T"], RingOutput]:
    """Return the raw log-probability, at each position, of the document's next token (0 where there is none), and the forward's output."""
    output = model(batch.tokens, batch.positions, segment_ids=batch.segment_ids)
    logprobs = _target_logprobs(model, output.hidden, _next(batch.tokens))
    return jnp.where(_scored(batch), logprobs, 0.0), output


def token_logprobs(model: Ring, batch: Batch) -> Float[Array, "B T"]:
    """Return the raw log-probability of each token given those before it in its document; 0 for a document's first token and padding."""
    logprobs, _ = next_token_logprobs(model, batch)
    return jnp.roll(logprobs, 1, axis=1)  # the last column is 0, so is the first one then


def loss(model: Ring, batch: Batch, *, z_loss: float = 0.0, mtp_weight: float = 0.1) -> tuple[Float[Array, ""], LossStats]:
    """Return this device's share of the mean loss of the whole batch (the shares add up to it), and the batch's sums.

    The loss is the mean negative log-likelihood of the scored tokens, plus `z_loss` times the mean squared log-sum-exp of the router
    logits (mean over tokens and MoE layers), plus `mtp_weight` times the mean loss of the multi-token-prediction layers.
    """
    logprobs, output = next_token_logprobs(model, batch)
    nll, num_tokens = -logprobs.sum(), _scored(batch).sum().astype(jnp.float32)
    total_tokens = jnp.maximum(sharding.sum_over_batch(num_tokens), 1.0)
    value = nll / total_tokens
    routers = [stats for segment in output.router for stats in segment if stats is not None]
    if z_loss and routers:
        num_valid = jnp.maximum(sharding.sum_over_batch((batch.segment_ids > 0).sum().astype(jnp.float32)), 1.0)
        num_layers = sum(stats.z_sum.size for stats in routers)
        value = value + z_loss * sum(stats.z_sum.sum() for stats in routers) / (num_valid * num_layers)
    further, router_further = _further_loss(model, batch, output.hidden)
    if model.config.num_mtp_layers:
        value = value + mtp_weight * further
    stats = LossStats(nll, num_tokens, (output.router, router_further))
    return value, jax.tree.map(sharding.sum_over_batch, stats)


def _further_loss(model: Ring, batch: Batch, hidden: Float[Array, "B T D"]) -> tuple[Any, Any]:
    """Mean loss of the multi-token-prediction layers: layer d predicts the token d + 2 positions on from the layer before."""
    total, router = 0.0, []
    place = caches.place(batch.positions, batch.segment_ids, None, *model.rotary(batch.positions), model.config.chunk_size)
    tokens = batch.tokens
    for depth, layer in enumerate(model.mtp):
        tokens = _next(tokens)
        hidden, stats = layer(hidden, model.embed(tokens), place)
        scored = _scored(batch, depth + 2)
        logprobs = jnp.where(scored, _target_logprobs(model, hidden, _next(tokens)), 0.0)
        count = jnp.maximum(sharding.sum_over_batch(scored.sum().astype(jnp.float32)), 1.0)
        total = total - logprobs.sum() / count / len(model.mtp)
        router.append(stats)
    return total, tuple(router)


def split(model: Ring) -> tuple[Any, Any, Any]:
    """Return the graph definition, the parameters, and the other variables (balancing biases and tables) of a model."""
    return nnx.split(model, nnx.Param, (BalanceBias, Table))


def loss_and_gradients(graph: Any, params: Any, others: Any, batch: Batch, **options: Any) -> tuple[Any, LossStats, Any]:
    """Return the loss of the whole batch, its sums, and the gradients of the parameters (sharded as they are).

    `params` may be fp32 masters: the forward reads them rounded to the model's dtype.
    """

    def of_params(params):
        model = nnx.merge(graph, round_weights(params, graph_numerics(graph, params, others).dtype), others)
        return loss(model, batch, **options)

    (value, stats), gradients = jax.value_and_grad(of_params, has_aux=True)(params)
    return sharding.sum_over_batch(value), stats, sharding.sum_gradients(gradients)


def graph_numerics(graph: Any, params: Any, others: Any) -> Any:
    """Return the numerics a model's graph definition carries."""
    return nnx.merge(graph, params, others).numerics


def on_mesh(fun: Callable, mesh: Any, in_specs: Any, out_specs: Any) -> Callable:
    """Return `fun`, written for one device, as a program over the mesh; itself without a mesh."""
    if mesh is None:
        return fun
    return jax.shard_map(fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
