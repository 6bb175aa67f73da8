"""The released models for the compile gates, with every kernel there is: `python -m pallas_kernels.aot --cases ring_jax.train.gates`.

Whole: all layers, widths, experts and the vocabulary, on slices that hold them. The programs are those that run: a training
run's own step and evaluation, and a decode step of the model.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.aot.case import CompileCase
from pallas_kernels.cross_entropy import head_logits
from ring_jax import flops, numerics, scoring, sharding
from ring_jax.cache import Cache
from ring_jax.config import PRESETS, ModelConfig
from ring_jax.model import Ring
from ring_jax.numerics import Numerics, inference_weights
from ring_jax.scoring import Batch
from ring_jax.train.config import OptimizerConfig
from ring_jax.train.step import make_program

KERNELS = {"v5p": "pallas_tpu", "v6e": "pallas_tpu", "h200": "pallas_gpu"}
TRAINING = {"mini": {"v5p": "2x4", "v6e": "4x4", "h200": "2x4"}, "flash": {"v5p": "8x8", "v6e": "16x8", "h200": "4x8"}}
"""Meshes (fsdp x experts) that hold parameters, moments, gradients and activations."""
DECODING = {"mini": {"v5p": "1x1", "v6e": "1x4", "h200": "1x1"}, "flash": {"v5p": "1x4", "v6e": "1x16", "h200": "1x4"}}
MEMORY = {"v5p": 95 * 2**30, "v6e": 31 * 2**30, "h200": 140 * 2**30}
"""Bytes of a chip that a program can have."""
TOKENS = {"v5p": 4096, "v6e": 2048, "h200": 4096}
"""Of a chip in a training step: one row."""
SLOTS = 64
"""Of a chip in a decode step."""
CACHE = 4096
"""Positions of a slot's cache in the decode step."""


def compile_cases() -> Iterator[CompileCase]:
    """Yield an evaluation, a training step and a decode step of each released model and chip, on a GPU in FP8, too: there it has a unit."""
    for name in ("mini", "flash"):
        config = PRESETS[f"ring-{name}-linear-2.0"]
        for target, kernels in KERNELS.items():
            for precision in ("bf16", "fp8") if target == "h200" else ("bf16",):
                how = Numerics.of(precision, aligned=False, kernels=kernels, remat="mixers")  # by name: one that refuses its case fails
                yield _case(name, config, how, target, "evaluate", _training)
                yield _case(name, config, how, target, "step", _training)
                yield _case(name, config, dataclasses.replace(how, gradients=False, aligned=True), target, "decode", _decode)


def _case(name: str, config: ModelConfig, how: Numerics, target: str, kind: str, make: Callable) -> CompileCase:
    text = (DECODING if kind == "decode" else TRAINING)[name][target]
    sizes = sharding.parse_mesh(text)
    chips = math.prod(sizes.values())

    def program(devices: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
        return make(kind, config, how, sharding.make_mesh(sizes, devices), tokens)

    tokens = SLOTS if kind == "decode" else TOKENS[target]
    weight = {"step": 16, "evaluate": 4, "decode": 1 if how.fp8 else 2}[kind]  # bytes of a parameter that are read and written, at least
    return CompileCase(
        kernel=f"model.{name}.{kind}{'.fp8' * how.fp8}",
        shape=f"{text}, {tokens} tokens a chip",
        targets=(target,),
        program=program,
        arguments=(),
        bytes=flops.num_params(config) * weight / chips,
        flops=tokens * flops.training_flops_per_token(config, TOKENS[target]) / (1 if kind == "step" else 3),
        memory=MEMORY[target],
        temporaries=0.1 if kind == "decode" else None,
        devices=chips,
    )


def _placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree's arrays, with their shardings."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def _training(kind: str, config: ModelConfig, how: Numerics, mesh: Mesh, tokens: int) -> tuple[Any, tuple[Any, ...]]:
    program = make_program(config, how, OptimizerConfig(), 1000, 0, mesh)
    state = _placed(program.abstract, program.state_shardings)
    tables = jax.eval_shape(program.make_tables)
    tables = _placed(tables, jax.tree.map(lambda _: NamedSharding(mesh, P()), tables))
    ids: Any = jax.ShapeDtypeStruct((mesh.size, tokens), jnp.int32, sharding=program.batch_sharding)
    batch = Batch(ids, ids, ids)
    if kind == "step":
        return program.step, (state, tables, batch)
    return program.evaluate, (state.params, state.balance, tables, batch)


def _decode(kind: str, config: ModelConfig, how: Numerics, mesh: Mesh, slots: int) -> tuple[Any, tuple[Any, ...]]:
    graph, params, biases, tables = scoring.split(nnx.eval_shape(lambda: Ring(config, how, rngs=nnx.Rngs(0), stacked=False)))
    model = nnx.merge(graph, params, biases, tables)
    params = jax.eval_shape(lambda params: inference_weights(params, how), params)
    cache = jax.eval_shape(lambda: model.init_cache(slots * mesh.size, CACHE))
    ids = jax.ShapeDtypeStruct((slots * mesh.size, 1), jnp.int32)
    by_slot: Any = sharding.batch_spec()
    cached = Cache(jax.tree.map(lambda _: P(None, None, *by_slot), cache.layers), by_slot)

    def step(params, biases, tables, tokens, positions, cache):
        model = nnx.merge(graph, params, biases, tables)
        output = model(tokens, positions, cache)
        logits, total = head_logits(output.hidden[:, 0], model.head_weight(), **how.ops)
        return jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1) - total, output.cache

    weights = tuple(sharding.specs(state, mesh) for state in (params, biases, tables))
    specs = (*weights, sharding.batch_spec(), sharding.batch_spec(), cached)
    where = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))
    program = sharding.on_mesh(step, mesh, specs, (sharding.batch_spec(), sharding.batch_spec(), cached))
    return numerics.jit(program, how, donate_argnums=5), _placed((params, biases, tables, ids, ids, cache), where)
