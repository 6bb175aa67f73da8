"""Whether a Hugging Face folder and a checkpoint of ours are the same model: every tensor to the bit, and every layer by what it computes.

The tensors are compared through the table of names; the layers are not: the folder's are computed in numpy from the equations
(`ring_jax.reference`), its tensors read by the safetensors library under their own names (FP8 and the embedding's rows by our reader), so a
mistake in the table shows as well. Multi-token-prediction layers are compared as tensors only.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from pallas_kernels.fused_layers import residual_rms_norm
from ring_jax import cache, checkpoint
from ring_jax.block import Block
from ring_jax.config import ModelConfig, read_hf_config
from ring_jax.convert.from_hf import chunks, layout
from ring_jax.convert.names import Parameter, parameters, variables
from ring_jax.convert.progress import Progress
from ring_jax.convert.shards import Tensors
from ring_jax.convert.store import Checkpoint
from ring_jax.layers import rotary_tables
from ring_jax.linear_attention import LinearAttention, log_decay
from ring_jax.model import Ring
from ring_jax.numerics import Numerics, Table
from ring_jax.reference import Twin

NUM_TOKENS = 8
TOLERANCE = 1e-3
"""Largest difference of a layer's output, relative to its largest value, that two orders of summation in fp32 explain."""


def narrower(a: np.dtype, b: np.dtype) -> np.dtype:
    """Return the dtype in which both sides are compared: a conversion may have rounded."""
    return min(a, b, key=lambda dtype: dtype.itemsize)


TRAINING_FIELDS = ("init_scale", "chunk_size")
"""Fields of a model's config that a Hugging Face folder does not state and that change no equation."""


class Stored:
    """The tensors of a folder as the safetensors library reads them (block-scaled FP8: dequantised), rounded to these dtypes."""

    def __init__(self, tensors: Tensors, dtypes: dict[str, np.dtype]):
        self._tensors, self._dtypes = tensors, dtypes

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._tensors.entries[name]
        if self._tensors.is_scaled(name):
            return self._tensors.read(name).astype(self._dtypes[name])
        with safe_open(entry.file, framework="np") as file:  # opened anew: what it has touched stays resident as long as it is open
            return file.get_tensor(name).astype(self._dtypes[name])


def verify(folder: pathlib.Path, path: pathlib.Path, say: Callable[[str], None]) -> bool:
    """Compare a Hugging Face folder and a checkpoint of ours; say what differs and the largest difference of each layer."""
    found = checkpoint.find(path)
    if found.step is None:
        raise ValueError(f"{path} is a Hugging Face folder, not a checkpoint of ours")
    tensors, config = Tensors(folder), read_hf_config(folder)
    abstract = nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0)))
    wanted = parameters(abstract)
    step = found.folder / checkpoint.RUN_SUBFOLDER / str(found.step)
    ours = Checkpoint(step, wanted)
    differing = dict.fromkeys(_differing_tensors(wanted, tensors, ours))  # a tensor may span several chunks
    for problem in differing:
        say(problem)
    layers = list(_layer_differences(config, abstract, wanted, tensors, ours))
    for name, difference in layers:
        say(f"{name}: largest difference {difference:.2e} of its largest value")
    meta = json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))
    held = ModelConfig.from_json(json.dumps(meta["model"]))
    unlike = [
        f.name for f in dataclasses.fields(config) if f.name not in TRAINING_FIELDS and getattr(held, f.name) != getattr(config, f.name)
    ]
    for name in unlike:
        say(f"config: {name} is {getattr(config, name)!r} in the folder and {getattr(held, name)!r} in the checkpoint")
    return not differing and not unlike and all(difference <= TOLERANCE for _, difference in layers)


def _differing_tensors(wanted: list[Parameter], tensors: Tensors, ours: Checkpoint):
    """Yield a line for each tensor whose values are not those of the checkpoint, in the narrower of the two dtypes."""
    layouts = {p.path: layout(p, ours.dtype(p.path)) for p in wanted}
    with Progress(sum(at.nbytes for at in layouts.values())) as progress:
        for parameter in wanted:
            for chunk in chunks(parameter, layouts[parameter.path]):
                part = chunk.part
                theirs, held = part.read(tensors, chunk.region), ours.read(parameter.path, (*part.index, *chunk.region))
                narrow = narrower(theirs.dtype, held.dtype)
                differ = theirs.astype(narrow).view(f"u{narrow.itemsize}") != held.astype(narrow).view(f"u{narrow.itemsize}")
                progress.add(held.nbytes)
                if differ.any():
                    columns = np.flatnonzero(differ.reshape(-1, differ.shape[-1]).any(0))
                    for name in part.owners(columns + chunk.region[-1].start):
                        yield f"{name} differs ({parameter.path}{list(part.index) or ''})"


def _layer_differences(config: ModelConfig, abstract: Ring, wanted: list[Parameter], tensors: Tensors, ours: Checkpoint):
    """Yield (name, relative difference) of the embedding, each layer given the same input, and the logits."""
    dtypes = {name: narrower(tensors.dtype(name), ours.dtype(p.path)) for p in wanted for part in p.slices for name in part.tensors}
    twin = Twin(config, Stored(tensors, dtypes), dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, NUM_TOKENS)
    relative = lambda a, b: float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))
    embedding = np.stack([tensors.read("model.word_embeddings.weight", int(token), 1)[0] for token in tokens]).astype(np.float32)
    narrow = dtypes["model.word_embeddings.weight"]
    embedding = embedding.astype(narrow).astype(np.float32)
    held = np.stack([ours.read("embedding", (int(token),)) for token in tokens]).astype(narrow).astype(np.float32)
    yield "embedding", relative(held, embedding)
    x, positions = embedding, np.arange(NUM_TOKENS)
    cos, sin = (jnp.asarray(table[:NUM_TOKENS])[None] for table in rotary_tables(config))
    place = cache.place(jnp.asarray(positions)[None], None, None, cos, sin, config.chunk_size)
    for layer in range(config.num_layers):
        after = twin.block(layer, x, positions, {}, config.mixer(layer))
        block, state = _block(config, abstract, wanted, layer, tensors, ours)
        y = jax.jit(lambda state, x, block=block: nnx.merge(block, state)(x, place, None)[0])(state, jnp.asarray(x)[None])
        yield f"layer {layer} ({config.mixer(layer)})", relative(np.asarray(y)[0], after)
        x = after
    weight = jnp.asarray(ours.read("norm.weight").astype(dtypes["model.norm.weight"]), jnp.float32)
    norm = np.asarray(residual_rms_norm(jnp.asarray(x), None, weight, eps=config.norm_eps, dtype="float32")[1])
    theirs = twin.rms(x, twin.tensors["model.norm.weight"])
    difference = largest = 0.0
    for parameter in wanted:
        if parameter.path == ("embedding" if config.tie_embeddings else "head"):
            for chunk in chunks(parameter, layout(parameter, np.dtype(np.float32))):
                narrow = dtypes[chunk.part.tensors[0]]
                held = ours.read(parameter.path, chunk.region).astype(narrow).astype(np.float32)
                stored = chunk.part.read(tensors, chunk.region).astype(narrow).astype(np.float32)
                a, b = (norm @ held, theirs @ stored) if chunk.part.transposed else (norm @ held.T, theirs @ stored.T)
                difference, largest = np.maximum(difference, np.abs(a - b).max()), np.maximum(largest, np.abs(b).max())  # NaN stays
    yield "logits", float(difference / max(largest, 1e-30))


def _block(config: ModelConfig, abstract: Ring, wanted: list[Parameter], layer: int, tensors: Tensors, ours: Checkpoint):
    """The graph and the state of one layer's block, with the checkpoint's weights in fp32."""
    run = next(run for segment in abstract.pattern for run in segment if any(layer in layers for layers in run.layers))
    how = Numerics(aligned=False)
    block = nnx.eval_shape(lambda: Block(config, how, run.mixer, run.ffn, rngs=nnx.Rngs(0)))
    held = variables(block)
    for parameter in wanted:
        index = next((part.index for part in parameter.slices if part.layer == layer), None)
        if index is not None and parameter.path.startswith("segments."):
            value = ours.read(parameter.path, index[:2]).astype(narrower(ours.dtype(parameter.path), parameter.dtype(tensors)))
            held[parameter.path.split(".", 3)[3]].set_value(jnp.asarray(value, jnp.float32))
    if isinstance(block.mixer, LinearAttention):
        block.mixer.log_decay = Table(jnp.asarray(log_decay(config, layer)))
    return nnx.split(block)
