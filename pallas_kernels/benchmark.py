"""What the ops' benchmarks share: timing side by side, errors against float64, the machine's ceilings, tables and JSON."""

import argparse
import functools
import itertools
import json
import os
import pathlib
import platform as machine
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.compat import dot_precision, platform

CACHE_BYTES = 128 << 20
"""Copies of the inputs rotate; they are larger than this together, as far as MAX_COPIES reaches: no run finds its inputs in a cache."""
MAX_COPIES = 64
BURST = 0.01
"""Seconds of calls that an accelerator is given at a time, so that it does not wait for the host."""
TRACED = 1e-3
"""Seconds of a GPU's call below which the host may be the slower one: the GPU's own trace then says how long its kernels took."""
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
_NATIVE = {"cpu": ("xla",), "gpu": ("pallas_gpu", "jax_triton", "mosaic_gpu", "xla"), "tpu": ("pallas_tpu", "xla")}
_OPTIONS = {"xla_allow_excess_precision": False}


class InPlace(NamedTuple):
    """An implementation that takes over the buffers of the arguments at `updates`: it returns its output, then their new values."""

    run: Callable[..., tuple]
    updates: tuple[int, ...]


class Target(NamedTuple):
    """What our implementations should reach: at most `ratio` times the time of a peer in the same run, of the "floor" or of a "second"."""

    ratio: float
    of: str
    label: str = ""


class Problem(NamedTuple):
    """One case: its implementations in one signature, and what it costs at least.

    Implementations whose name begins with "peer" are not ours. `torch` are peers on torch tensors in place of arrays; what they import
    may be missing. Arguments at `differentiable` get a gradient, the others are constants; without any the forward alone is timed.
    truth is the reference, run in float64, with which `read` of a result is compared. flops and bytes are (forward, backward) of the op
    itself, whoever computes it. `peer` is whose time others are compared with; targets are by pass, "forward" or "both".
    """

    case: str
    tokens: int
    inputs: Callable[[], tuple]
    differentiable: tuple[int, ...]
    implementations: Mapping[str, Callable[..., Any] | InPlace]
    truth: Callable[..., Any]
    flops: tuple[float, float]
    bytes: tuple[float, float]
    torch: Mapping[str, Callable] = {}
    peer: str = ""
    targets: Mapping[str, tuple[Target, ...]] = {}
    read: Callable[[Any], Any] = lambda result: result


def native(table: Iterable[str]) -> list[str]:
    """Return the implementations of a table that are meant for this platform; interpreted kernels are not timed."""
    return [name for name in _NATIVE[platform()] if name in table]


def clock(call: Callable[[int], Any]) -> Callable[[int], float]:
    """Return the function that makes so many calls of a jax program and returns the seconds of one."""
    turns = itertools.count()

    def run(calls):
        start, out = time.perf_counter(), None
        for _ in range(calls):
            out = call(next(turns))
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    return run


def _burst(run: Callable[[int], float]) -> int:
    """Return how many calls fill a burst: one on a CPU, which does nothing beside them. The first calls compile and warm up."""
    once = min(run(1) for _ in range(2))
    return 1 if platform() == "cpu" else int(np.clip(BURST / once, 1, 500))


def interleaved(clocks: Mapping[Any, Callable[[int], float]], seconds: float) -> dict[Any, list[float]]:
    """Return the times of a call of each; they take turns, so that a slow moment hits them all."""
    bursts = {name: _burst(run) for name, run in clocks.items()}
    times: dict[Any, list[float]] = {name: [] for name in clocks}
    until, turn = time.perf_counter() + seconds * len(clocks), 0
    while turn < 5 or (turn < 200 and time.perf_counter() < until):
        for name, run in clocks.items():
            times[name].append(run(bursts[name]))
        turn += 1
    return times


def kernel_seconds(run: Callable[[int], float], calls: int) -> float | None:
    """Return how long a GPU's kernels took a call, whoever started them, by the trace of its driver; None without one."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with jax.profiler.trace(folder):
                run(calls)
        except RuntimeError:  # a driver that does not let us trace
            return None
        total = 0.0
        for path in pathlib.Path(folder).glob("**/*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                streams = [x for x in plane.lines if x.name.startswith("Stream")] if plane.name.startswith("/device:GPU") else []
                total += sum(event.duration_ns for stream in streams for event in stream.events)
    return total / 1e9 / calls or None


_copy, _read = jax.jit(lambda x: x + 1), jax.jit(lambda x: jnp.ones(1024) @ x.reshape(1024, -1))


@functools.cache
def _product(dtype: jnp.dtype) -> Callable:
    """The product whose rate is the ceiling: one object, which is compiled once a shape."""
    return jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32, precision=dot_precision(dtype)))


def ceilings(dtype: DTypeLike, seconds: float) -> tuple[float, float]:
    """Return the most bytes/s of a copy or a read and the most FLOP/s of a product of this dtype, measured here and now.

    The best of several sizes and of all runs: nothing should exceed a ceiling.
    """
    product = _product(jnp.dtype(dtype))
    on_cpu, moves, products = platform() == "cpu", {}, {}
    for size in (1 << 20, 4 << 20, 64 << 20) if on_cpu else (1 << 30,):
        arrays = [jnp.full(size // 4, i, jnp.float32) for i in range(max(2, CACHE_BYTES // size))]
        moves[2 * size] = clock(lambda i, arrays=arrays: _copy(arrays[i % len(arrays)]))
        moves[size] = clock(lambda i, arrays=arrays: _read(arrays[i % len(arrays)]))
    for size in (512, 1024, 2048) if on_cpu else (4096, 8192):
        square = jax.random.normal(jax.random.key(0), (size, size), dtype)  # a GPU is faster, as it draws less power, on a constant
        products[2 * size**3] = clock(lambda _, square=square: product(square, square))
    best = lambda clocks: max(work / min(times) for work, times in interleaved(clocks, seconds).items())
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
        return out, pull_back(jax.tree.map(lambda d, y: d.astype(y.dtype), cotangent, out))

    return run


@jax.jit
def _errors(actual: Any, truth: Any) -> tuple[jax.Array, jax.Array]:
    """Return the largest error of any array, relative to its largest value, and the rms error in units of that of rounding to bf16."""
    largest, floors = [], []
    for a, t in zip(jax.tree.leaves(actual), jax.tree.leaves(truth), strict=True):
        error, rounding = a.astype(t.dtype) - t, lax.reduce_precision(t, 8, 7) - t
        largest.append(jnp.abs(error).max() / jnp.maximum(jnp.abs(t).max(), 1e-300))
        floors.append(jnp.sqrt(jnp.square(error).mean() / jnp.maximum(jnp.square(rounding).mean(), 1e-300)))
    return jnp.stack(largest).max(), jnp.stack(floors).max()


class _Measurement:
    """The implementations of a problem in one direction: each is called once for its error, then all are timed."""

    def __init__(self, problem: Problem, arguments: tuple, backward: bool):
        self.problem, self.arguments = problem, arguments
        self.positions = problem.differentiable if backward else ()
        size = sum(x.nbytes for x in jax.tree.leaves(arguments))
        self.copies = int(np.clip(CACHE_BYTES // size + 1, 2, MAX_COPIES))
        self.sets = [arguments, *(jax.tree.map(jnp.copy, arguments) for _ in range(self.copies - 1))]
        self.cotangent: Any = None  # of each array that the implementations return
        if backward:
            rng, out = np.random.default_rng(0), jax.eval_shape(problem.truth, *arguments)
            dtype = jax.tree.leaves([arguments[p] for p in self.positions])[0].dtype
            self.cotangent = jax.tree.map(lambda y: jnp.asarray(rng.standard_normal(y.shape, np.float32), dtype), out)
        self.truth = self._truth()

    def _program(self, f: Callable, donate: tuple[int, ...] = ()) -> Callable:
        if self.cotangent is None:
            return jax.jit(f, donate_argnums=donate, compiler_options=_OPTIONS)
        return functools.partial(jax.jit(_with_gradients(f, self.positions), compiler_options=_OPTIONS), self.cotangent)

    def _truth(self):
        double = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        wrapped = _with_gradients(self.problem.truth, self.positions) if self.positions else self.problem.truth
        lead = () if self.cotangent is None else (self.cotangent,)
        with jax.enable_x64(True):
            return jax.block_until_ready(jax.jit(lambda *x: wrapped(*jax.tree.map(double, x)))(*lead, *self.arguments))

    def in_jax(self, f: Callable | InPlace) -> tuple[Callable[[int], float], tuple[float, float]]:
        """Return the clock and the errors of a jax implementation."""
        if not isinstance(f, InPlace):
            program = self._program(f)
            return clock(lambda i: program(*self.sets[i % self.copies])), self.errors(program(*self.arguments))
        program = self._program(f.run, f.updates)
        own = [[jax.tree.map(jnp.copy, x) if i in f.updates else x for i, x in enumerate(each)] for each in self.sets]

        def call(i):
            arguments = own[i % self.copies]
            out, *values = program(*arguments)
            for position, value in zip(f.updates, values, strict=True):
                arguments[position] = value
            return out

        return clock(call), self.errors(call(0))

    def in_torch(self, f: Callable) -> tuple[Callable[[int], float], tuple[float, float]]:
        """Return the clock and the errors of a torch implementation; raises ImportError without torch."""
        from pallas_kernels import torch_peer

        call = torch_peer.caller(f, self.copies, self.arguments, self.positions, self.cotangent)
        return torch_peer.clock(call), self.errors(torch_peer.arrays(call(0)))

    def errors(self, result: Any) -> tuple[float, float]:
        """Return `_errors` of a result."""
        with jax.enable_x64(True):
            largest, floors = _errors(self.problem.read(result), self.truth)
            return float(largest), float(floors)


def measure(problem: Problem, dtype: str, seconds: float, left_out: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a record for each implementation, forward and forward with backward; say, and add to `left_out`, which do not run and why."""
    arguments = problem.inputs()
    for direction in range(2 if problem.differentiable else 1):
        measurement = _Measurement(problem, arguments, bool(direction))
        clocks, errors = {}, {}
        calls = {name: functools.partial(measurement.in_jax, f) for name, f in problem.implementations.items()}
        calls |= {name: functools.partial(measurement.in_torch, f) for name, f in problem.torch.items()}
        for name, prepare in calls.items():
            labels = {"case": problem.case, "dtype": dtype, "implementation": name, "pass": ("forward", "both")[direction]}
            try:
                clocks[name], errors[name] = prepare()
            except Exception as error:  # a peer, or a kernel that does not compile here: the others are still worth their times
                lines = str(error).strip().splitlines() or [""]
                expected = name.startswith("peer") or isinstance(error, NotImplementedError)
                left_out.append(labels | {"reason": f"{type(error).__name__}: {lines[0]}", "failed": not expected})
                print(f"{problem.case}, {labels['pass']}: without {name}: {left_out[-1]['reason']}", flush=True)
        flops, moved = (sum(x[: direction + 1]) for x in (problem.flops, problem.bytes))
        for name, times in interleaved(clocks, seconds).items():
            median, kernels = statistics.median(times), None
            if platform() == "gpu" and median < TRACED:
                kernels = kernel_seconds(clocks[name], 2 * measurement.copies)
            yield {"case": problem.case, "dtype": dtype, "implementation": name, "pass": ("forward", "both")[direction]} | {
                "seconds": median,
                "kernel_seconds": kernels,
                "runs": len(times),
                "tokens": problem.tokens,
                "error": errors[name][0],
                "rounding_floors": errors[name][1] if dtype == "bf16" else None,
                "flops": flops,
                "bytes": moved,
            }


def compare(records: list[dict[str, Any]], problem: Problem, peaks: tuple[float, float]) -> None:
    """Add to a problem's records how they stand to the ceilings, to its peer and to its targets.

    Where the host is slower than a GPU's kernels, the kernels' times are compared, if both are known.
    """
    for r in records:
        floor = max(r["bytes"] / peaks[0], r["flops"] / peaks[1])
        peers = {s["implementation"]: s for s in records if s["pass"] == r["pass"]}

        def ratio(other, r=r):
            unit = "kernel_seconds" if r["kernel_seconds"] and other["kernel_seconds"] else "seconds"
            return r[unit] / other[unit]

        r["of_ceiling"] = floor / (r["kernel_seconds"] or r["seconds"])
        r["x_peer"] = 1 / ratio(peers[problem.peer]) if problem.peer in peers else None
        r["targets"] = []
        for target in problem.targets.get(r["pass"], ()) if not r["implementation"].startswith("peer") else ():
            absolute = {"floor": 1 / r["of_ceiling"], "second": r["kernel_seconds"] or r["seconds"]}
            reached = ratio(peers[target.of]) if target.of in peers else absolute.get(target.of)
            label = target.label or f"{target.ratio:.2g}x {target.of.removeprefix('peer: ')}"
            met = None if reached is None else reached <= target.ratio
            r["targets"].append({"target": label, "of": target.of, "ratio": target.ratio, "reached": reached, "met": met})


_COLUMNS = "{:<41}{:<8}{:<30}{:>10}{:>11}{:>6}{:>10}{:>10}{:>8}{:>9}{:>9}{:>8}{:>8}  {}"
_HEADER = ("case", "pass", "implementation", "ms", "kernels", "runs", "us/token", "GFLOP/s", "GB/s", "ceiling", "error", "floors", "x peer")


def _line(r: Mapping[str, Any]) -> str:
    """Return a record as a line of the table."""
    optional = lambda x, form: "-" if x is None else format(x, form)
    busy = r["kernel_seconds"] or r["seconds"]
    verdict = {None: "no peer", True: "met", False: "missed"}
    return _COLUMNS.format(
        r["case"],
        r["pass"],
        r["implementation"],
        f"{r['seconds'] * 1e3:.3f}",
        optional(r["kernel_seconds"] and r["kernel_seconds"] * 1e3, ".4f"),
        r["runs"],
        f"{r['seconds'] / r['tokens'] * 1e6:.3f}",
        f"{r['flops'] / busy / 1e9:.1f}",
        f"{r['bytes'] / busy / 1e9:.1f}",
        f"{r['of_ceiling']:.1%}",
        f"{r['error']:.1e}",
        optional(r["rounding_floors"], ".2f"),
        optional(r["x_peer"], ".2f"),
        "; ".join(f"{t['target']}: {verdict[t['met']]}" for t in r["targets"]),
    ).rstrip()


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the parser with the options that all benchmarks have."""
    parser.add_argument("--json", metavar="FILE", help="also write the records to FILE")
    parser.add_argument("--quick", action="store_true", help="small cases, fp32, few runs")
    parser.add_argument("--case", metavar="TEXT", default="", help="only the cases whose name contains TEXT")
    return parser


def main(op: str, problems: Callable[[DTypeLike, bool], Iterable[Problem]], accelerated: Sequence[str] = ("bf16",)) -> None:
    """Run an op's benchmark from the command line, off the CPU in the dtypes `accelerated`.

    The exit status is 1 if an implementation of ours fails other than by refusing a case.
    """
    parser = argparse.ArgumentParser(prog=f"python -m pallas_kernels.{op}.bench", description=f"Time {op} beside its peers.")
    arguments = options(parser).parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # torch shares a GPU's memory
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # and a CPU's cores, where its waiting threads would spin: 100 times slower
    on_cpu, left_out, peaks, done = platform() == "cpu", [], {}, []
    seconds = 0.2 if arguments.quick else 1.0 if on_cpu else 0.4
    here = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "cpu": machine.machine(), "jax": jax.__version__}
    print(f"{op}: {here['device']} ({here['cpu']}), jax {here['jax']}", flush=True)

    def write() -> None:
        records = [r for _, rows in done for r in rows]
        if arguments.json:
            written = {"op": op, "machine": here, "ceilings": peaks, "records": records, "left_out": left_out}
            pathlib.Path(arguments.json).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

    for dtype in ("fp32",) if arguments.quick else ("fp32", "bf16") if on_cpu else accelerated:
        measured = []
        for problem in (p for p in problems(DTYPES[dtype], arguments.quick) if arguments.case in p.case):
            start = time.perf_counter()
            found = ceilings(DTYPES[dtype], seconds / 4)  # before each case: the best moment of the whole run counts
            peaks[dtype] = tuple(map(max, found, peaks.get(dtype, found)))
            measured.append((problem, list(measure(problem, dtype, seconds, left_out))))
            done.append(measured[-1])
            for each, rows in measured:
                compare(rows, each, peaks[dtype])
            write()  # what was measured is kept, whatever happens to the rest
            print(f"{problem.case}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if measured:
            print(f"\n{dtype}: copy or read {peaks[dtype][0] / 1e9:.1f} GB/s, product {peaks[dtype][1] / 1e9:.0f} GFLOP/s")
            print(_COLUMNS.format(*_HEADER, "targets"))
            for _, rows in measured:
                print(*map(_line, rows), sep="\n", flush=True)
    sys.exit(any(x["failed"] for x in left_out))
