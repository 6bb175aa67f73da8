"""Choosing the next token: which tokens may come, how often they do, and that only seed and position decide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.infer.sampling import Sampling, sample, truncate

GREEDY = Sampling(temperature=0)
PLAIN = Sampling(temperature=1.0)
SEED = np.uint32(0)
LOGITS = np.log(np.array([[0.02, 0.4, 0.08, 0.3, 0.2]], np.float32))
PROBABILITIES = np.exp(LOGITS[0])

compiled = jax.jit(sample, static_argnums=3)


def draws(sampling: Sampling, num: int = 4000, logits: np.ndarray = LOGITS) -> np.ndarray:
    """Return how often each token is chosen, over many positions."""
    tokens = compiled(np.repeat(logits, num, axis=0), np.arange(num, dtype=np.int32), SEED, sampling)
    return np.bincount(tokens, minlength=logits.shape[1]) / num


def kept(sampling: Sampling, logits: np.ndarray = LOGITS) -> list[int]:
    return np.flatnonzero(np.isfinite(truncate(jnp.asarray(logits), sampling)[0])).tolist()


def test_greedy_is_argmax():
    logits = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    np.testing.assert_array_equal(compiled(logits, np.arange(50, dtype=np.int32), SEED, GREEDY), logits.argmax(-1))
    assert compiled(np.zeros((1, 5), np.float32), np.zeros(1, np.int32), SEED, GREEDY).dtype == np.int32


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    np.testing.assert_allclose(draws(Sampling(temperature=temperature)), expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("top_k", "tokens"), [(0, [0, 1, 2, 3, 4]), (1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k(top_k, tokens):
    sampling = Sampling(temperature=1.0, top_k=top_k)
    assert kept(sampling) == tokens
    assert np.flatnonzero(draws(sampling)).tolist() == tokens


@pytest.mark.parametrize(
    ("top_p", "tokens"), [(1.0, [0, 1, 2, 3, 4]), (0.95, [1, 2, 3, 4]), (0.65, [1, 3]), (0.5, [1, 3]), (0.3, [1]), (1e-6, [1])]
)
def test_top_p(top_p, tokens):
    """The smallest set of that probability: the token that crosses the bound is in."""
    sampling = Sampling(temperature=1.0, top_p=top_p)
    assert kept(sampling) == tokens
    frequencies, expected = draws(sampling), np.where(np.isin(np.arange(5), tokens), PROBABILITIES, 0)
    np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.03)


def test_top_k_before_top_p():
    """Of the three likeliest (0.4, 0.3, 0.2 of 0.9), half of the probability is in two; temperature comes before both."""
    assert kept(Sampling(temperature=1.0, top_k=3, top_p=0.5)) == [1, 3]
    cold = Sampling(temperature=0.1, top_p=0.9)
    assert np.flatnonzero(draws(cold)).tolist() == [1]


def test_ties_stay_in():
    logits = np.array([[1.0, 2.0, 2.0, 0.0]], np.float32)
    assert kept(Sampling(top_k=1), logits) == [1, 2]
    assert kept(Sampling(top_p=0.1), logits) == [1, 2]
    assert kept(Sampling(top_p=0.99), np.array([[100.0, 0.0, 0.0, 0.0]], np.float32)) == [0]


def test_only_seed_and_position_decide():
    rng = np.random.default_rng(1)
    logits, positions = rng.standard_normal((8, 40)).astype(np.float32), np.arange(8, dtype=np.int32)
    once = np.asarray(compiled(logits, positions, SEED, PLAIN))
    np.testing.assert_array_equal(compiled(logits, positions, SEED, PLAIN), once)
    np.testing.assert_array_equal(compiled(logits[::-1], positions[::-1], SEED, PLAIN)[::-1], once)
    alone = [int(compiled(logits[i : i + 1], positions[i : i + 1], SEED, PLAIN)[0]) for i in range(8)]
    np.testing.assert_array_equal(alone, once)
    assert (np.asarray(compiled(logits, positions + 1, SEED, PLAIN)) != once).any()
    assert (np.asarray(compiled(logits, positions, np.uint32(1), PLAIN)) != once).any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, not -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, not nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0, not inf"),
        ({"top_k": -1}, "top-k must be at least 0, not -1"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1, not 1.5"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)
