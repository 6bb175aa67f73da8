"""Times the fused layers beside their equations as XLA fuses them: `python -m pallas_kernels.fused_layers.bench [--quick]`."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, Target, main, native
from pallas_kernels.compat import platform
from pallas_kernels.fused_layers.api import IMPLEMENTATIONS
from pallas_kernels.fused_layers.cases import BENCH_CASES, Case, model_cases, moved_bytes

PEER = "peer: its equations, by XLA"


def smooth(case: Case, layer: Callable, dtypes: Any = None) -> Callable:
    """Return the layer without the results that have no gradient, the others cast as the layer casts them."""

    def run(*arguments):
        outs = jax.tree.leaves(layer(*arguments))[1 if case.op == "route" else 0 :]
        outs = outs if dtypes is None else [x.astype(dtype) for x, dtype in zip(outs, dtypes, strict=True)]
        return tuple(outs) if len(outs) > 1 else outs[0]

    return run


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark: a kernel should take 1.3 times what its bytes take to copy."""
    on_cpu = platform() == "cpu"
    chosen = BENCH_CASES if on_cpu else {f"{m} {name}": case for m in ("mini", "flash") for name, case in model_cases(m, 8192).items()}
    for name, case in chosen.items():
        if quick and name not in ("norm", "swiglu"):
            continue
        ways = {kernel: {"implementation": kernel} for kernel in native(IMPLEMENTATIONS)}
        ways |= {"xla aligned": {"implementation": "xla", "aligned": True}} if on_cpu else {}
        outs = jax.tree.leaves(jax.eval_shape(smooth(case, case.function(dtype, implementation="xla")), *case.structs(dtype)))
        first = next(x for x in case.structs(dtype) if x)
        yield Problem(
            case=name,
            tokens=math.prod(first.shape[:-1]),
            inputs=lambda case=case: tuple(case.inputs(dtype)),
            differentiable=case.differentiable,
            implementations={label: smooth(case, case.function(dtype, **how)) for label, how in ways.items()}
            | {PEER: smooth(case, case.truth, [x.dtype for x in outs])},
            truth=smooth(case, case.truth),
            flops=(0, 0),
            bytes=(moved_bytes(case, dtype, False), moved_bytes(case, dtype, True)),
            peer=PEER,
            targets={} if on_cpu else {"forward": (Target(1.3, "floor", "1.3x of a copy"),)},
        )


if __name__ == "__main__":
    main("fused_layers", problems)
