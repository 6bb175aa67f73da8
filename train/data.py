"""Training data: files become rows of packed tokens, and a place in the stream of batches is one integer.

files -> pieces of documents -> token cache on disk -> documents to train on and documents held out -> packed rows
-> shuffled and mixed by grain -> batches. Nothing here holds a corpus in memory, and nothing depends on how many hosts read it.
"""

import array
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pallas_kernels import GRID
from ring_jax.tokenizer import Tokenizer, make_tokenizer

_log = logging.getLogger(__name__)

FORMAT = 1  # of the token cache; part of its key
PIECE_CHARS = 1 << 14  # a document goes to the tokenizer in pieces of at most these: four times as fast as 1 << 18
GROUP_CHARS = 1 << 22  # and so many pieces together, so that its threads have work
TOKENIZER_CHARS = 1 << 25  # a tokenizer is trained on at most these

TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".sql", ".yaml", ".yml", ".toml"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh"}
)
# Folders of the standard library left out of the default data: not its own, tests, tables, or gone from the next Python.
_STDLIB_SKIP = frozenset(
    {"site-packages", "dist-packages", "ensurepip", "test", "tests", "idlelib", "turtledemo", "encodings", "lib2to3", "distutils"}
)

_WORD_END = re.compile(r"\S(?= \S)")

Piece = str | np.ndarray | None
"""What the readers yield: a stretch of a document as text or as token ids, then None at the document's end."""


class Source(NamedTuple):
    """Files that are read as one data set, and its share of the mixture."""

    name: str
    weight: float
    files: tuple[pathlib.Path, ...]


def parse_source(spec: str) -> tuple[str, float]:
    """Returns (path, weight) of `PATH[:WEIGHT]`; the weight is 1 when not given.

    What follows the last colon is a weight if it reads as a number, unless the whole is the name of an existing file.
    ValueError if the path is empty or the weight is not positive and finite.
    """
    path, colon, tail = spec.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        path, colon = spec, ""
    if not colon or os.path.exists(os.path.expanduser(spec)):
        path, weight = spec, 1.0
    if not path:
        raise ValueError(f"data {spec!r}: expected PATH or PATH:WEIGHT")
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"data {spec!r}: weight {tail} must be a positive number")
    return path, weight


def open_source(spec: str) -> Source:
    """Returns the source that `PATH[:WEIGHT]` names: one file, or the files of known kinds in a folder, sorted.

    In a folder, hidden entries and files of other kinds are skipped; a single file of an unknown kind is read as text.
    ValueError if there is no such path, or no such file in it.
    """
    name, weight = parse_source(spec)
    path = pathlib.Path(name).expanduser()
    if os.path.isfile(path):
        return Source(name, weight, (path,))
    if not os.path.isdir(path):
        raise ValueError(f"data {name!r}: no such file or folder")
    files = [file for file in _walk(path, lambda folder: False) if file.suffix.lower() in TEXT_SUFFIXES | _READERS.keys()]
    if not files:
        raise ValueError(f"data {name!r}: no file to read in this folder; expected {' '.join(_READERS)} or text such as .txt .md .py")
    return Source(name, weight, tuple(files))


def stdlib_source(max_bytes: int) -> Source:
    """Returns the *.py files of the running interpreter's own standard library, the data when none is given.

    Its tests, character tables and installed packages are left out, and files that are not UTF-8. Beyond `max_bytes` in all,
    files are left out by a hash of their place in the list, the same ones every time.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, _STDLIB_SKIP.__contains__) if file.suffix == ".py"]
    chosen, size = [], 0
    for index in np.argsort(_uniform(len(files)), kind="stable"):
        content = files[index].read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:
            continue
        if content and size + len(content) <= max_bytes:
            chosen.append(files[index])
            size += len(content)
    if not chosen:
        raise ValueError(f"the standard library in {root}: no *.py file within {max_bytes} bytes; give your own data with --data")
    return Source(f"the standard library in {root}", 1.0, tuple(sorted(chosen)))


def _walk(root: pathlib.Path, skip: Callable[[str], bool]) -> list[pathlib.Path]:
    """Returns the files below `root`, sorted, without hidden entries and without folders whose name `skip` accepts."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and not skip(name)]
        found += [path for name in files if not name.startswith(".") and os.path.isfile(path := pathlib.Path(folder, name))]
    return sorted(found)


def _uniform(count: int) -> np.ndarray:
    """Returns [count] float64 in [0, 1), each a hash of its index alone (splitmix64): growing the list changes no earlier one."""
    value = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (value >> np.uint64(11)).astype(np.float64) / 2.0**53


def read_pieces(path: pathlib.Path, vocab: int | None = None) -> Iterator[Piece]:
    """Yields a file's documents by pieces, each document followed by None; token ids are checked against `vocab` if given.

    ValueError naming the path, and the line where there are lines, for whatever cannot be read.
    """
    try:
        yield from _READERS.get(path.suffix.lower(), _read_text)(path, vocab)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or _first_line(error)})") from error


def check_vocab(ids: np.ndarray, vocab: int, where: str) -> None:
    """Raises a ValueError that names the first of the `ids` [N] outside 0..vocab - 1."""
    wrong = ids[(ids < 0) | (ids >= vocab)]
    if wrong.size:
        raise ValueError(f"{where}: token id {wrong[0]} is not in the vocabulary; expected 0 to {vocab - 1}")


def _read_text(path: pathlib.Path, vocab: int | None) -> Iterator[Piece]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from _cut(iter(lambda: file.read(1 << 20), ""))
    yield None


def _read_jsonl(path: pathlib.Path, vocab: int | None) -> Iterator[Piece]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            text = _decode(line, where).strip()
            if text:
                yield from _document(_parse_json(text, where), where, vocab)


def _read_parquet(path: pathlib.Path, vocab: int | None) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f"{path}: no column 'text'; its columns are {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for value in batch.column(0).to_pylist():
                    if value is not None:
                        yield from _document({"text": value}, str(path), vocab)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _read_array_record(path: pathlib.Path, vocab: int | None) -> Iterator[Piece]:
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        if not reader.ok():
            raise ValueError(f"{path}: not a readable arrayrecord file, or a truncated one")
        for start in range(0, reader.num_records(), 1024):
            for number, content in enumerate(reader.read(start, min(start + 1024, reader.num_records())), start + 1):
                where = f"{path}, record {number}"
                text = _decode(content, where)
                try:
                    record = json.loads(text) if text.startswith("{") else None
                except ValueError:  # text that merely starts with a brace
                    record = None
                yield from _document(record if isinstance(record, dict) else {"text": text}, where, vocab)
        reader.close()
    except RuntimeError as error:  # what the library raises for a damaged chunk
        raise ValueError(f"{path}: not a readable arrayrecord file ({_first_line(error)})") from error


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrayrecord": _read_array_record,
    ".array_record": _read_array_record,
}


def _document(record: Any, where: str, vocab: int | None) -> Iterator[Piece]:
    """Yields the pieces of the document in a JSON record: its text, its question and answer, or its tokens."""
    if isinstance(record, dict) and "text" in record:
        values = [record["text"]]
    elif isinstance(record, dict) and "question" in record and "answer" in record:
        values = [record["question"], record["answer"]]
    elif isinstance(record, dict) and isinstance(record.get("tokens"), list):
        ids = np.asarray(record["tokens"] or np.zeros(0, np.int64))
        if ids.dtype.kind != "i" or ids.ndim != 1:
            raise ValueError(f"{where}: 'tokens' must be a list of whole numbers")
        if vocab is not None:
            check_vocab(ids, vocab, where)
        yield from (ids, None)
        return
    else:
        raise ValueError(f"{where}: expected an object with 'text', with 'question' and 'answer', or with a list 'tokens'")
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise ValueError(f"{where}: expected text, found {json.dumps(wrong[0], default=str)[:40]}")
    text = "\n".join(values)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text is not valid Unicode ({error.reason})") from error
    yield from _cut([text])
    yield None


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    """Yields the text of the blocks by pieces of at most PIECE_CHARS characters.

    It is cut before a single space where there is one near, as byte-level tokenizers split there anyway: the tokens are those
    of the whole text. Else after a newline, else anywhere.
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > PIECE_CHARS:
            stop = start + PIECE_CHARS
            stops = [match.end() for match in _WORD_END.finditer(rest, max(start, stop - 1000), stop)]
            stop = stops[-1] if stops else rest.rfind("\n", start, stop) + 1 or stop
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    yield rest


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)}); expected one object a line") from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def sample_texts(sources: Sequence[Source], max_chars: int = TOKENIZER_CHARS) -> list[str]:
    """Returns about `max_chars` characters of text to train a tokenizer on, the same ones every time.

    Each source gives its weight's share, from the heads of its files in the order of a hash. ValueError if there is no text.
    """
    texts = []
    for source in sources:
        left = max_chars * source.weight / sum(other.weight for other in sources)
        share = max(left / len(source.files), 1 << 20)  # of one file, so that a large one does not speak for all
        for index in np.argsort(_uniform(len(source.files)), kind="stable"):
            if left <= 0:
                break
            taken = 0
            for piece in read_pieces(source.files[index]):
                if taken >= min(share, left):
                    break
                taken += 0 if piece is None else len(piece)
                if isinstance(piece, str) and piece:
                    texts.append(piece)
            left -= taken
    if not texts:
        names = ", ".join(source.name for source in sources)
        raise ValueError(f"data {names}: no text to train a tokenizer on; name one with --tokenizer, or --tokenizer bytes")
    return texts


class TokenStore(NamedTuple):
    """A source's tokens, memory-mapped: tokens [N]; offsets [documents + 1] int64; num_bytes [documents] int64 of UTF-8 text."""

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray


def default_cache_dir() -> pathlib.Path:
    """Returns `$XDG_CACHE_HOME/ring_jax`, or `~/.cache/ring_jax`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "ring_jax"


def tokenize(source: Source, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> TokenStore:
    """Returns the tokens of a source, from the cache if its files and the tokenizer are the same as when it was written.

    The tokenizer's eos token ends each document; empty documents are left out. ValueError if there is no document, if a file
    is wrong, or if the cache cannot be written or is damaged.
    """
    stats = [(os.path.abspath(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in source.files]
    key = json.dumps([FORMAT, stats, tokenizer.to_json(), tokenizer.eos_id])
    folder = cache_dir / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    if not os.path.isdir(folder):
        _log.info("tokenising %s (%d files) into %s", source.name, len(source.files), folder)
        _build_store(source, tokenizer, folder)
    try:
        store = TokenStore(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in TokenStore._fields))
        if len(store.tokens) != store.offsets[-1] or len(store.offsets) != len(store.num_bytes) + 1:
            raise ValueError("its arrays do not fit together")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"token cache {folder}: damaged ({_first_line(error)}); delete this folder and run again") from error
    return store


def _build_store(source: Source, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes the store beside its final name and renames it, so that a folder of that name is always whole."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob("*.partial"):  # of killed runs: untouched for a day
            if max((file.stat().st_mtime for file in (stale, *stale.glob("*"))), default=0) < time.time() - 86400:
                shutil.rmtree(stale, ignore_errors=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            _write_store(source, tokenizer, partial)
            partial.rename(folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process was first, with the same content
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise ValueError(f"cache folder {folder.parent}: cannot be written ({reason}); set XDG_CACHE_HOME to one that can") from error


def _write_store(source: Source, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    offsets, num_bytes = array.array("q", [0]), array.array("q")
    length, size, last = 0, 0, None  # of the open document: tokens, bytes, last token
    with open(folder / "tokens.npy", "wb") as out:

        def write_header(count: int) -> None:
            out.seek(0)  # numpy pads a header so that the shape can grow in place
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(out, header)

        write_header(0)
        pieces = itertools.chain.from_iterable(read_pieces(file, tokenizer.vocab_size) for file in source.files)
        for group in _groups(pieces):
            encoded = iter(tokenizer.encode_batch([piece for piece in group if isinstance(piece, str)]))
            for piece in group:
                if piece is not None:
                    ids = np.asarray(next(encoded) if isinstance(piece, str) else piece, dtype)
                    size += len((piece if isinstance(piece, str) else tokenizer.decode(list(piece))).encode())
                    last = int(ids[-1]) if len(ids) else last
                elif length and tokenizer.eos_id is not None and last != tokenizer.eos_id:
                    ids = np.asarray([tokenizer.eos_id], dtype)
                else:
                    ids = np.zeros(0, dtype)
                out.write(ids.tobytes())
                length += len(ids)
                if piece is None and length:
                    offsets.append(offsets[-1] + length)
                    num_bytes.append(size)
                    length, size, last = 0, 0, None
        write_header(offsets[-1])
    if not num_bytes:
        raise ValueError(f"data {source.name}: no document in it, or only empty ones")
    np.save(folder / "offsets.npy", np.asarray(offsets, np.int64))
    np.save(folder / "num_bytes.npy", np.asarray(num_bytes, np.int64))


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yields the pieces in lists of about GROUP_CHARS characters."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += 1 if piece is None else 1 + len(piece)
        if size >= GROUP_CHARS:
            yield group
            group, size = [], 0
    yield group


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
    held = _uniform(len(lengths)) < fraction
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
    measured = [split[1] if eval_fraction else split[0] for split in splits]
    num_tokens = sum(rows.num_tokens for rows in train)
    return Data(
        tokenizer=tokenizer,
        train=Batches(mixed, batch_size, seq_len),
        eval=Batches(grain.MapDataset.concatenate([grain.MapDataset.source(rows) for rows in held]), batch_size, seq_len),
        bytes_per_token=sum(spans.num_bytes for spans in measured) / sum(int(spans.lengths.sum()) for spans in measured),
        num_tokens=num_tokens,
        fill=num_tokens / (sum(map(len, train)) * seq_len),
    )
