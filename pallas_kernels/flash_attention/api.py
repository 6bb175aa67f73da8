"""Flash attention: its implementations behind one signature."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import GRID, dispatch
from pallas_kernels.flash_attention import pallas_gpu, pallas_tpu, xla

_MODULES = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
IMPLEMENTATIONS = {name: module.flash_attention for name, module in _MODULES.items()}
PAGED_IMPLEMENTATIONS = {name: module.flash_attention_paged for name, module in _MODULES.items()}


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
    _check_heads(q, k)
    return dispatch.call("flash_attention", IMPLEMENTATIONS, implementation, q, k, v, start, stop, aligned=aligned)


def flash_attention_paged(
    q: Float[Array, "B T H K"],
    key_pages: Float[Array, "P page G K"],
    value_pages: Float[Array, "P page G V"],
    page_table: Int[Array, "B n"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    aligned: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B T H V"]:
    """Return `flash_attention` over the keys that a row's page table lists, GRID a page: key s is row s % GRID of its page s // GRID.

    The bits are those of `flash_attention` over the same keys laid out flat. Keys that no query of a row sees may be anything finite, and
    entries of the table that only hold such keys any number. Not differentiable. Raises ValueError for pages of another size.
    """
    _check_heads(q, key_pages)
    if key_pages.shape[1] != GRID or value_pages.shape[1] != GRID:
        raise ValueError(f"pages of {key_pages.shape[1]} keys and {value_pages.shape[1]} values do not hold {GRID}")
    arguments = (q, key_pages, value_pages, jnp.clip(page_table, 0, key_pages.shape[0] - 1), start, stop)
    return dispatch.call("flash_attention_paged", PAGED_IMPLEMENTATIONS, implementation, *arguments, aligned=aligned)


def _check_heads(q, k) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key-value heads do not divide {q.shape[2]} query heads")
