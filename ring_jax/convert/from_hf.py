"""A Hugging Face folder as a checkpoint of ours: streamed, restartable, whole or absent."""

import collections
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ring_jax import checkpoint
from ring_jax.config import read_hf_config
from ring_jax.convert import assets
from ring_jax.convert.hybrid import Widened, open_base
from ring_jax.convert.names import Parameter, Slice, check, parameters
from ring_jax.convert.partial import finish, open_partial
from ring_jax.convert.progress import Progress
from ring_jax.convert.shards import SCALE, Tensors, shown
from ring_jax.convert.store import Layout, Writer
from ring_jax.model import Ring
from ring_jax.numerics import DTYPES

BLOCK = 128 * 2**20
"""Most bytes of a chunk: a larger part of a parameter (the embedding, the head) is cut along the rows of its stored tensor."""
IN_FLIGHT = 256 * 2**20
"""Bytes that are being written at a time."""


class Chunk(NamedTuple):
    """What is read and written at a time: the index of a chunk of a parameter, and the region of a slice that it holds."""

    part: Slice
    index: tuple[int, ...]
    region: tuple[slice, ...]


def layout(parameter: Parameter, dtype: np.dtype) -> Layout:
    """Return how a parameter is stored: a chunk for each slice, or for each block of a large one."""
    part = parameter.slices[0]
    chunk = list(part.shape)
    cut = len(chunk) - 1 if part.transposed else 0  # the rows of a stored tensor
    row = max(1, np.dtype(dtype).itemsize * int(np.prod(chunk)) // max(chunk[cut], 1))
    if chunk[cut] * row > BLOCK:
        chunk[cut] = max(1, BLOCK // row)
    return Layout(parameter.shape, dtype, (*(1 for _ in part.index), *chunk))


def chunks(parameter: Parameter, stored: Layout) -> Iterator[Chunk]:
    """Yield the chunks of a parameter."""
    for part in parameter.slices:
        size = stored.chunk[len(part.index) :]
        for at in np.ndindex(*(-(-n // c) for n, c in zip(part.shape, size, strict=True))):
            region = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(at, size, part.shape, strict=True))
            yield Chunk(part, (*part.index, *at), region)


def _identity(tensors: Tensors, options: dict[str, Any]) -> str:
    """A digest of what is converted and how: a stopped conversion is continued only by the same one."""
    files = sorted({entry.file for entry in tensors.entries.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([str(tensors.folder.resolve()), stats, options], sort_keys=True).encode()).hexdigest()


class Hybrid(NamedTuple):
    """How a softmax-only base becomes a hybrid: its period, the groups of the new norms, and the seed of the new gates."""

    period: int
    norm_groups: int
    seed: int


def from_hf(
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    dtype: str | None = None,
    keep_fp8: bool = False,
    check_finite: bool = False,
    hybrid: Hybrid | None = None,
) -> None:
    """Convert a Hugging Face folder into a run folder with one checkpoint, step 0; with `hybrid`, a softmax-only base into a hybrid.

    Block-scaled FP8 tensors become bf16, or are kept with their scales (item "scales") and become bf16 when they are loaded.
    Everything is written to `out`.partial, which the same call continues after a stop, and renamed at the end. Raises ValueError in one
    line for a folder that is not what its config says, an existing `out`, or a disk that is full.
    """
    if out.exists():
        raise ValueError(f"output {out} exists: name another, or remove it")  # before a long look at the source
    if not source.is_dir():
        raise ValueError(f"no Hugging Face folder at {source}")
    if hybrid is None:
        fields, config, tensors = None, read_hf_config(source), Tensors(source, keep_fp8)
    else:
        fields, config, tensors = open_base(source, *hybrid)
    wanted = parameters(nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0))))
    check(tensors, wanted, source)
    scaled = [p for p in wanted if keep_fp8 and any(tensors.is_scaled(name) for part in p.slices for name in part.tensors)]
    if partly := [p.path for p in scaled if not all(tensors.is_scaled(name) for part in p.slices for name in part.tensors)]:
        raise ValueError(f"only some tensors of {shown(partly)} are FP8: they cannot be kept, convert without --keep-fp8")
    # The balancing bias is fp32 whatever the weights are.
    asked = lambda p: np.dtype(DTYPES[dtype]) if dtype and not p.is_balance else p.dtype(tensors)
    layouts = {parameter.path: layout(parameter, asked(parameter)) for parameter in wanted}
    options = {"dtype": dtype, "keep_fp8": keep_fp8, "check_finite": check_finite, "hybrid": hybrid}
    partial = open_partial(out, _identity(tensors, options))
    step = partial / checkpoint.RUN_SUBFOLDER / "0"
    item = lambda p: "balance" if p.is_balance else "params"
    writers = {name: Writer(step / name, {p.path: layouts[p.path] for p in wanted if item(p) == name}) for name in ("params", "balance")}
    problems: list[str] = []
    with Progress(sum(at.nbytes for at in layouts.values())) as progress:
        for parameter in wanted:
            problems += _stream(parameter, layouts[parameter.path], tensors, writers[item(parameter)], progress, check_finite)
        if problems:
            raise ValueError(f"{source} holds values that are not finite: {shown(problems)}")
    if scaled:
        writers["scales"] = _write_scales(scaled, tensors, step / "scales")
    for writer in writers.values():
        writer.finish()
    hf, meta = assets.read(tensors, wanted), assets.meta(config, layouts["embedding"].dtype)
    if fields is not None:
        hf["files"]["config.json"] = json.dumps(fields, indent=2) + "\n"
    tokenizer = hf["files"].get("tokenizer.json")
    for name, value in {"hf": hf, "meta": meta, "tokenizer": {"json": tokenizer}}.items():
        assets.write_json_item(step, name, value)
    (partial / "config.json").write_text(json.dumps({"model": meta["model"]}, indent=1), encoding="utf-8")
    if tokenizer is not None:
        (partial / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    finish(partial, out)
    if isinstance(tensors, Widened):
        print(tensors.report(), file=sys.stderr)


def _write_scales(scaled: list[Parameter], tensors: Tensors, folder: pathlib.Path) -> Writer:
    """Write the scales of the parameters that are kept in FP8, laid out as their values are."""
    of_part = lambda part: np.concatenate([tensors.read_raw(name + SCALE).T for name in part.tensors], axis=-1)
    layouts = {}
    for parameter in scaled:
        part = parameter.slices[0]
        scales, depth = of_part(part), len(part.index)
        layouts[parameter.path] = Layout((*parameter.shape[:depth], *scales.shape), scales.dtype, (*(1,) * depth, *scales.shape))
    writer = Writer(folder, layouts)
    for parameter in scaled:
        for part in parameter.slices:
            writer.write(parameter.path, (*part.index, 0, 0), np.ascontiguousarray(of_part(part), layouts[parameter.path].dtype)).result()
    return writer


def _stream(parameter: Parameter, stored: Layout, tensors: Tensors, writer: Writer, progress: Progress, check_finite: bool) -> list[str]:
    """Write a parameter's chunks that are not yet there, a few at a time; return the tensors with values that are not finite."""
    waiting: collections.deque[tuple[Any, int]] = collections.deque()
    in_flight, problems = 0, []
    for chunk in chunks(parameter, stored):
        nbytes = int(np.prod([s.stop - s.start for s in chunk.region])) * stored.dtype.itemsize
        if writer.has(parameter.path, chunk.index):
            progress.skip(nbytes)
            continue
        with np.errstate(over="ignore"):  # what a narrower dtype cannot hold is told of below
            value = np.ascontiguousarray(chunk.part.read(tensors, chunk.region), stored.dtype)
        if check_finite and not (finite := np.isfinite(value.astype(np.float32)).reshape(-1, value.shape[-1]).all(0)).all():
            names = chunk.part.owners(np.flatnonzero(~finite) + chunk.region[-1].start)
            problems += [name for name in names if name not in problems]
            continue  # not written, so that the next run looks again
        waiting.append((writer.write(parameter.path, chunk.index, value), nbytes))
        in_flight += nbytes
        while in_flight > IN_FLIGHT:
            in_flight -= _finished(*waiting.popleft(), progress, writer)
    while waiting:
        _finished(*waiting.popleft(), progress, writer)
    return problems


def _finished(future: Any, nbytes: int, progress: Progress, writer: Writer) -> int:
    try:
        future.result()
    except ValueError as error:
        raise ValueError(f"{writer.folder} could not be written ({checkpoint.reason(error)})") from error
    progress.add(nbytes)
    return nbytes
