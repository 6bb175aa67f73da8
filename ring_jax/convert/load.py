"""The parameters of a Hugging Face folder, or of a checkpoint of ours, read straight into the shards that each device holds."""

import concurrent.futures
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from ring_jax.convert.names import Parameter, Slice
from ring_jax.convert.shards import Tensors

READERS = 4
"""Slices of a parameter that are read at a time."""


def is_hf_folder(folder: pathlib.Path) -> bool:
    """Return whether a folder looks like a Hugging Face checkpoint."""
    return (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "pytorch_model*.bin*"))


def weights_dtype(tensors: Tensors) -> str:
    """Return the precision of a folder's weights, "bf16" or "fp32"."""
    return "bf16" if tensors.dtype("model.word_embeddings.weight").name == "bfloat16" else "fp32"


@runtime_checkable
class Source(Protocol):
    """What parameters are read from: the tensors of a Hugging Face folder, or a checkpoint of ours."""

    def read_part(self, part: Slice, region: tuple[slice, ...]) -> np.ndarray:
        """Return a region of a slice of a parameter."""
        ...

    def part_dtype(self, parameter: Parameter) -> np.dtype:
        """Return the dtype in which the slices of a parameter are read."""
        ...


class Folder(NamedTuple):
    """The tensors of a Hugging Face folder as a source of parameters."""

    tensors: Tensors

    def read_part(self, part: Slice, region: tuple[slice, ...]) -> np.ndarray:
        """Return a region of a slice of a parameter."""
        return part.read(self.tensors, region)

    def part_dtype(self, parameter: Parameter) -> np.dtype:
        """Return the dtype in which the slices of a parameter are read."""
        return parameter.dtype(self.tensors)


def read_arrays(source: Source, wanted: list[Parameter], shardings: Mapping[str, Any] | None = None) -> dict[str, jax.Array]:
    """Return the parameters by dotted path, in their stored dtype.

    shardings: of each path; a device's shard is read from the files and goes to the device before the next one is read (default: the
    first device holds all).
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {}
    for p in wanted:
        sharding = shardings[p.path] if shardings else here
        # One device after another: `make_array_from_callback` would hold the parts of all of this host's devices.
        where = sharding.addressable_devices_indices_map(p.shape)
        parts = [jax.block_until_ready(jax.device_put(read_region(p, source, index or ()), device)) for device, index in where.items()]
        arrays[p.path] = jax.make_array_from_single_device_arrays(p.shape, sharding, parts)
    return arrays


def read_region(parameter: Parameter, source: Source, region: tuple[slice, ...]) -> np.ndarray:
    """Return a region of a parameter, from those slices only that it touches."""
    spans = [range(*part.indices(size)) for part, size in zip(region, parameter.shape, strict=True)]
    depth = len(parameter.slices[0].index)
    inner = tuple(slice(span.start, span.stop) for span in spans[depth:])
    out = np.empty([len(span) for span in spans], source.part_dtype(parameter))

    def read(part: Slice) -> None:
        out[tuple(at - span.start for at, span in zip(part.index, spans, strict=False))] = source.read_part(part, inner)

    touched = [part for part in parameter.slices if all(at in span for at, span in zip(part.index, spans, strict=False))]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, touched))
    return out
