"""Worker of the compile gates for TPUs: libtpu compiles for a described slice and dumps its schedule, of which one bundle is one cycle.

The estimate of a kernel is the larger of its cycles (grid steps of one core times the bundles of a step, branches included) and the time
its blocks take from and to HBM.
"""

import functools
import math
import os
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import compat
from pallas_kernels.aot import case as gates

CHIPS = {
    "v5e": gates.Chip(bandwidth=8.2e11, flops=1.97e14, clock=1.5e9, cores=1),
    "v5p": gates.Chip(bandwidth=2.46e12, flops=4.59e14, clock=1.75e9, cores=2),
    "v6e": gates.Chip(bandwidth=1.64e12, flops=9.18e14, clock=1.75e9, cores=1),
}
_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}
"""Of the torus of a slice."""


@functools.cache
def _devices(target: str, number: int) -> Any:
    """Return the chips of the most compact slice that has as many (a power of two)."""
    sides = [1] * _DIMENSIONS[target]
    while math.prod(sides) < max(number, 4):  # the smallest that is described
        at = sides.index(min(sides))
        sides[at] *= 2
    name = f"{target}:{'x'.join(map(str, sorted(sides, reverse=_DIMENSIONS[target] == 3 and math.prod(sides) == 4)))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:number]


def moved_bytes(grid: tuple[int, ...], mapping: Any) -> int:
    """Return the bytes that blocks carry between HBM and VMEM: a block is fetched or written when its index changes."""
    total = 0
    for block in mapping.block_mappings:
        if str(getattr(block.block_aval, "memory_space", None)) in ("any", "hbm", "smem"):
            continue
        index_map, _ = compat.open_jaxpr(block.index_map_jaxpr)
        axes = {axis for axis, var in enumerate(index_map.invars[: len(grid)]) if grid[axis] > 1 and _reaches(index_map, var)}
        times = math.prod(grid[: max(axes) + 1]) if axes else 1
        sizes = [getattr(size, "block_size", 1) for size in block.block_shape]
        sizes = [min(size, most) for size, most in zip(sizes, block.array_aval.shape, strict=True)]  # what hangs over does not move
        total += times * math.prod(sizes) * block.array_aval.dtype.itemsize
    return total


def _reaches(jaxpr: Any, variable: Any) -> bool:
    """Return whether an output of the jaxpr depends on the variable."""
    reached = {variable}
    for equation in jaxpr.eqns:
        if any(x in reached for x in equation.invars if not isinstance(x, compat.Literal)):
            reached |= set(equation.outvars)
    return any(x in reached for x in jaxpr.outvars if not isinstance(x, compat.Literal))


def _listing(folder: str, suffix: str) -> dict[str, str]:
    """Return the dumped text of each kernel of the compiled program."""
    found = {}
    for name in sorted(os.listdir(folder)):
        match = re.fullmatch(r"\d+-(.*)-\d+-" + re.escape(suffix), name)
        if match and "schedule-analysis" not in name:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                found[match[1]] = file.read()
    return found


def schedule(text: str, utilization: str, kernel: Any, steps: int) -> dict[str, Any]:
    """Return cycles of a grid step, the share of empty bundles, matrix instructions and bytes spilled, from a kernel's dump."""
    bundles: list[str] = []
    for line in text.splitlines():
        if re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    loops = [(int(to), at) for at, line in enumerate(bundles) for to in re.findall(r"sbr\.rel [^;]*target bundleno = (\d+)", line)]
    loops = [(to, at) for to, at in loops if to <= at]
    grid_loop = max(loops, key=lambda loop: loop[1] - loop[0]) if loops and steps > 1 else (0, len(bundles) - 1)
    first, last = grid_loop[0], min(grid_loop[1] + 4, len(bundles) - 1)  # a branch has four delay slots
    inner = [(to - first, at - first) for to, at in loops if (to, at) != grid_loop and first <= to and at <= last]
    weights, known = gates.loop_weights(last - first + 1, inner, kernel)
    units = [[int(n) for n in line.split()] for line in utilization.splitlines() if re.fullmatch(r"\s*\d+( \d+)+\s*", line)]
    units = units[1:][first : last + 1]  # the first row holds the units' capacities
    cycles = sum(weights)
    names = [re.sub(r"\.(vlgmr|gmra|msr|mxu|mrb|gsf).*", "", n) for n in re.findall(r"vmatmul[.\w]*", " ".join(bundles[first : last + 1]))]
    return {
        "cycles": cycles,
        "known": known,
        "empty": sum(w for w, used in zip(weights, units, strict=False) if not any(used)) / cycles,
        "instructions": {name: names.count(name) for name in sorted(set(names))},
        "spills": 4096 * sum(used[8] for used in units if len(used) > 8),
    }


def _on_one_chip(case: gates.CompileCase, program: Any, target: str) -> tuple[Any, Any]:
    """Return a program of one chip, jitted, and its arguments. Traced inside `shard_map`, so that Pallas sees the topology's device."""
    mesh = Mesh(np.array(_devices(target, 1)), ("chip",))
    program = jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())), case.arguments)
    return jax.jit(program, donate_argnums=case.donate), arguments


def _compiled(case: gates.CompileCase, program: Any, target: str) -> tuple[Any, Any]:
    """Return a program of a case as traced and as compiled."""
    with compat.compiling_for(target):
        jitted, arguments = program(_devices(target, case.devices)) if case.devices else _on_one_chip(case, program, target)
        traced = jitted.trace(*arguments)
        return traced, traced.lower().compile(compiler_options=compat.compiler_options(True))


def compile_case(case: gates.CompileCase, target: str, folder: str) -> dict[str, Any]:
    """Return the row of a case, compiled for one chip."""
    chip = CHIPS[target]
    traced, compiled = _compiled(case, case.program, target)
    bundles, units = (_listing(folder, name) for name in ("packed-bundles-post-ra.txt", "pre-delay_hlo-static-per-bundle-utilization.txt"))
    vmem = dict(
        re.findall(
            r'%([\w.\-]+) = [^\n]*"tpu_custom_call"[^\n]*"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', compiled.as_text() or ""
        )
    )
    kernels, moves, listed = [], [], {}
    equations = list(gates.kernels_of(traced))
    names = {equation.params["name"] for equation in equations}
    for equation in equations:
        name, mapping, semantics = (equation.params[key] for key in ("name", "grid_mapping", "compiler_params"))
        grid, semantics = tuple(mapping.grid), getattr(semantics, "dimension_semantics", None) or ()
        moved = moved_bytes(grid, mapping)
        moves.append(moved)
        like = name, grid, tuple(str(x.aval) for x in (*equation.invars, *equation.outvars))
        hlo = next((n for n in bundles if gates.called(n, names) == name), None)
        if hlo is None:  # an equal kernel was listed, or nothing uses it
            kernels += [listed[like]] if like in listed else []
            continue
        steps, parallel = math.prod(grid), math.prod(n for n, kind in zip(grid, semantics, strict=False) if "parallel" in str(kind).lower())
        record = schedule(bundles.pop(hlo), units.get(hlo, ""), equation.params["jaxpr"], steps)
        core_steps = math.ceil(parallel / chip.cores) * steps // parallel
        times = {"compute": core_steps * record["cycles"] / chip.clock, "memory": moved / chip.bandwidth}
        record |= {
            "kernel": name,
            "grid": grid,
            "memory": int(vmem.get(hlo, 0)),
            "moved": moved,
            "times": times,
            "estimate": max(times.values()),
        }
        kernels.append(record)
        listed[like] = record
    others = {name: _compiled(case, program, target) for name, program in gates.others_of(case).items()}
    moved_by = lambda call: moved_bytes(tuple(call.params["grid_mapping"].grid), call.params["grid_mapping"])
    others = {name: (sum(map(moved_by, gates.kernels_of(traced))), program) for name, (traced, program) in others.items()}
    return gates.row(case, chip, compiled, kernels, moves, others)


if __name__ == "__main__":
    gates.serve(compile_case, sys.argv[1:])
