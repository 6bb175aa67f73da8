"""The token cache: a source tokenised once into arrays on disk, whole or not there."""

import array
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ring_jax.tokenizer import Tokenizer
from ring_jax.train.sources import Piece, Source, first_line, read_pieces

_log = logging.getLogger(__name__)

FORMAT = 1  # of the token cache; part of its key
GROUP_CHARS = 1 << 22  # pieces of a document go to the tokenizer so many together, so that its threads have work


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
        raise ValueError(f"token cache {folder}: damaged ({first_line(error)}); delete this folder and run again") from error
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
        reason = error.strerror or first_line(error)
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
