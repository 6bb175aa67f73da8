"""Scoring: the raw log-probability of each token of each line, by the function that training's loss uses."""

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ring_jax import numerics, scoring
from ring_jax.infer.generate import bucket
from ring_jax.model import Ring
from ring_jax.tokenizer import Tokenizer

MOST_TOKENS = 16384
"""Tokens (padding included) that go through the forward at once; a longer line goes alone."""
WINDOW = 256
"""Lines read ahead, so that lines of like length share a batch; output keeps the input's order."""


class Scorer:
    """A model's compiled scoring program."""

    def __init__(self, model: Ring):
        self.model = model
        graph, *self._state = scoring.split(model)

        def program(params, balance, tables, batch):
            return scoring.token_logprobs(scoring.merge(graph, params, balance, tables, model.numerics.dtype), batch)

        self._program = numerics.jit(program, model.numerics)

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return fp32 log-probabilities a row, as long as the row; the first is 0 and means nothing (no token stands before it)."""
        shape = 1 << (len(rows) - 1).bit_length(), bucket(max(len(row) for row in rows))  # few shapes: each one compiles
        tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], positions[i, : len(row)] = row, np.arange(len(row))
        batch = scoring.host_batch(tokens, positions)
        logprobs = np.asarray(self._program(*self._state, batch))
        return [logprobs[i, : len(row)] for i, row in enumerate(rows)]


def read_lines(path: pathlib.Path, tokenizer: Tokenizer | None, vocab: int, limit: int) -> Iterator[list[int]]:
    """Yield the tokens of each line of a jsonl file ({"tokens": [...]} or {"text": ...}).

    Raises ValueError naming file and line for what cannot be read, a token outside the vocabulary, or a line longer than the positions.
    """
    if not path.is_file():
        raise ValueError(f"no input file {path}")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                line = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"{where} is not UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            tokens = _tokens(line, tokenizer, where)
            if tokens and (min(tokens) < 0 or max(tokens) >= vocab):
                raise ValueError(f"{where}: token {next(t for t in tokens if not 0 <= t < vocab)} is outside the vocabulary of {vocab}")
            if len(tokens) > limit:
                raise ValueError(f"{where}: {len(tokens)} tokens exceed the {limit} positions of the model (extend them with YaRN)")
            yield tokens


def _tokens(line: Any, tokenizer: Tokenizer | None, where: str) -> list[int]:
    if isinstance(line, dict) and isinstance(line.get("tokens"), list) and all(type(t) is int for t in line["tokens"]):
        return line["tokens"]
    if isinstance(line, dict) and isinstance(line.get("text"), str):
        if tokenizer is None:
            raise ValueError(f'{where} has {{"text"}}, but the checkpoint has no tokenizer: give {{"tokens"}}')
        return tokenizer.encode(line["text"])
    raise ValueError(f'{where}: expected {{"tokens": [integers]}} or {{"text": string}}')


def _batches(rows: list[list[int]]) -> Iterator[list[int]]:
    """Indices of the rows that go together: of one bucket, at most MOST_TOKENS with padding."""
    order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
    group: list[int] = []
    for i in order:
        width = bucket(len(rows[i]))
        if group and (bucket(len(rows[group[0]])) != width or (len(group) + 1) * width > MOST_TOKENS):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def score_lines(scorer: Scorer, lines: Iterator[list[int]]) -> Iterator[str]:
    """Yield a line of JSON a line: {"tokens": [...], "logprobs": [null, ...]}, in input order; numbers read back to the same float32."""
    while window := list(itertools.islice(lines, WINDOW)):
        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(window)
        for group in _batches(window):
            for i, logprobs in zip(group, scorer([window[i] for i in group]), strict=True):
                results[i] = logprobs
        for row, logprobs in zip(window, results, strict=True):
            values = [None, *(float(str(x)) for x in logprobs[1:])][: len(row)]
            yield json.dumps({"tokens": row, "logprobs": values})
