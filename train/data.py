"""Training data: text becomes rows of packed tokens, and a place in the stream of batches is one integer.

files -> pieces of documents -> token cache on disk -> documents to train on and documents held out -> packed rows
-> shuffled and mixed by grain -> batches. Nothing here holds a corpus in memory, and nothing depends on how many hosts read it.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import pathlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pallas_kernels import GRID
from ring_jax.tokenizer import Tokenizer, make_tokenizer
from ring_jax.train.sources import open_source, sample_texts, stdlib_source, uniform
from ring_jax.train.token_store import TokenStore, default_cache_dir, tokenize


class Spans(NamedTuple):
    """Documents, or the parts of them on one side of the split: starts [D] and lengths [D] in tokens, and the bytes of all."""

    starts: np.ndarray
    lengths: np.ndarray
    num_bytes: float


def hold_out(store: TokenStore, fraction: float) -> tuple[Spans, Spans]:
    """Returns (train, eval) spans that share no token: `fraction` of the documents, by a hash of their index, is held out.

    At least one document is (of middle length, where the hash takes none) and one is left; of a single document, the end is
    held out. A fraction of 0 holds out nothing. ValueError if a single document has fewer than four tokens.
    """
    starts, lengths, num_bytes = np.asarray(store.offsets[:-1]), np.diff(store.offsets), np.asarray(store.num_bytes)
    if fraction and len(lengths) == 1:
        total = int(lengths[0])
        if total < 4:
            raise ValueError(f"data of {total} tokens: too little to train on and hold some out; expected at least 4")
        tail = min(max(2, round(total * fraction)), total - 2)  # two tokens are the least that has something to predict
        part = lambda start, count: Spans(starts + start, np.asarray([count]), num_bytes[0] * count / total)
        return part(0, total - tail), part(total - tail, tail)
    held = uniform(len(lengths)) < fraction
    if fraction and not held.any():
        held[np.argsort(lengths, kind="stable")[(len(lengths) - 1) // 2]] = True
    if held.all():
        held[np.argmax(lengths)] = False
    part = lambda side: Spans(starts[side], lengths[side], float(num_bytes[side].sum()))
    return part(~held), part(held)


def cut(spans: Spans, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns starts [P] and lengths [P] of the pieces: each span cut into full rows and what is left, so a long one wastes little."""
    counts = -(-spans.lengths // seq_len)
    offset = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    return np.repeat(spans.starts, counts) + offset, np.minimum(np.repeat(spans.lengths, counts) - offset, seq_len)


class Packing(NamedTuple):
    """Where each piece lies: rows [P] and columns [P], multiples of GRID; `num_rows` in all."""

    rows: np.ndarray
    columns: np.ndarray
    num_rows: int


def pack(lengths: np.ndarray, seq_len: int) -> Packing:
    """Returns a place for each of the pieces of `lengths` [P], 1..seq_len, in rows of `seq_len`: first fit decreasing.

    A piece takes whole slots of GRID, so there are only seq_len / GRID sizes. A row is filled with the largest pieces that
    fit, and that choice of sizes serves as many rows as the pieces last for: time does not grow with P but for array copies.
    """
    slots = -(-lengths // GRID)
    by_size = np.argsort(slots, kind="stable")
    left = np.bincount(slots, minlength=seq_len // GRID + 1)
    first = np.cumsum(left) - left
    rows, columns, num_rows = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64), 0
    while len(sizes := np.flatnonzero(left)):
        space, choice = seq_len // GRID, []
        for size in sizes[::-1].tolist():
            if times := min(space // size, int(left[size])):
                choice.append((size, times, seq_len // GRID - space))
                space -= times * size
        repeats = min(int(left[size]) // times for size, times, _ in choice)
        for size, times, slot in choice:
            taken = by_size[first[size] : first[size] + repeats * times].reshape(repeats, times)
            rows[taken] = num_rows + np.arange(repeats)[:, None]
            columns[taken] = GRID * (slot + size * np.arange(times))
            left[size] -= repeats * times
            first[size] += repeats * times
        num_rows += repeats
    return Packing(rows, columns, num_rows)


class TokenDataset:
    """Packed rows at random access: `dataset[row]` is a dict of `tokens`, `segment_ids` and `positions`, int32 [T] each.

    A row's pieces are segments 1, 2, ... from the left, each with positions from 0; where there is none, the token is 0, the
    segment 0 and the position -1. The plan is four arrays over the pieces in the order of their places.
    """

    def __init__(self, tokens: np.ndarray, spans: Spans, seq_len: int):
        starts, lengths = cut(spans, seq_len)
        packing = pack(lengths, seq_len)
        order = np.lexsort((packing.columns, packing.rows))
        self._tokens = tokens
        self._starts, self._lengths, self._columns = starts[order], lengths[order], packing.columns[order]
        self._row_offsets = np.concatenate([[0], np.cumsum(np.bincount(packing.rows, minlength=packing.num_rows))])
        self.seq_len = seq_len
        self.num_tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self._row_offsets) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        arrays = _empty_row(self.seq_len)
        pieces = slice(self._row_offsets[index], self._row_offsets[index + 1])
        places = zip(self._starts[pieces].tolist(), self._lengths[pieces].tolist(), self._columns[pieces].tolist(), strict=True)
        for segment, (start, length, column) in enumerate(places, 1):
            place = slice(column, column + length)
            arrays["tokens"][place] = self._tokens[start : start + length]
            arrays["segment_ids"][place] = segment
            arrays["positions"][place] = np.arange(length)
        return arrays


def _empty_row(seq_len: int) -> dict[str, np.ndarray]:
    return {name: np.full(seq_len, value, np.int32) for name, value in (("tokens", 0), ("segment_ids", 0), ("positions", -1))}


@runtime_checkable
class Rows(Protocol):
    """Packed rows at random access: grain's MapDataset is one, as is a TokenDataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Batches:
    """A sequence of batches over rows at random access: endless for training, finite and in a fixed order for evaluation."""

    def __init__(self, rows: Rows, batch_size: int, seq_len: int):
        self._rows = rows
        self.batch_size = batch_size
        self.seq_len = seq_len

    def __len__(self) -> int:
        """The number of batches; past the end of any run for training."""
        return (len(self._rows) + self.batch_size - 1) // self.batch_size

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns batch `step`: int32 [B, T] `tokens`, `segment_ids` (0: padding) and `positions` (from 0 in each segment, -1: padding).

        It depends on nothing but the data, its configuration and `step`. `rows` picks some of the batch's rows, so that a host
        reads only its own of one batch that is the same for any number of hosts. Past the last row come empty ones.
        IndexError if there is no such batch.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step}: expected 0 to {len(self) - 1}")
        indices = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        picked = [self._rows[index] if index < len(self._rows) else _empty_row(self.seq_len) for index in indices]
        return {name: np.stack([row[name] for row in picked]) for name in ("tokens", "segment_ids", "positions")}

    def iterate(self, start: int = 0, rows: slice = slice(None), num_ahead: int = 2) -> Generator[dict[str, np.ndarray], None, None]:
        """Yields the batches from `start` on, with `num_ahead` prepared in a thread that ends with the iterator."""
        pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            steps = iter(range(start, len(self)))
            pending = collections.deque(pool.submit(self.batch, step, rows) for step in itertools.islice(steps, num_ahead))
            while pending:
                batch = pending.popleft().result()
                pending.extend(pool.submit(self.batch, step, rows) for step in itertools.islice(steps, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What `load_data` returns.

    `bytes_per_token` is of the held-out text (of all, if none is held out): bits per byte = loss / ln 2 / bytes_per_token.
    `num_tokens` counts the training tokens, and `fill` is their share of the training rows; the rest is padding.
    """

    tokenizer: Tokenizer
    train: Batches
    eval: Batches
    bytes_per_token: float
    num_tokens: int
    fill: float


def load_data(
    sources: Sequence[str],
    tokenizer: str | Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    eval_fraction: float = 0.01,
    cache_dir: str | pathlib.Path | None = None,
    stdlib_bytes: int = 1 << 24,
) -> Data:
    """Returns the batches of the sources, `PATH[:WEIGHT]` each, tokenised into the cache on first use.

    No source: at most `stdlib_bytes` of the standard library. A weight is a share of the training rows, whatever the sizes of the sources:
    each is shuffled anew every time it has been seen whole. `tokenizer` is one, or `bytes`, `train:N` or a path. The held-out
    documents depend on the data alone. ValueError with one line for every mistake in the arguments or in the files.
    """
    if seq_len < GRID or seq_len % GRID:
        raise ValueError(f"sequence length {seq_len}: expected a multiple of {GRID}, as documents start at its multiples")
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: expected at least 1")
    if seed < 0:
        raise ValueError(f"seed {seed}: expected 0 or more")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"held-out fraction {eval_fraction}: expected at least 0 and below 1")
    opened = [open_source(spec) for spec in sources] or [stdlib_source(stdlib_bytes)]
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, lambda: sample_texts(opened))
    folder = pathlib.Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    stores = [tokenize(source, tokenizer, folder) for source in opened]
    splits = [hold_out(store, eval_fraction) for store in stores]
    train = [TokenDataset(store.tokens, split[0], seq_len) for store, split in zip(stores, splits, strict=True)]
    held = [TokenDataset(store.tokens, split[1], seq_len) for store, split in zip(stores, splits, strict=True)]

    import grain  # here, because it imports jax

    # One seed a source and no two runs' seeds alike: grain adds the epoch to the seed, so neighbours would share their orders.
    seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) for index in range(len(opened))]
    shuffled = [grain.MapDataset.source(rows).shuffle(seed).repeat() for rows, seed in zip(train, seeds, strict=True)]
    # grain scales the smallest weight to 100 and truncates the others: round them here instead.
    smallest = min(source.weight for source in opened)
    mixed = grain.MapDataset.mix(shuffled, [round(100 * source.weight / smallest) for source in opened])
    # An evaluation reads the first few batches: shuffled, once and for all, they are of every document.
    held_rows = grain.MapDataset.concatenate([grain.MapDataset.source(rows) for rows in held]).shuffle(seed=0)
    measured = [split[1] if eval_fraction else split[0] for split in splits]
    num_tokens = sum(rows.num_tokens for rows in train)
    return Data(
        tokenizer=tokenizer,
        train=Batches(mixed, batch_size, seq_len),
        eval=Batches(held_rows, batch_size, seq_len),
        bytes_per_token=sum(spans.num_bytes for spans in measured) / sum(int(spans.lengths.sum()) for spans in measured),
        num_tokens=num_tokens,
        fill=num_tokens / (sum(map(len, train)) * seq_len),
    )
