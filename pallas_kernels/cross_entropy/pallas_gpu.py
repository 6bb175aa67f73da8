"""LM head and cross entropy for GPUs (Pallas with the Triton lowering): a program has one tile of logits in registers.

Each tile's columns are a piece of the vocabulary: its statistics go to memory, a few bytes a row, and a second kernel takes them together.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tiles, triton_dot
from pallas_kernels.compat import interpreted
from pallas_kernels.cross_entropy import pallas, tile


def _product(a, b, acc):
    """Return acc + a @ b; fp32 operands in three TF32 passes."""
    if a.dtype == jnp.bfloat16:
        return triton_dot.dot(a, b, acc)
    exact = lax.Precision.HIGHEST if interpreted("gpu") else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return acc + lax.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _place(program, num_tiles: int, num_pieces: int, band: int):
    """The tile of rows and the piece of a program: down a band of tiles, then a piece on. Those at work together share operands."""
    first = program // (band * num_pieces) * band
    inside, height = program % (band * num_pieces), jnp.minimum(num_tiles - first, band) if num_tiles % band else band
    return first + inside % height, inside // height


def _logits(hidden_ref, w_ref, at, sizes, size):
    """The logits of a program's tile up to the last column, and which of its rows and columns there are."""
    num_rows, num_terms, vocab = sizes
    row, column = (x * length + jnp.arange(length) for x, length in zip(at, (size.rows, size.columns), strict=True))
    # A mask stands only where a tile hangs over.
    rows = (row < num_rows)[:, None] if num_rows % size.rows else None
    columns = (column < vocab)[None] if vocab % size.columns else None

    def load(ref, window, masks):
        mask = functools.reduce(jnp.logical_and, masks) if masks else None
        return triton.load(ref.at[window], mask=mask, other=None if mask is None else 0)

    def add_part(part, total):
        window = pl.ds(part * size.depth, size.depth)
        inside = part * size.depth + jnp.arange(size.depth) < num_terms
        of_terms = lambda axis: [jnp.expand_dims(inside, axis)] if num_terms % size.depth else []
        a = load(hidden_ref, (slice(None), window), [x for x in (rows,) if x is not None] + of_terms(0))
        b = load(w_ref, (window, slice(None)), [x for x in (columns,) if x is not None] + of_terms(1))
        return _product(a, b, total)

    x = lax.fori_loop(0, pl.cdiv(num_terms, size.depth), add_part, jnp.zeros((size.rows, size.columns), jnp.float32))
    return x if columns is None else tile.only(x, vocab - at[1] * size.columns), rows, columns


def _write_statistics(x, maxima_ref, totals_ref):
    maxima_ref[...], totals_ref[...] = tile.statistics(x)


def _logprobs_kernel(hidden_ref, w_ref, targets_ref, picked_ref, maxima_ref, totals_ref, *, at, sizes, size):
    at = at(pl.program_id(0))
    x, _, _ = _logits(hidden_ref, w_ref, at, sizes, size)
    picked_ref[...] = tile.at_target(x, targets_ref[...] - at[1] * size.columns).sum(-1)
    _write_statistics(x, maxima_ref, totals_ref)


def _store(out_ref, x, rows, columns):
    masks = [jnp.broadcast_to(mask, x.shape) for mask in (rows, columns) if mask is not None]
    triton.store(out_ref, x.astype(out_ref.dtype), mask=functools.reduce(jnp.logical_and, masks) if masks else None)


def _logits_kernel(hidden_ref, w_ref, logits_ref, maxima_ref, totals_ref, *, at, sizes, size):
    x, rows, columns = _logits(hidden_ref, w_ref, at(pl.program_id(0)), sizes, size)
    _store(logits_ref, x, rows, columns)
    _write_statistics(x, maxima_ref, totals_ref)


def _d_logits_kernel(fresh_ref, hidden_ref, w_ref, targets_ref, total_ref, d_logprob_ref, d_total_ref, out_ref, *, at, sizes, size):
    at = at(pl.program_id(0))
    x, rows, columns = _logits(hidden_ref, w_ref, at, sizes, size)
    first = at[1] * size.columns
    d = tile.d_logits(x, targets_ref[...] - first, total_ref[...], d_logprob_ref[...], d_total_ref[...])
    _store(out_ref, jnp.where(tile.columns(x) >= fresh_ref[0] - first, d, 0.0), rows, columns)


def _log_sum_exp_kernel(maxima_ref, totals_ref, total_ref, *, num_pieces):
    there = jnp.broadcast_to((jnp.arange(maxima_ref.shape[0]) < num_pieces)[:, None], maxima_ref.shape)
    maxima = triton.load(maxima_ref, mask=there, other=tile.NOTHING)
    total_ref[...] = tile.log_sum_exp(maxima, triton.load(totals_ref, mask=there, other=0.0))


def _size(dtype) -> tiles.CrossEntropyGpu:
    return tiles.of(tiles.CROSS_ENTROPY_GPU if dtype == jnp.bfloat16 else tiles.CROSS_ENTROPY_GPU_FP32)


def _call(kernel, name: str, hidden, w, rows, outs, scalars=()) -> Any:
    """Run a kernel on every tile of rows beside every piece.

    `rows` are vectors [N]. `outs` are dtypes: of an array [N, vocab], or None for a statistic, [pieces, N] in fp32.
    """
    size = _size(hidden.dtype)
    (num_rows, num_terms), vocab = hidden.shape, w.shape[1]
    num_tiles, num_pieces = pl.cdiv(num_rows, size.rows), pl.cdiv(vocab, size.columns)
    padded = num_tiles * size.rows
    vectors = [jnp.pad(x, (0, padded - num_rows)) for x in rows]
    statistic = jax.ShapeDtypeStruct((num_pieces, padded), jnp.float32)
    shapes = [statistic if dtype is None else jax.ShapeDtypeStruct((num_rows, vocab), dtype) for dtype in outs]
    if max(x.size for x in (hidden, w, *shapes)) >= 2**31:
        raise NotImplementedError("Pallas' Triton lowering counts an array's entries in 32 bits")
    at = functools.partial(_place, num_tiles=num_tiles, num_pieces=num_pieces, band=size.band)
    return pl.pallas_call(
        functools.partial(kernel, at=at, sizes=(num_rows, num_terms, vocab), size=size),
        name=name,
        grid=(num_tiles * num_pieces,),
        in_specs=[
            *(pl.BlockSpec((1,), lambda i: (0,)) for _ in scalars),
            pl.BlockSpec((size.rows, num_terms), lambda i: (at(i)[0], 0)),
            pl.BlockSpec((num_terms, size.columns), lambda i: (0, at(i)[1])),
            *(pl.BlockSpec((size.rows,), lambda i: (at(i)[0],)) for _ in vectors),
        ],
        out_specs=[
            pl.BlockSpec((None, size.rows), lambda i: at(i)[::-1]) if dtype is None else pl.BlockSpec((size.rows, size.columns), at)
            for dtype in outs
        ],
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_terms * vocab,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (hidden, w, *vectors, *shapes)),
            transcendentals=num_rows * vocab,
        ),
        interpret=interpreted("gpu"),
    )(*scalars, hidden, w, *vectors)


def _log_sum_exp(maxima, totals, num_rows: int, lines: int):
    """The log-sum-exp [N] of the statistics of all pieces."""
    num_pieces, padded = maxima.shape
    block = pl.BlockSpec((pl.next_power_of_2(num_pieces), lines), lambda m: (0, m))
    total = pl.pallas_call(
        functools.partial(_log_sum_exp_kernel, num_pieces=num_pieces),
        name="cross_entropy_log_sum_exp",
        grid=(padded // lines,),
        in_specs=[block, block],
        out_specs=pl.BlockSpec((lines,), lambda m: (m,)),
        out_shape=jax.ShapeDtypeStruct((padded,), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=3 * maxima.size, bytes_accessed=8 * maxima.size + 4 * padded, transcendentals=maxima.size),
        interpret=interpreted("gpu"),
    )(maxima, totals)
    return total[:num_rows]


def _all_logprobs(hidden, w, targets):
    picked, maxima, totals = _call(_logprobs_kernel, "cross_entropy_forward", hidden, w, (targets,), (None, None, None))
    return picked.sum(0)[: hidden.shape[0]], _log_sum_exp(maxima, totals, hidden.shape[0], _size(hidden.dtype).lines)


def _all_logits(hidden, w):
    logits, maxima, totals = _call(_logits_kernel, "cross_entropy_logits", hidden, w, (), (jnp.float32, None, None))
    return logits, _log_sum_exp(maxima, totals, hidden.shape[0], _size(hidden.dtype).lines)


def _d_logits(hidden, w, targets, total, d_logprob, d_total, fresh):
    rows, scalars = (targets, total, d_logprob, d_total), (jnp.reshape(fresh, 1),)
    (out,) = _call(_d_logits_kernel, "cross_entropy_d_logits", hidden, w, rows, (hidden.dtype,), scalars)
    return out


_KERNELS = pallas.Kernels(_all_logprobs, _all_logits, _d_logits)
token_logprobs = functools.partial(pallas.token_logprobs, _KERNELS)
head_logits = functools.partial(pallas.head_logits, _KERNELS)
