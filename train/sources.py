"""Sources of training text: which files, and how each format gives its documents in pieces."""

import json
import math
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

PIECE_CHARS = 1 << 14  # a document goes to the tokenizer in pieces of at most these: four times as fast as 1 << 18
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
    for index in np.argsort(uniform(len(files)), kind="stable"):
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


def uniform(count: int) -> np.ndarray:
    """Returns [count] float64 in [0, 1), each a hash of its index alone (splitmix64): growing the list changes no earlier one."""
    value = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (value >> np.uint64(11)).astype(np.float64) / 2.0**53


def _walk(root: pathlib.Path, skip: Callable[[str], bool]) -> list[pathlib.Path]:
    """Returns the files below `root`, sorted, without hidden entries and without folders whose name `skip` accepts."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and not skip(name)]
        found += [path for name in files if not name.startswith(".") and os.path.isfile(path := pathlib.Path(folder, name))]
    return sorted(found)


def read_pieces(path: pathlib.Path, vocab: int | None = None) -> Iterator[Piece]:
    """Yields a file's documents by pieces, each document followed by None; token ids are checked against `vocab` if given.

    ValueError naming the path, and the line where there are lines, for whatever cannot be read.
    """
    try:
        yield from _READERS.get(path.suffix.lower(), _read_text)(path, vocab)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


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
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)})") from error


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
        raise ValueError(f"{path}: not a readable arrayrecord file ({first_line(error)})") from error


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


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def sample_texts(sources: Sequence[Source], max_chars: int = TOKENIZER_CHARS) -> list[str]:
    """Returns about `max_chars` characters of text to train a tokenizer on, the same ones every time.

    Each source gives its weight's share, from the heads of its files in the order of a hash. ValueError if there is no text.
    """
    texts = []
    for source in sources:
        left = max_chars * source.weight / sum(other.weight for other in sources)
        share = max(left / len(source.files), 1 << 20)  # of one file, so that a large one does not speak for all
        for index in np.argsort(uniform(len(source.files)), kind="stable"):
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
