"""Whole models for the compile gates, with every kernel there is: `python -m pallas_kernels.aot --cases ring_jax.train.gates`.

The released models' widths and vocabularies, one group of their layer pattern and fewer experts: what a chip holds.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pallas_kernels.aot.case import CompileCase
from pallas_kernels.compat import compiling_for
from ring_jax import flops, scoring
from ring_jax.config import PRESETS, ModelConfig
from ring_jax.model import Ring
from ring_jax.numerics import Numerics, num_bytes, round_weights
from ring_jax.scoring import Batch
from ring_jax.train.config import OptimizerConfig
from ring_jax.train.optimizer import make_optimizer

TARGETS = {"pallas_tpu": ("v5p", "v6e"), "pallas_gpu": ("h200",)}
NUM_EXPERTS = 32
TOKENS = 2048
SLOTS = 64
CACHE = 4096
"""Positions of a slot's cache in the decode step."""


def compile_cases() -> Iterator[CompileCase]:
    """Yield a forward, a training step and a decode step of each released model, on a GPU in FP8, too: there it has a unit."""
    for name in ("mini", "flash"):
        preset = PRESETS[f"ring-{name}-linear-2.0"]
        config = dataclasses.replace(preset, num_layers=preset.period, num_experts=NUM_EXPERTS)
        for kernels, precision in (("pallas_tpu", "bf16"), ("pallas_gpu", "bf16"), ("pallas_gpu", "fp8")):
            how = Numerics.of(precision, aligned=False, kernels=kernels)  # by name: one that refuses its case fails the gate
            yield _forward(name, config, dataclasses.replace(how, gradients=False))
            step = _step(name, config, how)
            fits = [target for target in step.targets if (name, target) != ("flash", "v6e")]  # 31 GiB: less than its parameters and moments
            yield step._replace(targets=tuple(fits))
            yield _decode(name, config, dataclasses.replace(how, gradients=False))


def _shapes(config: ModelConfig, how: Numerics) -> tuple[Any, ...]:
    """The graph, and the shapes of parameters (fp32), balancing biases and tables."""
    return scoring.split(nnx.eval_shape(lambda: Ring(config, how, rngs=nnx.Rngs(0))))


def _rounded(params: Any, how: Numerics) -> Any:
    """The shapes of the weights as a forward reads them on an accelerator."""
    with compiling_for("tpu"):
        return jax.eval_shape(lambda params: round_weights(params, how.dtype), params)


def _case(
    kind: str,
    name: str,
    config: ModelConfig,
    how: Numerics,
    program: Any,
    arguments: tuple[Any, ...],
    tokens: int,
    donate: tuple[int, ...] = (),
) -> CompileCase:
    per_token = flops.training_flops_per_token(config, TOKENS)
    return CompileCase(
        kernel=f"model.{name}.{kind}{'.fp8' * how.fp8}",
        shape=f"{config.num_layers} layers, {tokens} tokens",
        targets=TARGETS[how.kernels],
        program=program,
        arguments=arguments,
        bytes=num_bytes(arguments),
        flops=tokens * per_token / (1 if kind == "step" else 3),
        donate=donate,
    )


def _batch() -> Batch:
    ids: Any = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    return Batch(ids, ids, ids)


def _forward(name: str, config: ModelConfig, how: Numerics) -> CompileCase:
    graph, params, biases, tables = _shapes(config, how)

    def program(params, biases, tables, batch):
        return scoring.next_token_logprobs(nnx.merge(graph, params, biases, tables), batch)[0]

    return _case("forward", name, config, how, program, (_rounded(params, how), biases, tables, _batch()), TOKENS)


def _step(name: str, config: ModelConfig, how: Numerics) -> CompileCase:
    graph, params, biases, tables = _shapes(config, how)
    optimizer = make_optimizer(OptimizerConfig(), 1000)

    def program(params, state, biases, tables, batch):
        loss, stats, gradients = scoring.loss_and_gradients(graph, how, params, biases, tables, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, stats.nll

    state = jax.eval_shape(optimizer.init, params)
    return _case("step", name, config, how, program, (params, state, biases, tables, _batch()), TOKENS, donate=(0, 1))


def _decode(name: str, config: ModelConfig, how: Numerics) -> CompileCase:
    graph, params, biases, tables = _shapes(config, how)
    model = nnx.merge(graph, params, biases, tables)
    with compiling_for("tpu"):
        cache = jax.eval_shape(lambda: model.init_cache(SLOTS, CACHE))

    def program(params, biases, tables, tokens, positions, cache):
        output = nnx.merge(graph, params, biases, tables)(tokens, positions, cache)
        return output.hidden, output.cache

    ids = jax.ShapeDtypeStruct((SLOTS, 1), jnp.int32)
    return _case("decode", name, config, how, program, (_rounded(params, how), biases, tables, ids, ids, cache), SLOTS, donate=(5,))
