"""Times the fused LM head beside the unfused one: `python -m pallas_kernels.cross_entropy.bench [--json FILE] [--quick]`."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.benchmark import Problem, main
from pallas_kernels.cross_entropy import reference, token_logprobs
from pallas_kernels.cross_entropy.cases import BENCH_CASES, inputs


def unfused(hidden, w, targets):
    """Return the log-probabilities by way of all logits."""
    logits = jnp.dot(hidden, w, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]


IMPLEMENTATIONS = {
    "xla": lambda hidden, w, targets: token_logprobs(hidden, w, targets)[0],
    "xla aligned": lambda hidden, w, targets: token_logprobs(hidden, w, targets, aligned=True)[0],
    "peer: log_softmax(h @ w)": unfused,
}


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark; the backward's FLOPs do not count the logits that the fused form computes again."""
    for name, case in BENCH_CASES.items():
        if quick:
            name, case = f"{name} (256 rows)", case._replace(N=256)
        product = 2 * case.N * case.D * case.vocab
        moved = jnp.dtype(dtype).itemsize * (case.N + case.vocab) * case.D
        yield Problem(
            case=name,
            tokens=case.N,
            inputs=functools.partial(inputs, case, dtype),
            differentiable=(0, 1),
            implementations=IMPLEMENTATIONS,
            truth=lambda *arguments: reference.token_logprobs(*arguments)[0],
            flops=(product, 2 * product),
            bytes=(moved, 2 * moved),
            peer="peer: log_softmax(h @ w)",
        )


if __name__ == "__main__":
    main("cross_entropy", problems)
