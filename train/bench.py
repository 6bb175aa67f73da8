"""The benchmark of this machine: training against its matmul ceiling, prefill and decode against mlx-lm, in one run.

    python -m ring_jax.train.bench [--json FILE] [--quick]

Prefill and decode run on a random checkpoint of the preset `bench-140m`, which mlx-lm loads from the same Hugging Face folder.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ring_jax import checkpoint, convert, flops, numerics
from ring_jax.config import PRESETS, ModelConfig
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
PROMPT = 1024
DECODE_BATCHES = (1, 16, 64)
DECODE_AT = 256
"""Position at which decode is timed."""


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a run, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def ceiling(dtype: str, repeats: int) -> float:
    """Return the best median operations a second of the five products."""
    best = 0.0
    for m, k, n in GEMMS:
        x, w = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        product = jax.jit(lambda x, w: x @ w)
        best = max(best, 2 * m * k * n / seconds(lambda product=product, x=x, w=w: product(x, w).block_until_ready(), repeats))
    return best


def bench_training(precision: str, repeats: int) -> dict[str, Any]:
    """Return tokens/s and utilisation of the demo's training step."""
    config, run = PRESETS["demo"], TrainConfig(precision=precision, batch_size=32)  # as `make demo`
    program = make_program(config, numerics_of(run), run.optimizer, run.steps, 0, None)
    rng, shape = np.random.default_rng(0), (run.batch_size, run.seq_len)
    tokens, positions = rng.integers(0, config.vocab_size, shape), np.broadcast_to(np.arange(run.seq_len), shape)
    batch = Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens, positions, np.ones(shape))))
    state = [program.init()]

    def step():
        state[0], metrics = program.step(state[0], program.tables, batch)
        jax.block_until_ready(metrics)

    limit = ceiling(DTYPES[precision], repeats)
    rate = run.batch_size * run.seq_len / seconds(step, repeats)
    work = rate * flops.training_flops_per_token(config, run.seq_len)
    speed = {"tokens/s": rate, "GFLOP/s": work / 1e9, "ceiling GFLOP/s": limit / 1e9, "MFU": work / limit}
    return {"what": "train demo", "dtype": precision, **speed}


class OurModel:
    """Our programs over the benchmark's checkpoint."""

    def __init__(self, folder: pathlib.Path, precision: str, aligned: bool):
        self.decoder = Decoder(checkpoint.load(folder, precision=precision, stacked=jax.default_backend() != "cpu", aligned=aligned).model)

    def prefill(self, tokens: list[int], repeats: int) -> float:
        """Return tokens/s of a prompt."""

        def run():
            cache = self.decoder.init_cache(1, PROMPT)
            cache, hidden = self.decoder.prefill([tokens], cache)
            hidden.block_until_ready()

        return len(tokens) / seconds(run, repeats)

    def decode(self, batch: int, repeats: int) -> float:
        """Return tokens/s of greedy decoding."""
        prompts = [list(range(1, DECODE_AT + 1))] * batch
        cache, _ = self.decoder.prefill(prompts, self.decoder.init_cache(batch, 2 * DECODE_AT))
        held, tokens, at = [cache], np.ones(batch, np.int32), [DECODE_AT]

        def run():
            step, held[0] = self.decoder.step(tokens, np.full(batch, at[0], np.int32), held[0], Sampling(temperature=0))
            at[0] += 1
            return step

        return batch / seconds(run, 4 * repeats)


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

    def prefill(self, tokens: list[int], repeats: int) -> float:
        """Return tokens/s of a prompt (the model itself, all logits of the last token as its generator asks for)."""
        prompt = self.mx.array([tokens])

        def run():
            self.mx.eval(self.model(prompt, cache=self._cache())[:, -1])

        return len(tokens) / seconds(run, repeats)

    def decode(self, repeats: int) -> float:
        """Return tokens/s of greedy decoding at batch 1."""
        cache = self._cache()
        self.mx.eval(self.model(self.mx.array([list(range(1, DECODE_AT + 1))]), cache=cache)[:, -1])
        token = self.mx.array([[1]])

        def run():
            self.mx.eval(self.mx.argmax(self.model(token, cache=cache)[:, -1], axis=-1))

        return 1 / seconds(run, 4 * repeats)


def write_checkpoint(folder: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Write a random checkpoint of the config."""
    create = numerics.jit(lambda: nnx.split(Ring(config, rngs=nnx.Rngs(0)))[1], Numerics(aligned=False))
    graph, _ = nnx.split(nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0))))
    convert.write_hf(nnx.merge(graph, create()), folder, dtype)


def bench_peer(folder: pathlib.Path, tokens: list[int], repeats: int) -> tuple[float, float]:
    """Return mlx-lm's tokens/s of prefill and of decode at batch 1."""
    mlx = MlxModel(folder)
    return mlx.prefill(tokens, 2), mlx.decode(repeats)


def bench_inference(precision: str, repeats: int, peer: tuple[float, float] | None) -> tuple[list[dict[str, Any]], tuple[float, float]]:
    """Return the rows of prefill and decode in one dtype, and the peer's speed: mlx-lm in that dtype, or what is given where it cannot."""
    rows = []
    tokens = np.random.default_rng(0).integers(1, 8192, PROMPT).tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_checkpoint(folder, PRESETS["bench-140m"], DTYPES[precision])
        try:
            peer = bench_peer(folder, tokens, repeats)
            for what, rate in zip((f"prefill {PROMPT}", "decode batch 1"), peer, strict=True):
                rows.append({"what": what, "dtype": precision, "by": "mlx-lm", "tokens/s": rate, "x mlx-lm": 1.0})
        except RuntimeError as error:  # its CPU backend multiplies experts in float32 only
            if peer is None:
                raise
            print(f"mlx-lm cannot run {precision} here ({error}): compared with its fp32", flush=True)
        peer_prefill, peer_decode = peer
        for aligned in (False, True):
            ours, how = OurModel(folder, precision, aligned), "aligned" if aligned else "fast"
            rate = ours.prefill(tokens, repeats)
            rows.append({"what": f"prefill {PROMPT}", "dtype": precision, "by": how, "tokens/s": rate, "x mlx-lm": rate / peer_prefill})
            for batch in DECODE_BATCHES:
                rate = ours.decode(batch, repeats)
                what = f"decode batch {batch}"
                rows.append({"what": what, "dtype": precision, "by": how, "tokens/s": rate, "x mlx-lm": rate / peer_decode})
    fast = {row["what"]: row["tokens/s"] for row in rows if row["by"] == "fast"}
    for row in rows:
        if row["by"] == "aligned":
            row["fast / aligned"] = fast[row["what"]] / row["tokens/s"]
    return rows, peer


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
    training = [bench_training(precision, repeats) for precision in precisions]
    print(table(training), flush=True)
    inference, peer = [], None
    for precision in precisions:
        rows, peer = bench_inference(precision, repeats, peer)
        inference += rows
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
