"""What a sequence leaves behind for its next tokens, and how a call's tokens lie on it.

The decode state of a linear layer is chunk-buffered (numerics contract, rule 2): the fp32 state at the last chunk boundary plus the keys
and values of the open chunk. That of a softmax layer is its keys and values by position.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import GRID
from pallas_kernels.compat import dot_operand
from ring_jax.config import ModelConfig


class LinearCache(NamedTuple):
    """State at the last chunk boundary and the open chunk's keys and values; rows past the open one are finite leftovers.

    copy: the state in the products' dtype, where that is a narrower one: a decode step reads it instead, half the bytes.
    """

    state: Float[Array, "*layers B H K V"]
    key: Float[Array, "*layers B H C K"]
    value: Float[Array, "*layers B H C V"]
    copy: Float[Array, "*layers B H K V"] | None = None


class SoftmaxCache(NamedTuple):
    """Keys and values by position, a token's heads side by side: so a TPU's kernel reads them where they lie, not a copy in its tiles.

    In pages (see `Cache`) B are these, and S the GRID positions of one.
    """

    key: Float[Array, "*layers B S GK"]
    value: Float[Array, "*layers B S GV"]


class Cache(NamedTuple):
    """Caches of all layers, in the structure of the model's layer pattern, and the tokens each slot has absorbed.

    pages: where softmax layers' keys and values are in pages that the slots share, the page of each slot's positions GRID i to
    GRID (i + 1), all layers alike; on a mesh, of those that the slot's device has. A number outside of these is none. The caller gives a
    slot its pages before tokens come to their positions (what would be written to none is dropped), and takes them back. Several slots may
    read one page, for documents that begin alike; of linear layers each has a state of its own.
    """

    layers: Any
    length: Int[Array, " B"]
    pages: Int[Array, "B n"] | None = None


class Placement(NamedTuple):
    """Where a call's tokens are: the same for every layer, so it is made once.

    valid marks tokens (others are padding); start and stop bound the keys a token sees: in the call itself, or in the cache if there is
    one. reset marks chunks that begin a packed document. With a cache a row's tokens are consecutive: `count` of them from column
    `first` on, continuing at position `length`. only: the column of each row whose hidden state is wanted of a softmax layer, if the others
    leave their keys and values and nothing else. on_grid: each slot has absorbed whole chunks, and its new tokens begin at column 0.
    pages: those of the cache.
    """

    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]
    reset: Bool[Array, "B chunks"] | None
    length: Int[Array, " B"]
    first: Int[Array, " B"]
    count: Int[Array, " B"]
    may_fold: bool = True
    on_grid: bool = False
    only: Int[Array, " B"] | None = None
    pages: Int[Array, "B n"] | None = None

    def wanted(self, x: jax.Array) -> jax.Array:
        """Return the columns of x [B, T, ...] whose hidden states are wanted: all, or one of each row, [B, 1, ...]."""
        if self.only is None:
            return x
        return jnp.take_along_axis(x, self.only.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


def place(
    positions: jax.Array, segment_ids: jax.Array | None, cache: Cache | None, cos: jax.Array, sin: jax.Array, chunk: int
) -> Placement:
    """Return the placement of tokens at these positions [B, T]; padding has a negative position or segment 0."""
    valid = positions >= 0 if segment_ids is None else (positions >= 0) & (segment_ids > 0)
    count, first = valid.sum(1).astype(jnp.int32), jnp.argmax(valid, axis=1)
    if cache is None:
        index = jnp.arange(positions.shape[1])
        start, stop = index - positions, jnp.broadcast_to(index + 1, positions.shape)  # positions restart at a document's first token
        bounds = jnp.where(valid, start, 0), jnp.where(valid, stop, 0)
        return Placement(positions, valid, cos, sin, *bounds, positions[:, ::chunk] == 0, jnp.zeros_like(count), first, count)
    start, stop = jnp.zeros_like(positions), jnp.where(valid, positions + 1, 0)
    return Placement(positions, valid, cos, sin, start, stop, None, cache.length, first, count, pages=cache.pages)


def linear_cache(config: ModelConfig, layers: tuple[int, ...], batch: int, dtype: str) -> LinearCache:
    """Return the empty cache of a stack of linear layers."""
    heads, size = (*layers, batch, config.num_heads), config.head_size
    held = dot_operand(jnp.zeros((), dtype)).dtype  # what products read is held as they take it
    state, buffer = (*heads, size, size), lambda: jnp.zeros((*heads, config.chunk_size, size), held)
    copy = None if held == jnp.float32 else jnp.zeros(state, held)
    return LinearCache(jnp.zeros(state), buffer(), buffer(), copy)


def softmax_cache(config: ModelConfig, layers: tuple[int, ...], batch: int, size: int, dtype: str) -> SoftmaxCache:
    """Return the empty cache of a stack of softmax layers, for at least `size` positions (whole key blocks)."""
    shape = (*layers, batch, -(-size // GRID) * GRID, config.num_kv_heads * config.head_size)
    empty = lambda: dot_operand(jnp.zeros(shape, dtype))
    return SoftmaxCache(empty(), empty())


def reset_slots(cache: Cache, slots: jax.Array) -> Cache:
    """Return the cache with the marked slots [B] empty; they keep their pages.

    Leftover keys and values need no clearing: nothing reads past a slot's length.
    """
    clear = lambda x: jnp.where(slots.reshape((-1,) + (1,) * 3), 0, x)
    states = lambda layer: jax.tree.map(clear, {"state": layer.state, "copy": layer.copy})
    empty = lambda layer: layer._replace(**states(layer)) if isinstance(layer, LinearCache) else layer
    is_layer = lambda x: isinstance(x, LinearCache | SoftmaxCache)
    return cache._replace(layers=jax.tree.map(empty, cache.layers, is_leaf=is_layer), length=jnp.where(slots, 0, cache.length))
