"""Checkpoints and programs that the tests of the model and of inference share."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from pallas_kernels.cross_entropy import head_logits
from ring_jax import numerics
from ring_jax.config import ModelConfig, to_hf
from ring_jax.infer.align import layer_values
from ring_jax.infer.taps import tapped
from ring_jax.model import Ring
from tests.ring_jax.random_tensors import Tensors

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"

SMALL = ModelConfig(
    vocab_size=260,
    num_layers=4,
    hidden_size=24,
    num_heads=6,
    num_kv_heads=3,
    head_size=8,
    period=3,
    num_norm_groups=3,
    ffn_size=40,
    expert_size=16,
    shared_expert_size=24,
    num_experts=8,
    num_active_experts=3,
    num_expert_groups=4,
    num_active_expert_groups=2,
    max_positions=512,
    init_scale=0.2,
)
"""Each kind of layer once: linear and dense, linear and sparse, softmax, and a softmax layer behind the last whole group."""
TWO_LAYERS = dataclasses.replace(SMALL, num_layers=2, period=2)
"""Each operator once: a linear layer with a dense FFN, a softmax layer with experts."""

YARN = (("beta_fast", 32), ("factor", 4.0), ("original_max_position_embeddings", 512), ("rope_type", "yarn"))


def write_hf(folder: pathlib.Path, config: ModelConfig, tensors: Tensors, **fields: Any) -> pathlib.Path:
    """Write a Hugging Face folder, with these `fields` of config.json besides the config's, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config) | fields))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


class Forward(NamedTuple):
    """fp32 logits [B, T, vocab] and the residual stream after each layer [L, B, T, D]."""

    logits: np.ndarray
    hidden: np.ndarray


class Programs:
    """A model's forward, compiled once a shape: whole documents, and through a cache."""

    def __init__(self, model: Ring):
        self.model = model
        self._graph, _ = nnx.split(model)
        self._taps: list[Any] = []

        def whole(state, tokens, positions, segment_ids):
            return nnx.merge(self._graph, state)(tokens, positions, segment_ids=segment_ids).hidden

        def cached(state, tokens, positions, cache):
            output = nnx.merge(self._graph, state)(tokens, positions, cache)
            return output.hidden, output.cache

        def everything(state, tokens, positions):
            merged = nnx.merge(self._graph, state)
            hidden = merged(tokens, positions).hidden.reshape(-1, merged.config.hidden_size)
            return head_logits(hidden, merged.head_weight(), **model.numerics.ops)[0].reshape(*tokens.shape, -1)

        def taps(*args):
            logits, self._taps[:] = tapped(everything)(*args)
            return logits, [tap.value for tap in self._taps]

        self._whole = numerics.jit(whole, model.numerics)
        self._cached = numerics.jit(cached, model.numerics)
        self._everything = numerics.jit(taps, model.numerics)

    @property
    def state(self) -> Any:
        """What the model holds now: a test may change it."""
        return nnx.split(self.model)[1]

    def hidden(self, tokens: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray | None = None) -> np.ndarray:
        """Return the hidden states [B, T, D] after the final norm."""
        segment_ids = (positions >= 0).astype(np.int32) if segment_ids is None else segment_ids
        return np.asarray(self._whole(self.state, tokens, positions, segment_ids))

    def cached(self, tokens: np.ndarray, positions: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """Return the same for tokens that continue a cache, and the cache after them."""
        hidden, cache = self._cached(self.state, tokens, positions, cache)
        return np.asarray(hidden), cache

    def forward(self, tokens: Sequence[int]) -> Forward:
        """Return the logits [T, vocab] of one document, and its residual stream after each layer."""
        tokens = np.asarray(tokens, np.int32)[None]
        logits, values = self._everything(self.state, tokens, np.arange(tokens.shape[1], dtype=np.int32)[None])
        taps = [tap._replace(value=value) for tap, value in zip(self._taps, values, strict=True)]
        rows = layer_values(self.model, taps, tokens.shape).rows
        return Forward(np.asarray(logits)[0], np.stack([rows[layer, "block"][0] for layer in range(self.model.config.num_layers)]))


def pad(documents: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and positions [B, width] of documents padded on the right."""
    tokens, positions = np.zeros((len(documents), width), np.int32), np.full((len(documents), width), -1, np.int32)
    for row, document in enumerate(documents):
        tokens[row, : len(document)], positions[row, : len(document)] = document, np.arange(len(document))
    return tokens, positions


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two trees of arrays are finite and do not differ in a single bit."""
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and bool(np.isfinite(x).all()) and x.tobytes() == y.tobytes()
    return jax.tree.all(jax.tree.map(lambda x, y: same(np.asarray(x), np.asarray(y)), a, b))
