"""The arrays of one item of a checkpoint ("params") as Orbax stores them, written and read a chunk at a time.

Orbax's own writer takes whole arrays. What it restores is simple: a zarr array (version 2) a parameter, below the item's folder, and a
`_METADATA` file that lists them. Here the arrays are plain files, one an expert or a layer, so that a stopped conversion sees what it has.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore

from ring_jax.convert.names import Parameter, Slice
from ring_jax.convert.shards import shown, spread_scales

CACHE_BYTES = 256 * 2**20
"""Bytes of decoded chunks that a reader keeps."""


class Layout(NamedTuple):
    """An array to be written: its shape, dtype and chunk shape."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


def _open(spec: dict[str, Any], **options: Any) -> Any:
    return tensorstore.open(spec, **options).result()


class Writer:
    """Writes arrays below a folder; what an earlier process has written is kept."""

    def __init__(self, folder: pathlib.Path, layouts: Mapping[str, Layout]):
        self.folder, self.layouts = folder, layouts
        self._arrays: dict[str, Any] = {}

    def has(self, path: str, index: tuple[int, ...]) -> bool:
        """Return whether the chunk at an index of chunks is on disk (files appear whole)."""
        return (self.folder / path / ".".join(map(str, index))).is_file()

    def write(self, path: str, index: tuple[int, ...], value: np.ndarray) -> Any:
        """Start writing the chunk at an index of chunks; returns a future whose `result()` raises what went wrong."""
        layout = self.layouts[path]
        if path not in self._arrays:
            metadata = {"shape": layout.shape, "chunks": layout.chunk, "compressor": None, "dimension_separator": "."}
            self._arrays[path] = _open(
                {
                    "driver": "zarr",
                    "kvstore": {"driver": "file", "path": f"{(self.folder / path).absolute()}/"},
                    "metadata": metadata,
                    "dtype": layout.dtype.name,
                    "store_data_equal_to_fill_value": True,
                },
                create=True,
                open=True,
            )
        where = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, layout.chunk, layout.shape, strict=True))
        return self._arrays[path][where].write(value.reshape([part.stop - part.start for part in where]))

    def finish(self) -> None:
        """Write what Orbax reads to find the arrays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = {
            str((path,)): {
                "key_metadata": [{"key": path, "key_type": 2}],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(layout.shape)},
            }
            for path, layout in self.layouts.items()
        }
        metadata = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
        (self.folder / "_METADATA").write_text(json.dumps({**metadata, "custom_metadata": None}), encoding="utf-8")


class Reader:
    """Reads parts of the arrays of an item, ours or Orbax's own."""

    def __init__(self, folder: pathlib.Path):
        base = folder.absolute()
        ocdbt = (folder / "manifest.ocdbt").is_file()
        self._store: dict[str, Any] = {"driver": "ocdbt", "base": f"file://{base}/"} if ocdbt else {"driver": "file", "path": f"{base}/"}
        self._arrays: dict[str, Any] = {}
        # A chunk may hold several of the parts that are asked for one after another.
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        try:
            self.paths = sorted(self._names(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} lists no arrays ({error})") from None

    @staticmethod
    def _names(folder: pathlib.Path) -> list[str]:
        tree = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"]
        return [value["key_metadata"][0]["key"] for value in tree.values()]

    def _array(self, path: str) -> Any:
        if path not in self._arrays:
            prefix = self._store.get("path", "")
            spec = {
                "driver": "zarr",
                "kvstore": {**self._store, "path": f"{prefix}{path}/"},
                "recheck_cached_data": "open",
                "fill_missing_data_reads": False,  # a chunk that is not there is an error, not zeros
            }
            self._arrays[path] = _open(spec, context=self._context)
        return self._arrays[path]

    def shape(self, path: str) -> tuple[int, ...]:
        """Return an array's shape."""
        return tuple(self._array(path).shape)

    def dtype(self, path: str) -> np.dtype:
        """Return an array's dtype."""
        return np.dtype(self._array(path).dtype.numpy_dtype)

    def read(self, path: str, where: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Return a part of an array. Raises ValueError naming an array that cannot be read whole."""
        try:
            return self._array(path)[where].read().result()
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0][:200]}") from None


class Checkpoint:
    """The parameters of one of our checkpoints (the folder of a step); what is kept in FP8 is read as bf16.

    wanted: the parameters of its model. Raises ValueError that lists those that are missing or misshapen.
    """

    def __init__(self, step: pathlib.Path, wanted: list[Parameter]):
        self._step = step
        self._joined = {p.path: len(p.slices[0].tensors) for p in wanted}  # how many tensors stand side by side in a parameter
        self._places = {part.tensors: (p.path, part.index) for p in wanted for part in p.slices}
        with self._told():
            self.arrays = {path: reader for item in ("params", "balance") for reader in [Reader(step / item)] for path in reader.paths}
            scales = Reader(step / "scales") if (step / "scales").is_dir() else None
            self.scales = {path: scales for path in scales.paths} if scales else {}
            problems = [f"missing {p.path}" for p in wanted if p.path not in self.arrays]
            problems += [
                f"{p.path} is {list(self.shape(p.path))}, not {list(p.shape)}"
                for p in wanted
                if p.path in self.arrays and self.shape(p.path) != p.shape
            ]
            if problems:
                raise ValueError(shown(problems))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors name the checkpoint."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"checkpoint {self._step} is damaged or not of this model: {error}") from None

    def shape(self, path: str) -> tuple[int, ...]:
        """Return a parameter's shape."""
        return self.arrays[path].shape(path)

    def dtype(self, path: str) -> np.dtype:
        """Return the dtype in which a parameter is read."""
        return np.dtype(ml_dtypes.bfloat16) if path in self.scales else self.arrays[path].dtype(path)

    def read(self, path: str, where: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Return a part of a parameter: leading indices, then slices."""
        with self._told():
            value = self.arrays[path].read(path, where)
            if path not in self.scales:
                return value
            index = tuple(part for part in where if not isinstance(part, slice))
            scales = spread_scales(self.scales[path].read(path, index).astype(np.float32), self.shape(path), self._joined[path])
            return (value.astype(np.float32) * scales[where[len(index) :]]).astype(ml_dtypes.bfloat16)

    def read_part(self, part: Slice, region: tuple[slice, ...]) -> np.ndarray:
        """Return a region of a slice of any layout of the same model: the tensors that make it say where it is stored."""
        path, index = self._places[part.tensors]
        return self.read(path, (*index, *region))

    def part_dtype(self, parameter: Parameter) -> np.dtype:
        """Return the dtype in which `read_part` returns the slices of a parameter, of any layout."""
        return self.dtype(self._places[parameter.slices[0].tensors][0])
