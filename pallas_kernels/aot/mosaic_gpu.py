"""What the worker for GPUs says of a Mosaic GPU kernel: it dumps its own PTX; its copies and products stand in its jaxpr, with their loops.

The estimate is the largest of three bounds: of HBM, of L2 (a tile that TMA brings to several programs of a cluster counts once) and of the
matrix units. Instructions of the warps are not in it: those of one warpgroup hide behind the other's products.
"""

import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels import compat

WARPGROUP = 128
"""Threads of what Mosaic GPU calls a thread."""


def is_kernel(equation: Any) -> bool:
    """Return whether an equation calls a Mosaic GPU kernel."""
    return equation.primitive.name == "mpmd_map"


def operations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield the equations of a kernel that contain no others, and how often they run."""
    for equation in compat.open_jaxpr(jaxpr)[0].eqns:
        inner = [x for x in jax.tree.leaves(list(equation.params.values()), is_leaf=compat.is_jaxpr) if compat.is_jaxpr(x)]
        for body in inner:
            yield from operations(body, times * equation.params.get("length", 1))
        if not inner:
            yield equation, times


def record(
    equation: Any, moved: float, folder: str, resources: Callable[[pathlib.Path], Any], rates: Mapping[str, float], cores: int
) -> dict[str, Any]:
    """Return the record of a kernel that moves so many bytes.

    rates: per second, bytes of HBM and L2 ("memory", "l2") and multiply-adds of all `cores` SMs ("tensor"). resources: see `gpu.resources`.
    """
    mesh, jaxpr, name = equation.params["meshes"][0], equation.params["jaxprs"][0], equation.params["name"]
    ptx = max(pathlib.Path(folder).glob(f"{name}_*.ptx"), key=lambda path: path.stat().st_mtime_ns)
    listing = ptx.read_text(encoding="utf-8")
    matrix = re.findall(r"wgmma\.mma_async[\w.]*", listing)
    dumps = (path.read_text(encoding="utf-8") for path in sorted(ptx.parent.glob(f"{name}_*")) if path.suffix in (".txt", ".log"))
    shared = next(match for text in dumps if (match := re.search(r"dynamic_shared_memory_size %c(\d+)_i32", text)))
    grid, cluster = math.prod(mesh.grid), dict(zip(mesh.cluster_names, mesh.cluster, strict=True))
    programs, size = grid * math.prod(mesh.cluster), lambda x: math.prod(x.shape) * x.dtype.itemsize
    within = list(operations(jaxpr))
    copies = [(each, times) for each, times in within if each.primitive.name == "copy_gmem_to_smem"]
    turns = [times for each, times in within if each.primitive.name == "wgmma_ref"]
    shared_by = lambda each: math.prod(cluster[axis] for axis in each.params["collective_axes"] or ())
    in_flight = lambda each: each.invars[1].aval.shape[0]
    copied = sum(times * size(each.invars[1].aval) / in_flight(each) / shared_by(each) for each, times in copies)
    # All but one warpgroup multiply; the listing has each product's instructions once.
    terms = sum(math.prod(map(int, re.findall(r"m(\d+)n(\d+)k(\d+)", name)[0])) for name in matrix) / len(turns)
    products = terms * sum(turns) * (mesh.num_threads - 1)
    waves = math.ceil(grid / (cores // math.prod(mesh.cluster)))  # a program takes an SM, a cluster as many as it has programs
    times = {
        "memory": moved / rates["memory"],
        "l2": (programs * copied + sum(size(x.aval) for x in equation.outvars)) / rates["l2"],
        "tensor": waves * cores * products / rates["tensor"],
    }
    return {
        "kernel": name,
        "grid": (*mesh.grid, *mesh.cluster),
        "threads": WARPGROUP * mesh.num_threads,
        "programs": 1,
        "memory": int(shared[1]),
        "moved": moved,
        "known": True,
        "issued": len(re.findall(r"^\s+(?:@!?%p\d+ )?[a-z][\w.:]*\s.*;$", listing, re.MULTILINE)),
        "instructions": {kind: matrix.count(kind) for kind in sorted(set(matrix))},
        "sequence": [],
        **resources(ptx)[f"{name}_mosaic_gpu_kernel"],
        "times": times,
        "estimate": max(times.values()),
    }
