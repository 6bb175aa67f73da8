"""Times the fused LM head beside the unfused one: `python -m pallas_kernels.cross_entropy.bench [--json FILE] [--quick]`."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, Target, main, native
from pallas_kernels.compat import platform
from pallas_kernels.cross_entropy import head_logits, reference, token_logprobs
from pallas_kernels.cross_entropy.api import IMPLEMENTATIONS
from pallas_kernels.cross_entropy.cases import BENCH_CASES, BENCH_GPU_CASES, Case, inputs

UNFUSED, TORCH = "peer: log_softmax(h @ w)", "peer: torch cross_entropy(h @ w)"
UNFUSED_LOGITS = "peer: h @ w, logsumexp"
TARGETS = {"forward": (Target(1.0, TORCH), Target(1.5, "floor")), "both": (Target(1.0, TORCH),)}
"""On a GPU: not slower than by way of all logits, which the gradient would not have to compute again."""


def unfused(hidden, w, targets):
    """Return the log-probabilities by way of all logits."""
    logits = jnp.dot(hidden, w, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]


def torch_cross_entropy(hidden, w, targets):
    """Return the log-probabilities by torch's cross entropy on all logits, in the operands' dtype."""
    import torch  # pyright: ignore[reportMissingImports]

    return -torch.nn.functional.cross_entropy(hidden @ w, targets.long(), reduction="none")


def op(hidden, w, targets, **how):
    """Return the op's log-probabilities."""
    return token_logprobs(hidden, w, targets, **how)[0]


def rows(name: str, case: Case, dtype: DTypeLike) -> Problem:
    """Return the problem of scoring rows; the backward's FLOPs do not count the logits that the fused form computes again."""
    product, on_cpu = 2 * case.N * case.D * case.vocab, platform() == "cpu"
    moved = jnp.dtype(dtype).itemsize * (case.N + case.vocab) * case.D
    implementations: dict[str, Any] = {x: functools.partial(op, implementation=x) for x in native(IMPLEMENTATIONS)}
    if on_cpu:  # elsewhere the aligned form is the kernel
        implementations["xla aligned"] = functools.partial(op, aligned=True)
    return Problem(
        case=name,
        tokens=case.N,
        inputs=functools.partial(inputs, case, dtype),
        differentiable=(0, 1) if case.N > 64 else (),
        implementations=implementations | {UNFUSED: unfused},
        truth=lambda *arguments: reference.token_logprobs(*arguments)[0],
        flops=(product, 2 * product),
        bytes=(moved, 2 * moved),
        torch={} if on_cpu else {TORCH: torch_cross_entropy},
        peer=UNFUSED,
        targets=TARGETS if platform() == "gpu" and case.N > 64 else {},
    )


def all_logits(name: str, case: Case, dtype: DTypeLike) -> Problem:
    """Return the problem of all logits of few rows, as sampling wants them."""
    product = lambda hidden, w: jnp.dot(hidden, w, preferred_element_type=jnp.float32)
    whole: Any = lambda x: (x, jax.nn.logsumexp(x, axis=-1))
    implementations: dict[str, Any] = {x: functools.partial(head_logits, implementation=x) for x in native(IMPLEMENTATIONS)}
    return Problem(
        case=f"logits, {name}",
        tokens=case.N,
        inputs=lambda: inputs(case, dtype)[:2],
        differentiable=(),
        implementations=implementations | {UNFUSED_LOGITS: lambda hidden, w: whole(product(hidden, w))},
        truth=lambda hidden, w: whole(jnp.dot(hidden, w, precision="highest")),
        flops=(2 * case.N * case.D * case.vocab, 0),
        bytes=(jnp.dtype(dtype).itemsize * (case.N + case.vocab) * case.D + 4 * case.N * case.vocab, 0),
        peer=UNFUSED_LOGITS,
        targets={"forward": (Target(1.3, "floor"),)} if platform() == "gpu" else {},
    )


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark."""
    for name, case in (BENCH_CASES if platform() == "cpu" else BENCH_GPU_CASES).items():
        if quick:
            name, case = f"{name} (256 rows)", case._replace(N=min(case.N, 256))
        yield rows(name, case, dtype)
        if case.N <= 64:
            yield all_logits(name, case, dtype)


if __name__ == "__main__":
    main("cross_entropy", problems)
