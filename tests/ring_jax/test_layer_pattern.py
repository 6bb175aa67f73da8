"""The layer pattern and its scan: each layer once, and programs that do not grow with depth."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from ring_jax import numerics, scoring
from ring_jax.config import PRESETS, preset
from ring_jax.model import Ring, Run, layer_pattern
from ring_jax.numerics import Numerics
from tests.ring_jax.models import SMALL


def flat(pattern) -> list[int]:
    """Return the numbers of the layers in the order in which they run."""
    found = []
    for segment in pattern:
        for group in range(len(segment[0].layers)):
            for run in segment:
                found.extend(run.layers[group])
    return found


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7, 9, 10, 20])
@pytest.mark.parametrize("period", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dense", [0, 1, 2, 4])
def test_pattern_has_each_layer_once(layers, period, dense, stacked):
    config = dataclasses.replace(SMALL, num_layers=layers, period=period, num_dense_layers=dense)
    pattern = layer_pattern(config, stacked)
    assert flat(pattern) == list(range(layers))
    for segment in pattern:
        assert len({len(run.layers) for run in segment}) == 1, "a segment's runs repeat together"
        for run in segment:
            assert len({len(group) for group in run.layers}) == 1
            assert all((config.mixer(i), config.ffn(i)) == (run.mixer, run.ffn) for group in run.layers for i in group)


def test_pattern_of_the_released_models():
    mini, flash = (layer_pattern(preset(f"ring-{name}-linear-2.0")) for name in ("mini", "flash"))
    assert mini == (
        (Run("linear", "dense", ((0,),)), Run("linear", "moe", ((1, 2, 3),)), Run("softmax", "moe", ((4,),))),
        (Run("linear", "moe", ((5, 6, 7, 8), (10, 11, 12, 13), (15, 16, 17, 18))), Run("softmax", "moe", ((9,), (14,), (19,)))),
    )
    assert [[(run.mixer, len(run.layers), len(run.layers[0])) for run in segment] for segment in flash] == [
        [("linear", 1, 1), ("linear", 1, 6), ("softmax", 1, 1)],
        [("linear", 3, 7), ("softmax", 3, 1)],
    ]


def test_odd_patterns():
    two_dense = dataclasses.replace(SMALL, num_layers=7, period=4, num_dense_layers=2)
    assert [[(*run[:2], run.layers) for run in segment] for segment in layer_pattern(two_dense)] == [
        [("linear", "dense", ((0, 1),)), ("linear", "moe", ((2,),)), ("softmax", "moe", ((3,),))],
        [("softmax", "moe", ((4, 5, 6),))],
    ]
    every = dataclasses.replace(SMALL, num_layers=4, period=1)
    assert [segment[0].layers for segment in layer_pattern(every)] == [((0,),), ((1,), (2,), (3,))]


# Programs do not grow with depth.


def tiny(layers: int):
    return dataclasses.replace(PRESETS["test"], num_layers=layers, period=5, num_dense_layers=1, hidden_size=16, head_size=4, vocab_size=32)


def lowered(layers: int, gradient: bool, aligned: bool):
    numeric = Numerics(aligned=aligned)
    model = nnx.eval_shape(lambda: Ring(tiny(layers), numeric, rngs=nnx.Rngs(0)))
    graph, *state = scoring.split(model)
    rows = jax.ShapeDtypeStruct((2, 128), np.int32)

    def forward(*args):
        return scoring.token_logprobs(nnx.merge(graph, *args[:3]), args[3])

    def gradients(*args):
        return scoring.loss_and_gradients(graph, numeric, *args)

    return numerics.jit(gradients if gradient else forward, numeric).lower(*state, scoring.Batch(rows, rows, rows))


@pytest.mark.parametrize("gradient", [pytest.param(False, marks=pytest.mark.slow), True])
def test_lowered_program_does_not_grow_with_depth(gradient):
    few, many = (lowered(layers, gradient, aligned=True).as_text().count("\n") for layers in (20, 40))
    assert few > 1000
    assert abs(many - few) <= 0.05 * few


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_compiled_program_does_not_grow_with_depth(gradient):
    instructions = lambda text: len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))
    few, many = (instructions(lowered(layers, gradient, aligned=False).compile().as_text()) for layers in (20, 40))
    assert few > 1000
    assert abs(many - few) <= 0.05 * few
