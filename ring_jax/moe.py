"""The sparse FFN: grouped sigmoid router, dropless experts, a shared expert; experts may live on other devices."""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.fused_layers import route
from pallas_kernels.grouped_matmul import Groups, combine_groups, group_rows, row_tile_for, take_rows
from pallas_kernels.matmul import matmul
from pallas_kernels.scaled_matmul import QuantizedRows
from ring_jax import sharding
from ring_jax.config import ModelConfig
from ring_jax.layers import SwiGLU, weight
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
        self.router = weight(rngs, (width, experts), ("embed", None), scale, fp8=False, keep_fp32=True)
        self.bias = BalanceBias(jnp.zeros(experts), logical_axes=(None,), full_shape=(experts,))
        self.gate_up = weight(rngs, (experts, width, 2 * size), ("experts", "embed", "ffn"), scale)
        self.down = weight(rngs, (experts, size, width), ("experts", "ffn", "embed"), scale / math.sqrt(2 * config.num_layers))
        if config.num_shared_experts:
            self.shared = SwiGLU(config, numerics, config.shared_expert_size, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"] | QuantizedRows, valid: Bool[Array, "B T"]) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return the FFN's output and what the router did; padding is routed nowhere."""
        plain = x.plain if isinstance(x, QuantizedRows) else x
        experts, weights, stats = self.route(plain, valid)
        experts, weights = (y.reshape(-1, y.shape[-1]) for y in (experts, weights))
        rows = x.flat if isinstance(x, QuantizedRows) else x.reshape(-1, x.shape[-1])
        if isinstance(rows, QuantizedRows) and not self.numerics.gradients:
            rows = rows._replace(plain=None, carrier=None)  # the experts' rows are in FP8 alone, wherever they go
        y = name(self.weighted_experts(rows, experts, weights).reshape(plain.shape), "experts")
        return (y + name(self.shared(x), "shared") if self.config.num_shared_experts else y), stats

    def route(self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"], RouterStats]:
        """Return each token's experts (E for padding) and their weights: sigmoid scores, selected with the bias, weighed without."""
        config = self.config
        choose = functools.partial(
            route,
            num_active=config.num_active_experts,
            num_groups=config.num_expert_groups,
            num_active_groups=config.num_active_expert_groups,
            normalise=config.norm_topk,
            factor=config.routed_scaling_factor,
        )
        found = matmul(x.astype(jnp.float32), self.router[...], choose, weights=[self.bias[...]], **self.numerics.ops)
        chosen, weights, log_total = found
        chosen = jnp.where(valid[..., None], chosen, config.num_experts)
        load = jnp.bincount(chosen.reshape(-1), length=config.num_experts + 1)[:-1].astype(jnp.float32)
        return chosen, name(weights, "router"), RouterStats(load, jnp.where(valid, log_total**2, 0.0).sum())

    def weighted_experts(
        self, rows: Float[Array, "N D"] | QuantizedRows, experts: Int[Array, "N A"], weights: Float[Array, "N A"]
    ) -> Float[Array, "N D"]:
        """Return the weighted sum of the outputs of each row's experts, wherever the experts live; zeros for padding."""
        num_shards = sharding.manual_axes().get("expert", 1)
        if num_shards == 1:
            return self._sums(rows, experts, weights)
        # Each device computes its experts for the tokens of all devices of the axis, and they add up what they get back: of one size,
        # whatever the router does, and a token travels once to a device, however many of its experts are there.
        move = lambda to: rows.moved(to) if isinstance(rows, QuantizedRows) else to(rows)
        num_slots, per_shard = experts.shape[1], self.config.num_experts // num_shards
        everywhere = functools.partial(sharding.gather_rows, axis="expert")
        rows, weights = move(everywhere), everywhere(weights)
        experts = everywhere(experts) - lax.axis_index("expert") * per_shard
        experts = jnp.where((experts >= 0) & (experts < per_shard), experts, per_shard)
        if not self.numerics.aligned:
            return sharding.reduce_scatter_rows(self._sums(rows, experts, weights), axis="expert")
        # Aligned, a token's slots come back one by one: each meets zeros only, and they are added in their order as on one device.
        slots = jnp.arange(experts.size).reshape(experts.shape)
        rows = move(lambda x: take_rows(x, slots.reshape(-1) // num_slots, slots))
        found: Any = sharding.reduce_scatter_rows(self._sums(rows, experts.reshape(-1, 1), weights.reshape(-1, 1)), axis="expert")
        own = jnp.arange(len(found))
        return combine_groups(found, Groups(own, own, tiles=jnp.zeros(0, jnp.int32)), num_slots, implementation=self.numerics.kernels)

    def _sums(
        self, rows: Float[Array, "N D"] | QuantizedRows, experts: Int[Array, "N A"], weights: Float[Array, "N A"]
    ) -> Float[Array, "N D"]:
        """The weighted sum of the outputs of each row's experts, which are this device's; E and above is none."""
        num_experts = self.config.num_experts // sharding.manual_axes().get("expert", 1)
        row_tile = row_tile_for(experts.size, num_experts, aligned=self.numerics.aligned)
        groups = group_rows(experts.reshape(-1), num_experts, row_tile)
        return self.numerics.grouped_mlp(rows, self.gate_up.get_value(), self.down.get_value(), groups, weights, row_tile)


def balance(bias: Float[Array, "*layers E"], load: Float[Array, "*layers E"], rate: float) -> Float[Array, "*layers E"]:
    """Return the bias moved against the load by `rate` a step, zero-mean (aux-loss-free balancing, arXiv 2408.15664)."""
    bias = bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    return bias - bias.mean(-1, keepdims=True)
