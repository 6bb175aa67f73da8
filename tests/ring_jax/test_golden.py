"""Golden checkpoints: the float64 logits and hidden states that an independent program computed from the equations."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from ring_jax.config import read_hf_config
from ring_jax.reference import Twin
from tests.ring_jax.models import GOLDEN

NAMES = ("periodic", "trailing")
TOLERANCE = 2e-5
# Each layout and each numerics once; the slow tests have all four.
LAYOUTS = [
    pytest.param(True, True, id="stacked-aligned"),
    pytest.param(False, False, id="unstacked-fast"),
    pytest.param(True, False, id="stacked-fast", marks=pytest.mark.slow),
    pytest.param(False, True, id="unstacked-aligned", marks=pytest.mark.slow),
]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def expected(name):
    return np.load(GOLDEN / name / "expected.npz")


@pytest.mark.parametrize(("stacked", "aligned"), LAYOUTS)
def test_forward(golden, name, expected, stacked, aligned):
    programs = golden(name, stacked, aligned)
    logits, hidden = programs.forward(expected["tokens"])
    assert logits.dtype == np.float32
    assert logits.shape == expected["logits"].shape
    assert np.abs(logits - expected["logits"]).max() < TOLERANCE
    wanted = expected["hidden_after_layer"]
    assert len(hidden) == len(wanted) == programs.model.config.num_layers
    # The residual stream grows with depth, and the rounding of its fp32 with it: numpy in fp32 is off by as much.
    scale = np.maximum(np.sqrt(np.square(wanted).mean((1, 2))), 1)
    assert (np.abs(hidden[:, : wanted.shape[1]] - wanted).max((1, 2)) < TOLERANCE * scale).all()


@pytest.mark.parametrize(("stacked", "aligned"), LAYOUTS)
def test_decay_of_the_remote_code(golden, name, expected, stacked, aligned):
    programs = golden(name, stacked, aligned)
    wanted = expected["logits_decay_offset_1"]
    trained = programs.forward(expected["tokens"]).logits[: len(wanted)]
    assert np.abs(trained - wanted).max() > 100 * TOLERANCE, "the two decays are told apart"
    model, config = programs.model, programs.model.config
    try:
        model.config = dataclasses.replace(config, decay_layer_offset=1)
        model.init_tables()
        logits = programs.forward(expected["tokens"]).logits[: len(wanted)]
    finally:
        model.config = config
        model.init_tables()
    assert np.abs(logits - wanted).max() < TOLERANCE


def test_twin(name, expected):
    """The oracle of the other tests computes the same function."""
    config, tensors = read_hf_config(GOLDEN / name), load_file(GOLDEN / name / "model.safetensors")
    result, wanted = Twin(config, tensors)(expected["tokens"]), expected["hidden_after_layer"]
    assert np.abs(result.logits - expected["logits"]).max() < 1e-9
    assert np.abs(result.hidden[:, : wanted.shape[1]] - wanted).max() < 1e-9
    other = Twin(dataclasses.replace(config, decay_layer_offset=1), tensors)(expected["tokens"][:64])
    assert np.abs(other.logits - expected["logits_decay_offset_1"]).max() < 1e-9
