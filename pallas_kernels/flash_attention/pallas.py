"""What the Pallas implementations share: keys as pages of one block, and the gradient as two passes over the same inputs.

A kernel finds the keys of a block by a page's number: in a page table, or by counting where the keys of a row lie one after another.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dot_operand
from pallas_kernels.flash_attention import tile
from pallas_kernels.flash_attention.tile import KEY_BLOCK


def _pages(x: jax.Array) -> jax.Array:
    """[B, S, G, K] -> [B * blocks, KEY_BLOCK, G, K]: a view, unless the last block is not whole."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % KEY_BLOCK), (0, 0), (0, 0)))
    return x.reshape(-1, KEY_BLOCK, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash(q, k, v, start, stop, aligned, forward, backward):
    return _forward(q, k, v, start, stop, aligned, forward, backward)[0]


def _forward(q, k, v, start, stop, aligned, forward, backward):
    del backward
    out, log_total = forward(q, _pages(k), _pages(v), None, start, stop, aligned)
    return out, (q, k, v, start, stop, out, log_total)


def _backward(aligned, forward, backward, residuals, d_out):
    del aligned, forward
    q, k, v, start, stop, out, log_total = residuals
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [B, T, H]
    dq, *d_pages = backward(q, _pages(k), _pages(v), start, stop, d_out.astype(q.dtype), log_total, delta)
    dk, dv = (x.reshape(k.shape[0], -1, *x.shape[2:])[:, : k.shape[1]] for x in d_pages)
    return dq, dk, dv, None, None


_flash.defvjp(_forward, _backward)


def _operands(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays as products take them; on a CPU caches hold them so."""
    arrays = tuple(map(dot_operand, arrays))
    dtypes = [x.dtype for x in arrays]
    if len(set(dtypes)) > 1 or dtypes[0] not in ("bfloat16", "float32"):
        raise NotImplementedError(f"q, k and v are {', '.join(map(str, dtypes))}, not all bfloat16 or all float32")
    return list(arrays)


def query_ranges(start: jax.Array, stop: jax.Array, positions: int, num_blocks: int, size: int = KEY_BLOCK):
    """Return the first and one past the last tile of so many positions that see a block of keys, [B, blocks]; bounds are [B, T]."""
    tiled = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % positions))).reshape(x.shape[0], -1, positions) for x in (start, stop))
    first, last = (x[..., None] for x in tile.block_range(*tiled, size=size))  # [B, tiles, 1]
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    touches, index = (first <= block) & (block < last), jnp.arange(first.shape[1], dtype=jnp.int32)[:, None]
    return jnp.where(touches, index, first.shape[1]).min(1), jnp.where(touches, index + 1, 0).max(1)


def flash_attention(forward: Callable, backward: Callable, q, k, v, start, stop, *, aligned):
    """See `api.flash_attention`.

    forward(q, key_pages, value_pages, page_table, start, stop, aligned) returns the outputs and the log-sum-exps, as backward(q, key_pages,
    value_pages, start, stop, d_out, log_total, delta) takes them, which returns the gradients of q and the pages. Without a table the
    pages of a row lie one after another.
    """
    out: Any = _flash(*_operands(q, k, v), start.astype(jnp.int32), stop.astype(jnp.int32), aligned, forward, backward)
    return out.astype(q.dtype)


def flash_attention_paged(forward: Callable, q, key_pages, value_pages, page_table, start, stop, *, aligned):
    """See `api.flash_attention_paged`; `forward` is that of `flash_attention`."""
    out, _ = forward(*_operands(q, key_pages, value_pages), page_table, start.astype(jnp.int32), stop.astype(jnp.int32), aligned)
    return out.astype(q.dtype)
