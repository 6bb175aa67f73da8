"""Live parity with mlx-lm's implementation, on a checkpoint that it loads itself."""

import dataclasses
import pathlib

import numpy as np
import pytest

from ring_jax import checkpoint
from ring_jax.convert.from_hf import from_hf
from ring_jax.convert.to_hf import to_hf
from ring_jax.linear_attention import log_decay
from ring_jax.reference import Twin
from tests.ring_jax.models import SMALL, YARN, Programs, write_hf
from tests.ring_jax.random_tensors import random_tensors

mx = pytest.importorskip("mlx.core", reason="mlx does not load here", exc_type=ImportError)
utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm does not load here", exc_type=ImportError)

TOLERANCE = 2e-5
# mlx-lm takes the head size of a linear layer from width / heads.
CONFIG = dataclasses.replace(SMALL, hidden_size=48)


def of_mlx(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    model, _ = utils.load_model(folder)
    for i, layer in enumerate(model.layers):
        if not layer.is_global:
            layer.attention._slope = mx.array(log_decay(CONFIG, i))  # theirs clamps the layer's number
    return np.array(model(mx.array(tokens[None])))[0]


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_logits(tmp_path, tokens, scaling):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    tensors = random_tensors(config, seed=3)
    for name in tensors:
        if name.endswith("expert_bias"):
            tensors[name] = abs(tensors[name])  # theirs masks dropped groups with 0: see model.md
    from_hf(write_hf(tmp_path / "hf", config, tensors), tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "out")
    theirs = of_mlx(tmp_path / "out", tokens)
    ours = Programs(checkpoint.load(tmp_path / "ours").model).forward(tokens).logits
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() < TOLERANCE * scale
    assert np.abs(ours - Twin(config, tensors)(tokens).logits).max() < TOLERANCE * scale
