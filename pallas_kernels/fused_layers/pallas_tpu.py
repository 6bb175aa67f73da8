"""The layers for TPUs: a grid step has a block of whole rows, and walks it in strips of a few rows, part by part.

A strip is what registers hold: its pieces are loaded, go through the tile function and are stored. Sums over rows stay eight sublanes
high, one a block: they are added up outside, in the blocks' order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles
from pallas_kernels.compat import apart_if_interpreted, dot_operand, interpreted
from pallas_kernels.fused_layers.rows import Pass, Piece, grouped, moved, pieces, quantised_after, shapes, spread_before
from pallas_kernels.fused_layers.tile import Lanes

_LANES, _SUBLANES = 128, 8


def _exchanged(x: jax.Array, half: int) -> jax.Array:
    """X with its channels exchanged in pairs."""
    size, axis = x.shape[-1], x.ndim - 1
    if 2 * half == size:
        return pltpu.roll(x, half, axis)
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, axis) < half, pltpu.roll(x, size - half, axis), pltpu.roll(x, half, axis))


def _lanes(x: jax.Array, half: int) -> Lanes:
    """Sums and exchanges in the lanes of a piece: of bf16 values in a single vector's width by the matrix unit, which is idle.

    A product with ones is a sum in every lane, one with a permutation the exchange, which is exact. A sum's terms go in as two bf16
    values each: squares of bf16 values are exact so, others keep 16 bits.
    """
    size, axis = x.shape[-1], x.ndim - 1
    kept_apart = apart_if_interpreted("tpu")
    if size != _LANES or x.dtype != jnp.bfloat16:
        return Lanes(lambda f, own=(), other=(): _exchanged(f(x, *own), half), apart=kept_apart)
    product = lambda x, y: lax.dot(dot_operand(x), dot_operand(y.astype(jnp.bfloat16)), preferred_element_type=jnp.float32)
    ones = jnp.ones((size, size), jnp.float32)
    to, lane = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (axis, axis - 1))
    swap = jnp.where(lane == jnp.where(to < half, to + half, jnp.where(to < 2 * half, to - half, -1)), 1.0, 0.0)

    def row_sum(x):
        high = x.astype(jnp.bfloat16)
        return product(high, ones) + product((x - high.astype(jnp.float32)).astype(jnp.bfloat16), ones)

    return Lanes(lambda f, own=(), other=(): product(f(x, *own).astype(jnp.bfloat16), swap), row_sum, kept_apart)


def _kernel(*refs, call: Pass, parts: int, strip: int, num_rows: int):
    refs = list(refs)
    rows = [(operand, pieces(operand, parts), [refs.pop(0) for _ in operand.arrays]) for operand in call.rows]
    weights = [refs.pop(0) for _ in call.weights]
    outs = [(out, pieces(out, parts), [refs.pop(0) for _ in pieces(out, parts).columns]) for out in call.outs]
    sums = refs
    for ref in sums:
        ref[...] = jnp.zeros_like(ref)
    height = rows[0][2][0].shape[0]
    first_row = pl.program_id(0) * height

    def place(where: Piece, arrays, slot: int):
        array, column = where.find(slot)
        return arrays[array], slice(column, column + where.width)

    def one_strip(index, carry):
        first = pl.multiple_of(index * strip, strip)
        at = pl.ds(first, strip)
        for part in range(parts):
            seen = []
            for operand, where, arrays in rows:
                for j in range(operand.pieces or 1):
                    ref, columns = place(where, arrays, j * parts + part if operand.pieces else 0)
                    seen.append(x := ref[at, columns])
                    if operand.half:
                        seen.append(_lanes(x, operand.half))
            if part >= parts - call.copied:
                results = seen[:1]
            else:
                results = list(call.tile(*seen, *(w[min(part, w.shape[0] - 1)][None] for w in weights)))
            for out, where, arrays in outs:
                for j in range(out.pieces):
                    ref, columns = place(where, arrays, j * parts + part)
                    ref[at, columns] = results.pop(0)[:, : where.width].astype(ref.dtype)
            if part >= parts - call.copied:
                continue
            for ref, terms in zip(sums, results, strict=True):
                width = terms.shape[-1]
                if num_rows % height:
                    row = first_row + first + lax.broadcasted_iota(jnp.int32, terms.shape, 0)
                    terms = jnp.where(row < num_rows, terms, 0.0)
                columns = slice(part * width, (part + 1) * width)
                ref[:, columns] += terms.reshape(strip // _SUBLANES, _SUBLANES, width).sum(0)
        return carry

    lax.fori_loop(0, height // strip, one_strip, 0)


def _parts(call: Pass, most: int) -> int:
    """The parts of a row; if it may be cut anywhere, into the widest pieces of at most so many columns that are whole lanes."""
    if call.parts:
        return call.parts
    out = pieces(call.rows[0], 1)
    return next((n for n in range(-(-out.width // most), out.width // _LANES + 1) if out.width % (n * _LANES) == 0), 1)


def run(call: Pass) -> tuple[list[tuple[jax.Array, ...]], list[jax.Array]]:
    """See `rows.Run`. FP8 is XLA's: before tpu7x nothing gains by it."""
    if any(out.by_rows or out.by_columns for out in call.outs):
        return quantised_after(run, call)
    if call.turns:
        return _run_turned(call)
    call, choice = spread_before(call), tiles.of(tiles.FUSED_LAYERS_TPU)
    parts = _parts(call, choice.columns)
    for operand in (*call.rows, *call.outs):
        where = pieces(operand, parts)
        if parts * operand.pieces > 1 and where.width % _LANES and where.width > 1:
            raise NotImplementedError(f"pieces of {where.width} columns are not whole lanes of {_LANES}")
    arrays, num_rows = [x for operand in call.rows for x in operand.arrays], call.rows[0].arrays[0].shape[0]
    outs = shapes(call, num_rows, parts)
    bytes_per_row = moved((arrays, outs)) // num_rows
    height = choice.rows
    while height > choice.strip and height * bytes_per_row > choice.block:
        height //= 2
    strip, widest = height, max(pieces(x, parts).width for x in call.rows)
    while strip > choice.strip and strip * widest > choice.entries:
        strip //= 2
    num_blocks = pl.cdiv(num_rows, height)
    of_rows = lambda x: pl.BlockSpec((height, x.shape[1]), lambda i: (i, 0))
    sums = [w.shape[0] * w.shape[1] for w in call.weights[: call.sums]]
    results = pl.pallas_call(
        functools.partial(_kernel, call=call, parts=parts, strip=strip, num_rows=num_rows),
        name=call.name,
        grid=(num_blocks,),
        in_specs=[*map(of_rows, arrays), *(pl.BlockSpec(w.shape, lambda i: (0, 0)) for w in call.weights)],
        out_specs=[*map(of_rows, outs), *(pl.BlockSpec((None, _SUBLANES, size), lambda i: (i, 0, 0)) for size in sums)],
        out_shape=[*outs, *(jax.ShapeDtypeStruct((num_blocks, _SUBLANES, size), jnp.float32) for size in sums)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=choice.vmem, disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved((arrays, outs, call.weights))),
        interpret=interpreted("tpu"),
    )(*arrays, *call.weights)
    totals = [x.sum((0, 1)).reshape(w.shape) for x, w in zip(results[len(outs) :], call.weights, strict=False)]
    return grouped(call, results[: len(outs)]), totals


def _turned_kernel(*refs, call: Pass, wide: list[bool]):
    refs, num = list(refs), len(call.rows)
    rows, weights, outs = refs[:num], refs[num : num + len(call.weights)], refs[num + len(call.weights) :]
    seen = [ref[...].T if is_wide else ref[...] for ref, is_wide in zip(rows, wide, strict=False)]
    results = call.tile(*seen, *(ref[...] for ref in weights), axis=-2)
    for ref, is_wide, x in zip(outs, wide[num:], results, strict=True):
        ref[...] = (x.T if is_wide else x[: ref.shape[0]]).astype(ref.dtype)


def _run_turned(call: Pass) -> tuple[list[tuple[jax.Array, ...]], list[jax.Array]]:
    """The same with a row in each lane, for a tile function of one part that reduces a lot: that is cheap between vectors, not in one.

    Arrays of whole lanes are transposed in the kernel. Others are so outside, where it costs a layout, not a pass: rows of a few columns
    would take all lanes of a vector in memory.
    """
    choice = tiles.of(tiles.FUSED_LAYERS_TPU)
    num_rows, height = call.rows[0].arrays[0].shape[0], choice.turned_rows
    arrays, outs = [operand.arrays[0] for operand in call.rows], shapes(call, num_rows, 1)
    wide = [x.shape[1] % _LANES == 0 for x in (*arrays, *outs)]
    turned = lambda x: jax.ShapeDtypeStruct(x.shape[::-1], x.dtype)
    spec = lambda x, is_wide: (
        pl.BlockSpec((height, x.shape[1]), lambda i: (i, 0)) if is_wide else pl.BlockSpec((x.shape[1], height), lambda i: (0, i))
    )
    specs = [spec(x, is_wide) for x, is_wide in zip((*arrays, *outs), wide, strict=True)]
    factors = [jnp.broadcast_to(w.T, (w.shape[1], height)) for w in call.weights]
    results = pl.pallas_call(
        functools.partial(_turned_kernel, call=call, wide=wide),
        name=call.name,
        grid=(pl.cdiv(num_rows, height),),
        in_specs=[*specs[: len(arrays)], *(pl.BlockSpec(w.shape, lambda i: (0, 0)) for w in factors)],
        out_specs=specs[len(arrays) :],
        out_shape=[x if is_wide else turned(x) for x, is_wide in zip(outs, wide[len(arrays) :], strict=True)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=choice.vmem, disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved((arrays, outs, call.weights))),
        interpret=interpreted("tpu"),
    )(*(x if is_wide else x.T for x, is_wide in zip(arrays, wide, strict=False)), *factors)
    return [(x if is_wide else x.T,) for x, is_wide in zip(results, wide[len(arrays) :], strict=True)], []
