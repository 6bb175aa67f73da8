"""One layer: a mixer and an FFN, each behind a norm, on the residual stream."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ring_jax import sharding
from ring_jax.attention import SoftmaxAttention
from ring_jax.cache import Placement
from ring_jax.config import ModelConfig
from ring_jax.layers import RMSNorm, SwiGLU
from ring_jax.linear_attention import LinearAttention
from ring_jax.moe import MoE, RouterStats
from ring_jax.numerics import Numerics, name


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)), on an fp32 residual stream."""

    def __init__(self, config: ModelConfig, numerics: Numerics, mixer: str, ffn: str, *, rngs: nnx.Rngs):
        self.numerics = numerics
        self.mixer_norm, self.ffn_norm = RMSNorm(config, numerics), RMSNorm(config, numerics)
        self.mixer = (SoftmaxAttention if mixer == "softmax" else LinearAttention)(config, numerics, rngs=rngs)
        self.ffn = SwiGLU(config, numerics, config.ffn_size, rngs=rngs) if ffn == "dense" else MoE(config, numerics, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], place: Placement, cache: Any) -> tuple[Float[Array, "B R D"], Any, RouterStats | None]:
        """Return the wanted rows of the residual stream after the block, the layer's cache, and what its router did (None if dense)."""
        x, y = self.mixer_norm(x, emit=self.numerics.emit())
        y, cache = self.mixer(name(y, "mixer_norm"), place, cache)
        x, y = self.ffn_norm(place.wanted(x), y, emit=self.numerics.emit(plain=isinstance(self.ffn, MoE)))
        x, y = name(x, "residual"), name(y, "ffn_norm")
        y, stats = self.ffn(y, place.wanted(place.valid)) if isinstance(self.ffn, MoE) else (self.ffn(y), None)
        return name(x + name(y, "ffn").astype(jnp.float32), "block"), cache, stats


def remat(layer: Callable, policy: str) -> Callable:
    """Return the layer with the rematerialisation asked for. Weights gathered from other devices are never kept for the gradient."""
    if policy == "full":
        return jax.checkpoint(layer)
    if policy == "mixers":
        return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("mixer", "mixer_out"))
    return jax.checkpoint(layer, policy=sharding.all_but_weights) if sharding.manual_axes() else layer
