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
from jax.typing import DTypeLike

CACHE_BYTES = 64 << 20
"""Inputs that rotate are larger than this together, as far as MAX_COPIES reaches, so that no run finds its inputs in the cache."""
MAX_COPIES = 16


class Problem(NamedTuple):
    """One case: its implementations in one signature, and what it costs at least.

    inputs(seed) returns the arguments; those named by `differentiable` (positions) get a gradient, the others are constants. Without
    any the forward alone is timed.
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


def interleaved(runs: Mapping[Any, Callable[[int], Any]], seconds: float) -> dict[Any, list[float]]:
    """Return the times of each run; they take turns, so that a slow moment hits them all."""
    for run in runs.values():
        jax.block_until_ready(run(0))
    times: dict[Any, list[float]] = {name: [] for name in runs}
    until, turn = time.perf_counter() + seconds * len(runs), 0
    while turn < 5 or (turn < 200 and time.perf_counter() < until):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(turn))
            times[name].append(time.perf_counter() - start)
        turn += 1
    return times


def ceilings(dtype: DTypeLike, seconds: float) -> tuple[float, float]:
    """Return the most bytes/s of a copy or a read and the most FLOP/s of a product of this dtype, measured here and now.

    The best of several sizes and of all runs: nothing should exceed a ceiling.
    """
    copy, read = jax.jit(lambda x: x + 1), jax.jit(lambda x: jnp.ones(1024) @ x.reshape(1024, -1))
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    moves, products = {}, {}
    for size in (1 << 20, 4 << 20, 64 << 20):
        arrays = [jnp.full(size // 4, i, jnp.float32) for i in range(max(2, CACHE_BYTES // size))]
        moves[2 * size] = lambda i, arrays=arrays: copy(arrays[i % len(arrays)])
        moves[size] = lambda i, arrays=arrays: read(arrays[i % len(arrays)])
    for size in (512, 1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        square = jnp.ones((size, size), dtype)
        products[2 * size**3] = lambda _, square=square: product(square)
    best = lambda runs: max(work / min(times) for work, times in interleaved(runs, seconds).items())
    return best(moves), best(products)


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


def measure(problem: Problem, dtype: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a record for each implementation, forward and forward with backward."""
    one = jax.tree.leaves(problem.inputs(0))
    copies = int(np.clip(CACHE_BYTES // sum(x.nbytes for x in one) + 1, 2, MAX_COPIES))
    arguments = [problem.inputs(seed) for seed in range(copies)]
    double = lambda x: np.asarray(x).astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)
    out = jax.eval_shape(next(iter(problem.implementations.values())), *arguments[0])
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal(out.shape), out.dtype)
    options = {"xla_allow_excess_precision": False}
    directions = (lambda f: f, lambda f: _with_gradients(f, problem.differentiable))
    for direction, wrap in enumerate(directions[: 2 if problem.differentiable else 1]):
        lead = (cotangent,) if direction else ()
        programs = {name: jax.jit(wrap(f), compiler_options=options) for name, f in problem.implementations.items()}
        with jax.enable_x64(True):
            truth = jax.tree.map(np.asarray, jax.jit(wrap(problem.truth))(*jax.tree.map(double, (*lead, *arguments[0]))))
        results = {name: jax.tree.map(np.asarray, program(*lead, *arguments[0])) for name, program in programs.items()}
        runs: dict[str, Any] = {name: lambda i, f=f, lead=lead: f(*lead, *arguments[i % copies]) for name, f in programs.items()}
        for name, f in problem.host.items() if not direction else ():
            results[name], runs[name] = f(*arguments[0]), lambda i, f=f: f(*arguments[i % copies])
        flops, moved = (sum(x[: direction + 1]) for x in (problem.flops, problem.bytes))
        for name, times in interleaved(runs, seconds).items():
            labels = {"case": problem.case, "dtype": dtype, "implementation": name, "pass": ("forward", "both")[direction]}
            yield labels | {
                "seconds": statistics.median(times),
                "runs": len(times),
                "error": _error(results[name], truth),
                "flops": flops,
                "bytes": moved,
            }


def main(op: str, problems: Callable[[DTypeLike, bool], Iterator[Problem]]) -> None:
    """Run an op's benchmark from the command line: `--quick` for the small cases in fp32, `--json FILE` for the records."""
    parser = argparse.ArgumentParser(prog=f"python -m pallas_kernels.{op}.bench", description=f"Time {op} beside its peers.")
    parser.add_argument("--json", metavar="FILE", help="also write the records to FILE")
    parser.add_argument("--quick", action="store_true", help="small cases, fp32, few runs")
    arguments = parser.parse_args()
    seconds, records, peaks = (0.2 if arguments.quick else 1.0), [], {}
    machine = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "cpu": platform.machine(), "jax": jax.__version__}
    print(f"{op}: {machine['device']} ({machine['cpu']}), jax {machine['jax']}")
    for dtype in ("fp32",) if arguments.quick else ("fp32", "bf16"):
        array_type, measured, found = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[dtype], [], []
        for problem in problems(array_type, arguments.quick):
            found.append(ceilings(array_type, seconds / 4))  # before each case: the best moment of the whole run counts
            measured += measure(problem, dtype, seconds)
        peaks[dtype] = copy, product = tuple(max(x) for x in zip(*found, strict=True))
        print(f"\n{dtype}: copy or read {copy / 1e9:.1f} GB/s, product {product / 1e9:.0f} GFLOP/s")
        print(f"{'case':<18}{'pass':<9}{'implementation':<26}{'ms':>10}{'runs':>6}{'GFLOP/s':>10}{'GB/s':>8}{'ceiling':>9}{'error':>10}")
        for r in measured:
            r["of_ceiling"] = max(r["bytes"] / copy, r["flops"] / product) / r["seconds"]
            rates = f"{r['flops'] / r['seconds'] / 1e9:>10.1f}{r['bytes'] / r['seconds'] / 1e9:>8.2f}{r['of_ceiling']:>9.1%}"
            line = f"{r['case']:<18}{r['pass']:<9}{r['implementation']:<26}{r['seconds'] * 1e3:>10.3f}{r['runs']:>6}"
            print(f"{line}{rates}{r['error']:>10.1e}", flush=True)
        records += measured
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"op": op, "machine": machine, "ceilings": peaks, "records": records}, file, indent=1)
