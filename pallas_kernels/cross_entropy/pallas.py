"""What the Pallas implementations share: a gradient that goes over the vocabulary in pieces, its products by the platform's library."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import dot_general, dot_operand

_MOST_COLUMNS, _MOST_LOGITS = 1 << 14, 1 << 28
"""Of a piece in the gradient: few columns would make much of adding to the gradient of hidden, many logits take memory."""
_COLUMNS = 2048
"""What a piece is a multiple of: with 15872 columns a TPU's compiler looks for tiles of the products with it for minutes."""


class Kernels(NamedTuple):
    """A backend's kernels.

    logprobs(hidden, w, targets) returns the logits of the targets [N] and the log-sum-exp [N], logits(hidden, w) all logits [N, vocab] and
    the same log-sum-exp; d_logits(hidden, w, targets, total, d_logprob, d_total, fresh) the gradient of a piece's logits [N, P] in the
    operands' dtype, 0 in columns before `fresh`. All fp32 but that.
    """

    logprobs: Callable
    logits: Callable
    d_logits: Callable


def _operands(hidden, w):
    hidden, w = dot_operand(hidden), dot_operand(w)  # on a CPU weights are held as products take them
    if hidden.dtype != w.dtype or hidden.dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"the operands are {hidden.dtype} and {w.dtype}, not both bfloat16 or float32")
    return hidden, w


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(hidden, w, targets, kernels):
    picked, total = kernels.logprobs(hidden, w, targets)
    return picked - total, total


def _forward(hidden, w, targets, kernels):
    result: Any = _logprobs(hidden, w, targets, kernels)
    logprob, total = result
    return (logprob, total), (hidden, w, targets, total)


def piece_size(num_rows: int, vocab: int) -> int:
    """Return the columns of a piece in the gradient: the size with the least left over in the last piece, which is moved to fit."""
    most = max(min(_MOST_COLUMNS, _MOST_LOGITS // num_rows) // _COLUMNS, 1) * _COLUMNS
    sizes = range(most, most // 2 - 1, -_COLUMNS)
    return min(min(sizes, key=lambda size: pl.cdiv(vocab, size) * size), vocab)


def _backward(kernels, residuals, gradients):
    hidden, w, targets, total = residuals
    vocab = w.shape[1]
    size = piece_size(hidden.shape[0], vocab)
    num_pieces = pl.cdiv(vocab, size)

    def piece(turn, carry):
        """From the last piece to the first: the last one has zeros where it overlaps with the one before, which then writes there."""
        d_hidden, dw = carry
        index = num_pieces - 1 - turn
        first = jnp.minimum(index * size, vocab - size)
        columns = lax.dynamic_slice_in_dim(w, first, size, axis=1)
        d = kernels.d_logits(hidden, columns, targets - first, total, *gradients, index * size - first)
        d_hidden = d_hidden + dot_general(d, columns, ((1,), (1,)))
        d_columns = dot_general(hidden, d, ((0,), (0,))).astype(w.dtype)
        return d_hidden, lax.dynamic_update_slice_in_dim(dw, d_columns, first, axis=1)

    d_hidden, dw = lax.fori_loop(0, num_pieces, piece, (jnp.zeros(hidden.shape), jnp.zeros_like(w)))
    return d_hidden.astype(hidden.dtype), dw, None


_logprobs.defvjp(_forward, _backward)


def token_logprobs(kernels: Kernels, hidden, w, targets, *, aligned):
    """See `api.token_logprobs`. A kernel's rows have the same bits in every mode, aligned or not."""
    del aligned
    return _logprobs(*_operands(hidden, w), targets, kernels)


def head_logits(kernels: Kernels, hidden, w, *, aligned):
    """See `api.head_logits`."""
    del aligned
    return kernels.logits(*_operands(hidden, w))
