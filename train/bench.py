"""The benchmark of this machine: training against its matmul ceiling, prefill and decode against mlx-lm, in one run.

    python -m ring_jax.train.bench [--json FILE] [--quick]

Prefill and decode run on a random checkpoint of the preset `bench-140m`, which mlx-lm loads from the same Hugging Face folder.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from pallas_kernels import fused_layers
from pallas_kernels.fused_layers import reference
from pallas_kernels.grouped_matmul import combine_groups, gather_groups, gather_weights
from pallas_kernels.grouped_matmul import xla as experts
from ring_jax import checkpoint, flops, layers, linear_attention, moe, numerics
from ring_jax.config import PRESETS, ModelConfig
from ring_jax.convert.to_hf import write_hf
from ring_jax.hugepages import use_huge_pages
from ring_jax.infer.generate import Decoder
from ring_jax.infer.sampling import Sampling
from ring_jax.model import Ring
from ring_jax.numerics import DTYPES, Numerics
from ring_jax.scoring import Batch
from ring_jax.train.config import TrainConfig
from ring_jax.train.step import make_program, numerics_of

GEMMS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (8192, 256, 1024), (1024, 4096, 1024))
"""M, K, N of the products whose best median is the ceiling."""
DEMO, SEQ_LEN, BATCH_SIZE = dataclasses.replace(PRESETS["demo"], vocab_size=384), 512, 8
"""What `make demo` trains."""
PROMPT = 1024
DECODE_BATCHES = (1, 16, 64)
DECODE_AT = 256
"""Position from which decode is timed."""
DECODE_STEPS = 8
"""Steps of one timed run; eight runs (the first warms up) end at a chunk's end, whose fold the median leaves out."""


RAGGED_DOT, NEITHER = "train demo, its experts by lax.ragged_dot", "train demo, both: none of our ops but attention and products"
RARELY = 3
"""Rounds of which a run of many seconds takes part in one."""


def medians(runs: Mapping[Any, Callable[[], Any]], repeats: int, rare: Collection[Any] = ()) -> dict[Any, float]:
    """Return the median seconds of each run: rounds of all of them, so that a busy moment of the machine meets all alike.

    The `rare` take part in the first round, which warms up, and in one of RARELY.
    """
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for repeat in range(repeats + 1):
        for key, run in runs.items():
            if key in rare and repeat % RARELY:
                continue
            start = time.perf_counter()
            run()
            if repeat:
                times[key].append(time.perf_counter() - start)
    return {key: float(np.median(taken)) for key, taken in times.items()}


def product(m: int, k: int, n: int, dtype: str) -> Callable[[], Any]:
    """Return a run of one product."""
    x, w, run = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype), jax.jit(lambda x, w: x @ w)
    return lambda: run(x, w).block_until_ready()


@contextlib.contextmanager
def equations() -> Iterator[None]:
    """Trace models with the equations of the fused layers, and the gradients that autodiff makes of them, in place of the layers."""
    with contextlib.ExitStack() as stack:
        for module in (layers, linear_attention, moe, experts):
            for name in set(fused_layers.__all__) & set(vars(module)):
                truth = getattr(reference, name)
                ours = ("aligned", "implementation", "emit", "dtype")
                plain = lambda *args, truth=truth, ours=ours, **how: truth(*args, **{k: v for k, v in how.items() if k not in ours})
                stack.enter_context(mock.patch.object(module, name, plain))
        yield


def experts_by_ragged_dot() -> Any:
    """Trace models whose experts' products are `lax.ragged_dot`, with autodiff's gradients, in place of ours."""

    def mlp(x, w_in, w_out, groups, weights, *, row_tile, aligned, implementation):
        del aligned
        num_slots, sizes = weights.shape[1], groups.tiles * row_tile
        gate_up = lax.ragged_dot(gather_groups(x, groups, num_slots), w_in, sizes)
        hidden: Any = experts.swiglu(gate_up, gather_weights(weights, groups), implementation=implementation)
        return combine_groups(lax.ragged_dot(hidden, w_out, sizes), groups, num_slots, implementation=implementation)

    return mock.patch.object(numerics, "grouped_mlp", mlp)


def demo(precision: str) -> tuple[Any, Batch, TrainConfig]:
    """Return the demo's training program, a batch, and the configuration."""
    run = TrainConfig(precision=precision, seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    program = make_program(DEMO, numerics_of(run), run.optimizer, run.steps, 0, None)
    rng, shape = np.random.default_rng(0), (run.batch_size, run.seq_len)
    tokens, positions = rng.integers(0, DEMO.vocab_size, shape), np.broadcast_to(np.arange(run.seq_len), shape)
    return program, Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens, positions, np.ones(shape)))), run


def training_step(precision: str) -> tuple[Callable[[], Any], TrainConfig]:
    """Return a run of the demo's training step, and its configuration."""
    program, batch, run = demo(precision)
    state = [program.init()]

    def step():
        state[0], metrics = program.step(state[0], program.tables, batch)
        jax.block_until_ready(metrics)

    step()  # traced here and now (see `equations`)
    return step, run


def bench_training(precisions: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Return tokens/s and utilisation of the demo's training step in each precision."""
    rows = []
    for precision in precisions:
        step, run = training_step(precision)
        steps = {"train demo": step}
        if DTYPES[precision] == "float32":  # the equations are in fp32 at least
            with equations():
                steps["train demo, its layers as equations"], _ = training_step(precision)
            with experts_by_ragged_dot():
                steps[RAGGED_DOT], _ = training_step(precision)
            with equations(), experts_by_ragged_dot():
                steps[NEITHER], _ = training_step(precision)
        rare = (RAGGED_DOT, NEITHER)  # many seconds each
        taken = medians(steps | {shape: product(*shape, DTYPES[precision]) for shape in GEMMS}, repeats, rare)
        limit = max(2 * m * k * n / taken[m, k, n] for m, k, n in GEMMS)
        for what in steps:
            rate = run.batch_size * run.seq_len / taken[what]
            work = rate * flops.training_flops_per_token(DEMO, run.seq_len)
            speed = {"tokens/s": rate, "GFLOP/s": work / 1e9, "ceiling GFLOP/s": limit / 1e9, "MFU": work / limit}
            rows.append({"what": what, "dtype": precision, **speed})
    return rows


def random_tokens(batch: int, length: int) -> np.ndarray:
    """Return tokens [batch, length] of the benchmark's vocabulary."""
    return np.random.default_rng(0).integers(1, 8192, (batch, length), np.int32)


class OurModel:
    """Our programs over the benchmark's checkpoint."""

    def __init__(self, folder: pathlib.Path, precision: str, aligned: bool):
        self.decoder = Decoder(checkpoint.load(folder, precision=precision, stacked=jax.default_backend() != "cpu", aligned=aligned).model)

    def prefill(self, tokens: list[int]) -> Callable[[], Any]:
        """Return a run of a prompt's prefill, up to its first new token."""

        def run():
            cache, hidden = self.decoder.prefill([tokens], self.decoder.init_cache(1, PROMPT))
            self.decoder.first_tokens(hidden, np.array([PROMPT], np.int32), Sampling(temperature=0), 0)

        return run

    def decode(self, batch: int) -> Callable[[], Any]:
        """Return a run of a few steps of decoding, each slot with tokens (so experts) of its own."""
        cache, _ = self.decoder.prefill(random_tokens(batch, DECODE_AT).tolist(), self.decoder.init_cache(batch, 2 * DECODE_AT))
        held, tokens, at = [cache], random_tokens(batch, 2 * DECODE_AT), [DECODE_AT]

        def run():
            for _ in range(DECODE_STEPS):
                positions = np.full(batch, at[0], np.int32)
                _, held[0] = self.decoder.step(tokens[:, at[0]], positions, held[0], Sampling(temperature=0))
                at[0] += 1

        return run


class MlxModel:
    """mlx-lm over the same checkpoint."""

    def __init__(self, folder: pathlib.Path):
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self.mx = mx
        self.model, _ = load_model(folder)

    def _cache(self) -> Any:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model)

    def prefill(self, tokens: list[int]) -> Callable[[], Any]:
        """Return a run of a prompt as its generator computes it: the caches of all tokens but the last, then that one's logits."""
        prompt = self.mx.array([tokens])

        def run():
            cache = self._cache()
            self.model(prompt[:, :-1], cache=cache)
            self.mx.eval([layer.state for layer in cache])
            self.mx.eval(self.mx.argmax(self.model(prompt[:, -1:], cache=cache)[:, -1], axis=-1))

        return run

    def decode(self) -> Callable[[], Any]:
        """Return a run of a few steps of decoding at batch 1."""
        cache = self._cache()
        self.mx.eval(self.model(self.mx.array(random_tokens(1, DECODE_AT)), cache=cache)[:, -1])
        tokens, at = random_tokens(1, 2 * DECODE_AT), [DECODE_AT]

        def run():
            for _ in range(DECODE_STEPS):
                token = self.mx.array(tokens[:, at[0] : at[0] + 1])
                self.mx.eval(self.mx.argmax(self.model(token, cache=cache)[:, -1], axis=-1))
                at[0] += 1

        return run


def write_checkpoint(folder: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Write a random checkpoint of the config."""
    create = numerics.jit(lambda: nnx.split(Ring(config, rngs=nnx.Rngs(0)))[1], Numerics(aligned=False))
    graph, _ = nnx.split(nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0))))
    write_hf(nnx.merge(graph, create()), folder, dtype)


def bench_inference(precisions: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Return the rows of prefill and decode: mlx-lm in the first precision, then ours in each, fast and aligned."""
    tokens = random_tokens(1, PROMPT)[0].tolist()
    prefill, seconds = f"prefill {PROMPT}", {}
    with tempfile.TemporaryDirectory() as name:
        folders = {precision: pathlib.Path(name) / precision for precision in precisions}
        for precision, folder in folders.items():
            write_checkpoint(folder, PRESETS["bench-140m"], DTYPES[precision])
        peer = MlxModel(folders[precisions[0]])  # its CPU backend multiplies experts in float32 only
        key = lambda what: (what, precisions[0], "mlx-lm")
        models = {(p, "aligned" if a else "fast"): OurModel(folders[p], p, a) for p in precisions for a in (False, True)}
    runs = {key(prefill): peer.prefill(tokens)} | {(prefill, *how): model.prefill(tokens) for how, model in models.items()}
    seconds |= medians(runs, repeats, rare=[key(prefill)])
    for batch in DECODE_BATCHES:
        what = f"decode batch {batch}"
        runs = {(what, *how): model.decode(batch) for how, model in models.items()}
        seconds |= medians(({key(what): peer.decode()} if batch == 1 else {}) | runs, repeats)
    rows = []
    for (what, precision, by), taken in seconds.items():
        amount = PROMPT if what == prefill else DECODE_STEPS * int(what.split()[-1])
        mlx = PROMPT / seconds[key(prefill)] if what == prefill else DECODE_STEPS / seconds[key("decode batch 1")]
        row = {"what": what, "dtype": precision, "by": by, "tokens/s": amount / taken, f"x mlx-lm {precisions[0]}": amount / taken / mlx}
        if by == "aligned":
            row["aligned / fast time"] = taken / seconds[what, precision, "fast"]
        if by != "mlx-lm" and precision != precisions[0]:
            row[f"{precision} / {precisions[0]} time"] = taken / seconds[what, precisions[0], by]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    show = lambda x: f"{x:,.1f}" if isinstance(x, float) and x >= 10 else f"{x:.2f}" if isinstance(x, float) else str(x)
    lines = [columns, ["---"] * len(columns), *([show(row.get(key, "")) for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m ring_jax.train.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, fp32 only")
    args = parser.parse_args(arguments)
    repeats, precisions = (3, ("fp32",)) if args.quick else (7, ("fp32", "bf16"))
    device = f"{jax.devices()[0].device_kind} ({platform.machine()}, {len(os.sched_getaffinity(0))} cores)"
    machine = {"machine": device, "jax": jax.__version__, "python": platform.python_version()}
    print(json.dumps(machine))
    training = bench_training(precisions, repeats)
    print(table(training), flush=True)
    inference = bench_inference(precisions, repeats)
    print(table(inference))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process: {peak:.1f} GiB")
    if args.json:
        everything = {**machine, "training": training, "inference": inference, "peak_memory_gib": peak}
        pathlib.Path(args.json).write_text(json.dumps(everything, indent=1))
    return 0


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main())
