"""Checkpoints: Orbax for ours, a Hugging Face folder directly, and one way to load a model from either.

A run folder holds `checkpoints/STEP/`, each whole by itself: `params`, `balance`, `optimizer` (arrays by dotted path), `meta` (step, model
and training config), `tokenizer`, and `hf` (what a Hugging Face folder held besides weights, if the model came from one). Orbax writes a
step under a temporary name and renames it, so a step is whole or absent.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import absl.logging
import jax
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx

from ring_jax import scoring, sharding
from ring_jax.config import ModelConfig, read_hf_config
from ring_jax.convert import assets
from ring_jax.convert.load import Folder, Source, is_hf_folder, read_arrays, weights_dtype
from ring_jax.convert.names import check, parameters
from ring_jax.convert.shards import Tensors
from ring_jax.convert.store import Checkpoint, Reader
from ring_jax.model import Ring
from ring_jax.numerics import DTYPES, BalanceBias, Numerics, inference_weights
from ring_jax.tokenizer import Tokenizer

absl.logging.set_verbosity(absl.logging.FATAL)  # orbax tells of each default it fills in, and of each error that it also raises

ARRAYS = ("params", "balance", "optimizer")
OBJECTS = ("meta", "tokenizer", "hf")
CHUNK_BYTES = 64 * 2**20
"""Most bytes of a stored array's chunk: what reads a part of an array reads whole chunks."""
RUN_SUBFOLDER = "checkpoints"


def by_path(tree: Any) -> dict[str, Any]:
    """Return a tree's arrays by dotted path: the form in which they are stored."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    key = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    return {".".join(map(key, path)): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in leaves}


def from_paths(like: Any, arrays: Mapping[str, Any]) -> Any:
    """Return a tree of the structure of `like` with these arrays. Raises ValueError that lists all missing or misshapen ones."""
    wanted = by_path(like)
    problems = [f"missing {path}" for path in wanted if path not in arrays]
    problems += [
        f"{path} is {list(arrays[path].shape)}, not {list(leaf.shape)}"
        for path, leaf in wanted.items()
        if path in arrays and tuple(arrays[path].shape) != tuple(leaf.shape)
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit its config: {'; '.join(problems)}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in wanted])


def reason(error: BaseException) -> str:
    """Return why something could not be written: the system's reason, where the error holds one (tensorstore's errors are long)."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _drop_late_errors(report: Any = sys.unraisablehook) -> None:
    """Keep quiet about reads and writes that end after another has failed: each prints a stack trace, and the first error is raised."""

    def is_late(error: Any) -> bool:
        return str(error) == "Event loop is closed" or "ocdbt" in str(error).lower()

    sys.unraisablehook = lambda unraisable: None if is_late(unraisable.exc_value) else report(unraisable)
    # It logs errors of tasks that nobody waits for any more: several of a save's files may find the disk full.
    unwanted = lambda error: is_late(error) or isinstance(error, OSError)
    logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and unwanted(record.exc_info[1])))


_drop_late_errors()


def _damage(folder: pathlib.Path) -> list[str]:
    """What cannot be read of a checkpoint's folder: files that should be JSON, and arrays."""
    found = []
    for file in sorted(file for pattern in ("_METADATA", "metadata", "array_metadatas/*") for file in folder.glob(f"*/{pattern}")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found.append(f"{file.relative_to(folder)} is not JSON")
    for item in ARRAYS:
        if (folder / item).is_dir() and not (folder / item / "manifest.ocdbt").is_file():  # as a conversion writes it
            found += _damaged_arrays(folder / item)
            continue
        database = {"driver": "ocdbt", "base": f"file://{folder.absolute() / item}/"}
        try:
            keys = sorted(key.decode() for key in tensorstore.KvStore.open(database).result().list().result())
        except ValueError:
            found.append(f"the list of arrays of {item} cannot be read")
            continue
        for array in (key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")):
            try:
                tensorstore.open({"driver": "zarr", "kvstore": {**database, "path": f"{array}/"}}).result().read().result()
            except ValueError:
                found.append(f"{item} {array} cannot be read whole")
    return found


def _damaged_arrays(item: pathlib.Path) -> list[str]:
    try:
        reader = Reader(item)
    except ValueError:
        return [f"the list of arrays of {item.name} cannot be read"]
    found = []
    for path in reader.paths:
        try:
            reader.read(path)
        except ValueError:
            found.append(f"{item.name} {path} cannot be read whole")
    return found


class Manager:
    """The checkpoints of a run: saved in the background, the last few and every n-th kept."""

    def __init__(self, run: pathlib.Path, *, keep_last: int = 3, keep_every: int | None = None, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            read_only=read_only,
            create=not read_only,
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in OBJECTS}
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name, handler in handlers.items():
            kinds = (ocp.args.JsonSave, ocp.args.JsonRestore) if name in OBJECTS else (ocp.args.StandardSave, ocp.args.StandardRestore)
            for kind in kinds:
                registry.add(name, kind, handler)
        self.folder, self._saving = run / RUN_SUBFOLDER, 0
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options, handler_registry=registry)

    def latest(self) -> int | None:
        """Return the newest step, None if there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        *,
        params: Any,
        balance: Any,
        optimizer: Any,
        meta: dict[str, Any],
        tokenizer: str | None,
        hf: dict[str, Any] | None = None,
    ) -> None:
        """Start saving; returns once the arrays are copied. Raises ValueError when this save cannot start or the one before failed."""
        self.wait()
        trees = {"params": params, "balance": balance, "optimizer": optimizer}
        # Stacked axes are cut first, so that an expert of a layer can be read by itself.
        stacked = lambda x: tuple(range(max(0, getattr(x, "ndim", 0) - 2)))
        chunked = lambda arrays: {p: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=stacked(x)) for p, x in arrays.items()}
        items: dict[str, Any] = {}
        for name, tree in trees.items():
            arrays = by_path(tree)
            items[name] = ocp.args.StandardSave(arrays, save_args=chunked(arrays))
        items["meta"] = ocp.args.JsonSave(meta)
        items["tokenizer"] = ocp.args.JsonSave({"json": tokenizer})
        if hf is not None:
            items["hf"] = ocp.args.JsonSave(hf)
        self._saving = step
        with self._named_errors():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Wait until everything is on disk. Raises ValueError naming the checkpoint that could not be written."""
        with self._named_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            checkpoint = self.folder / str(self._saving)
            raise ValueError(f"checkpoint {checkpoint} could not be written ({reason(error)}); those before it are whole") from error

    def close(self) -> None:
        """Release the manager's threads."""
        self._manager.close()

    def meta(self, step: int) -> dict[str, Any]:
        """Return a step's metadata."""
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def tokenizer(self, step: int) -> str | None:
        """Return a step's tokenizer.json, None if it was trained without one."""
        return self._restore(step, tokenizer=ocp.args.JsonRestore())["tokenizer"]["json"]

    def hf(self, step: int) -> dict[str, Any] | None:
        """Return what came with the weights in a Hugging Face folder (see `convert.assets`), None if the model did not come from one."""
        if not (self.folder / str(step) / "hf").is_dir():
            return None
        return self._restore(step, hf=ocp.args.JsonRestore())["hf"]

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Return trees of a step, by name, in the structure and with the shardings (default: the first device) of those given."""
        # Without a sharding orbax restores the one it saved, which may ask for devices that are not here.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
        items = {name: ocp.args.StandardRestore(jax.tree.map(placed, by_path(tree))) for name, tree in like.items()}
        restored = self._restore(step, **items)
        return {name: from_paths(tree, restored[name]) for name, tree in like.items()}

    def _restore(self, step: int, **items: Any) -> dict[str, Any]:
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        except Exception as error:  # orbax raises nothing narrower for an array that is cut short
            reason = "; ".join(_damage(self.folder / str(step))) or _first_line(error)
            raise ValueError(f"checkpoint {self.folder / str(step)} is damaged or not of this model: {reason}") from error


class Loaded(NamedTuple):
    """A model ready to run, its config, and its tokenizer (None where the folder has none)."""

    model: Ring
    config: ModelConfig
    tokenizer: Tokenizer | None


class _Found(NamedTuple):
    """A checkpoint on disk: a step of a run, or a Hugging Face folder (no step)."""

    folder: pathlib.Path
    step: int | None

    @contextlib.contextmanager
    def manager(self) -> Iterator[Manager]:
        """The checkpoints of the run, to be read."""
        manager = Manager(self.folder, read_only=True)
        try:
            yield manager
        finally:
            manager.close()


def find(path: str | pathlib.Path) -> _Found:
    """Return what a path names: a run folder (its newest checkpoint), one checkpoint of ours, or a Hugging Face folder.

    Raises ValueError naming the path and what was expected.
    """
    folder = pathlib.Path(path)
    if not folder.exists():
        raise ValueError(f"no checkpoint at {folder}: no such folder")
    if (folder / RUN_SUBFOLDER).is_dir():
        steps = sorted(int(p.name) for p in (folder / RUN_SUBFOLDER).iterdir() if p.name.isdigit())
        if not steps:
            raise ValueError(f"{folder} has no finished checkpoint yet")
        return _Found(folder, steps[-1])
    if folder.name.isdigit() and folder.parent.name == RUN_SUBFOLDER:
        return _Found(folder.parent.parent, int(folder.name))
    if is_hf_folder(folder):
        return _Found(folder, None)
    raise ValueError(f"{folder} is neither a run folder, one of its checkpoints, nor a Hugging Face folder (config.json and *.safetensors)")


def load(
    path: str | pathlib.Path,
    mesh: Any = None,
    *,
    precision: str | None = None,
    stacked: bool = True,
    aligned: bool = True,
    remat: str = "none",
    gradients: bool = False,
    kernels: str = "auto",
) -> Loaded:
    """Return a checkpoint's model, config and tokenizer.

    precision: "fp32", "bf16" or "fp8" (see Numerics), default the checkpoint's. With a mesh the parameters are sharded over it. `stacked`
    chooses the layout of the parameters (see `model.layer_pattern`), `gradients` whether the model may be differentiated in FP8. Raises
    ValueError in one line for a missing, damaged or unfitting checkpoint.
    """
    found = find(path)
    if found.step is None:
        config = read_hf_config(found.folder)
        tokenizer = Tokenizer.from_file(found.folder) if (found.folder / "tokenizer.json").is_file() else None
    else:
        with found.manager() as manager:
            config = ModelConfig.from_json(json.dumps(manager.meta(found.step)["model"]))
            text = manager.tokenizer(found.step)
        tokenizer = Tokenizer.from_json(text) if text else None
    source, stored = _source(found, config)
    abstract = nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0), stacked=stacked))
    placed = mesh and by_path(sharding.shardings(nnx.state(abstract, (nnx.Param, BalanceBias)), mesh))
    arrays: dict[str, Any] = read_arrays(source, parameters(abstract), placed)
    if precision is not None and precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
    numerics = Numerics.of(precision or stored, aligned=aligned, remat=remat, gradients=gradients, kernels=kernels)
    return Loaded(build(config, numerics, arrays, stacked=stacked, mesh=mesh), config, tokenizer)


def _source(found: _Found, config: ModelConfig) -> tuple[Source, str]:
    """What the weights are read from, and their precision. Raises ValueError that lists all that does not fit the config."""
    wanted = parameters(nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0))))
    if found.step is None:
        tensors = Tensors(found.folder)
        check(tensors, wanted, found.folder)
        return Folder(tensors), weights_dtype(tensors)
    with found.manager() as manager:
        precision = manager.meta(found.step)["precision"]
    return Checkpoint(found.folder / RUN_SUBFOLDER / str(found.step), wanted), precision


def load_weights(path: str | pathlib.Path, config: ModelConfig, params: Any, balance: Any) -> tuple[Any, Any, dict[str, Any] | None]:
    """Return the weights of a checkpoint as fp32 master weights, in the structure and with the shardings given, and its item "hf".

    Raises ValueError in one line for a missing, damaged or unfitting checkpoint.
    """
    found, wanted = find(path), by_path(params) | by_path(balance)
    source, _ = _source(found, config)
    described = parameters(nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0))))
    arrays: dict[str, Any] = read_arrays(source, described, {path: leaf.sharding for path, leaf in wanted.items()})
    for path in wanted:  # one at a time: both copies of a large model would not fit
        arrays[path] = arrays.pop(path).astype(wanted[path].dtype)
    if found.step is None:
        hf = assets.read(Tensors(found.folder), described)
    else:
        with found.manager() as manager:
            hf = manager.hf(found.step)
    return from_paths(params, arrays), from_paths(balance, arrays), hf


def build(config: ModelConfig, numerics: Numerics, arrays: dict[str, Any], *, stacked: bool = True, mesh: Any = None) -> Ring:
    """Return a model with these arrays by dotted path, rounded (in FP8 quantised) once, on the mesh if there is one.

    The arrays are taken out of the dictionary one by one: two copies of a large model would not fit.
    """
    graph, params, balance, tables = scoring.split(nnx.eval_shape(lambda: Ring(config, numerics, rngs=nnx.Rngs(0), stacked=stacked)))
    from_paths(params, arrays)
    from_paths(balance, arrays)

    def take(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        array = arrays.pop(".".join(str(key.key) for key in path))
        if mesh is not None:
            array = jax.device_put(array, sharding.shardings(variable, mesh).get_value())
        fp32 = isinstance(variable, BalanceBias) or variable.get_metadata("keep_fp32", False)
        if fp32:
            return variable.replace(array.astype("float32"))
        variable = inference_weights(variable.replace(array), numerics)
        return variable if mesh is None else jax.device_put(variable, sharding.shardings(variable, mesh))

    is_variable = lambda x: isinstance(x, nnx.Variable)
    params, balance = (jax.tree_util.tree_map_with_path(take, tree, is_leaf=is_variable) for tree in (params, balance))
    model = nnx.merge(graph, params, balance, tables)
    model.init_tables()
    if mesh is not None:
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.device_put(state, sharding.shardings(state, mesh)))
    return model


def text_files(path: str | pathlib.Path) -> dict[str, str]:
    """Return what a checkpoint says about chatting: the text of tokenizer_config.json and chat_template.jinja, where it has them."""
    found = find(path)
    if found.step is None:
        files = (found.folder / name for name in ("tokenizer_config.json", "chat_template.jinja"))
        return {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    with found.manager() as manager:
        return (manager.hf(found.step) or {"files": {}})["files"]


def training_remat(path: str | pathlib.Path) -> str:
    """Return the rematerialisation a checkpoint was trained with ("none" for a Hugging Face folder)."""
    found = find(path)
    if found.step is None:
        return "none"
    with found.manager() as manager:
        return manager.meta(found.step).get("train", {}).get("remat", "none")
