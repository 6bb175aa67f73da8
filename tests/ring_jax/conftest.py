"""Models that several files of tests look at, loaded and compiled once."""

import functools
from collections.abc import Callable

import numpy as np
import pytest

from ring_jax import checkpoint
from tests.ring_jax.models import GOLDEN, SMALL, Programs, write_hf
from tests.ring_jax.random_tensors import Tensors, random_tensors


@pytest.fixture(scope="session")
def golden() -> Callable[..., Programs]:
    """Return the programs of a golden checkpoint, by name and layout."""

    @functools.cache
    def load(name: str, stacked: bool = True, aligned: bool = True) -> Programs:
        return Programs(checkpoint.load(GOLDEN / name, stacked=stacked, aligned=aligned).model)

    return load


@pytest.fixture(scope="session")
def small_tensors() -> Tensors:
    return random_tensors(SMALL)


@pytest.fixture(scope="session")
def small(small_tensors, tmp_path_factory) -> Programs:
    """Return the programs of a random checkpoint with one layer of each kind."""
    return Programs(checkpoint.load(write_hf(tmp_path_factory.mktemp("small"), SMALL, small_tensors)).model)


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SMALL.vocab_size, 200).astype(np.int32)
