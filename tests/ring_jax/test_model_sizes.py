"""The model at other sizes than the presets': rotary tables, odd shapes, multi-token prediction, against float64."""

import dataclasses
import math

import numpy as np
import pytest
from flax import nnx

from ring_jax import checkpoint, numerics, scoring
from ring_jax.config import PRESETS
from ring_jax.layers import rotary_tables
from ring_jax.model import Ring
from ring_jax.numerics import Numerics
from ring_jax.reference import Twin
from tests.ring_jax.models import SMALL, YARN, Programs, pad, write_hf
from tests.ring_jax.random_tensors import random_tensors

# Rotary tables.


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_yarn_tables(theta):
    config = dataclasses.replace(PRESETS["test"], head_size=64, partial_rotary_factor=0.5, rope_theta=theta, rope_scaling=YARN)
    cos, sin = rotary_tables(config)
    exact = Twin(config, {}).angles(np.arange(2048), 16)
    assert cos.dtype == np.float32
    np.testing.assert_allclose(cos, exact[0], atol=2e-7)
    np.testing.assert_allclose(sin, exact[1], atol=2e-7)
    amplitude = 1 + 0.1 * math.log(4)
    np.testing.assert_allclose(cos**2 + sin**2, amplitude**2, rtol=1e-6)
    plain = rotary_tables(dataclasses.replace(config, rope_scaling=None, max_positions=2048))
    np.testing.assert_allclose(cos[:, 0], amplitude * plain[0][:, 0], rtol=1e-6)  # the fastest channel keeps its frequency,
    np.testing.assert_allclose(cos[::4, -1], amplitude * plain[0][:512, -1], rtol=1e-6)  # the slowest turns a quarter as fast
    stated = rotary_tables(dataclasses.replace(config, rope_scaling=(*YARN, ("attention_factor", 1.0))))
    np.testing.assert_allclose(stated[0] ** 2 + stated[1] ** 2, 1, rtol=1e-6)


def test_long_positions_are_exact():
    """fp32 angles would be off by 0.004 at 128K."""
    config = dataclasses.replace(PRESETS["test"], max_positions=131072, head_size=16)
    cos, sin = rotary_tables(config)
    assert cos.shape == (131072, 4)
    exact = Twin(config, {}).angles(np.array([131071]), 4)
    np.testing.assert_allclose([cos[-1:], sin[-1:]], exact, atol=1e-7)


@pytest.mark.usefixtures("unoptimised")
def test_yarn_model(tmp_path, tokens):
    config = dataclasses.replace(SMALL, rope_scaling=YARN, max_positions=64, period=2)
    tensors = random_tensors(config)
    logits = Programs(checkpoint.load(write_hf(tmp_path, config, tensors)).model).forward(tokens).logits
    exact = Twin(config, tensors)(tokens).logits
    assert np.abs(logits - exact).max() < 2e-5 * np.abs(exact).max()


@pytest.mark.usefixtures("unoptimised")
def test_position_past_the_limit(tokens):
    """A position without an angle must not pass as the last one that has: the commands refuse it, the model shows it."""
    config = dataclasses.replace(SMALL, num_layers=1, max_positions=100)
    model = Programs(Ring(config, Numerics(aligned=False), rngs=nnx.Rngs(0)))
    hidden = model.hidden(tokens[None, :128], np.arange(128, dtype=np.int32)[None])
    assert np.isfinite(hidden[:, :100]).all()
    assert np.isnan(hidden[:, 100:]).any(-1).all()


# Other sizes than the presets'.

ODD = [
    pytest.param({"tie_embeddings": True, "num_experts": 6, "num_expert_groups": 3, "num_shared_experts": 0, "period": 1}, id="tied"),
    pytest.param({"num_heads": 3, "num_kv_heads": 1, "num_dense_layers": 2, "norm_topk": False, "num_expert_groups": 1,
                  "num_active_expert_groups": 1, "partial_rotary_factor": 1.0, "num_norm_groups": 1}, id="ungrouped"),
    pytest.param({"num_experts": 4, "num_active_experts": 1, "num_active_expert_groups": 1, "num_dense_layers": 0, "num_layers": 2},
                 id="one-expert-a-group"),
]  # fmt: skip


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("change", ODD)
def test_odd_sizes(tmp_path, tokens, change):
    config = dataclasses.replace(SMALL, **change)
    tensors = random_tensors(config)
    ours = Programs(checkpoint.load(write_hf(tmp_path, config, tensors)).model).forward(tokens[:70])
    exact = Twin(config, tensors)(tokens[:70])
    assert np.abs(ours.logits - exact.logits).max() < 2e-5 * np.abs(exact.logits).max()
    assert np.abs(ours.hidden - exact.hidden).max() < 2e-5 * np.abs(exact.hidden).max()


# Multi-token prediction.


@pytest.mark.usefixtures("unoptimised")
def test_multi_token_prediction(tmp_path, tokens):
    """Two further layers: their hidden states, and the loss with its weight, against float64."""
    config = dataclasses.replace(SMALL, num_mtp_layers=2, num_layers=2)
    tensors, length, width = random_tensors(config), 100, 128
    model = checkpoint.load(write_hf(tmp_path, config, tensors)).model
    twin, document = Twin(config, tensors), tokens[:length]
    head = twin.tensors["lm_head.weight"].T

    def nll(logits, ahead):
        shifted = logits[: length - ahead] - logits.max()
        logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return -logprobs[np.arange(length - ahead), document[ahead:]].mean()

    result = twin(document)
    hidden = twin.rms(result.hidden[-1], twin.tensors["model.norm.weight"])
    losses = [nll(result.logits, 1)]
    for depth in range(2):
        hidden = twin.further(depth, hidden, np.roll(document, -depth - 1))
        losses.append(nll(hidden @ head, depth + 2))

    batch = scoring.Batch(*pad([document], width), np.array([[1] * length + [0] * (width - length)], np.int32))
    graph, *state = scoring.split(model)

    def loss(*args):
        model, batch = nnx.merge(graph, *args[:3]), args[3]
        return [scoring.loss(model, batch, scoring.totals(batch, 2), mtp_weight=weight)[0] for weight in (0.0, 0.1)]

    plain, weighted = numerics.jit(loss, model.numerics)(*state, batch)
    np.testing.assert_allclose(plain, losses[0], rtol=2e-6)
    np.testing.assert_allclose(weighted, losses[0] + 0.1 * np.mean(losses[1:]), rtol=2e-6)
