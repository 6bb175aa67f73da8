"""The optimiser: the learning rate by step, what decays, clipping, and settings that make no sense."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ring_jax import scoring
from ring_jax.config import preset
from ring_jax.model import Ring
from ring_jax.train.config import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from ring_jax.train.optimizer import decays, make_optimizer, schedule


def rates(steps=20, **config):
    rate = schedule(OptimizerConfig(learning_rate=1.0, **config), steps)
    return np.array([rate(step) for step in range(steps + 1)])


def test_warmup_rises_evenly_to_the_full_rate():
    np.testing.assert_allclose(rates(warmup=4)[:6], [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(rates(warmup=1)[:3], [1, 1, 1])
    np.testing.assert_allclose(rates(warmup=0)[:3], [1, 1, 1])


def test_constant():
    assert set(rates(warmup=4)[4:]) == {1.0}


@pytest.mark.parametrize("warmup", [0, 4])
def test_linear(warmup):
    found = rates(schedule="linear", warmup=warmup, final_fraction=0.2)[warmup:]
    np.testing.assert_allclose(found, np.linspace(1, 0.2, len(found)), rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine(warmup):
    found = rates(schedule="cosine", warmup=warmup, final_fraction=0.2)[warmup:]
    half = (1 + np.cos(np.linspace(0, np.pi, len(found)))) / 2
    np.testing.assert_allclose(found, 0.2 + 0.8 * half, rtol=1e-5)


def model_params():
    """Abstract parameters of the preset, whose layers are stacked."""
    return scoring.split(nnx.eval_shape(lambda: Ring(preset("test"), rngs=nnx.Rngs(0))))[1]


def test_decay_spares_norms_and_biases_in_stacked_layers_too():
    leaves, _ = jax.tree_util.tree_flatten_with_path(decays(model_params()), is_leaf=lambda x: isinstance(x, nnx.Variable))
    decaying = {str(path[-1].key) if path[-1].key != "weight" else "norm": bool(leaf.get_value()) for path, leaf in leaves}
    matrices = {"embedding", "head", "qkv", "out", "gate", "gate_up", "down", "router"}
    assert {name for name, decay in decaying.items() if decay} == matrices
    assert {name for name, decay in decaying.items() if not decay} == {"norm", "group_norm", "query", "key"}


def updates(config, grads, params):
    optimizer = make_optimizer(config, 10)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def parameter(shape, value=1.0):
    """A stacked parameter: two layers of this shape."""
    return nnx.Param(jnp.full((2, *shape), value), full_shape=shape, logical_axes=(None,) * len(shape))


def test_decay_is_decoupled():
    params = {"matrix": parameter((3, 4), 2.0), "norm": parameter((4,), 2.0)}
    found = updates(OptimizerConfig(learning_rate=0.5, warmup=0, weight_decay=0.1), jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(found["matrix"][...], -0.5 * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(found["norm"][...], 0)


def test_clipping_is_by_the_global_norm():
    params = {"a": parameter((3, 4)), "b": parameter((4,))}
    grads = {"a": parameter((3, 4), 3.0), "b": parameter((4,), 4.0)}
    # With an epsilon this large the first Adam step is the gradient itself, divided by it.
    config = dict(learning_rate=1.0, warmup=0, weight_decay=0.0, epsilon=1e6)
    norm = float(optax.global_norm(grads))
    free, clipped = (updates(OptimizerConfig(clip=clip, **config), grads, params) for clip in (0.0, 1.0))
    for name in ("a", "b"):
        np.testing.assert_allclose(free[name][...], -1e-6 * grads[name][...], rtol=1e-4)
        np.testing.assert_allclose(clipped[name][...], -1e-6 * grads[name][...] / norm, rtol=1e-4)
    loose = updates(OptimizerConfig(clip=2 * norm, **config), grads, params)
    np.testing.assert_allclose(loose["a"][...], free["a"][...], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(schedule="sawtooth"), "'sawtooth'"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate"),
        (lambda: OptimizerConfig(warmup=-1), "warmup"),
        (lambda: OptimizerConfig(accumulate=0), "accumulate"),
        (lambda: CheckpointConfig(every=0), "checkpoint.every"),
        (lambda: CheckpointConfig(keep_last=0), "keep_last"),
        (lambda: EvalConfig(every=-1), "eval.every"),
        (lambda: TrainConfig(steps=0), "steps"),
        (lambda: TrainConfig(seed=-1), "seed"),
        (lambda: TrainConfig(seed=10**20), "seed"),
        (lambda: TrainConfig(resume=True, overwrite=True), "--overwrite"),
        (lambda: TrainConfig(batch_size=6, optimizer=OptimizerConfig(accumulate=4)), "4"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
