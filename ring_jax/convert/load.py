"""The tensors of a Hugging Face folder as the arrays of a model, read straight into the shards that each device holds."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ring_jax.convert.names import Parameter, check, parameters
from ring_jax.convert.shards import Tensors
from ring_jax.model import Ring


def is_hf_folder(folder: pathlib.Path) -> bool:
    """Return whether a folder looks like a Hugging Face checkpoint."""
    return (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "pytorch_model*.bin*"))


def weights_dtype(tensors: Tensors) -> str:
    """Return the precision of a folder's weights, "bf16" or "fp32"."""
    return "bf16" if tensors.dtype("model.word_embeddings.weight").name == "bfloat16" else "fp32"


def read_hf(folder: pathlib.Path, abstract: Ring, shardings: Mapping[str, Any] | None = None) -> tuple[dict[str, jax.Array], str]:
    """Return the parameters of a Hugging Face folder by the dotted paths of the abstract model, in their stored dtype, and the precision.

    shardings: of each path; a device's shard is read from the files and goes to the device before the next one is read (default: the
    first device holds all). Raises ValueError that lists all missing, unexpected, misshapen and mistyped tensors.
    """
    tensors, wanted = Tensors(folder), parameters(abstract)
    check(tensors, wanted, folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {}
    for p in wanted:
        read = lambda index, p=p: read_region(p, tensors, index or ())
        sharding = shardings[p.path] if shardings else here
        # One device after another: `make_array_from_callback` would hold the parts of all of this host's devices.
        where = sharding.addressable_devices_indices_map(p.shape)
        parts = [jax.block_until_ready(jax.device_put(read(index), device)) for device, index in where.items()]
        arrays[p.path] = jax.make_array_from_single_device_arrays(p.shape, sharding, parts)
    return arrays, weights_dtype(tensors)


def read_region(parameter: Parameter, tensors: Tensors, region: tuple[slice, ...]) -> np.ndarray:
    """Return a region of a parameter, from those tensors only that it touches."""
    spans = [range(*part.indices(size)) for part, size in zip(region, parameter.shape, strict=True)]
    depth = len(parameter.slices[0].index)
    inner = tuple(slice(span.start, span.stop) for span in spans[depth:])
    out: np.ndarray | None = None
    for part in parameter.slices:
        if all(at in span for at, span in zip(part.index, spans, strict=False)):
            value = part.read(tensors, inner)
            if out is None:
                out = np.empty([len(span) for span in spans], parameter.dtype(tensors))
            out[tuple(at - span.start for at, span in zip(part.index, spans, strict=False))] = value
    assert out is not None, "a region is never empty"
    return out
