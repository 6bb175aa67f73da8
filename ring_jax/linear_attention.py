"""The linear mixer: Lightning attention with a decay per head, a grouped norm and a sigmoid gate (arXiv 2510.19338, section 2)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.fused_layers import gated_group_norm
from pallas_kernels.lightning_attention import lightning_attention, lightning_attention_step
from pallas_kernels.scaled_matmul import Product, QuantizedRows
from ring_jax.cache import LinearCache, Placement
from ring_jax.config import ModelConfig
from ring_jax.layers import HeadNorms, norm_weight, weight
from ring_jax.numerics import Numerics, Table, name


def log_decay(config: ModelConfig, layer: int) -> np.ndarray:
    """Return g [H], fp32: minus the ALiBi slope of the head times f(layer), which falls from 1 in the first layer to 1e-5 in the last."""

    def power_of_two(heads: int) -> list[float]:
        return [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]

    lower = 1 << (config.num_heads.bit_length() - 1)
    slopes = power_of_two(lower) + power_of_two(2 * lower)[::2][: config.num_heads - lower]
    fade = 1 - (layer - config.decay_layer_offset) / max(config.num_layers - 1, 1) + 1e-5
    return (-np.array(slopes) * fade).astype(np.float32)


class LinearAttention(nnx.Module):
    """S_t = exp(g) S_{t-1} + k_t^T v_t,  o_t = K**-0.5 q_t S_t,  y = W_out (groupnorm(o) * sigmoid(W_gate x))."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, rngs: nnx.Rngs):
        width, heads, size = config.hidden_size, config.num_heads, config.num_heads * config.head_size
        self.config, self.numerics = config, numerics
        self.qkv = weight(rngs, (width, 3 * size), ("embed", "heads"), config.init_scale)
        self.head_norms = HeadNorms(config, numerics)
        self.gate = weight(rngs, (width, size), ("embed", "heads"), config.init_scale)
        self.group_norm = norm_weight(size)
        self.out = weight(rngs, (size, width), ("heads", "embed"), config.init_scale / math.sqrt(2 * config.num_layers))
        self.log_decay = Table(jnp.zeros(heads))  # set by the model, which knows the layer

    def __call__(
        self, x: Float[Array, "B T D"] | QuantizedRows, place: Placement, cache: LinearCache | None
    ) -> tuple[Float[Array, "B T D"], LinearCache | None]:
        """Return the mixer's output and the cache after the call's tokens."""
        config, product = self.config, self.numerics.matmul
        q, k, v = self.head_norms.project(x, self.qkv.get_value(), config.num_heads, place.cos, place.sin)
        o, cache = self.attend(name(q, "query"), name(k, "key"), name(v, "value"), place, cache)
        o = name(o, "mixer").reshape(*o.shape[:2], -1)
        o = name(product(x, self.gate.get_value(), self.gated_norm, rows=[o], weights=[self.group_norm[...]]), "gated")
        return name(product(o, self.out.get_value()), "mixer_out"), cache

    def gated_norm(
        self, gate: Float[Array, "*rows D"] | Product, o: Float[Array, "*rows D"], weight: Float[Array, " D"], **how: Any
    ) -> Float[Array, "*rows D"] | QuantizedRows:
        """Return groupnorm(o) * sigmoid(gate); the gate is not normalised."""
        how |= {"num_groups": self.config.num_norm_groups, "eps": self.config.norm_eps, "emit": self.numerics.emit()}
        return gated_group_norm(o, gate, weight, **how)

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T H K"],
        v: Float[Array, "B T H V"],
        place: Placement,
        cache: LinearCache | None,
    ) -> tuple[Float[Array, "B T H V"], LinearCache | None]:
        """Return Lightning attention: whole documents without a cache, else a decode step (T = 1) or a piece of a prompt."""
        decay, chunk, ops = self.log_decay[...], self.config.chunk_size, self.numerics.ops
        if cache is None:
            return lightning_attention(q, k, v, decay, reset=place.reset, chunk_size=chunk, **ops)[0], None
        offset = place.length % chunk  # rows of the open chunk that are in the buffers
        if q.shape[1] == 1:
            row = jnp.where(place.valid[:, 0], offset, chunk)
            token, how = (q[:, 0], k[:, 0], v[:, 0]), {"state_copy": cache.copy, "may_fold": place.may_fold, **ops}
            step = lightning_attention_step(*token, cache.state, cache.key, cache.value, decay, row, **how)
            return step.out[:, None], LinearCache(*step[1:])
        grid_q, grid_k, grid_v = (q, k, v) if place.on_grid else self._on_grid(q, k, v, place, cache)
        total = offset + place.count
        o, state = lightning_attention(grid_q, grid_k, grid_v, decay, state=cache.state, length=total, chunk_size=chunk, **ops)
        if not place.on_grid:
            column = jnp.arange(q.shape[1]) - place.first[:, None] + offset[:, None]
            o = jnp.take_along_axis(o, jnp.clip(column, 0, o.shape[1] - 1)[..., None, None], axis=1)
        rows = (total // chunk * chunk)[:, None] + jnp.arange(chunk)
        rows, open_rows = rows[..., None, None], (rows < total[:, None])[..., None, None]
        last = lambda x: jnp.where(open_rows, jnp.take_along_axis(x, jnp.minimum(rows, x.shape[1] - 1), axis=1), 0)
        tail = lambda x: jnp.moveaxis(last(x), 1, 2).astype(cache.key.dtype)
        return o, LinearCache(state, tail(grid_k), tail(grid_v), None if cache.copy is None else state.astype(cache.copy.dtype))

    def _on_grid(self, q: jax.Array, k: jax.Array, v: jax.Array, place: Placement, cache: LinearCache) -> tuple[jax.Array, ...]:
        """A piece's rows behind those of the open chunk, so that they lie on the grid of chunks again."""
        chunk = self.config.chunk_size
        num_rows = -(-(q.shape[1] + chunk - 1) // chunk) * chunk
        buffered = lambda x: jnp.moveaxis(x, 2, 1)  # [B, H, C, K] -> [B, C, H, K]
        key, value = buffered(cache.key), buffered(cache.value)
        behind = lambda buffer, x: _shift(
            jnp.concatenate([buffer, x], axis=1), chunk, place.first, place.length % chunk, place.count, num_rows
        )
        return behind(jnp.zeros_like(key, q.dtype), q), behind(key, k), behind(value, v)


def _shift(
    rows: Float[Array, "B source H K"], chunk: int, first: jax.Array, offset: jax.Array, count: jax.Array, num_rows: int
) -> Float[Array, "B rows H K"]:
    """Return `offset` buffered rows (of the `chunk` in front) followed by `count` new ones (from `first` on), then zeros."""
    at = jnp.arange(num_rows)
    offset, first, count = offset[:, None], first[:, None], count[:, None]
    source = jnp.where(at < offset, at, chunk + first + at - offset)
    taken = jnp.take_along_axis(rows, jnp.clip(source, 0, rows.shape[1] - 1)[..., None, None], axis=1)
    return jnp.where((at < offset + count)[..., None, None], taken, 0)
