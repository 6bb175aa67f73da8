"""The softmax mixer: grouped-query attention with a norm per head and partial rotary embedding."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import GRID
from pallas_kernels.flash_attention import flash_attention, flash_attention_paged
from pallas_kernels.scaled_matmul import QuantizedRows
from ring_jax.cache import Placement, SoftmaxCache
from ring_jax.config import ModelConfig
from ring_jax.layers import HeadNorms, weight
from ring_jax.numerics import Numerics, name


class SoftmaxAttention(nnx.Module):
    """o_t = softmax(K**-0.5 q_t k^T) v over the tokens up to t of the same document; no gate, no bias."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, rngs: nnx.Rngs):
        width, size = config.hidden_size, config.num_heads * config.head_size
        self.config, self.numerics = config, numerics
        self.qkv = weight(rngs, (width, size + 2 * config.num_kv_heads * config.head_size), ("embed", "heads"), config.init_scale)
        self.head_norms = HeadNorms(config, numerics)
        self.out = weight(rngs, (size, width), ("heads", "embed"), config.init_scale / math.sqrt(2 * config.num_layers))

    def __call__(
        self, x: Float[Array, "B T D"] | QuantizedRows, place: Placement, cache: SoftmaxCache | None
    ) -> tuple[Float[Array, "B R D"], SoftmaxCache | None]:
        """Return the mixer's output for the wanted tokens and the cache after the call's tokens."""
        config = self.config
        q, k, v = self.head_norms.project(x, self.qkv.get_value(), config.num_kv_heads, place.cos, place.sin)
        q, k, v = name(q, "query"), name(k, "key"), name(v, "value")
        if cache is not None:
            cache = _write(cache, k, v, place)
            k, v = (x.reshape(*x.shape[:2], *k.shape[2:]) for x in cache)
        q, start, stop = map(place.wanted, (q, place.start, place.stop))
        if place.pages is None:
            o = flash_attention(q, k, v, start, stop, **self.numerics.ops)
        else:
            o = flash_attention_paged(q, k, v, place.pages, start, stop, **self.numerics.ops)
        o = name(o, "mixer")
        return name(self.numerics.matmul(o.reshape(*o.shape[:2], -1), self.out.get_value()), "mixer_out"), cache


def _write(cache: SoftmaxCache, k: Float[Array, "B T G K"], v: Float[Array, "B T G V"], place: Placement) -> SoftmaxCache:
    """Return the cache with the call's keys and values at their positions; padding is dropped."""
    row, position = jnp.arange(k.shape[0])[:, None], place.positions
    if place.pages is not None:
        row = jnp.take_along_axis(place.pages, jnp.maximum(position, 0) // GRID, axis=1, mode="fill", fill_value=-1)
        row, position = jnp.where(row < 0, cache.key.shape[0], row), position % GRID
    position = jnp.where(place.valid, position, cache.key.shape[1])
    write = lambda old, new: old.at[row, position].set(new.reshape(*new.shape[:2], -1), mode="drop", unique_indices=True)
    return SoftmaxCache(write(cache.key, k), write(cache.value, v))
