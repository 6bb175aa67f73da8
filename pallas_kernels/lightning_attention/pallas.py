"""What the Pallas implementations share: whole chunks, and the gradient as passes of its own over the same inputs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compat import dot_operand
from pallas_kernels.lightning_attention import tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _lightning(q, k, v, log_decay, state, reset, last, chunk_size, forward, backward):
    del backward
    return forward(q, k, v, tile.weights(tile.decay_powers(log_decay, chunk_size), q.shape[-1]), state, reset, last)


def _forward(q, k, v, log_decay, state, reset, last, chunk_size, forward, backward):
    out = _lightning(q, k, v, log_decay, state, reset, last, chunk_size, forward, backward)
    return out, (q, k, v, log_decay, state, reset, last)


def _backward(chunk_size, forward, backward, residuals, gradients):
    del forward
    q, k, v, log_decay, state, reset, last = residuals
    d_out, d_state = gradients
    weights = tile.weights(tile.decay_powers(log_decay, chunk_size), q.shape[-1])
    dq, dk, dv, d_state = backward(q, k, v, d_out.astype(q.dtype), weights, state, d_state, reset, last)
    return dq, dk, dv, jnp.zeros_like(log_decay), d_state, None, None


_lightning.defvjp(_forward, _backward)


def lightning_attention(forward: Callable, backward: Callable, q, k, v, log_decay, *, state, reset, length, chunk_size, aligned):
    """See `api.lightning_attention`. A kernel's rows have the same bits in every mode, aligned or not.

    forward(q, k, v, weights, state, reset, last) returns the outputs and the state after `last` chunks, backward(q, k, v, d_out, weights,
    state, d_state, reset, last) the gradients of q, k, v and the state.
    """
    del aligned
    dtype = q.dtype
    q, k, v = dot_operand(q), dot_operand(k), dot_operand(v)  # on a CPU caches hold the operands as products take them
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all bfloat16 or all float32")
    batch, num_tokens, heads, size = q.shape
    num_chunks = -(-num_tokens // chunk_size)
    q, k, v = (jnp.pad(x, ((0, 0), (0, num_chunks * chunk_size - num_tokens), (0, 0), (0, 0))) for x in (q, k, v))
    state = jnp.zeros((batch, heads, size, v.shape[-1]), jnp.float32) if state is None else state
    reset = jnp.zeros((batch, num_chunks), jnp.int32) if reset is None else reset.astype(jnp.int32)
    length = jnp.full(batch, num_tokens, jnp.int32) if length is None else length
    result: Any = _lightning(q, k, v, log_decay, state, reset, length // chunk_size, chunk_size, forward, backward)
    return result[0][:, :num_tokens].astype(dtype), result[1]
