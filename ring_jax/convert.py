"""Hugging Face checkpoints: one table of names, and a reader that reports every problem at once."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ring_jax.config import to_hf
from ring_jax.model import Ring
from ring_jax.numerics import BalanceBias

# Our parameter -> the tensors it is made of. A tensor is stored [out, in] and transposed; several are joined along the last axis;
# "{e}" stacks over the experts.
TOP = {"embedding": ("model.word_embeddings.weight",), "norm.weight": ("model.norm.weight",), "head": ("lm_head.weight",)}
LAYER = {
    "mixer_norm.weight": ("input_layernorm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "mixer.qkv": ("attention.query_key_value.weight",),
    "mixer.head_norms.query": ("attention.query_layernorm.weight",),
    "mixer.head_norms.key": ("attention.key_layernorm.weight",),
    "mixer.out": ("attention.dense.weight",),
    "mixer.gate": ("attention.g_proj.weight",),
    "mixer.group_norm": ("attention.g_norm.weight",),
    "ffn.router": ("mlp.gate.weight",),
    "ffn.bias": ("mlp.gate.expert_bias",),
    "ffn.shared.gate_up": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn.shared.down": ("mlp.shared_experts.down_proj.weight",),
}
DENSE = {"ffn.gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "ffn.down": ("mlp.down_proj.weight",)}
EXPERTS = {
    "ffn.gate_up": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "ffn.down": ("mlp.experts.{e}.down_proj.weight",),
}
MTP = {
    "embedding_norm.weight": ("enorm.weight",),
    "hidden_norm.weight": ("hnorm.weight",),
    "project": ("eh_proj.weight",),
    "norm.weight": ("final_layernorm.weight",),
}


class Source(NamedTuple):
    """The tensors of one parameter of one layer, the shape the parameter has, and whether they are stored transposed."""

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and balancing biases of a module by dotted path."""
    state = nnx.state(module, (nnx.Param, BalanceBias))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {".".join(str(key.key) for key in path): variable for path, variable in leaves}


def sources(model: Ring) -> dict[str, list[tuple[tuple[int, ...], Source]]]:
    """Return, for each parameter of a (possibly abstract) model, where in its stack each layer goes and which tensors make it."""
    config = model.config
    found: dict[str, list[tuple[tuple[int, ...], Source]]] = {}

    def add(path: str, at: tuple[int, ...], names: tuple[str, ...], variable: nnx.Variable) -> None:
        found.setdefault(path, []).append((at, Source(names, tuple(variable.get_metadata("full_shape")), path != "embedding")))

    def block_names(path: str, ffn: str, layer: int) -> tuple[str, ...]:
        names = ((EXPERTS if ffn == "moe" else DENSE) | LAYER)[path]
        return tuple(f"model.layers.{layer}.{name}" for name in names)

    for path, variable in _variables(model).items():
        keys = path.split(".")
        if keys[0] == "segments":
            run, rest = model.pattern[int(keys[1])][int(keys[2])], ".".join(keys[3:])
            for group, layers in enumerate(run.layers):
                for position, layer in enumerate(layers):
                    add(path, (group, position), block_names(rest, run.ffn, layer), variable)
        elif keys[0] == "mtp":
            layer, rest = config.num_layers + int(keys[1]), ".".join(keys[2:])
            names = (
                block_names(rest[len("block.") :], "moe", layer)
                if keys[2] == "block"
                else tuple(f"model.layers.{layer}.{n}" for n in MTP[rest])
            )
            add(path, (), names, variable)
        else:
            add(path, (), TOP[path], variable)
    return found


class Tensors:
    """The tensors of a Hugging Face folder, memory-mapped, by name."""

    def __init__(self, folder: pathlib.Path):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is not an index of tensors: {error!r}") from None
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} has no safetensors file")
        self._files: dict[str, Any] = {}
        for name in files:
            try:
                handle = safe_open(folder / name, framework="np")
                self._files.update(dict.fromkeys(handle.keys(), handle))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{folder / name} cannot be read as safetensors: {error}") from None

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor; bf16 as ml_dtypes' bfloat16."""
        return self._files[name].get_tensor(name)


def _theirs(source: Source, name: str) -> tuple[int, ...]:
    """The stored shape of one tensor of a parameter."""
    shape = source.shape[1:] if "{e}" in name else source.shape
    if len(shape) == 1 or not source.transposed:
        return shape
    return (shape[1] // len(source.tensors), shape[0])


def _expert_names(source: Source, name: str) -> list[str]:
    return [name.replace("{e}", str(e)) for e in range(source.shape[0])] if "{e}" in name else [name]


def _check(tensors: Tensors, wanted: dict[str, tuple[int, ...]], folder: pathlib.Path) -> None:
    problems = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in tensors.names]
    problems += [f"unexpected {name}" for name in sorted(tensors.names - wanted.keys())]
    for name, shape in wanted.items():
        if name in tensors.names and tensors.shape(name) != shape:
            problems.append(f"{name} is {list(tensors.shape(name))}, not {list(shape)}")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{folder} is not the checkpoint its config.json describes: {shown}")


def read_hf(folder: pathlib.Path, abstract: Ring) -> dict[str, jax.Array]:
    """Return the parameters of a Hugging Face folder, by the dotted paths of the abstract model and in their stored dtype.

    Raises ValueError that lists all missing, unexpected and misshapen tensors.
    """
    tensors, layout = Tensors(folder), sources(abstract)
    wanted = {
        expert: _theirs(source, name)
        for entries in layout.values()
        for _, source in entries
        for name in source.tensors
        for expert in _expert_names(source, name)
    }
    _check(tensors, wanted, folder)

    def part(source: Source, name: str) -> np.ndarray:
        parts = [tensors[expert].T if source.transposed else tensors[expert] for expert in _expert_names(source, name)]
        return np.stack(parts) if "{e}" in name else parts[0]

    def whole(source: Source) -> np.ndarray:
        return np.concatenate([part(source, name) for name in source.tensors], axis=-1)

    read = {}
    for path, entries in layout.items():
        arrays = [whole(source) for _, source in entries]
        if entries[0][0] == ():
            read[path] = jnp.asarray(arrays[0])
        else:
            groups, repeat = (max(at[i] for at, _ in entries) + 1 for i in range(2))
            read[path] = jnp.asarray(np.stack(arrays).reshape(groups, repeat, *arrays[0].shape))
    return read


def is_hf_folder(folder: pathlib.Path) -> bool:
    """Return whether a folder looks like a Hugging Face checkpoint."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors*"))


def write_hf(model: Ring, folder: pathlib.Path, dtype: str = "float32") -> None:
    """Write a model that fits in memory as a Hugging Face folder: config.json and one model.safetensors."""
    variables = _variables(model)
    tensors: dict[str, np.ndarray] = {}
    for path, entries in sources(model).items():
        stacked = np.asarray(variables[path].get_value()).astype(dtype)
        for at, source in entries:
            parts = np.split(stacked[at], len(source.tensors), axis=-1)
            for name, part in zip(source.tensors, parts, strict=True):
                experts = part if "{e}" in name else [part]
                for expert, tensor in zip(_expert_names(source, name), experts, strict=True):
                    tensors[expert] = np.ascontiguousarray(tensor.T if source.transposed else tensor)
    for name in tensors:
        if name.endswith("expert_bias"):
            tensors[name] = tensors[name].astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**to_hf(model.config), "torch_dtype": dtype}, indent=1), encoding="utf-8")
