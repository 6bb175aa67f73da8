"""A small random model that writes bytes, and its folder."""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

from ring_jax import checkpoint
from ring_jax.infer.generate import Decoder
from ring_jax.infer.score import Scorer
from ring_jax.tokenizer import Tokenizer
from tests.ring_jax.models import TWO_LAYERS, write_hf
from tests.ring_jax.random_tensors import random_tensors


class Bytes(NamedTuple):
    """A Hugging Face folder with a tokenizer of bytes, and the programs of its model."""

    folder: pathlib.Path
    tokenizer: Tokenizer
    decoder: Decoder
    scorer: Scorer


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Bytes:
    config = dataclasses.replace(TWO_LAYERS, max_positions=300, stop_tokens=(258, 259))
    tensors = random_tensors(config)
    # Replies are ASCII: each token is a character, and decoding it never waits for the next.
    tensors["lm_head.weight"] *= np.where((np.arange(260) >= 32) & (np.arange(260) < 127), 1, 0.01)[:, None].astype(np.float32)
    folder = write_hf(tmp_path_factory.mktemp("bytes"), config, tensors)
    (folder / "tokenizer.json").write_text(Tokenizer.bytes().to_json())
    loaded = checkpoint.load(folder)
    assert loaded.tokenizer is not None
    return Bytes(folder, loaded.tokenizer, Decoder(checkpoint.load(folder, stacked=False).model), Scorer(loaded.model))
