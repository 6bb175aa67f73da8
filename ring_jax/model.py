"""Ring: the layer pattern, its scan, and the one forward pass of training, prefill and decode."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import GRID
from ring_jax import cache as caches
from ring_jax import sharding
from ring_jax.block import Block, remat
from ring_jax.cache import Cache, Placement
from ring_jax.config import ModelConfig
from ring_jax.layers import RMSNorm, Rotary, weight
from ring_jax.linear_attention import LinearAttention, log_decay
from ring_jax.mtp import MultiTokenPrediction
from ring_jax.numerics import Numerics, Table, name


class Run(NamedTuple):
    """`repeat` consecutive layers of one kind; `layers` numbers them, one tuple for each group."""

    mixer: str
    ffn: str
    layers: tuple[tuple[int, ...], ...]


def num_layers(runs: tuple[Run, ...]) -> int:
    """Return the number of a segment's layers."""
    return sum(len(layers) for run in runs for layers in run.layers)


def layer_pattern(config: ModelConfig, stacked: bool = True) -> tuple[tuple[Run, ...], ...]:
    """Return the model as segments of runs: the groups with dense layers in front, the group that repeats, the trailing layers.

    A segment is repeated as often as its runs have groups. Depth is a loop, so tracing and compiling do not grow with it. Not stacked,
    each layer is a segment of its own: the same model with a buffer a layer. Inference has that: what a kernel reads of a stack in a loop
    is sliced out first, so a decode step would copy every weight and every cache.
    """
    kinds = [(config.mixer(layer), config.ffn(layer)) for layer in range(config.num_layers)]
    if not stacked:
        return tuple((Run(*kind, ((layer,),)),) for layer, kind in enumerate(kinds))
    period = config.period
    head = min(-(-config.num_dense_layers // period) * period, config.num_layers // period * period)
    repeats = (config.num_layers - head) // period
    tail = head + repeats * period

    def runs(first: int, last: int, groups: int) -> tuple[Run, ...]:
        found: list[Run] = []
        for layer in range(first, last):
            every = tuple((layer + group * period,) for group in range(groups))
            if found and found[-1][:2] == kinds[layer]:
                joined = tuple(a + b for a, b in zip(found[-1].layers, every, strict=True))
                found[-1] = found[-1]._replace(layers=joined)
            else:
                found.append(Run(*kinds[layer], every))
        return tuple(found)

    segments = [runs(first, min(first + period, head), 1) for first in range(0, head, period)]
    if repeats:
        segments.append(runs(head, head + period, repeats))
    return tuple(segment for segment in (*segments, runs(tail, config.num_layers, 1)) if segment)


def _stack(config: ModelConfig, numerics: Numerics, run: Run, rngs: nnx.Rngs) -> Block:
    """A block whose variables have the leading axes [groups, repeat]."""
    shape = (len(run.layers), len(run.layers[0]))
    create = lambda key: nnx.split(Block(config, numerics, run.mixer, run.ffn, rngs=nnx.Rngs(key)))[1]
    keys = jax.random.split(rngs.params(), shape)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Block(config, numerics, run.mixer, run.ffn, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.vmap(jax.vmap(create))(keys))


def _loop(body: Any, x: Any, per_layer: Any, length: int, unroll: int = 1, wrap: Any = lambda turn: turn) -> tuple[Any, Any]:
    """`lax.scan` over a leading axis of turns, each wrapped for rematerialisation; a single one is inlined."""
    if length > 1:
        return lax.scan(wrap(body), x, per_layer, unroll=min(unroll, length))

    def turn(x, per_layer):
        x, out = body(x, jax.tree.map(lambda a: lax.squeeze(a, [0]), per_layer))
        return x, jax.tree.map(lambda a: a[None], out)

    # The only layer is taken of its stack inside: the stack, which lives anyway, stays for the gradient, and no copy of the layer.
    return wrap(turn)(x, per_layer)


class RingOutput(NamedTuple):
    """hidden: after the final norm, in the compute dtype. router: the statistics of each run of MoE layers, in the layer pattern."""

    hidden: Float[Array, "B R D"]
    cache: Cache | None
    router: Any


class Ring(nnx.Module):
    """The hybrid model. It holds parameters and constant tables only; caches go in and come out.

    `stacked` chooses the layout of the parameters (see `layer_pattern`), never the result.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics = Numerics(), *, rngs: nnx.Rngs, stacked: bool = True):
        self.config, self.numerics, self.pattern = config, numerics, layer_pattern(config, stacked)
        self.embedding = weight(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), config.init_scale, fp8=False)
        self.segments = nnx.List([nnx.List([_stack(config, numerics, run, rngs) for run in segment]) for segment in self.pattern])
        self.norm = RMSNorm(config, numerics)
        if not config.tie_embeddings:
            self.head = weight(rngs, (config.hidden_size, config.vocab_size), ("embed", "vocab"), config.init_scale, fp8=False)
        self.rotary = Rotary()
        self.mtp = nnx.List([MultiTokenPrediction(config, numerics, rngs=rngs) for _ in range(config.num_mtp_layers)])
        self.init_tables()

    def init_tables(self) -> None:
        """Make the constant tables on the host: rotary angles, and the decay of each linear layer, which depends on its depth."""
        self.rotary.init_tables(self.config)
        for segment, runs in zip(self.segments, self.pattern, strict=True):
            for block, run in zip(segment, runs, strict=True):
                if isinstance(block.mixer, LinearAttention):
                    decays = [[log_decay(self.config, layer) for layer in layers] for layers in run.layers]
                    block.mixer.log_decay = Table(jnp.array(decays))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        only: Int[Array, " B"] | None = None,
        may_fold: bool = True,
        on_grid: bool = False,
    ) -> RingOutput:
        """Return the hidden states, the cache after the tokens, and the routers' statistics.

        Without a cache: whole rows, packed with documents that start at multiples of GRID and whose positions restart at 0. With one:
        T = 1 is a decode step, T > 1 a piece of a prompt that continues each slot; padding has negative positions and changes nothing.
        With `only` the hidden states are those of one column of each row, [B, 1, D]: what the last layer does for others alone is left out
        (where it is not part of a loop over layers).
        A caller who knows that no slot's decode step ends a chunk may say so (may_fold=False) and spare the program the fold; likewise
        (on_grid=True) that every slot has absorbed whole chunks, maybe none, and its piece begins at column 0: then no row is moved.
        """
        place = caches.place(positions, segment_ids, cache, *self.rotary(positions), self.config.chunk_size)
        place = place._replace(may_fold=may_fold, on_grid=on_grid)
        x = name(self.embed(tokens), "embedding")
        layers, router = [], []
        for i, (segment, runs) in enumerate(zip(self.segments, self.pattern, strict=True)):
            if i == len(self.pattern) - 1 and num_layers(runs) == 1:
                place = place._replace(only=only)  # the last layer is a softmax one, whatever the pattern
            x, (layer_caches, stats) = self._segment(segment, runs, x, place, cache and cache.layers[i])
            layers.append(layer_caches)
            router.append(stats)
        if place.only is None:
            x = place._replace(only=only).wanted(x)
        hidden = name(self.norm(x)[1], "final_norm")
        after = None if cache is None else cache._replace(layers=tuple(layers), length=cache.length + place.count)
        return RingOutput(hidden, after, tuple(router))

    def _segment(self, segment: nnx.List, runs: tuple[Run, ...], x: jax.Array, place: Placement, cache: Any) -> tuple[Any, Any]:
        """The residual stream after all groups of a segment, with the caches and router statistics of each of its runs."""
        graphs, states = zip(*(nnx.split(block) for block in segment), strict=True)
        unroll, wrap = self.numerics.unroll, functools.partial(remat, policy=self.numerics.remat)

        def group(x, per_group):
            states, group_caches = per_group
            caches, stats = [], []
            for run, graph, state, run_cache in zip(runs, graphs, states, group_caches, strict=True):

                def layer(x, per_layer, graph=graph):
                    state, layer_cache = per_layer
                    x, layer_cache, stats = nnx.merge(graph, sharding.gather(state))(x, place, layer_cache)
                    return x, (layer_cache, stats)

                x, (run_cache, run_stats) = _loop(layer, x, (state, run_cache), len(run.layers[0]), unroll, wrap)
                caches.append(run_cache)
                stats.append(run_stats)
            return x, (tuple(caches), tuple(stats))

        return _loop(group, x, (states, cache or (None,) * len(runs)), len(runs[0].layers))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the tokens' embeddings, fp32."""
        return sharding.gather(self.embedding)[...][tokens].astype(jnp.float32)

    def head_weight(self) -> Float[Array, "D vocab"]:
        """Return the LM head, whole."""
        if self.config.tie_embeddings:
            return sharding.gather(self.embedding)[...].T
        return sharding.gather(self.head)[...]

    def init_cache(self, batch: int, size: int, num_pages: int | None = None) -> Cache:
        """Return the empty cache of `batch` slots for sequences of up to `size` tokens.

        With `num_pages` the slots share so many pages of softmax layers' keys and values, and have none yet: see `Cache.pages`.
        """
        shape, pages = (batch, size), None
        if num_pages is not None:
            shape, pages = (num_pages, GRID), jnp.full((batch, -(-size // GRID)), num_pages, jnp.int32)

        def run_cache(run: Run) -> Any:
            stack = (len(run.layers), len(run.layers[0]))
            if run.mixer == "linear":
                return caches.linear_cache(self.config, stack, batch, self.numerics.dtype)
            return caches.softmax_cache(self.config, stack, *shape, self.numerics.dtype)

        layers = tuple(tuple(run_cache(run) for run in segment) for segment in self.pattern)
        return Cache(layers, jnp.zeros(batch, jnp.int32), pages)
