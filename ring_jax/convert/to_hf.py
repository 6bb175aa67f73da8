"""A model as a Hugging Face folder: streamed from a checkpoint of ours, or written from memory."""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from ring_jax import checkpoint
from ring_jax.config import ModelConfig
from ring_jax.config import from_hf as config_from_hf
from ring_jax.config import to_hf as config_to_hf
from ring_jax.convert import assets
from ring_jax.convert.from_hf import BLOCK
from ring_jax.convert.names import Parameter, Slice, parameters, variables
from ring_jax.convert.partial import finish, open_partial
from ring_jax.convert.progress import Progress
from ring_jax.convert.shards import DTYPE_OF, INDEX, SCALE, SCALE_BLOCK, Planned, Shard, index_json, plain, plan_shards, write_shard
from ring_jax.convert.store import Checkpoint
from ring_jax.model import Ring
from ring_jax.numerics import DTYPES

MAX_SHARD_SIZE = 5 * 10**9


def _blocks(part: Slice, which: int, itemsize: int, read: Callable[[tuple[slice, ...]], np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the rows of one stored tensor of a part, a block at a time; read(region) returns a region of the part."""
    shape = part.stored_shape
    if not part.transposed:
        rows = max(1, BLOCK // max(1, itemsize * int(np.prod(shape[1:]))))
        for first in range(0, shape[0], rows):
            yield read((slice(first, min(first + rows, shape[0])), *(slice(0, n) for n in shape[1:])))
        return
    rows = max(1, BLOCK // max(1, itemsize * shape[1]))
    for first in range(0, shape[0], rows):
        columns = slice(which * shape[0] + first, which * shape[0] + min(first + rows, shape[0]))
        yield read((slice(0, shape[1]), columns)).T


def tensor_dtype(parameter: Parameter, stored: np.dtype, precision: str | None, dtype: str | None, keep_fp32: bool) -> np.dtype:
    """Return the dtype of a parameter's tensors: what was asked for, else as stored; the master weights of a bf16 run are rounded.

    precision: of the run that the weights were trained in, None if in none. The balancing bias stays as it is. Parameters that the model
    reads in fp32 (routers) are not rounded unasked.
    """
    if parameter.is_balance:
        return stored
    if dtype is not None:
        return np.dtype(DTYPES[dtype])
    rounded = stored == np.float32 and precision == "bf16" and not keep_fp32
    return np.dtype(ml_dtypes.bfloat16) if rounded else stored


def _config_text(config: ModelConfig, hf: dict[str, Any] | None, dtype: np.dtype, as_stored: bool, kept_fp8: bool) -> str:
    """The text of config.json: the one that came with the model, with what has changed; fields we do not know stay."""
    original = (hf or {"files": {}})["files"].get("config.json")
    name = dtype.name
    if original is None:
        return json.dumps({**config_to_hf(config), "torch_dtype": name}, indent=2) + "\n"
    fields = json.loads(original)
    generation = json.loads(hf["files"].get("generation_config.json", "{}")) if hf else {}
    said = fields.get("torch_dtype", fields.get("dtype", name))
    name = said if as_stored else name
    scaled = fields.get("quantization_config") and not kept_fp8
    if config_from_hf(fields, generation) == config and said == name and not scaled:
        return original
    if scaled:
        del fields["quantization_config"]
    ours, before = config_to_hf(config), config_to_hf(config_from_hf(fields, generation))
    fields |= {key: value for key, value in ours.items() if before[key] != value}
    fields["dtype" if "dtype" in fields else "torch_dtype"] = name
    return json.dumps(fields, indent=2) + "\n"


def write_folder(
    partial: pathlib.Path,
    wanted: list[Parameter],
    dtypes: dict[str, np.dtype],
    read: Callable[[str, tuple[int | slice, ...]], np.ndarray],
    progress: Progress,
    kept: Checkpoint | None = None,
    *,
    continued: bool = False,
    weight_map: dict[str, list[str]] | None = None,
    index_metadata: dict[str, Any] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write the tensors of these parameters as safetensors files, with an index if there are several.

    If `continued`, files that are there are kept.

    dtypes: of each tensor. read(path, where): a part of a parameter. kept: where FP8 values and scales come from as they are.
    weight_map: the tensors of each file, as they came, if they did. index_metadata: what the index says besides.
    """
    found = {name: (parameter, part, i) for parameter in wanted for part in parameter.slices for i, name in enumerate(part.tensors)}
    planned = {name: Planned(name, dtypes[name], part.stored_shape) for name, (_, part, _) in found.items()}
    for name, (parameter, part, _) in list(found.items()):
        if kept is not None and parameter.path in kept.scales:
            shape = tuple(-(-size // SCALE_BLOCK) for size in part.stored_shape)
            planned[name + SCALE] = Planned(name + SCALE, kept.scales[parameter.path].dtype(parameter.path), shape)
            found[name + SCALE] = found[name]
    if weight_map is not None and sorted(name for names in weight_map.values() for name in names) == sorted(planned):
        shards = [Shard(plain(file), [planned[name] for name in names]) for file, names in weight_map.items()]
    else:
        in_order = sorted(planned.values(), key=lambda tensor: _layer(found[tensor.name][1]))
        shards = plan_shards(in_order, max_shard_size)

    def rows(name: str) -> Iterator[np.ndarray]:
        parameter, part, which = found[name]
        if kept is not None and parameter.path in kept.scales:
            source = kept.scales if name.endswith(SCALE) else kept.arrays
            value = source[parameter.path].read(parameter.path, part.index)
            return iter([np.split(value, len(part.tensors), axis=-1)[which].T])
        region = lambda where: read(parameter.path, (*part.index, *where))
        return _blocks(part, which, dtypes[name].itemsize, region)

    for shard in shards:
        if continued and (partial / shard.file).is_file():
            progress.skip(sum(tensor.nbytes for tensor in shard.tensors))
            continue
        for nbytes in write_shard(partial, shard, rows):
            progress.add(nbytes)
    if len(shards) > 1 or shards[0].file != "model.safetensors":
        (partial / INDEX).write_text(index_json(shards, index_metadata or {}), encoding="utf-8")


def _nbytes(wanted: list[Parameter], dtypes: dict[str, np.dtype]) -> int:
    """Bytes of all tensors."""
    return sum(dtypes[name].itemsize * int(np.prod(part.stored_shape)) for p in wanted for part in p.slices for name in part.tensors)


def _layer(part: Slice) -> float:
    """Where a part stands in the files: the embedding, the layers, then what follows them."""
    return part.layer if part.layer >= 0 else -1 if part.path == "embedding" else float("inf")


def to_hf(path: str | pathlib.Path, out: pathlib.Path, *, dtype: str | None = None, max_shard_size: int | None = None) -> ModelConfig:
    """Convert a checkpoint of ours (a run folder, or one of its steps) into a Hugging Face folder.

    Everything is written to `out`.partial, which the same call continues after a stop, and renamed at the end. Raises ValueError in one
    line for a missing or damaged checkpoint, an existing `out`, or a disk that is full.
    """
    if out.exists():
        raise ValueError(f"output {out} exists: name another, or remove it")
    found = checkpoint.find(path)
    if found.step is None:
        raise ValueError(f"{path} is a Hugging Face folder already")
    manager = checkpoint.Manager(found.folder, read_only=True)
    try:
        meta, hf, tokenizer = manager.meta(found.step), manager.hf(found.step), manager.tokenizer(found.step)
    finally:
        manager.close()
    for name in (*hf["files"], *hf["binaries"], *hf["weight_map"]) if hf else ():
        plain(name)  # before anything is written
    config = ModelConfig.from_json(json.dumps(meta["model"]))
    abstract = nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0)))
    wanted, ours = parameters(abstract), variables(abstract)
    step = found.folder / checkpoint.RUN_SUBFOLDER / str(found.step)
    held = Checkpoint(step, wanted)
    dtypes: dict[str, np.dtype] = {}
    precision = meta["precision"] if "train" in meta else None
    for p in wanted:
        keep = bool(ours[p.path].get_metadata("keep_fp32", False))
        stored = held.arrays[p.path].dtype(p.path) if dtype is None else held.dtype(p.path)
        ours_dtype = tensor_dtype(p, stored, precision, dtype, keep)
        dtypes |= {name: ours_dtype for part in p.slices for name in part.tensors}
    if hf and dtype is None:
        dtypes |= {name: DTYPE_OF[code] for name, code in hf["dtypes"].items() if name in dtypes and code in DTYPE_OF}
    identity = json.dumps([str(step.resolve()), (step / "meta" / "metadata").stat().st_mtime_ns, dtype, max_shard_size])
    partial = open_partial(out, identity)
    keep_files = hf["weight_map"] if hf and max_shard_size is None and dtype is None else None
    kept = held if dtype is None else None
    with Progress(_nbytes(wanted, dtypes)) as progress:
        write_folder(
            partial,
            wanted,
            dtypes,
            held.read,
            progress,
            kept,
            continued=True,
            weight_map=keep_files,
            index_metadata=hf.get("index_metadata") if hf else None,
            max_shard_size=max_shard_size or MAX_SHARD_SIZE,
        )
    if hf:
        assets.write_files(hf, partial)
    elif tokenizer is not None:
        (partial / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    as_stored = dtype is None and precision is None
    (partial / "config.json").write_bytes(
        _config_text(config, hf, dtypes["model.word_embeddings.weight"], as_stored, bool(held.scales) and dtype is None).encode()
    )
    finish(partial, out)
    return config


def write_hf(model: Ring, folder: pathlib.Path, dtype: str = "float32") -> None:
    """Write a model that fits in memory as a Hugging Face folder: config.json and safetensors files."""
    held, wanted = variables(model), parameters(model)
    dtypes = {name: np.dtype(np.float32 if p.is_balance else dtype) for p in wanted for part in p.slices for name in part.tensors}
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {path: np.asarray(variable.get_value()) for path, variable in held.items()}
    write_folder(folder, wanted, dtypes, lambda path, where: arrays[path][where], Progress(0, quiet=True))
    text = json.dumps({**config_to_hf(model.config), "torch_dtype": np.dtype(dtype).name}, indent=1)
    (folder / "config.json").write_text(text, encoding="utf-8")
