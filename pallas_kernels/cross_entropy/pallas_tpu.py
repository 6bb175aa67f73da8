"""LM head and cross entropy for TPUs: a block of columns of w stays in VMEM while the tiles of rows pass.

Each block is a piece of the vocabulary: its statistics go to HBM, a few bytes a row, and a second kernel takes them together. So the cores
of a chip share the columns, in decoding too, and w is read once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles
from pallas_kernels.compat import interpreted
from pallas_kernels.cross_entropy import pallas, tile

_LANES = 128


def _piece(hidden_ref, w_ref, vocab: int) -> jax.Array:
    """The logits of a tile up to the last column."""
    x = tile.logits(hidden_ref[...], w_ref[...])
    return x if vocab % x.shape[1] == 0 else tile.only(x, vocab - pl.program_id(0) * x.shape[1])


def _lanes(x) -> jax.Array:
    """A tile [R, P] as groups of lanes [P / 128, R, 128]: reductions along rows begin without exchange between lanes."""
    return jnp.stack([x[:, i : i + _LANES] for i in range(0, x.shape[1], _LANES)])


def _write_statistics(x, maxima_ref, totals_ref):
    """Transposed, rows lie along the lanes as they do in HBM, and the rest of the reduction is over sublanes."""
    maxima, totals = tile.statistics(_lanes(x), axis=0)
    maxima_ref[0, 0], totals_ref[0, 0] = tile.merged(maxima.T, totals.T)


def _logprobs_kernel(hidden_ref, w_ref, targets_ref, picked_ref, maxima_ref, totals_ref, *, vocab):
    x = _piece(hidden_ref, w_ref, vocab)
    at_target = tile.at_target(x, targets_ref[0] - pl.program_id(0) * x.shape[1])
    picked_ref[0, 0] = _lanes(at_target).sum(0).T.sum(0)
    _write_statistics(x, maxima_ref, totals_ref)


def _logits_kernel(hidden_ref, w_ref, logits_ref, maxima_ref, totals_ref, *, vocab):
    x = _piece(hidden_ref, w_ref, vocab)
    logits_ref[...] = x
    _write_statistics(x, maxima_ref, totals_ref)


def _d_logits_kernel(fresh_ref, hidden_ref, w_ref, targets_ref, total_ref, d_logprob_ref, d_total_ref, out_ref):
    x = tile.logits(hidden_ref[...], w_ref[...])
    first = pl.program_id(0) * x.shape[1]
    d = tile.d_logits(x, targets_ref[0] - first, total_ref[0], d_logprob_ref[0], d_total_ref[0])
    out_ref[...] = jnp.where(tile.columns(x) >= fresh_ref[0] - first, d, 0.0).astype(out_ref.dtype)


def _log_sum_exp_kernel(maxima_ref, totals_ref, total_ref):
    total_ref[0] = tile.log_sum_exp(maxima_ref[:, 0], totals_ref[:, 0])


def _width(size: tiles.CrossEntropyTpu, num_terms: int, itemsize: int) -> int:
    """Columns of a block of w of which two fit beside each other; it depends on the sizes of w alone."""
    width = size.columns
    while width > _LANES and 2 * width * num_terms * itemsize > size.resident:
        width //= 2
    if 2 * width * num_terms * itemsize > size.resident:
        raise NotImplementedError(f"rows of {num_terms} {itemsize}-byte terms are too long: {_LANES} columns of w do not fit into VMEM")
    return width


def _call(kernel, name: str, hidden, w, rows, outs, exponentials: int, scalars=()) -> Any:
    """Run a kernel on every tile of rows beside every block of columns.

    `rows` are vectors [N]. `outs` are dtypes: of an array [N, vocab], or None for a statistic, [pieces, 1, N] in fp32.
    """
    size = tiles.of(tiles.CROSS_ENTROPY_TPU)
    (num_rows, num_terms), vocab = hidden.shape, w.shape[1]
    width = _width(size, num_terms, w.dtype.itemsize)
    num_tiles, num_pieces = pl.cdiv(num_rows, size.rows), pl.cdiv(vocab, width)
    padded = num_tiles * size.rows
    vectors = [jnp.pad(x, (0, padded - num_rows))[None] for x in rows]
    statistic = jax.ShapeDtypeStruct((num_pieces, 1, padded), jnp.float32)
    shapes = [statistic if dtype is None else jax.ShapeDtypeStruct((num_rows, vocab), dtype) for dtype in outs]
    moved = sum(x.size * x.dtype.itemsize for x in (hidden, w, *vectors, *shapes))
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(num_pieces, num_tiles),
        in_specs=[
            *(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in scalars),
            pl.BlockSpec((size.rows, num_terms), lambda n, m: (m, 0)),
            pl.BlockSpec((num_terms, width), lambda n, m: (0, n)),
            *(pl.BlockSpec((1, size.rows), lambda n, m: (0, m)) for _ in vectors),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, size.rows), lambda n, m: (n, 0, m))
            if dtype is None
            else pl.BlockSpec((size.rows, width), lambda n, m: (m, n))
            for dtype in outs
        ],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=size.vmem, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_terms * vocab, bytes_accessed=moved, transcendentals=exponentials * num_rows * vocab
        ),
        interpret=interpreted("tpu"),
    )(*scalars, hidden, w, *vectors)


def _log_sum_exp(maxima, totals, num_rows: int):
    """The log-sum-exp [N] of the statistics of all pieces."""
    num_pieces, _, padded = maxima.shape
    rows = tiles.of(tiles.CROSS_ENTROPY_TPU).rows
    block = pl.BlockSpec((num_pieces, 1, rows), lambda m: (0, 0, m))
    total = pl.pallas_call(
        _log_sum_exp_kernel,
        name="cross_entropy_log_sum_exp",
        grid=(padded // rows,),
        in_specs=[block, block],
        out_specs=pl.BlockSpec((1, rows), lambda m: (0, m)),
        out_shape=jax.ShapeDtypeStruct((1, padded), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=3 * maxima.size, bytes_accessed=8 * maxima.size + 4 * padded, transcendentals=maxima.size),
        interpret=interpreted("tpu"),
    )(maxima, totals)
    return total[0, :num_rows]


def _logprobs(hidden, w, targets):
    kernel = functools.partial(_logprobs_kernel, vocab=w.shape[1])
    picked, maxima, totals = _call(kernel, "cross_entropy_forward", hidden, w, (targets,), (None, None, None), 1)
    return picked.sum((0, 1))[: hidden.shape[0]], _log_sum_exp(maxima, totals, hidden.shape[0])


def _logits(hidden, w):
    kernel = functools.partial(_logits_kernel, vocab=w.shape[1])
    logits, maxima, totals = _call(kernel, "cross_entropy_logits", hidden, w, (), (jnp.float32, None, None), 1)
    return logits, _log_sum_exp(maxima, totals, hidden.shape[0])


def _d_logits(hidden, w, targets, total, d_logprob, d_total, fresh):
    rows, scalars = (targets, total, d_logprob, d_total), (jnp.reshape(fresh, 1),)
    (out,) = _call(_d_logits_kernel, "cross_entropy_d_logits", hidden, w, rows, (hidden.dtype,), 1, scalars)
    return out


_KERNELS = pallas.Kernels(_logprobs, _logits, _d_logits)
token_logprobs = functools.partial(pallas.token_logprobs, _KERNELS)
head_logits = functools.partial(pallas.head_logits, _KERNELS)
