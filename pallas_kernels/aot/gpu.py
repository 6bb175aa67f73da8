"""Worker of the compile gates for GPUs: XLA's own CUDA compiler for a described H200 dumps each program's PTX and launches; ptxas reports.

The estimate of a kernel is the largest of five bounds, counted over the PTX with its loops' trips:
- memory: the bytes of its cost estimate (or all its arrays) at the HBM rate; l2: the bytes that its programs copy
  asynchronously and store at the L2 rate (other loads may be masked, in a branch not taken, or of what L1 holds: a listing cannot tell);
- tensor: the matrix instructions' cycles, issue: an instruction a cycle for each of the four schedulers, for the busiest SM;
- latency: waves of programs, each a chain of its first loads, its instructions, its barriers and its matrix instructions; those hide
  behind other instructions only where a wait leaves some in flight.
"""

import contextlib
import functools
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding

from pallas_kernels import compat
from pallas_kernels.aot import case as gates
from pallas_kernels.aot import mosaic_gpu

CHIPS = {"h200": gates.Chip(bandwidth=4.3e12, flops=7.9e14, clock=1.755e9, cores=132)}
"""Bandwidth and FLOP/s as measured on an H200."""
_L2_BANDWIDTH = 8e12
_MATRIX_RATE = {"bf16": 2048, "f16": 2048, "tf32": 1024, "e4m3": 4096, "e5m2": 4096, "s8": 4096}
"""Multiply-adds of an SM per cycle with wgmma; mma.sync reaches half."""
_BARRIER, _WAIT, _START = 30, 64, 2000
"""Cycles of a barrier, of waiting for a matrix instruction, of a program's first loads and last stores."""
_REGISTERS, _SHARED, _THREADS, _PROGRAMS = 65536, 233472, 2048, 32
"""What programs on one SM share."""
_DESCRIPTION = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_address_bits: 64
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  device_memory_size: 151397597184
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
"""


@functools.cache
def _devices(number: int) -> Any:
    """Return so many GPUs of one machine."""
    described = {"platform": "cuda", "topology_name": f"1x1x{number}", "topology": f"1x1x{number}", "target_config": _DESCRIPTION}
    return topologies.get_topology_desc(**described).devices


def _abstract_mesh() -> AbstractMesh:
    device = compat.AbstractDevice("NVIDIA H200", 132, "gpu")
    return AbstractMesh((1,), ("chip",), (AxisType.Explicit,), abstract_device=device)


@functools.cache
def _toolkit(folder: str) -> str:
    """Return a CUDA toolkit whose ptxas keeps what it is given in `folder`: XLA writes the PTX of Triton's kernels nowhere else."""
    real, root = (
        pathlib.Path(os.environ["RING_JAX_PTXAS"]),
        pathlib.Path(tempfile.mkdtemp(prefix="toolkit-", dir=pathlib.Path(folder).parent)),
    )
    (root / "bin").mkdir()
    (root / "nvvm").symlink_to(real.parents[1] / "nvvm")
    wrapper = root / "bin/ptxas"
    wrapper.write_text(f'#!/bin/sh\n[ -f "$1" ] && cp "$1" "{folder}kept-$$.ptx"\nexec "{real}" "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    return str(root)


def resources(path: pathlib.Path) -> dict[str, dict[str, int]]:
    """Return registers a thread and bytes spilled of each kernel of a PTX file, by ptxas."""
    command = [os.environ["RING_JAX_PTXAS"], "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", report, re.DOTALL):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        found[name] = {"registers": int(re.findall(r"Used (\d+)", text)[0]), "spills": spills}
    return found


def count(ptx: str, kernel: Any, turns: int | None = None) -> dict[str, Any]:
    """Return what a warp of a kernel executes: instructions, matrix instructions by name, barriers, waits, and bytes copied and stored.

    sequence: the matrix instructions as they stand in the listing, runs of equal ones: shape, where the first operand is, how many.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\$\w+:", line)}
    branches = [(labels[to], at) for at, line in enumerate(lines) for to in re.findall(r"\bbra(?:\.uni)?\s+(\$\w+);", line)]
    weights, known = gates.loop_weights(len(lines), [(to, at) for to, at in branches if to <= at], kernel, turns)
    total: dict[str, Any] = {"known": known, "issued": 0, "bytes": 0, "stalls": 0, "overlapped": False, "instructions": {}, "sequence": []}
    for line, weight in zip(lines, weights, strict=True):
        match = re.match(r"(?:@!?%p\d+ )?([a-z][a-z0-9]*(?:[.:]+\w+)*)\s", line)
        if not match or match[1].startswith(("mov", "ret")):
            continue
        name = match[1]
        total["issued"] += weight
        if name.startswith(("wgmma.mma_async", "mma.sync")):
            total["instructions"][name] = total["instructions"].get(name, 0) + weight
            source = "registers" if re.search(r"\}, *\{", line) else "memory"  # of the first operand
            shape = next((part for part in name.split(".") if re.fullmatch(r"m\d+n\d+k\d+", part)), name)
            if not total["sequence"] or total["sequence"][-1][:2] != [shape, source]:
                total["sequence"].append([shape, source, 0])
            total["sequence"][-1][2] += 1
        elif name.startswith("cp.async") and "], [" in line:
            total["bytes"] += weight * int(re.findall(r"\], (?:\[.*?\], )?(0x[0-9a-f]+|\d+)", line)[0], 0)
        elif access := re.match(r"st\.global(?:[.:]\w+)*?(?:\.v(\d))?\.[bsuf](\d+)", name):
            total["bytes"] += weight * int(access[1] or 1) * int(access[2]) // 8
        elif name.startswith(("bar.sync", "barrier")):
            total["stalls"] += weight * _BARRIER
        elif name.startswith("wgmma.wait_group"):
            total["stalls"] += weight * _WAIT
            total["overlapped"] |= not line.rstrip(";").endswith(" 0")
    return total


def matrix_cycles(name: str, warps: int) -> float:
    """Return the cycles for which an SM's matrix units work on one such instruction of every warp of a program."""
    m, n, k = map(int, re.findall(r"\.m(\d+)n(\d+)k(\d+)", name)[0])
    operand = next((rate for kind, rate in _MATRIX_RATE.items() if name.endswith("." + kind) or f".{kind}." in name.split("k", 1)[1]), 1024)
    return m * n * k / operand * (warps / 4 if name.startswith("wgmma") else 2 * warps)


def resident(programs: int, threads: int, registers: int, shared: int) -> int:
    """Return how many of so many programs an SM has at a time: what its registers, shared memory and threads allow."""
    registers_of_a_warp = -(-registers * 32 // 256) * 256
    fits = (_REGISTERS // (registers_of_a_warp * threads // 32), _SHARED // (shared + 1024), _THREADS // threads, _PROGRAMS)
    return max(min(*fits, -(-programs // CHIPS["h200"].cores)), 1)


def bounds(counted: dict[str, Any], programs: int, threads: int, active: int, moved: float) -> dict[str, float]:
    """Return the five bounds of a kernel in seconds; an SM has `active` programs at a time."""
    chip, warps = CHIPS["h200"], threads // 32
    busiest = -(-programs // chip.cores)
    tensor = sum(number * matrix_cycles(name, warps) for name, number in counted["instructions"].items())
    other = counted["issued"] * max(warps / 4, 1) + counted["stalls"]
    chain = _START + (max(tensor, other) if counted["overlapped"] else tensor + other)
    return {
        "memory": moved / chip.bandwidth,
        "l2": counted["bytes"] * threads * programs / _L2_BANDWIDTH,
        "tensor": busiest * tensor / chip.clock,
        "issue": busiest * counted["issued"] * warps / 4 / chip.clock,
        "latency": -(-busiest // active) * chain / chip.clock,
    }


def _compiled(case: gates.CompileCase, program: Any, target: str, folder: str) -> tuple[Any, Any]:
    """Return a program of a case as traced and as compiled."""
    # In a program of its own ptxas can be watched; jax names the toolkit it finds beside itself, unless an option does.
    options = {"xla_allow_excess_precision": False, "xla_gpu_cuda_data_dir": _toolkit(folder), "xla_gpu_enable_libnvptxcompiler": False}
    with compat.compiling_for(target), contextlib.ExitStack() as stack:
        if case.devices:
            jitted, arguments = program(_devices(case.devices))
        else:
            where, arguments = SingleDeviceSharding(_devices(1)[0]), case.arguments
            jitted = jax.jit(lambda *arguments: program(*arguments), in_shardings=where, out_shardings=where, donate_argnums=case.donate)
            stack.enter_context(jax.sharding.use_abstract_mesh(_abstract_mesh()))
        traced = jitted.trace(*arguments)
        return traced, traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options)


def moved_bytes(call: Any) -> float:
    """Return the bytes that a kernel's call moves by its cost estimate, or all of its operands and results."""
    cost, arrays = call.params["cost_estimate"], [x.aval for x in (*call.invars, *call.outvars)]
    return cost.bytes_accessed if cost else sum(x.size * x.dtype.itemsize for x in arrays)


def compile_case(case: gates.CompileCase, target: str, folder: str) -> dict[str, Any]:
    """Return the row of a case, compiled for one GPU."""
    traced, compiled = _compiled(case, case.program, target, folder)
    parts, reports = {}, {}
    for path in pathlib.Path(folder).glob("kept-*.ptx"):
        reports |= resources(path)
        parts |= {match[1]: match[2] for match in re.finditer(r"\.entry (\w+)\((.*?)\n}", path.read_text(encoding="utf-8"), re.DOTALL)}
    sequence = "\n".join(path.read_text(encoding="utf-8") for path in pathlib.Path(folder).glob("*thunk_sequence.txt"))
    launches = re.findall(r"(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+).*?shared_memory: (\d+)", sequence)
    kernels, moves, equations = [], [], list(gates.kernels_of(traced))
    names = {equation.params["name"] for equation in equations}
    for equation in equations:
        name, moved = equation.params["name"], moved_bytes(equation)
        moves.append(moved)
        if mosaic_gpu.is_kernel(equation):
            chip = CHIPS[target]
            rates = {"memory": chip.bandwidth, "l2": _L2_BANDWIDTH, "tensor": _MATRIX_RATE["e4m3"] * chip.clock * chip.cores}
            kernels.append(mosaic_gpu.record(equation, moved, folder, resources, rates, chip.cores))
            continue
        launch = next((launch for launch in launches if gates.called(launch[0], names) == name), None)
        if launch is None:
            continue  # an equal kernel was listed, or nothing uses it
        launches.remove(launch)
        grid, threads, shared = tuple(map(int, launch[1:4])), int(launch[4]), int(launch[5])
        counted, report = count(parts[launch[0]], equation.params["jaxpr"], case.turns.get(name)), reports[launch[0]]
        active = resident(math.prod(grid), threads, report["registers"], shared)
        times = bounds(counted, math.prod(grid), threads, active, moved)
        record = {"kernel": name, "grid": grid, "threads": threads, "programs": active, "memory": shared, "moved": moved}
        record |= {key: counted[key] for key in ("known", "issued", "instructions", "sequence")} | report
        kernels.append(record | {"times": times, "estimate": max(times.values())})
    others = {name: _compiled(case, program, target, folder) for name, program in gates.others_of(case).items()}
    others = {name: (sum(map(moved_bytes, gates.kernels_of(traced))), program) for name, (traced, program) in others.items()}
    return gates.row(case, CHIPS[target], compiled, kernels, moves, others)


if __name__ == "__main__":
    gates.serve(compile_case, sys.argv[1:])
