"""Times flash attention beside `jax.nn`: `python -m pallas_kernels.flash_attention.bench [--json FILE] [--quick]`."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, main
from pallas_kernels.flash_attention import flash_attention, reference
from pallas_kernels.flash_attention.cases import BENCH_CASES, inputs


def dot_product_attention(q, k, v, start, stop):
    """Return causal attention by jax.nn; the bounds of the benchmark are causal."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


IMPLEMENTATIONS = {
    "xla": flash_attention,
    "xla aligned": functools.partial(flash_attention, aligned=True),
    "peer: jax.nn": dot_product_attention,
}


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark; the FLOPs are those of the causal half of the scores."""
    for name, case in BENCH_CASES.items():
        if quick and case.T > 1024:
            continue
        scores, size = case.B * case.H * case.T * (case.T + 1) / 2, case.K + (case.V or case.K)
        moved = jnp.dtype(dtype).itemsize * case.B * case.T * (case.H + case.G) * size
        yield Problem(
            case=name,
            tokens=case.B * case.T,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1, 2),
            implementations=IMPLEMENTATIONS,
            truth=reference.flash_attention,
            flops=(2 * scores * size, 5 * scores * size),
            bytes=(moved, 2 * moved),
            peer="peer: jax.nn",
        )


if __name__ == "__main__":
    main("flash_attention", problems)
