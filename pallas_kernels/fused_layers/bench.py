"""Times the fused layers beside their equations as XLA fuses them: `python -m pallas_kernels.fused_layers.bench [--quick]`.

"fp8" cases are layers in front of products, which leave their rows quantised, or rows and columns; the peer quantises behind its
equations. Their error is against the exact rows, so it is what FP8 costs.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, Target, main, native
from pallas_kernels.compat import platform
from pallas_kernels.fused_layers.api import IMPLEMENTATIONS
from pallas_kernels.fused_layers.cases import BENCH_CASES, FEEDING, Case, equations_of, is_rows, model_cases, moved_bytes
from pallas_kernels.scaled_matmul import Quantized, quantize
from pallas_kernels.scaled_matmul.reference import dequantize

PEER = "peer: its equations, by XLA"
TARGETS: dict[str, tuple[Target, ...]] = {kind: (Target(1.3, "floor", "1.3x of a copy"),) for kind in ("forward", "both")}


def smooth(case: Case, layer: Callable, dtypes: Any = None) -> Callable:
    """Return the layer without the results that have no gradient, the others cast as the layer casts them."""

    def run(*arguments):
        outs = jax.tree.leaves(layer(*arguments))[1 if case.op == "route" else 0 :]
        outs = outs if dtypes is None else [x.astype(dtype) for x, dtype in zip(outs, dtypes, strict=True)]
        return tuple(outs) if len(outs) > 1 else outs[0]

    return run


def ways() -> dict[str, dict[str, Any]]:
    """Return how our implementations are called, by their names."""
    aligned = {"xla aligned": {"implementation": "xla", "aligned": True}} if platform() == "cpu" else {}
    return {kernel: {"implementation": kernel} for kernel in native(IMPLEMENTATIONS)} | aligned


def num_rows(case: Case, dtype: DTypeLike) -> int:
    """Return the rows of a case."""
    return math.prod(next(x for x in case.structs(dtype) if x).shape[:-1])


def in_plain(name: str, case: Case, dtype: DTypeLike) -> Problem:
    """Return the problem of a layer and its gradient."""
    outs = jax.tree.leaves(jax.eval_shape(smooth(case, case.function(dtype, implementation="xla")), *case.structs(dtype)))
    return Problem(
        case=name,
        tokens=num_rows(case, dtype),
        inputs=lambda: tuple(case.inputs(dtype)),
        differentiable=case.differentiable,
        implementations={label: smooth(case, case.function(dtype, **how)) for label, how in ways().items()}
        | {PEER: smooth(case, case.truth, [x.dtype for x in outs])},
        truth=smooth(case, case.truth),
        flops=(0, 0),
        bytes=(moved_bytes(case, dtype, False), moved_bytes(case, dtype, True)),
        peer=PEER,
        targets={} if platform() == "cpu" else TARGETS,
    )


def in_fp8(name: str, case: Case, emit: tuple[str, ...], dtype: DTypeLike) -> Problem:
    """Return the problem of a layer whose rows are written in FP8 alone: as rows, or as rows and columns."""

    def emitted(*arguments, layer):
        *others, rows = jax.tree.leaves(layer(*arguments), is_leaf=is_rows)
        return [*others, rows.quantized, *([rows.columns] if "columns" in emit else [])]

    def quantised_after(*arguments):
        *others, rows = jax.tree.leaves(equations_of(case, dtype)(*arguments))
        return [*others, quantize(rows), *([quantize(rows, transpose=True)] if "columns" in emit else [])]

    def truth(*arguments):
        *others, rows = jax.tree.leaves(case.truth(*arguments))
        return [*others, rows, *([rows.T] if "columns" in emit else [])]

    return Problem(
        case=f"{name} fp8 {'+'.join(emit)}",
        tokens=num_rows(case, dtype),
        inputs=lambda: tuple(case.inputs(dtype)),
        differentiable=(),
        implementations={label: functools.partial(emitted, layer=case.function(dtype, emit=emit, **how)) for label, how in ways().items()}
        | {PEER: quantised_after},
        truth=truth,
        flops=(0, 0),
        bytes=(moved_bytes(case, dtype, False, emit=emit), 0),
        peer=PEER,
        targets={} if platform() == "cpu" else TARGETS,
        read=lambda outs: [dequantize(x) if isinstance(x, Quantized) else x for x in outs],
    )


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark: a kernel should take 1.3 times what its bytes take to copy."""
    on_gpu = {f"{model} {name}": case for model in ("mini", "flash") for name, case in model_cases(model, 8192).items()}
    for name, case in (BENCH_CASES if platform() == "cpu" else on_gpu).items():
        if quick and name not in ("norm", "swiglu"):
            continue
        yield in_plain(name, case, dtype)
        for emit in (("rows",), ("rows", "columns")) if case.op in FEEDING else ():
            yield in_fp8(name, case, emit, dtype)


if __name__ == "__main__":
    main("fused_layers", problems)
