"""Flash attention: its implementations behind one signature."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import xla

IMPLEMENTATIONS = {"xla": xla.flash_attention}


def flash_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    aligned: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B T H V"]:
    """Return softmax attention, scale K**-0.5, of each query over the keys start <= s < stop; zeros where there are none.

    Causal attention over a packed row has start = first index of the token's segment and stop = its own index + 1; over a cache,
    start = 0 and stop = position + 1. Query head h reads key head h // (H / G). Key blocks have one size and one order, so with
    `aligned` a query's bits are the same in training, prefill and decode. Differentiable in q, k and v. Raises ValueError if G does
    not divide H.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key-value heads do not divide {q.shape[2]} query heads")
    return dispatch.call("flash_attention", IMPLEMENTATIONS, implementation, q, k, v, start, stop, aligned=aligned)
