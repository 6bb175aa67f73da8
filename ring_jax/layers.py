"""Parameters, norms, rotary embedding and SwiGLU: the pieces the mixers and FFNs share."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.fused_layers import qk_norm_rope, residual_rms_norm, swiglu
from pallas_kernels.scaled_matmul import Quantized, QuantizedRows
from ring_jax.config import ModelConfig
from ring_jax.numerics import Numerics, Table


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float, *, fp8: bool = True, **metadata
) -> nnx.Param:
    """Return a normal(0, scale) parameter that knows its logical axes (see sharding.RULES) and its unsharded shape.

    fp8: in that precision it is quantised, on its way to a product or where it is loaded (see `numerics.inference_weights`).
    """
    value = scale * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes, full_shape=shape, fp8=fp8, **metadata)


def norm_weight(size: int) -> nnx.Param:
    """Return the weight of a norm, ones."""
    return nnx.Param(jnp.ones(size), logical_axes=(None,), full_shape=(size,))


class RMSNorm(nnx.Module):
    """The norm in front of a mixer, an FFN or the head."""

    def __init__(self, config: ModelConfig, numerics: Numerics):
        self.eps, self.numerics = config.norm_eps, numerics
        self.weight = norm_weight(config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"], y: Float[Array, "B T D"] | None = None, emit: tuple[str, ...] = ("plain",)) -> Any:
        """Return x + y, the residual stream after an update y, and its normalised rows in the compute dtype, as `emit` says."""
        return residual_rms_norm(x, y, self.weight[...], eps=self.eps, dtype=self.numerics.dtype, emit=emit, **self.numerics.ops)


def rotary_tables(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin [positions, rotary_size / 2], fp32, made in fp64 on the host; with YaRN (arXiv 2309.00071) if configured."""
    size, theta = config.rotary_size, config.rope_theta
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    amplitude = 1.0
    if config.rope_scaling:
        scaling = dict(config.rope_scaling)
        factor, original = scaling["factor"], scaling.get("original_max_position_embeddings", config.max_positions)
        # Channels that turn more than beta_fast times within the original length keep their frequency, slow ones are stretched.
        turns = lambda beta: size * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))
        low, high = math.floor(turns(scaling.get("beta_fast", 32))), math.ceil(turns(scaling.get("beta_slow", 1)))
        low, high = max(low, 0), min(high, size - 1)
        stretched = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
        frequencies = frequencies * (1 - stretched) + frequencies / factor * stretched
        amplitude = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1
    angles = np.arange(config.num_positions)[:, None] * frequencies
    return (amplitude * np.cos(angles)).astype(np.float32), (amplitude * np.sin(angles)).astype(np.float32)


class Rotary(nnx.Module):
    """The rotary tables of a model, gathered by position."""

    def __init__(self):
        self.cos, self.sin = Table(jnp.zeros((1, 0))), Table(jnp.zeros((1, 0)))  # made by the model

    def init_tables(self, config: ModelConfig) -> None:
        """Make the tables on the host."""
        cos, sin = rotary_tables(config)
        self.cos, self.sin = Table(jnp.asarray(cos)), Table(jnp.asarray(sin))

    def __call__(self, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """Return cos and sin at the positions, NaN past the last one; padding (negative positions) reads position 0."""
        positions = jnp.maximum(positions, 0)
        at = lambda table: table[...].at[positions].get(mode="fill", fill_value=jnp.nan)
        return at(self.cos), at(self.sin)


class HeadNorms(nnx.Module):
    """What follows the product with the qkv weight: the norms of queries and keys per head, and the rotary embedding."""

    def __init__(self, config: ModelConfig, numerics: Numerics):
        self.eps, self.numerics = config.norm_eps, numerics
        self.query, self.key = norm_weight(config.head_size), norm_weight(config.head_size)

    def project(
        self,
        x: Float[Array, "B T D"] | QuantizedRows,
        qkv: Float[Array, "D F"] | Quantized,
        num_kv_heads: int,
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Return x's queries and keys, normalised and rotated, and values, of G = num_kv_heads heads."""
        heads = functools.partial(qk_norm_rope, num_kv_heads=num_kv_heads, eps=self.eps)
        return self.numerics.matmul(x, qkv, heads, rows=[cos, sin], weights=[self.query[...], self.key[...]])


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x): the dense FFN and the shared expert."""

    def __init__(self, config: ModelConfig, numerics: Numerics, size: int, *, rngs: nnx.Rngs):
        width, scale = config.hidden_size, config.init_scale
        self.numerics = numerics
        self.gate_up = weight(rngs, (width, 2 * size), ("embed", "ffn"), scale)
        self.down = weight(rngs, (size, width), ("ffn", "embed"), scale / math.sqrt(2 * config.num_layers))

    def __call__(self, x: Float[Array, "B T D"] | QuantizedRows) -> Float[Array, "B T D"]:
        """Return the FFN's output."""
        gated = functools.partial(swiglu, emit=self.numerics.emit())
        return self.numerics.matmul(self.numerics.matmul(x, self.gate_up.get_value(), gated), self.down.get_value())
