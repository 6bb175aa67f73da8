"""Log-probabilities of tokens and the training loss: one function for training, evaluation, scoring and RL."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cross_entropy import token_logprobs as head_logprobs
from ring_jax import cache as caches
from ring_jax import sharding
from ring_jax.model import Ring, RingOutput
from ring_jax.moe import RouterStats
from ring_jax.numerics import BalanceBias, Numerics, Table, name, round_weights


class Batch(NamedTuple):
    """Packed rows: segment 0 is padding (position -1), positions restart at 0 with each document."""

    tokens: Int[Array, "*rows T"]
    positions: Int[Array, "*rows T"]
    segment_ids: Int[Array, "*rows T"]


def host_batch(tokens: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray | None = None) -> Batch:
    """Return a batch of host arrays, which the program it is given to puts on its devices; default segment: 1 where not padding."""
    segment_ids = (positions >= 0).astype(np.int32) if segment_ids is None else segment_ids
    return Batch(*cast(Any, (tokens, positions, segment_ids)))


class LossStats(NamedTuple):
    """Sums: negative log-likelihood, scored tokens, and the router statistics of the layer pattern and of the MTP layers."""

    nll: Float[Array, ""]
    num_tokens: Float[Array, ""]
    router: Any


def _next(x: jax.Array) -> jax.Array:
    """X one position earlier. The last column wraps around: it is masked, never sliced off, so that row tiles keep their shapes."""
    return jnp.roll(x, -1, axis=1)


def scored(batch: Batch, ahead: int = 1) -> Bool[Array, "B T"]:
    """Return which positions are scored: those whose token `ahead` further on is of the same document."""
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
    return jnp.where(scored(batch), logprobs, 0.0), output


def token_logprobs(model: Ring, batch: Batch) -> Float[Array, "B T"]:
    """Return the raw log-probability of each token given those before it in its document; 0 for a document's first token and padding."""
    logprobs, _ = next_token_logprobs(model, batch)
    return jnp.roll(logprobs, 1, axis=1)  # the last column is 0, so is the first one then


class Totals(NamedTuple):
    """Tokens of a whole batch, over all devices and accumulation steps: what its loss is the mean over."""

    scored: Float[Array, ""]
    further: tuple[Float[Array, ""], ...]
    valid: Float[Array, ""]


def totals(batch: Batch, num_mtp_layers: int) -> Totals:
    """Return the totals of a batch [..., T]; any leading axes are one batch."""
    batch = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    count = lambda marks: jnp.maximum(sharding.sum_over_batch(marks.sum().astype(jnp.float32)), 1.0)
    further = tuple(count(scored(batch, depth + 2)) for depth in range(num_mtp_layers))
    return Totals(count(scored(batch)), further, count(batch.segment_ids > 0))


def loss(model: Ring, batch: Batch, total: Totals, *, z_loss: float = 0.0, mtp_weight: float = 0.1) -> tuple[Float[Array, ""], LossStats]:
    """Return this device's share of the mean loss of the whole batch (the shares add up to it), and this device's sums.

    The loss is the mean negative log-likelihood of the scored tokens, plus `z_loss` times the mean squared log-sum-exp of the router
    logits (mean over tokens and MoE layers), plus `mtp_weight` times the mean loss of the multi-token-prediction layers.
    """
    logprobs, output = next_token_logprobs(model, batch)
    nll = -logprobs.sum()
    value = nll / total.scored
    further, router_further = _further_loss(model, batch, output.hidden, total)
    if model.config.num_mtp_layers:
        value = value + mtp_weight * further
    router = (output.router, router_further)
    z_sums = [stats.z_sum for stats in jax.tree.leaves(router, is_leaf=_is_stats) if stats is not None]
    if z_loss and z_sums:
        value = value + z_loss * sum(z.sum() for z in z_sums) / (total.valid * sum(z.size for z in z_sums))
    return value, LossStats(nll, scored(batch).sum().astype(jnp.float32), router)


def _is_stats(x: Any) -> bool:
    return isinstance(x, RouterStats)


def _further_loss(model: Ring, batch: Batch, hidden: Float[Array, "B T D"], total: Totals) -> tuple[Any, Any]:
    """Mean loss of the multi-token-prediction layers: layer d predicts the token d + 2 positions on from the layer before."""
    value, router = jnp.float32(0.0), []
    place = caches.place(batch.positions, batch.segment_ids, None, *model.rotary(batch.positions), model.config.chunk_size)
    tokens = batch.tokens
    for depth, layer in enumerate(model.mtp):
        tokens = _next(tokens)
        hidden, stats = layer(hidden, model.embed(tokens), place)
        logprobs = jnp.where(scored(batch, depth + 2), _target_logprobs(model, hidden, _next(tokens)), 0.0)
        value = value - logprobs.sum() / total.further[depth] / len(model.mtp)
        router.append(stats)
    return value, tuple(router)


def split(model: Ring) -> tuple[Any, Any, Any, Any]:
    """Return a model's graph definition, parameters, balancing biases and tables."""
    graph, params, balance, tables = nnx.split(model, nnx.Param, BalanceBias, Table)
    return graph, params, balance, tables


def merge(graph: Any, params: Any, balance: Any, tables: Any, dtype: str) -> Ring:
    """Return the model whose products read the parameters (fp32 masters, say) rounded to the dtype."""
    return nnx.merge(graph, round_weights(params, dtype), balance, tables)


def loss_and_gradients(
    graph: Any, numerics: Numerics, params: Any, balance: Any, tables: Any, batch: Batch, **options: Any
) -> tuple[Float[Array, ""], LossStats, Any]:
    """Return the loss of the whole batch, its sums, and the gradients of the parameters, sharded as they are.

    A batch of [steps, B, T] is accumulated step by step. Runs on one device's rows inside `on_mesh`.
    """
    total = totals(batch, len(nnx.merge(graph, params, balance, tables).mtp))

    def of_params(params, batch):
        return loss(merge(graph, params, balance, tables, numerics.dtype), batch, total, **options)

    def step(gradients, batch):
        (value, stats), more = jax.value_and_grad(of_params, has_aux=True)(params, batch)
        return jax.tree.map(jnp.add, gradients, more), (value, stats)

    if batch.tokens.ndim == 2:
        (value, stats), gradients = jax.value_and_grad(of_params, has_aux=True)(params, batch)
    else:
        gradients, per_step = lax.scan(step, jax.tree.map(jnp.zeros_like, params), batch)
        value, stats = jax.tree.map(lambda x: x.sum(0), per_step)
    value, stats = sharding.sum_over_batch((value, stats))
    return value, stats, sharding.sum_gradients(gradients)
