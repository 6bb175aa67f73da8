"""LM head and cross entropy in plain JAX: a loop over tiles of rows, inside it over pieces of the vocabulary; logits are recomputed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import dot_general, pin
from pallas_kernels.cross_entropy import tile
from pallas_kernels.matmul import ROW_TILE, map_row_tiles

FAST_TILE = 512
"""Rows of a tile in fast numerics."""


def _row_tiles(x: jax.Array, row_tile: int) -> jax.Array:
    padded = jnp.pad(x, ((0, -x.shape[0] % row_tile),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(-1, row_tile, *x.shape[1:])


def _tile_size(num_rows: int, aligned: bool) -> int:
    return ROW_TILE if aligned else min(FAST_TILE, num_rows)


def _piece_size(vocab: int) -> int:
    return min(tile.VOCAB_PIECE, vocab)


def _piece(w: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Columns of piece `index`, the first column, and which of them no earlier piece had (the last piece is moved to fit)."""
    vocab = w.shape[1]
    size = _piece_size(vocab)
    first = jnp.minimum(index * size, vocab - size)
    return lax.dynamic_slice_in_dim(w, first, size, axis=1), first, first + jnp.arange(size) >= index * size


def _over_pieces(vocab: int, body, init):
    return lax.fori_loop(0, -(-vocab // _piece_size(vocab)), body, init)


def _tile_logprobs(hidden, w, targets):
    """Log-probability of the target and log-sum-exp for a tile of rows."""

    def piece(index, carry):
        statistics, picked = carry
        columns, first, fresh = _piece(w, index)
        x = jnp.where(fresh, tile.logits(hidden, columns), -jnp.inf)
        at = targets - first
        here = (at >= 0) & (at < x.shape[1])
        value = jnp.take_along_axis(x, jnp.clip(at, 0, x.shape[1] - 1)[:, None], axis=1)[:, 0]
        return _with_statistics(statistics, index, x), jnp.where(here & (value > -jnp.inf), value, picked)

    start = _no_statistics(hidden.shape[0], w.shape[1]), jnp.zeros(hidden.shape[0])
    statistics, picked = _over_pieces(w.shape[1], piece, start)
    total = _log_sum_exp(statistics)
    return picked - total, total


def _no_statistics(num_rows: int, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Room for the statistics of every piece [pieces, R]."""
    shape = -(-vocab // _piece_size(vocab)), num_rows
    return jnp.zeros(shape), jnp.zeros(shape)


def _with_statistics(statistics, index: jax.Array, x: jax.Array):
    """The statistics with those of piece `index`, whose logits are x."""
    return jax.tree.map(lambda old, new: old.at[index].set(new), statistics, pin(tile.statistics(pin(x))))


def _log_sum_exp(statistics) -> jax.Array:
    return pin(tile.log_sum_exp(*pin(statistics)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(hidden, w, targets, aligned):
    how = {"row_tile": _tile_size(hidden.shape[0], aligned), "aligned": aligned}
    return map_row_tiles(lambda hidden, targets: _tile_logprobs(hidden, w, targets), hidden, targets, **how)


def _forward(hidden, w, targets, aligned):
    result: Any = _logprobs(hidden, w, targets, aligned)
    logprobs, total = result
    return (logprobs, total), (hidden, w, targets, total)


def _backward(aligned, residuals, gradients):
    del aligned  # gradients promise no bits
    hidden, w, targets, total = residuals
    row_tile = min(FAST_TILE, hidden.shape[0])

    def rows(dw, inputs):
        hidden, targets, total, d_logprob, d_total = inputs

        def piece(index, carry):
            d_hidden, dw = carry
            columns, first, fresh = _piece(w, index)
            d_logits = tile.d_logits(tile.logits(hidden, columns), targets - first, total, d_logprob, d_total)
            d_logits = jnp.where(fresh, d_logits, 0.0).astype(hidden.dtype)
            d_hidden = d_hidden + dot_general(d_logits, columns, ((1,), (1,)))
            d_columns = dot_general(hidden, d_logits, ((0,), (0,)))
            old = lax.dynamic_slice_in_dim(dw, first, columns.shape[1], axis=1)
            return d_hidden, lax.dynamic_update_slice_in_dim(dw, old + d_columns, first, axis=1)

        d_hidden, dw = _over_pieces(w.shape[1], piece, (jnp.zeros(hidden.shape), dw))
        return dw, d_hidden.astype(hidden.dtype)

    inputs = tuple(_row_tiles(x, row_tile) for x in (hidden, targets, total, *gradients))
    dw, d_hidden = lax.scan(rows, jnp.zeros(w.shape), inputs)
    return d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], dw.astype(w.dtype), None


_logprobs.defvjp(_forward, _backward)


def token_logprobs(hidden, w, targets, *, aligned):
    """See `api.token_logprobs`."""
    return _logprobs(hidden, w, targets, aligned)


def head_logits(hidden, w, *, aligned):
    """See `api.head_logits`."""
    vocab = w.shape[1]

    def rows(hidden):
        def piece(index, carry):
            statistics, out = carry
            columns, first, fresh = _piece(w, index)
            x = tile.logits(hidden, columns)
            statistics = _with_statistics(statistics, index, jnp.where(fresh, x, -jnp.inf))
            return statistics, lax.dynamic_update_slice_in_dim(out, x, first, axis=1)

        start = _no_statistics(hidden.shape[0], vocab), jnp.zeros((hidden.shape[0], vocab))
        statistics, out = _over_pieces(vocab, piece, start)
        return out, _log_sum_exp(statistics)

    return map_row_tiles(rows, hidden, row_tile=_tile_size(hidden.shape[0], aligned), aligned=aligned)
