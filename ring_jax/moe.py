"""The sparse FFN: grouped sigmoid router, dropless experts, a shared expert; experts may live on other devices."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_matmul import gather_groups, group_rows, grouped_matmul, row_tile_for, scatter_groups, take_rows
from pallas_kernels.matmul import matmul
from ring_jax import sharding
from ring_jax.config import ModelConfig
from ring_jax.layers import SwiGLU, swiglu, weight
from ring_jax.numerics import BalanceBias, Numerics, name


class RouterStats(NamedTuple):
    """Sums over this device's tokens: assignments per expert, and the squared log-sum-exp of the router's logits (z-loss)."""

    load: Float[Array, "*layers E"]
    z_sum: Float[Array, "*layers"]


class MoE(nnx.Module):
    """y = sum_a w_a expert_a(x) + shared(x), the A experts of the largest biased scores in the best expert groups."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, rngs: nnx.Rngs):
        width, size, experts, scale = config.hidden_size, config.expert_size, config.num_experts, config.init_scale
        self.config, self.numerics = config, numerics
        self.router = weight(rngs, (width, experts), ("embed", None), scale, keep_fp32=True)
        self.bias = BalanceBias(jnp.zeros(experts), logical_axes=(None,), full_shape=(experts,))
        self.gate_up = weight(rngs, (experts, width, 2 * size), ("experts", "embed", "ffn"), scale)
        self.down = weight(rngs, (experts, size, width), ("experts", "ffn", "embed"), scale / math.sqrt(2 * config.num_layers))
        if config.num_shared_experts:
            self.shared = SwiGLU(config, numerics, config.shared_expert_size, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return the FFN's output and what the router did; padding is routed nowhere."""
        experts, weights, stats = self.route(x, valid)
        slots = self.expert_outputs(x.reshape(-1, x.shape[-1]), experts.reshape(-1, experts.shape[-1])).reshape(*experts.shape, -1)
        y = name(self.combine(slots, weights), "experts")
        return (y + name(self.shared(x), "shared") if self.config.num_shared_experts else y), stats

    def route(self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"], RouterStats]:
        """Return each token's experts (E for padding) and their weights: sigmoid scores, selected with the bias, weighed without."""
        config = self.config
        scored = lambda logits: (logits, jax.nn.sigmoid(logits), jax.nn.logsumexp(logits, axis=-1))
        logits, scores, log_total = matmul(x.astype(jnp.float32), self.router[...], scored, **self.numerics.ops)
        chosen = self.choose(lax.stop_gradient(scores) + self.bias[...])
        weights = self.numerics.by_rows(self.weigh, jnp.take_along_axis(name(logits, "router"), chosen, axis=-1))
        chosen = jnp.where(valid[..., None], chosen, config.num_experts)
        load = jnp.bincount(chosen.reshape(-1), length=config.num_experts + 1)[:-1].astype(jnp.float32)
        return chosen, name(weights, "router_weights"), RouterStats(load, jnp.where(valid, log_total**2, 0.0).sum())

    def choose(self, ranked: Float[Array, "B T E"]) -> Int[Array, "B T A"]:
        """Return the experts of the largest ranks among those of the best groups (a group counts its two largest)."""
        config = self.config
        groups = ranked.reshape(*ranked.shape[:-1], config.num_expert_groups, -1)
        best_two, _ = lax.top_k(groups, min(2, groups.shape[-1]))
        _, kept = lax.top_k(best_two.sum(-1), config.num_active_expert_groups)
        keep = (kept[..., None] == jnp.arange(config.num_expert_groups)).any(-2)
        # Dropped groups get -inf, not 0: a biased score may be negative. top_k is stable: equal scores go to the lower expert.
        return lax.top_k(jnp.where(keep[..., None], groups, -jnp.inf).reshape(ranked.shape), config.num_active_experts)[1]

    def weigh(self, logits: Float[Array, "*rows A"]) -> Float[Array, "*rows A"]:
        """Return the weights of the chosen experts."""
        scores = jax.nn.sigmoid(logits)
        if self.config.norm_topk:
            scores = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        return scores * self.config.routed_scaling_factor

    def combine(self, slots: Float[Array, "*rows A D"], weights: Float[Array, "*rows A"]) -> Float[Array, "*rows D"]:
        """Return the weighted sum over the slots, in their order, in fp32, cast once."""
        weighted = weights[..., None] * slots.astype(jnp.float32)
        if self.numerics.aligned:
            # Products apart from sums: each is rounded once, so no compiler's multiply-add can tell programs apart and no tiles are
            # needed. The choice keeps them apart; its second branch is what it replaces (inf or NaN), which no compiler knows.
            weighted = jnp.where(jnp.isfinite(weighted), weighted, 2 * weighted)
        return functools.reduce(jnp.add, [weighted[..., a, :] for a in range(slots.shape[-2])]).astype(slots.dtype)

    def expert_outputs(self, rows: Float[Array, "N D"], experts: Int[Array, "N A"]) -> Float[Array, "N A D"]:
        """Return the output of each of a row's experts, wherever the experts live; zeros for padding."""
        num, num_slots = experts.shape
        num_shards = sharding.manual_axes().get("expert", 1)
        if num_shards == 1:
            return self._local_outputs(rows, experts)
        # Rows travel to the device of their expert and back; each slot's output is computed in one place, so no sum changes order.
        # Every pair of devices exchanges room for all of a device's rows: nothing is dropped, whatever the router does.
        per_shard, capacity = self.config.num_experts // num_shards, num * num_slots
        flat = experts.reshape(-1)
        shard = jnp.minimum(flat // per_shard, num_shards)
        order = jnp.argsort(shard, stable=True)
        rank = jnp.arange(capacity) - jnp.searchsorted(shard[order], shard[order], side="left")
        row = jnp.where(shard[order] == num_shards, num_shards * capacity, shard[order] * capacity + rank).astype(jnp.int32)
        destination = jnp.zeros(capacity, jnp.int32).at[order].set(row)
        source = jnp.full(num_shards * capacity, capacity, jnp.int32).at[row].set(order.astype(jnp.int32), mode="drop")
        exchange = lambda x: lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)
        token = jnp.where(source < capacity, source // num_slots, num)
        received = exchange(take_rows(rows, token, destination.reshape(num, num_slots)))
        wanted = exchange(jnp.take(flat % per_shard, source, mode="fill", fill_value=per_shard))
        out = exchange(self._local_outputs(received, wanted[:, None])[:, 0])
        return take_rows(out, destination, source[:, None]).reshape(num, num_slots, -1)

    def _local_outputs(self, rows: Float[Array, "N D"], experts: Int[Array, "N A"]) -> Float[Array, "N A D"]:
        """The same over the experts of this device."""
        gate_up, down = self.gate_up[...], self.down[...]
        (num, num_slots), num_experts, implementation = experts.shape, gate_up.shape[0], self.numerics.kernels
        row_tile = row_tile_for(num * num_slots, num_experts, aligned=self.numerics.aligned)
        groups = group_rows(experts.reshape(-1), num_experts, row_tile)
        grouped = gather_groups(rows, groups, num_slots)
        hidden = swiglu(grouped_matmul(grouped, gate_up, groups.tiles, row_tile=row_tile, implementation=implementation))
        out = grouped_matmul(hidden, down, groups.tiles, row_tile=row_tile, implementation=implementation)
        return scatter_groups(out, groups).reshape(num, num_slots, -1)


def balance(bias: Float[Array, "*layers E"], load: Float[Array, "*layers E"], rate: float) -> Float[Array, "*layers E"]:
    """Return the bias moved against the load by `rate` a step, zero-mean (aux-loss-free balancing, arXiv 2408.15664)."""
    bias = bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    return bias - bias.mean(-1, keepdims=True)
