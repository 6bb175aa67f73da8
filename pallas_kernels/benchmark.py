"""What the ops' benchmarks share: timing side by side, errors against float64, the machine's ceilings, tables and JSON."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CACHE_BYTES = 64 << 20
"""Inputs that rotate are larger than this together, as far as MAX_COPIES reaches, so that no run finds its inputs in the cache."""
MAX_COPIES = 16


class Problem(NamedTuple):
    """One case: its implementations in one signature, and what it costs at least.

    inputs(seed) returns the arguments; those named by `differentiable` (positions) get a gradient, the others are constants.
    truth is the reference, run in float64. flops and bytes are (forward, backward) of the op itself, whoever computes it.
    host are implementations outside of JAX: functions of numpy arrays, timed forward only.
    """

    case: str
    inputs: Callable[[int], tuple]
    differentiable: tuple[int, ...]
    implementations: Mapping[str, Callable[..., jax.Array]]
    truth: Callable[..., jax.Array]
    flops: tuple[float, float]
    bytes: tuple[float, float]
    host: Mapping[str, Callable[..., np.ndarray]] = {}


def interleaved(runs: Mapping[str, Callable[[int], Any]], seconds: float) -> dict[str, tuple[float, int]]:
    """Return the median time of each run and how many it is the median of; they take turns, so that a slow moment hits them all."""
    for run in runs.values():
        jax.block_until_ready(run(0))
    times: dict[str, list[float]] = {name: [] for name in runs}
    until, turn = time.perf_counter() + seconds * len(runs), 0
    while turn < 5 or (turn < 200 and time.perf_counter() < until):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(turn))
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: (statistics.median(one), len(one)) for name, one in times.items()}


def ceilings(dtype: jnp.dtype, seconds: float) -> tuple[float, float]:
    """Return the bytes/s of a large copy and the FLOP/s of a large product of this dtype, measured here and now."""
    size = 1 << (11 if jax.default_backend() == "cpu" else 13)
    big, square = jnp.ones(64 << 20, jnp.uint8), jnp.ones((size, size), dtype)
    copy, product = jax.jit(lambda x: x + jnp.uint8(1)), jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    times = interleaved({"copy": lambda _: copy(big), "product": lambda _: product(square)}, seconds)
    return 2 * big.size / times["copy"][0], 2 * size**3 / times["product"][0]


def _with_gradients(f: Callable, positions: tuple[int, ...]) -> Callable:
    """Return the function (cotangent, *arguments) -> (value, gradients of the arguments at `positions`)."""

    def run(cotangent, *arguments):
        def of(*chosen):
            mixed = list(arguments)
            for position, x in zip(positions, chosen, strict=True):
                mixed[position] = x
            return f(*mixed)

        out, pull_back = jax.vjp(of, *(arguments[p] for p in positions))
        return out, pull_back(cotangent.astype(out.dtype))

    return run


def _error(actual: Any, truth: Any) -> float:
    """Return the largest error of any array of a tree, relative to the array's largest value."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(truth), strict=True)
    return max(float(np.abs(np.asarray(a).astype(np.float64) - t).max() / max(np.abs(t).max(), 1e-300)) for a, t in pairs)


def measure(problem: Problem, dtype: str, peaks: tuple[float, float], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a record for each implementation, forward and forward with backward."""
    one = jax.tree.leaves(problem.inputs(0))
    copies = int(np.clip(CACHE_BYTES // sum(x.nbytes for x in one) + 1, 2, MAX_COPIES))
    arguments = [problem.inputs(seed) for seed in range(copies)]
    double = lambda x: np.asarray(x).astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)
    out = jax.eval_shape(next(iter(problem.implementations.values())), *arguments[0])
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal(out.shape), out.dtype)
    options = {"xla_allow_excess_precision": False}
    for direction, wrap in enumerate((lambda f: f, lambda f: _with_gradients(f, problem.differentiable))):
        lead = (cotangent,) if direction else ()
        programs = {name: jax.jit(wrap(f), compiler_options=options) for name, f in problem.implementations.items()}
        with jax.enable_x64(True):
            truth = jax.tree.map(np.asarray, jax.jit(wrap(problem.truth))(*jax.tree.map(double, (*lead, *arguments[0]))))
        results = {name: jax.tree.map(np.asarray, program(*lead, *arguments[0])) for name, program in programs.items()}
        runs = {name: lambda i, f=f: f(*lead, *arguments[i % copies]) for name, f in programs.items()}
        for name, f in problem.host.items() if not direction else ():
            results[name], runs[name] = f(*arguments[0]), lambda i, f=f: f(*arguments[i % copies])
        flops, moved = (sum(x[: direction + 1]) for x in (problem.flops, problem.bytes))
        floor = max(moved / peaks[0], flops / peaks[1])
        for name, (median, count) in interleaved(runs, seconds).items():
            rates = {"flop/s": flops / median, "byte/s": moved / median, "of_ceiling": floor / median}
            labels = {"case": problem.case, "dtype": dtype, "implementation": name, "pass": ("forward", "both")[direction]}
            yield labels | {"seconds": median, "runs": count, "error": _error(results[name], truth)} | rates


def main(op: str, problems: Callable[[jnp.dtype, bool], Iterator[Problem]]) -> None:
    """Run an op's benchmark from the command line: `--quick` for the small cases in fp32, `--json FILE` for the records."""
    parser = argparse.ArgumentParser(prog=f"python -m pallas_kernels.{op}.bench", description=f"Time {op} beside its peers.")
    parser.add_argument("--json", metavar="FILE", help="also write the records to FILE")
    parser.add_argument("--quick", action="store_true", help="small cases, fp32, few runs")
    arguments = parser.parse_args()
    seconds, records, peaks = (0.2 if arguments.quick else 1.0), [], {}
    machine = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "cpu": platform.machine(), "jax": jax.__version__}
    print(f"{op}: {machine['device']} ({machine['cpu']}), jax {machine['jax']}")
    for dtype in ("fp32",) if arguments.quick else ("fp32", "bf16"):
        array_type = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[dtype]
        peaks[dtype] = ceilings(array_type, seconds)
        print(f"\n{dtype}: copy {peaks[dtype][0] / 1e9:.1f} GB/s, product {peaks[dtype][1] / 1e9:.0f} GFLOP/s")
        print(f"{'case':<22}{'pass':<9}{'implementation':<24}{'ms':>10}{'runs':>6}{'GFLOP/s':>10}{'GB/s':>8}{'ceiling':>9}{'error':>10}")
        for problem in problems(array_type, arguments.quick):
            for r in measure(problem, dtype, peaks[dtype], seconds):
                records.append(r)
                rates = f"{r['flop/s'] / 1e9:>10.1f}{r['byte/s'] / 1e9:>8.2f}{r['of_ceiling']:>9.1%}{r['error']:>10.1e}"
                print(f"{r['case']:<22}{r['pass']:<9}{r['implementation']:<24}{r['seconds'] * 1e3:>10.3f}{r['runs']:>6}{rates}", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"op": op, "machine": machine, "ceilings": peaks, "records": records}, file, indent=1)
