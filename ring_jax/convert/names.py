"""The names of a Hugging Face checkpoint: one table, read in both directions."""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from ring_jax.convert.shards import Tensors, shown
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


class Slice(NamedTuple):
    """The part of a parameter that is made of tensors of its own: what stands at `index` of its leading (stacked) axes.

    shape: of the part, [in, out] or [channels] ([vocabulary, width] for the embedding). tensors: their names, each [out / n, in] where
    `transposed`, joined along the last axis. layer: the layer it belongs to, -1 for none.
    """

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    transposed: bool
    layer: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        return (self.shape[1] // len(self.tensors), self.shape[0]) if self.transposed else self.shape

    def read(self, tensors: Tensors, region: tuple[slice, ...]) -> np.ndarray:
        """Return a region (of the part's axes) from the tensors of a folder, without reading the rest."""
        starts, stops = zip(*(part.indices(size)[:2] for part, size in zip(region, self.shape, strict=True)), strict=True)
        if not self.transposed:
            return tensors.read(self.tensors[0], starts[0], stops[0] - starts[0])[(slice(None), *region[1:])]
        width, parts = self.stored_shape[0], []
        for i, name in enumerate(self.tensors):
            first, last = max(starts[1] - i * width, 0), min(stops[1] - i * width, width)
            if first < last:
                parts.append(tensors.read(name, first, last - first)[:, region[0]].T)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def owners(self, columns: np.ndarray) -> list[str]:
        """Return the tensors that hold these columns of the part's last axis."""
        width = self.shape[-1] // len(self.tensors)
        return [self.tensors[i] for i in sorted(set((columns // width).tolist()))]


class Parameter(NamedTuple):
    """A parameter: its path, its shape with the stacked axes, and its slices in the order of layers and experts."""

    path: str
    shape: tuple[int, ...]
    slices: list[Slice]

    @property
    def is_balance(self) -> bool:
        """Whether this is a balancing bias: fp32 whatever the weights are, and an item of its own in a checkpoint."""
        return self.path.endswith("ffn.bias")

    def dtype(self, tensors: Tensors) -> np.dtype:
        """Return the dtype of the parameter's tensors in a folder; where they differ, the one that holds them all."""
        return np.result_type(*{tensors.dtype(name) for part in self.slices for name in part.tensors})


def variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Return parameters and balancing biases of a module by dotted path."""
    state = nnx.state(module, (nnx.Param, BalanceBias))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {".".join(str(key.key) for key in path): variable for path, variable in leaves}


def parameters(model: Ring) -> list[Parameter]:
    """Return the parameters of a (possibly abstract) model with the tensors that make them."""
    found = []
    for path, variable in variables(model).items():
        slices = []
        for index, layer, names in _places(model, path):
            full = tuple(variable.get_metadata("full_shape"))
            experts = range(full[0]) if "{e}" in names[0] else (None,)
            for e in experts:
                shape = full if e is None else full[1:]
                at = index if e is None else (*index, e)
                tensors = names if e is None else tuple(name.replace("{e}", str(e)) for name in names)
                slices.append(Slice(path, at, shape, tensors, len(shape) == 2 and path != "embedding", layer))
        found.append(Parameter(path, tuple(variable.get_value().shape), slices))
    return found


def _places(model: Ring, path: str) -> Iterator[tuple[tuple[int, ...], int, tuple[str, ...]]]:
    """Where in its stack each layer of a parameter goes, the layer (-1: none), and the names of its tensors."""
    keys = path.split(".")
    of_layer = lambda layer, names: tuple(f"model.layers.{layer}.{name}" for name in names)
    if keys[0] == "segments":
        run, rest = model.pattern[int(keys[1])][int(keys[2])], ".".join(keys[3:])
        names = ((EXPERTS if run.ffn == "moe" else DENSE) | LAYER)[rest]
        for group, layers in enumerate(run.layers):
            for position, layer in enumerate(layers):
                yield (group, position), layer, of_layer(layer, names)
    elif keys[0] == "mtp":
        layer, rest = model.config.num_layers + int(keys[1]), ".".join(keys[2:])
        names = (EXPERTS | LAYER)[rest.removeprefix("block.")] if keys[2] == "block" else MTP[rest]
        yield (), layer, of_layer(layer, names)
    else:
        yield (), -1, TOP[path]


def check(tensors: Tensors, wanted: list[Parameter], folder: pathlib.Path) -> None:
    """Raise ValueError that lists all missing, unexpected, misshapen and mistyped tensors of a folder."""
    shapes = {name: part.stored_shape for parameter in wanted for part in parameter.slices for name in part.tensors}
    there = tensors.names
    problems = [f"missing {name} {list(shape)}" for name, shape in shapes.items() if name not in there]
    problems += [f"unexpected {name}" for name in sorted(there - shapes.keys())]
    for name, shape in shapes.items():
        if name in there:
            if (found := tensors.entries[name].shape) != shape:
                problems.append(f"{name} is {list(found)}, not {list(shape)}")
            if (dtype := tensors.dtype(name)).kind not in "fV":
                problems.append(f"{name} is of dtype {dtype}, not a floating-point one")
    if problems:
        raise ValueError(f"{folder} is not the checkpoint its config.json describes: {shown(problems)}")
