"""The mistakes that other implementations of this model made: ours differs from each of them and agrees with the equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pallas_kernels.grouped_matmul import Groups, combine_groups
from ring_jax.cache import LinearCache
from ring_jax.config import from_hf, read_hf_config, to_hf
from ring_jax.infer.taps import tapped
from ring_jax.linear_attention import log_decay
from ring_jax.model import Ring
from ring_jax.moe import MoE
from ring_jax.numerics import Numerics
from ring_jax.reference import Twin, sigmoid
from tests.ring_jax.models import GOLDEN, SMALL, Forward
from tests.ring_jax.random_tensors import Tensors

pytestmark = pytest.mark.usefixtures("all_unoptimised")

TOLERANCE = 2e-5
VISIBLE = 1e-3
"""What a mistake moves the logits by, at least."""


class ChannelsPerGroup(Twin):
    def norm_groups(self):
        return self.config.num_heads * self.config.head_size // self.config.num_norm_groups


class NormedGate(Twin):
    def gated(self, o, gate, weight):
        return self.group_norm(o * sigmoid(gate), weight)


class NormOfTheGate(Twin):
    def gated(self, o, gate, weight):
        return self.group_norm(o, weight) * sigmoid(self.group_norm(gate, weight))


class GroupedQueries(Twin):
    def linear_heads(self, q, k, v):
        shared = np.arange(self.config.num_heads) // (self.config.num_heads // self.config.num_kv_heads)
        return q, k[:, shared], v[:, shared]


class Interleaved(Twin):
    def rotate(self, x, positions):
        size = self.config.rotary_size
        cos, sin = (t[:, None] for t in self.angles(positions, size // 2))
        out, a, b = x.copy(), x[..., 0:size:2], x[..., 1:size:2]
        out[..., 0:size:2], out[..., 1:size:2] = a * cos - b * sin, b * cos + a * sin
        return out


class GatedDelta(Twin):
    def update(self, state, decay, k, v):
        state = decay * state
        return state + np.einsum("hk,hv->hkv", k, v - np.einsum("hk,hkv->hv", k, state))


class HalfResidual(Twin):
    def residual(self, x):
        return x.astype(np.float16).astype(np.float64)


class DroppedAtZero(Twin):
    def dropped(self):
        return 0.0


class NoTrailingClause(Twin):
    def mixer(self, layer):
        return "softmax" if (layer + 1) % self.config.period == 0 else "linear"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return load_file(GOLDEN / "periodic" / "model.safetensors")


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "periodic" / "expected.npz")


@pytest.fixture(scope="module")
def ours(golden, expected) -> Forward:
    return golden("periodic").forward(expected["tokens"])


@pytest.mark.parametrize("mistake", [ChannelsPerGroup, NormedGate, NormOfTheGate, GroupedQueries, Interleaved, GatedDelta])
def test_equations(ours, tensors, expected, mistake):
    mistaken = mistake(read_hf_config(GOLDEN / "periodic"), tensors)(expected["tokens"])
    assert np.abs(ours.logits - expected["logits"]).max() < TOLERANCE
    assert np.abs(ours.logits - mistaken.logits).max() > VISIBLE


def test_decay_keeps_its_small_constant(golden):
    """Without the 1e-5 the last layer would not forget at all; elsewhere it is below the tolerance of logits, so it is tested alone."""
    for name in ("periodic", "trailing"):
        config = golden(name).model.config
        for layer in range(config.num_layers):
            exact = Twin(config, {}).log_decay(layer)
            np.testing.assert_allclose(log_decay(config, layer), exact, rtol=1e-7)
            without = exact / Twin(config, {}).fade(layer) * (1 - layer / (config.num_layers - 1))
            assert not np.allclose(log_decay(config, layer), without, rtol=5e-6, atol=0)
        assert (log_decay(config, config.num_layers - 1) < 0).all()
    # The tables of the model are those of its layers.
    model = golden("periodic").model
    for segment, runs in zip(model.segments, model.pattern, strict=True):
        for block, run in zip(segment, runs, strict=True):
            if run.mixer == "linear":
                np.testing.assert_array_equal(block.mixer.log_decay[...], [[log_decay(model.config, i) for i in g] for g in run.layers])


def test_residual_stream_beyond_fp16(golden, tensors, expected):
    programs = golden("periodic")
    embedding, large = programs.model.embedding[...], 1e5
    config, tokens = programs.model.config, expected["tokens"]
    scaled = tensors | {"model.word_embeddings.weight": tensors["model.word_embeddings.weight"].astype(np.float64) * large}
    try:
        programs.model.embedding[...] = embedding * large
        ours = programs.forward(tokens)
    finally:
        programs.model.embedding[...] = embedding
    exact = Twin(config, scaled)(tokens)
    assert np.abs(ours.hidden).max() > np.finfo(np.float16).max
    assert np.abs(ours.logits - exact.logits).max() < TOLERANCE
    with np.errstate(all="ignore"):
        assert not np.isfinite(HalfResidual(config, scaled)(tokens).logits).all()


def test_residual_stream_is_fp32_in_bf16():
    graph, state = nnx.split(nnx.eval_shape(lambda: Ring(SMALL, Numerics(dtype="bfloat16"), rngs=nnx.Rngs(0))))
    run = tapped(lambda state, tokens: nnx.merge(graph, state)(tokens, tokens).hidden)
    found: dict[str, set[str]] = {}

    def values(state, tokens):
        for tap in run(state, tokens)[1]:
            found.setdefault(tap.label, set()).add(str(tap.value.dtype))

    jax.eval_shape(values, state, jax.ShapeDtypeStruct((1, 4), np.int32))
    assert all(found[label] == {"float32"} for label in ("embedding", "residual", "block", "router"))
    assert all(found[label] == {"bfloat16"} for label in ("mixer_norm", "query", "mixer", "mixer_out", "ffn", "final_norm"))


def chosen(logits, bias):
    """Return the experts of rows whose router gives these logits, with one bias for all experts."""
    moe = MoE(dataclasses.replace(SMALL, hidden_size=SMALL.num_experts), Numerics(), rngs=nnx.Rngs(0))
    moe.router.set_value(jnp.eye(SMALL.num_experts))
    moe.bias.set_value(jnp.full(SMALL.num_experts, bias))
    experts, _, _ = moe.route(jnp.asarray(logits)[None], jnp.ones((1, len(logits)), bool))
    return np.asarray(experts)[0]


def test_dropped_groups_of_negative_scores():
    """A bias may make every score negative; a dropped group must not win with a zero."""
    logits = np.random.default_rng(1).uniform(-3, 3, (200, SMALL.num_experts)).astype(np.float32)
    ours = chosen(logits, bias=-2.0)
    ranked = np.asarray(jax.nn.sigmoid(logits)) - 2
    exact, mistaken = (np.array([twin(SMALL, {}).choose(row) for row in ranked]) for twin in (Twin, DroppedAtZero))
    np.testing.assert_array_equal(ours, exact)
    assert (np.sort(ours) != np.sort(mistaken)).any(-1).all()


def test_equal_scores_go_to_the_lower_expert():
    logits = np.random.default_rng(2).integers(0, 3, (200, SMALL.num_experts)).astype(np.float32)
    exact = [Twin(SMALL, {}).choose(row) for row in np.asarray(jax.nn.sigmoid(logits))]
    np.testing.assert_array_equal(chosen(logits, bias=0.0), exact)


def test_trailing_layers_are_softmax(golden):
    model = golden("trailing").model  # agrees with the golden logits: test_golden.py
    config, tensors = model.config, load_file(GOLDEN / "trailing" / "model.safetensors")
    assert [config.mixer(layer) for layer in range(config.num_layers)] == ["linear"] * 3 + ["softmax"] * 4
    assert NoTrailingClause(config, tensors).mixer(4) == "linear"
    with pytest.raises((KeyError, ValueError)):
        NoTrailingClause(config, tensors)(np.arange(4))


def test_every_stop_token_counts():
    """Generation ends at each of them: tests/infer/test_generate.py."""
    assert from_hf(to_hf(SMALL) | {"eos_token_id": [7, 9]}).stop_tokens == (7, 9)
    assert from_hf(to_hf(SMALL) | {"eos_token_id": 7}, {"eos_token_id": [7, 9]}).stop_tokens == (7, 9)


def test_padding_does_not_decay_the_state(small, small_tensors, tokens):
    """A piece padded on both sides leaves the states that its tokens alone leave."""
    length, left, width = 2 * SMALL.chunk_size, 21, 192
    padded, positions = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
    padded[0, left : left + length], positions[0, left : left + length] = tokens[:length], np.arange(length)
    _, cache = small.cached(padded, positions, small.model.init_cache(1, 256))
    states = Twin(SMALL, small_tensors)(tokens[:length]).states
    found = {}
    for segment, runs in zip(cache.layers, small.model.pattern, strict=True):
        for layer, run in zip(segment, runs, strict=True):
            if isinstance(layer, LinearCache):
                found |= {run.layers[g][i]: layer.state[g, i, 0] for g in range(len(run.layers)) for i in range(len(run.layers[0]))}
    assert found.keys() == states.keys()
    for layer, exact in states.items():
        scale = np.abs(exact).max()
        decayed = exact * np.exp(Twin(SMALL, {}).log_decay(layer) * (width - length - left))[:, None, None]
        assert np.abs(found[layer] - exact).max() < TOLERANCE * scale
        assert np.abs(found[layer] - decayed).max() > VISIBLE * scale


def test_rotary_position_of_a_decode_step(small, small_tensors, tokens):
    """A linear layer's cache does not know the position: taken from there, it would be 0 again."""
    length = 100
    piece = np.zeros((1, 192), np.int32), np.full((1, 192), -1, np.int32)
    piece[0][0, :length], piece[1][0, :length] = tokens[:length], np.arange(length)
    _, cache = small.cached(*piece, small.model.init_cache(1, 256))
    hidden, _ = small.cached(tokens[None, length : length + 1], np.array([[length]], np.int32), cache)
    logits = hidden[0, 0].astype(np.float64) @ small_tensors["lm_head.weight"].T
    twin, after = Twin(SMALL, small_tensors), tokens[: length + 1]
    exact = twin(after).logits[-1]
    mistaken = twin(after, np.append(np.arange(length), 0)).logits[-1]
    assert np.abs(logits - exact).max() < TOLERANCE * np.abs(exact).max()
    assert np.abs(logits - mistaken).max() > VISIBLE


@pytest.mark.parametrize("num_slots", [2, 3, 8])
def test_experts_are_combined_in_the_order_of_the_slots(num_slots):
    """Each sum is rounded by itself, whatever stands behind it; infinities and NaN pass."""
    slots = np.random.default_rng(0).standard_normal((50, num_slots, 24)).astype(np.float32)
    slots[3, 1, :2] = np.inf, np.nan
    exact = functools.reduce(np.add, [slots[:, a] for a in range(num_slots)])
    index = jnp.arange(50 * num_slots)
    groups = Groups(index, index, jnp.zeros(0, jnp.int32))
    combine = lambda slots: combine_groups(slots.reshape(-1, 24), groups, num_slots)
    np.testing.assert_array_equal(jax.jit(combine)(slots), exact)
    around = jax.jit(lambda slots, x: (x + combine(2 * slots)[:7], jax.nn.silu(combine(slots))))
    np.testing.assert_array_equal(around(slots, exact[:7])[0], exact[:7] + 2 * exact[:7])
