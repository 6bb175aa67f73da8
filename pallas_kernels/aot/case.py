"""What a compile gate compiles, what must hold of the result, and the loop of a worker that compiles."""

import importlib
import json
import math
import os
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

import pallas_kernels
from pallas_kernels.compat import equations

PLATFORMS = {"v5e": "tpu", "v5p": "tpu", "v6e": "tpu", "h200": "gpu"}
"""The targets, and whose compiler each needs."""
SET_WITH, OTHERS = "0.10.", 1.03
"""The jax whose compilers the cases' `floor_ratio`s were set with, and what those of others, which schedule otherwise, may add to them."""


class CompileCase(NamedTuple):
    """A program for some targets: one kernel, or as many as a whole model has.

    bytes and flops are what the op itself moves and computes; with the chip's rates they make the floor. The gates: it compiles, on a GPU
    nothing spills, `instruction` (a regular expression) is in the PTX, the estimate is at most `floor_ratio` times the floor (but see
    `OTHERS`), the program's peak memory at most `memory` bytes, its temporaries at most the part `temporaries` of its arguments (a copied
    cache or weight shows there), and what is donated is written in place. `devices`: for a slice of so many chips; then `program` is a
    function of these devices that returns the jitted program and its arguments, shapes with their shardings, and all that is counted is of
    one chip. `turns`: how often a kernel's loops turn, by its name, on average, where that is data. `unfused`: the same without kernels; of
    the bytes that it moves as the compiler fuses it, the program with kernels may move at most the part `fewer_bytes`. `products`: where
    that program has products, too, these alone: what they move does not count.
    """

    kernel: str
    shape: str
    targets: tuple[str, ...]
    program: Callable
    arguments: tuple[Any, ...]
    bytes: float
    flops: float
    donate: tuple[int, ...] = ()
    floor_ratio: float | None = None
    instruction: str | None = None
    memory: float | None = None
    temporaries: float | None = None
    devices: int | None = None
    turns: Mapping[str, int] = MappingProxyType({})
    unfused: Callable | None = None
    products: Callable | None = None
    fewer_bytes: float | None = None


class Chip(NamedTuple):
    """Rates of a chip: HBM bytes/s, bf16 FLOP/s, cycles/s, and how many cores (TensorCores, SMs) share them."""

    bandwidth: float
    flops: float
    clock: float
    cores: int


def op_modules() -> list[str]:
    """Return the modules that hold the kernels' cases."""
    ops = [module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg and module.name != "aot"]
    return [f"pallas_kernels.{op}.cases" for op in ops]


def collect(modules: Iterable[str]) -> list[CompileCase]:
    """Return the cases of all modules that have some."""
    found = [getattr(importlib.import_module(name), "compile_cases", tuple) for name in modules]
    return [case for cases in found for case in cases()]


def indices(cases: Sequence[CompileCase], target: str, kernel: str = "", quick: bool = False) -> list[int]:
    """Return which of the cases are for a target and of a kernel whose name starts so.

    With `quick` one of each kernel, that of the fewest bytes, and none of the programs that are compared with others (`unfused`).
    """
    found = [i for i, case in enumerate(cases) if target in case.targets and case.kernel.startswith(kernel)]
    if not quick:
        return found
    cheapest: dict[str, int] = {}
    for i in sorted((i for i in found if not cases[i].unfused), key=lambda i: cases[i].bytes):
        cheapest.setdefault(cases[i].kernel, i)
    return sorted(cheapest.values())


def failures(case: CompileCase, row: dict[str, Any]) -> list[str]:
    """Return the gates that a compiled case fails."""
    kernels, found = row["kernels"], []
    if "error" in row:
        return [row["error"]]
    if not kernels:
        found.append("no kernel in the program")
    found += [f"{k['kernel']} spills {k['spills']} bytes" for k in kernels if "registers" in k and k["spills"]]
    instructions = {name for k in kernels for name in k["instructions"]}
    if case.instruction and not any(re.search(case.instruction, name) for name in instructions):
        found.append(f"no {case.instruction} but {', '.join(sorted(instructions)) or 'no matrix instruction'}")
    most = case.floor_ratio and case.floor_ratio * (1.0 if row["jax"].startswith(SET_WITH) else OTHERS)
    if most and row["estimate"] > most * row["floor"]:
        found.append(f"estimate is {row['estimate'] / row['floor']:.2f} of the floor, over {most:.4g}")
    if case.memory and row["memory"] > case.memory:
        found.append(f"takes {row['memory'] / 2**20:.0f} MiB, over {case.memory / 2**20:.0f}")
    sizes = row["sizes"]
    if case.temporaries is not None and sizes["temp"] > case.temporaries * sizes["argument"]:
        found.append(f"has {sizes['temp'] / 2**20:.0f} MiB of temporaries, {sizes['temp'] / sizes['argument']:.3f} of its arguments")
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves([case.arguments[at] for at in case.donate]))
    if sizes["alias"] < donated:
        found.append(f"copies {donated - sizes['alias']} bytes of what it could write in place")
    if case.fewer_bytes and row["moved"] > case.fewer_bytes * row["unfused"]:
        found.append(f"moves {row['moved'] / row['unfused']:.2f} of what the compiler's own fusions move, over {case.fewer_bytes:.2f}")
    return found


_ELEMENT_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_NO_MOVES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done", "after-all")


_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)")
_SLICES = ("slice", "dynamic-slice")


def hlo_bytes(text: str) -> int:
    """Return the bytes that a compiled program's operations move, but for its kernels: each operand and result of an operation once.

    Of an operand that a fusion only slices, the slices count. What a TPU's compiler keeps in VMEM between operations (memory space 1)
    counts at neither end; loops' bodies do not count.
    """
    total, sliced = 0, _sliced(text)
    sizes: dict[Any, int] = {}
    for line in text[text.index("\nENTRY") :].splitlines():
        match = _OPERATION.match(line)
        if not match:
            continue
        name, shape, operation, operands = match.groups()
        sizes[name] = _bytes(shape)
        is_kernel = operation == "custom-call" and re.search(
            r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|mosaic_gpu\w*)"', line
        )
        if operation in _NO_MOVES or is_kernel:
            continue
        called = re.search(r"calls=%?([\w.\-]+)", line)
        read: dict[int, int] = {0: sizes[name]} if operation in _SLICES else sliced.get(called[1], {}) if called else {}
        total += sizes[name] + sum(read.get(at, sizes.get(x, 0)) for at, x in enumerate(re.findall(r"%([\w.\-]+)", operands)))
    return total


def _sliced(text: str) -> dict[str, dict[int, int]]:
    """Return, for each computation of a program, its parameters that are only sliced, and the bytes of the slices."""
    found: dict[str, dict[int, int]] = {}
    for title, body in re.findall(r"^%?([\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE):
        operations = [match.groups() for line in body.splitlines() if (match := _OPERATION.match(line))]
        found[title] = {}
        for name, shape, operation, number in operations:
            uses = [(kind, _bytes(out)) for _, out, kind, given in operations if name in re.findall(r"%([\w.\-]+)", given)]
            if operation == "parameter" and uses and all(kind in _SLICES for kind, _ in uses):
                found[title][int(number)] = min(sum(size for _, size in uses), _bytes(shape))
    return found


def _bytes(shape: str) -> int:
    """The bytes of an array or of a tuple of arrays, as an HLO text has its shape."""
    return sum(map(_array_bytes, re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape)))


def _array_bytes(array: tuple[str, str, str]) -> int:
    kind, dimensions, layout = array
    if "S(1)" in layout or kind == "token":
        return 0
    bits = _ELEMENT_BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
    return math.prod(map(int, dimensions.split(","))) * bits // 8 if dimensions else bits // 8


def row(
    case: CompileCase,
    chip: Chip,
    compiled: Any,
    kernels: list[dict[str, Any]],
    moves: Sequence[float],
    others: Mapping[str, tuple[float, Any]],
) -> dict[str, Any]:
    """Return the record of a compiled case. Its estimate is the sum of its kernels' calls (one in a loop is counted once).

    moves: bytes of every call of a kernel, to which those of the program's other operations are added. others: of the case's `unfused` and
    `products`, what their kernels move, and the compiled program.
    """
    memory = compiled.memory_analysis()
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    others = {"moved": (sum(moves), compiled), **others} if others else {}
    compared = {name: by_kernels + hlo_bytes(program.as_text()) for name, (by_kernels, program) in others.items()}
    if "products" in compared:
        compared["moved"] -= compared.pop("products")
    return compared | {
        "kernels": kernels,
        "estimate": sum(k["estimate"] for k in kernels),
        "floor": max(case.bytes / chip.bandwidth, case.flops / chip.flops),
        "memory": sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"],
        "sizes": sizes,
    }


def kernels_of(traced: Any) -> Iterator[Any]:
    """Yield the equations of a traced program that call a kernel; Mosaic GPU's are an `mpmd_map`."""
    return (equation for equation in equations(traced.jaxpr) if equation.primitive.name in ("pallas_call", "mpmd_map"))


def others_of(case: CompileCase) -> dict[str, Callable]:
    """Return the programs that a case's is compared with."""
    return {name: program for name in ("unfused", "products") if (program := getattr(case, name))}


def serve(compile_case: Callable[[CompileCase, str, str], dict[str, Any]], arguments: Sequence[str]) -> None:
    """Answer each index of a case on stdin with its row, a line of JSON on stdout. `arguments`: target, folder of dumps, modules."""
    target, folder, *modules = arguments
    cases = collect(modules)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compilers print must not stand between the answers
    for index in map(int, sys.stdin):
        start = time.monotonic()
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
        try:
            result = compile_case(cases[index], target, folder)
        except Exception as error:  # whatever the compiler throws is the row's result
            result = {"kernels": [], "error": _first_line(error)}
        print(json.dumps(result | {"jax": jax.__version__, "seconds": time.monotonic() - start}), file=answers, flush=True)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:400]


def called(compiled: str, names: Iterable[str]) -> str | None:
    """Return which of a program's `pallas_call`s a compiled kernel is: by name, perhaps with transformations around and a number behind.

    The longest name that fits: `grouped_matmul_forward` is no `matmul_forward` that was transformed.
    """
    is_named = lambda name: re.fullmatch(r"(\w*_)?" + re.sub(r"\W", "_", name) + r"_*([._]\d+)?", compiled)
    return max(filter(is_named, names), key=len, default=None)


def loop_weights(length: int, loops: Iterable[tuple[int, int]], kernel: Any, turns: int | None = None) -> tuple[list[int], bool]:
    """Return how often each of the lines of a listing runs, and whether that is known.

    Loops are (first, last) lines; the n-th to start is the n-th loop of the kernel's jaxpr, whose length is known if it is a scan; others
    take `turns`. A compiler that unrolled or merged loops leaves another number of them: then each counts once, and the answer is a lower
    bound.
    """
    lengths: list[Any] = [e.params.get("length", turns) for e in equations(kernel) if e.primitive.name in ("scan", "while")]
    loops, weights = sorted(set(loops)), [1] * length
    known = not loops or (len(loops) == len(lengths) and None not in lengths)
    for (first, last), times in zip(loops, lengths, strict=False) if known else ():
        weights[first : last + 1] = [w * times for w in weights[first : last + 1]]
    return weights, known
