"""LM head and cross entropy: their implementations behind one signature."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cross_entropy import pallas_gpu, pallas_tpu, xla

_MODULES = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
IMPLEMENTATIONS = {name: module.token_logprobs for name, module in _MODULES.items()}
LOGITS_IMPLEMENTATIONS = {name: module.head_logits for name, module in _MODULES.items()}


def token_logprobs(
    hidden: Float[Array, "N D"],
    w: Float[Array, "D vocab"],
    targets: Int[Array, " N"],
    *,
    aligned: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Return the log-probability of each row's target and the log-sum-exp of its logits, fp32.

    Logits exist for one tile of rows and one piece of the vocabulary at a time, in the gradient too. Differentiable in hidden and w.
    """
    return dispatch.call("cross_entropy", IMPLEMENTATIONS, implementation, hidden, w, targets, aligned=aligned)


def head_logits(
    hidden: Float[Array, "N D"], w: Float[Array, "D vocab"], *, aligned: bool = False, implementation: str = "auto"
) -> tuple[Float[Array, "N vocab"], Float[Array, " N"]]:
    """Return the fp32 logits and their log-sum-exp, for the few rows that are sampled from.

    logits[n, t] - log_sum_exp[n] has, with `aligned`, the bits that `token_logprobs` gives for target t.
    """
    return dispatch.call("head_logits", LOGITS_IMPLEMENTATIONS, implementation, hidden, w, aligned=aligned)
