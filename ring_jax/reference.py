"""The whole model in numpy, from the equations alone: what `convert --verify` and the model's tests compare with.

It shares nothing with the model but `ModelConfig`'s fields. Weights are those of a Hugging Face checkpoint, by name, [out, in]; linear
attention is its recurrence, softmax attention and the experts are loops. One document, no cache. Each method is one statement of the
model, so that a test states a mistake by overriding one.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ring_jax.config import ModelConfig


class Result(NamedTuple):
    """Logits [T, vocab], the residual stream after each layer [L, T, D], and the state of each linear layer [H, K, V]."""

    logits: np.ndarray
    hidden: np.ndarray
    states: dict[int, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return the logistic function."""
    return 1 / (1 + np.exp(-x))


class Weights:
    """Tensors by name in one dtype, each read (by indexing) and cast when asked for."""

    def __init__(self, tensors: Any, dtype: str):
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._tensors[name]).astype(self._dtype)


class Twin:
    """A checkpoint's model, computed in `dtype`."""

    def __init__(self, config: ModelConfig, tensors: Any, dtype: str = "float64"):
        self.config, self.dtype, self.tensors = config, dtype, Weights(tensors, dtype)

    def __call__(self, tokens: np.ndarray, positions: np.ndarray | None = None) -> Result:
        """Return what the model makes of one document, whose positions count from 0 unless given."""
        positions = np.arange(len(tokens)) if positions is None else positions
        x, hidden, states = self.tensors["model.word_embeddings.weight"][tokens], [], {}
        for layer in range(self.config.num_layers):
            x = self.block(layer, x, positions, states, self.mixer(layer))
            hidden.append(x)
        head = self.tensors["model.word_embeddings.weight" if self.config.tie_embeddings else "lm_head.weight"]
        return Result(self.rms(x, self.tensors["model.norm.weight"]) @ head.T, np.array(hidden), states)

    def block(self, layer: int, x: np.ndarray, positions: np.ndarray, states: dict[int, np.ndarray], mixer: str) -> np.ndarray:
        """Return the residual stream after a layer."""
        p = f"model.layers.{layer}."
        mix = self.linear if mixer == "linear" else self.softmax
        x = self.residual(x + mix(layer, self.rms(x, self.tensors[p + "input_layernorm.weight"]), positions, states))
        y = self.rms(x, self.tensors[p + "post_attention_layernorm.weight"])
        return self.residual(x + (self.swiglu(y, p + "mlp.") if layer < self.config.num_dense_layers else self.moe(y, p + "mlp.")))

    def further(self, depth: int, hidden: np.ndarray, next_tokens: np.ndarray) -> np.ndarray:
        """Return the normed hidden states of a multi-token-prediction layer, after those [T, D] of the model or of the layer before."""
        layer = self.config.num_layers + depth
        p = f"model.layers.{layer}."
        embedding = self.tensors["model.word_embeddings.weight"][next_tokens]
        both = [self.rms(embedding, self.tensors[p + "enorm.weight"]), self.rms(hidden, self.tensors[p + "hnorm.weight"])]
        x = np.concatenate(both, axis=-1) @ self.tensors[p + "eh_proj.weight"].T
        x = self.block(layer, x, np.arange(len(x)), {}, "softmax")
        return self.rms(x, self.tensors[p + "final_layernorm.weight"])

    def mixer(self, layer: int) -> str:
        """Return the kind of a layer: it closes a group, or stands behind the last whole one."""
        period, layers = self.config.period, self.config.num_layers
        return "softmax" if (layer + 1) % period == 0 or layer >= layers // period * period else "linear"

    def residual(self, x: np.ndarray) -> np.ndarray:
        """Return the residual stream as it is kept."""
        return x

    def rms(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Return the RMS norm over the last axis."""
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps) * weight

    # Softmax attention.

    def softmax(self, layer: int, x: np.ndarray, positions: np.ndarray, states: dict[int, np.ndarray]) -> np.ndarray:
        """Return grouped-query attention."""
        config, p = self.config, f"model.layers.{layer}.attention."
        heads, kv, size = config.num_heads, config.num_kv_heads, config.head_size
        qkv = (x @ self.tensors[p + "query_key_value.weight"].T).reshape(len(x), heads + 2 * kv, size)
        q, k, v = np.split(qkv, [heads, heads + kv], axis=1)
        q, k = self.norm_and_rotate(p, q, k, positions)
        out = np.zeros((len(x), heads, size), x.dtype)
        for h in range(heads):
            scores = q[:, h] @ k[:, h // (heads // kv)].T / math.sqrt(size)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, h // (heads // kv)]
        return out.reshape(len(x), -1) @ self.tensors[p + "dense.weight"].T

    def norm_and_rotate(self, p: str, q: np.ndarray, k: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return queries and keys, normalised per head and rotated."""
        q = self.rms(q, self.tensors[p + "query_layernorm.weight"])
        k = self.rms(k, self.tensors[p + "key_layernorm.weight"])
        return self.rotate(q, positions), self.rotate(k, positions)

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rotate channels (j, j + half) of the first 2 half ones."""
        half = int(self.config.head_size * self.config.partial_rotary_factor) // 2
        cos, sin = (t[:, None].astype(x.dtype) for t in self.angles(positions, half))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    def angles(self, positions: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin of the rotary angles [T, half], with YaRN (arXiv 2309.00071) if configured."""
        frequency, amplitude = self.config.rope_theta ** (-np.arange(half) / half), 1.0
        if self.config.rope_scaling:
            # YaRN: a channel that turns more than beta_fast times in the original length stays, one of less than beta_slow turns is
            # stretched by the factor; in between, in proportion to the channel's number (bounds rounded outwards to whole channels).
            scaling = {"beta_fast": 32, "beta_slow": 1} | dict(self.config.rope_scaling)
            original = scaling["original_max_position_embeddings"]
            channel = lambda turns: half * math.log(original / (2 * math.pi * turns)) / math.log(self.config.rope_theta)
            low = max(math.floor(channel(scaling["beta_fast"])), 0)
            high = min(math.ceil(channel(scaling["beta_slow"])), 2 * half - 1)
            for j in range(half):
                stretched = min(max((j - low) / (high - low), 0), 1)
                frequency[j] *= 1 - stretched + stretched / scaling["factor"]
            amplitude = 1 + 0.1 * math.log(scaling["factor"])
        angle = positions[:, None] * frequency
        return amplitude * np.cos(angle), amplitude * np.sin(angle)

    # Linear attention.

    def linear(self, layer: int, x: np.ndarray, positions: np.ndarray, states: dict[int, np.ndarray]) -> np.ndarray:
        """Return Lightning attention, by its recurrence."""
        config, p = self.config, f"model.layers.{layer}.attention."
        qkv = (x @ self.tensors[p + "query_key_value.weight"].T).reshape(len(x), 3, config.num_heads, config.head_size)
        q, k, v = self.linear_heads(*(qkv[:, i] for i in range(3)))
        q, k = self.norm_and_rotate(p, q, k, positions)
        decay, out = np.exp(self.log_decay(layer))[:, None, None].astype(x.dtype), []
        state = np.zeros((config.num_heads,) + (config.head_size,) * 2, x.dtype)
        for q_t, k_t, v_t in zip(q, k, v, strict=True):
            state = self.update(state, decay, k_t, v_t)
            out.append(np.einsum("hk,hkv->hv", q_t, state) / math.sqrt(config.head_size))
        states[layer] = state
        gate = x @ self.tensors[p + "g_proj.weight"].T
        return self.gated(np.reshape(out, (len(x), -1)), gate, self.tensors[p + "g_norm.weight"]) @ self.tensors[p + "dense.weight"].T

    def linear_heads(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the heads of a linear layer."""
        return q, k, v

    def log_decay(self, layer: int) -> np.ndarray:
        """Return the log decay of each head."""
        heads = self.config.num_heads
        lower = 2 ** int(math.log2(heads))
        slopes = [2 ** (-8 * (h + 1) / lower) for h in range(lower)] + [2 ** (-4 * (2 * h + 1) / lower) for h in range(heads - lower)]
        return -np.array(slopes) * self.fade(layer)

    def fade(self, layer: int) -> float:
        """Return how the decay fades with depth."""
        return 1 - (layer - self.config.decay_layer_offset) / (self.config.num_layers - 1) + 1e-5

    def update(self, state: np.ndarray, decay: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the state after one token."""
        return decay * state + np.einsum("hk,hv->hkv", k, v)

    def gated(self, o: np.ndarray, gate: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Return the gated output."""
        return self.group_norm(o, weight) * sigmoid(gate)

    def group_norm(self, o: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Return the RMS norm over groups of channels."""
        groups = o.reshape(len(o), self.norm_groups(), -1)
        return (groups / np.sqrt((groups**2).mean(-1, keepdims=True) + self.config.norm_eps)).reshape(o.shape) * weight

    def norm_groups(self) -> int:
        """Return the number of groups."""
        return self.config.num_norm_groups

    # FFN.

    def swiglu(self, x: np.ndarray, p: str) -> np.ndarray:
        """Return down(silu(gate x) * up x)."""
        gate, up, down = (self.tensors[f"{p}{name}_proj.weight"] for name in ("gate", "up", "down"))
        z = x @ gate.T
        return (z * sigmoid(z) * (x @ up.T)) @ down.T

    def moe(self, x: np.ndarray, p: str) -> np.ndarray:
        """Return the chosen experts' weighted outputs and the shared expert's."""
        scores = sigmoid(x @ self.tensors[p + "gate.weight"].T)
        y = self.swiglu(x, p + "shared_experts.") if self.config.num_shared_experts else np.zeros_like(x)
        for t, row in enumerate(scores):
            chosen = self.choose(row + self.tensors[p + "gate.expert_bias"])
            total = row[chosen].sum() + 1e-20 if self.config.norm_topk else 1.0
            for e in chosen:
                y[t] += row[e] / total * self.config.routed_scaling_factor * self.swiglu(x[t : t + 1], f"{p}experts.{e}.")[0]
        return y

    def choose(self, ranked: np.ndarray) -> np.ndarray:
        """Return the experts of one token, best first; among equals the lower number."""
        config = self.config
        groups = ranked.reshape(config.num_expert_groups, -1)
        best = np.argsort(-np.sort(groups, axis=-1)[:, -2:].sum(-1), kind="stable")[: config.num_active_expert_groups]
        kept = np.full_like(groups, self.dropped())
        kept[best] = groups[best]
        return np.argsort(-kept.reshape(-1), kind="stable")[: config.num_active_experts]

    def dropped(self) -> float:
        """Return the rank of experts in dropped groups."""
        return -np.inf
