"""Safetensors files: a folder's tensors read a block of rows at a time, and a writer that never holds a whole file.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header with each tensor's dtype, shape and
byte range, then the bytes. The library's reader keeps what it has touched of a file resident and its writer takes whole tensors, so a file
of any size would not do with bounded memory; here a block is mapped, used and unmapped.
"""

import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
DTYPE_OF = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
SCALE = "_scale_inv"
"""What the name of a block-scaled FP8 tensor's scales ends with."""
SCALE_BLOCK = 128
LARGEST_HEADER = 100_000_000
"""Bytes of the longest header, as in the safetensors library."""
CODE_OF = {dtype: code for code, dtype in DTYPE_OF.items()}


class Entry(NamedTuple):
    """Where a tensor lies: its file, dtype, shape, and first byte in the file."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


MOST_SHOWN = 20


def shown(problems: list[str]) -> str:
    """Return the problems in one line, the first ones if there are many."""
    more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
    return "; ".join(problems[:MOST_SHOWN]) + more


def plain(name: str) -> str:
    """Return the name of a file in a folder. Raises ValueError for one that leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or name != pathlib.PurePath(name).name or "\\" in name:
        raise ValueError(f"{name!r} is not the name of a file")
    return name


def read_header(file: pathlib.Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file. Raises ValueError naming a file that is none, is cut short, or has an unknown dtype."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header wants {8 + length} bytes (at most {LARGEST_HEADER}), the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, fields in header.items():
            if fields["dtype"] not in DTYPE_OF:
                raise ValueError(f"{name} has dtype {fields['dtype']}; known: {', '.join(DTYPE_OF)}")
            start, stop = fields["data_offsets"]
            if not all(isinstance(n, int) and n >= 0 for n in (start, stop, *fields["shape"])):
                raise ValueError(f"{name} has offsets {fields['data_offsets']} and shape {fields['shape']}")
            entry = Entry(file, DTYPE_OF[fields["dtype"]], tuple(fields["shape"]), 8 + length + start)
            if stop - start != entry.nbytes:
                raise ValueError(f"{name} has {stop - start} bytes, its shape {list(entry.shape)} wants {entry.nbytes}")
            if 8 + length + stop > size:
                raise ValueError(f"it is cut short: {name} ends at byte {8 + length + stop}, the file has {size}")
            entries[name] = entry
        in_order = sorted((entry.start, entry.start + entry.nbytes, name) for name, entry in entries.items())
        for (_, stop, one), (start, _, other) in itertools.pairwise(in_order):
            if start < stop:
                raise ValueError(f"{one} and {other} share bytes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else f"its header is damaged ({type(error).__name__})"
        raise ValueError(f"{file} cannot be read as safetensors: {reason}") from None
    return entries


class Tensors:
    """The tensors of a Hugging Face folder by name; none is read before it is asked for.

    Block-scaled FP8 tensors (values in e4m3, and a scale for each SCALE_BLOCK x SCALE_BLOCK block under the name + SCALE) are read as bf16:
    value times scale in fp32, rounded. With `keep_fp8` their values are read as stored.
    """

    def __init__(self, folder: pathlib.Path, keep_fp8: bool = False):
        self.folder, self._keep_fp8 = folder, keep_fp8
        self.index_metadata: dict[str, Any] = {}
        index = folder / INDEX
        weight_map: dict[str, str] = {}
        if index.is_file():
            try:
                fields = json.loads(index.read_text(encoding="utf-8"))
                weight_map = {str(name): plain(file) for name, file in fields["weight_map"].items()}
                self.index_metadata = dict(fields.get("metadata") or {})
                files = sorted(set(weight_map.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is not an index of tensors: {error!r}") from None
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            if pickles := sorted(path.name for path in folder.glob("*.bin")):
                raise ValueError(
                    f"{folder} holds pickled weights ({pickles[0]}): reading them can run code; convert them to safetensors first"
                )
            raise ValueError(f"{folder} has no safetensors file")
        self.entries: dict[str, Entry] = {}
        problems = []
        for name in files:
            if not (folder / name).is_file():
                problems.append(f"{INDEX} names {name}, which is not there" if weight_map else f"{name} is not there")
                continue
            try:
                found = read_header(folder / name)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            # The index decides where a tensor is read; without one a name may be there once.
            problems += [
                f"{tensor} is in {name} and in {self.entries[tensor].file.name}"
                for tensor in found
                if tensor in self.entries and not weight_map
            ]
            self.entries.update({tensor: entry for tensor, entry in found.items() if weight_map.get(tensor, name) == name})
        misplaced = [name for name, file in weight_map.items() if name not in self.entries and (folder / file).is_file()]
        if not problems and misplaced:
            problems = [f"{INDEX} lists {name} in {weight_map[name]}, which lacks it" for name in misplaced]
        for name, entry in self.entries.items():
            if entry.dtype == DTYPE_OF["F8_E4M3"] and entry.shape:
                wanted = [-(-size // SCALE_BLOCK) for size in entry.shape]
                scale = self.entries.get(name + SCALE)
                if scale is None or list(scale.shape) != wanted:
                    problems.append(
                        f"{name} is FP8: {name + SCALE} {wanted} {'is missing' if scale is None else f'is {list(scale.shape)}'}"
                    )
        if problems:
            raise ValueError(f"{folder}: {shown(problems)}")

    @property
    def names(self) -> set[str]:
        """The names of all tensors, but the scales of block-scaled ones, which belong to them."""
        return {name for name in self.entries if not (name.endswith(SCALE) and self.is_scaled(name.removesuffix(SCALE)))}

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype in which a tensor is read."""
        return self.entries[name].dtype if self._keep_fp8 or not self.is_scaled(name) else np.dtype(ml_dtypes.bfloat16)

    def is_scaled(self, name: str) -> bool:
        """Return whether a tensor is block-scaled FP8."""
        return name + SCALE in self.entries and self.entries[name].dtype == DTYPE_OF["F8_E4M3"]

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return rows first to first + count of a tensor (default: all), mapped read-only: its pages leave memory with the array."""
        if self.is_scaled(name) and not self._keep_fp8:
            return self._dequantised(name, first, self.entries[name].shape[0] - first if count is None else count)
        return self.read_raw(name, first, count)

    def _dequantised(self, name: str, first: int, count: int) -> np.ndarray:
        block = first // SCALE_BLOCK
        scales = np.asarray(self.read_raw(name + SCALE, block, -(-(first + count) // SCALE_BLOCK) - block), np.float32)
        scales = spread_scales(scales, (first + count - block * SCALE_BLOCK, self.entries[name].shape[1]))[first - block * SCALE_BLOCK :]
        return (self.read_raw(name, first, count).astype(np.float32) * scales).astype(ml_dtypes.bfloat16)

    def read_raw(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return rows of a tensor as they are stored."""
        entry = self.entries[name]
        if not entry.shape:
            return np.fromfile(entry.file, entry.dtype, 1, offset=entry.start).reshape(())
        count = entry.shape[0] - first if count is None else count
        row = math.prod(entry.shape[1:])
        if not count * row:
            return np.zeros((count, *entry.shape[1:]), entry.dtype)
        start = entry.start + first * row * entry.dtype.itemsize
        raw = np.memmap(entry.file, np.uint8, "r", start, (count * row * entry.dtype.itemsize,))
        return np.ndarray((count, *entry.shape[1:]), entry.dtype, raw)


def spread_scales(scales: Any, shape: tuple[int, ...], joined: int = 1) -> Any:
    """Return the scale of each element of tensors [..., rows, columns] from those of their blocks; `joined` tensors lie side by side."""
    width, blocks = shape[-1] // joined, scales.shape[-1] // joined
    column = np.arange(width * joined)
    columns = column // width * blocks + column % width // SCALE_BLOCK
    return scales[..., np.arange(shape[-2]) // SCALE_BLOCK, :][..., columns]


class Planned(NamedTuple):
    """A tensor to be written: its name, dtype and shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """A file to be written: its name, and its tensors in order."""

    file: str
    tensors: list[Planned]


def plan_shards(tensors: Iterable[Planned], largest: int) -> list[Shard]:
    """Return the files for these tensors, in order, of at most `largest` bytes each (a larger tensor has a file of its own)."""
    groups: list[list[Planned]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.nbytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{i + 1:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups)]


def write_shard(folder: pathlib.Path, shard: Shard, rows: Callable[[str], Iterator[np.ndarray]]) -> Iterator[int]:
    """Write a file under a temporary name and rename it; rows(name) yields a tensor's blocks of rows. Yields the bytes of each block."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard.tensors:
        header[tensor.name] = {"dtype": CODE_OF[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = folder / f"{shard.file}.partial"
    try:
        with partial.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in shard.tensors:
                written = 0
                for block in rows(tensor.name):
                    block = np.ascontiguousarray(block, tensor.dtype)
                    stream.write(block.reshape(-1).view(np.uint8).data)
                    written += block.nbytes
                    yield block.nbytes
                if written != tensor.nbytes:
                    raise ValueError(f"{tensor.name}: {written} bytes instead of {tensor.nbytes}")
            stream.flush()
            os.fsync(stream.fileno())  # a file that has its name is whole, also after a power cut
        partial.rename(folder / shard.file)
    except OSError as error:
        raise ValueError(f"{partial} could not be written ({error.strerror or error})") from error


def index_json(shards: list[Shard], metadata: Mapping[str, Any]) -> str:
    """Return the text of the index of several files, with this metadata."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return json.dumps({"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB, 500MB or 4GiB. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"size {text!r} is not one such as 5GB, 500MB or 4GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
