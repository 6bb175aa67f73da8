"""Times Lightning attention beside the recurrence: `python -m pallas_kernels.lightning_attention.bench [--json FILE] [--quick]`.

When torch and fla are importable, fla's naive chunked form (its plain torch code, forward only) runs beside them.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, main
from pallas_kernels.lightning_attention import lightning_attention, reference
from pallas_kernels.lightning_attention.cases import BENCH_CASES, Case, inputs

BLOCK = 128
"""Tokens between the recurrence's stored states: its gradient recomputes the others, which would not fit into memory."""


def recurrence(q, k, v, log_decay):
    """Return the reference's outputs; T is a multiple of BLOCK."""
    state = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), jnp.promote_types(q.dtype, jnp.float32))
    blocks = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]), 1, 0)
    step = jax.checkpoint(lambda state, block: reference.lightning_attention(block[0], block[1], block[2], log_decay, state)[::-1])
    _, out = lax.scan(step, state, (blocks(q), blocks(k), blocks(v)))
    return jnp.moveaxis(out, 0, 1).reshape(v.shape)


def fla_naive(chunk_size: int) -> dict[str, Callable]:
    """Return fla's naive chunked form as a function of our arguments, if torch and fla are importable."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}

    def run(q, k, v, log_decay):
        g = np.broadcast_to(np.asarray(log_decay), q.shape[:3])
        q, k, v, g = (torch.from_numpy(np.array(x, np.float32)) for x in (q, k, v, g))
        return naive_chunk_simple_gla(q, k, v, g, chunk_size=chunk_size)[0].numpy()

    return {"peer: fla naive (torch)": run}


def op(q, k, v, log_decay, case: Case, aligned: bool):
    """Return the op's outputs without its state."""
    return lightning_attention(q, k, v, log_decay, chunk_size=case.C, aligned=aligned)[0]


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark; the FLOPs are those of the chunked form."""
    for name, case in BENCH_CASES.items():
        if quick and case.T > 1024:
            continue
        per_head = case.B * case.T * case.H
        flops = 2 * case.C * (case.K + case.V) + 4 * case.K * case.V
        moved = jnp.dtype(dtype).itemsize * per_head * 2 * (case.K + case.V)
        yield Problem(
            case=name,
            inputs=lambda seed, case=case: inputs(case, dtype, seed)[:4],
            differentiable=(0, 1, 2),
            implementations={
                "xla": functools.partial(op, case=case, aligned=False),
                "xla aligned": functools.partial(op, case=case, aligned=True),
                "peer: fp32 recurrence": recurrence,
            },
            truth=recurrence,
            flops=(per_head * flops, per_head * 2.5 * flops),
            bytes=(moved, 2 * moved),
            host=fla_naive(case.C),
        )


if __name__ == "__main__":
    main("lightning_attention", problems)
