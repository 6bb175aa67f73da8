"""The layers for GPUs (Pallas with the Triton lowering): a program has a few rows and parts, [rows, parts, width], in registers.

Widths that are no powers of two are masked. A pass with sums over rows walks some rows in a program, its sums in registers; they are
added up outside, in the programs' order.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tiles
from pallas_kernels.compat import apart_if_interpreted, interpreted
from pallas_kernels.fused_layers.rows import Out, Pass, Piece, grouped, moved, pieces, quantised_after, shapes
from pallas_kernels.fused_layers.tile import Lanes
from pallas_kernels.scaled_matmul.quantized import GROUP, finite_magnitude, group_scales, to_e4m3


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _partner(lane: jax.Array, half: int) -> jax.Array:
    """The lanes of the partner, written so that the compiler sees runs of `half` neighbours."""
    return lane + half - 2 * half * lax.rem(lax.div(lane, jnp.int32(half)), jnp.int32(2))


def _all(conditions: list[jax.Array]) -> jax.Array | None:
    """Whether all conditions hold, None if there are none: a mask stands only where something is missing."""
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _load(at, mask: jax.Array | None) -> jax.Array:
    return triton.load(at, mask=mask, other=None if mask is None else 0)


def _kernel(*refs, call: Pass, parts: int, num: int, height: int, turns: int, num_rows: int):
    """`num` parts and `height` rows in each of some turns."""
    refs = list(refs)
    rows = [(operand, pieces(operand, parts), [refs.pop(0) for _ in operand.arrays]) for operand in call.rows]
    weights = [(w.shape[1], refs.pop(0)) for w in call.weights]
    outs = [(out, where := pieces(out, parts), [refs.pop(0) for _ in _layouts(out, where)]) for out in call.outs]
    sums = refs
    part, first_row = pl.program_id(0) * num, pl.program_id(1) * turns * height

    def inside(size: tuple[int, ...], width: int) -> list[jax.Array]:
        return [lax.broadcasted_iota(jnp.int32, size, len(size) - 1) < width] if size[-1] != width else []

    def windows(turn, where: Piece, arrays, j: int) -> Iterator[tuple[Any, tuple[int, int, int], Any, list[jax.Array]]]:
        """For each array that may have the j-th pieces: its ref, their shape and first slot, and what must hold for an entry to exist."""
        size, first = (height, num if where.pieces else 1, _power_of_two(where.width)), 0
        row = first_row + turn * height + lax.broadcasted_iota(jnp.int32, size, 0)
        exists = ([row < num_rows] if num_rows % (height * turns) else []) + inside(size, where.width)
        if len(arrays) == 1:
            yield arrays[0], size, j * parts + part if where.pieces else 0, exists
            return
        for ref, columns in zip(arrays, where.columns, strict=True):
            count = columns // where.width
            here = (part >= first) & (part < first + count)
            yield ref, size, jnp.clip(part - first, 0, count - num), [*exists, jnp.broadcast_to(here, size)]
            first += count

    def load(turn, where: Piece, arrays, j: int, half: int = 0) -> jax.Array:
        found = []
        for ref, size, slot, exists in windows(turn, where, arrays, j):
            window = ref.at[pl.ds(turn * height, height), pl.ds(slot, size[1]), pl.ds(0, size[2])]
            if half:
                row, at, lane = (lax.broadcasted_iota(jnp.int32, size, axis) for axis in range(3))
                lane = _partner(lane, half)
                exists = [*exists, lane < where.width] if where.width % (2 * half) else exists
                window = ref.at[turn * height + row, slot + at, lane]
            found.append(_load(window, _all(exists)))
        return functools.reduce(jnp.add, found)  # where there are several arrays, all but one gave zeros

    def load_spread(turn, where: Piece, ref, width: int, sign: int) -> jax.Array:
        """An operand that all parts share, spread over the channels as it is loaded."""
        row, lane = (lax.broadcasted_iota(jnp.int32, (height, 1, _power_of_two(width)), axis) for axis in (0, 2))
        exists = [first_row + turn * height + row < num_rows] if num_rows % (height * turns) else []
        exists += [lane < 2 * where.width] if lane.shape[2] != 2 * where.width else []
        x = _load(ref.at[turn * height + row, jnp.zeros_like(row), lax.rem(lane, jnp.int32(where.width))], _all(exists))
        return x if sign == 1 else x * jnp.where(lane < where.width, float(sign), 1.0)

    def store(turn, where: Piece, arrays, j: int, x: jax.Array) -> None:
        for ref, size, slot, exists in windows(turn, where, arrays, j):
            window = ref.at[pl.ds(turn * height, height), pl.ds(slot, num), pl.ds(0, size[2])]
            triton.store(window, jnp.broadcast_to(x, size).astype(ref.dtype), mask=_all(exists))

    def scales_of(x: jax.Array, axis: int) -> jax.Array:
        return group_scales(finite_magnitude(x).max(axis), False)

    def by_rows(turn, where: Piece, quantised, j: int, x: jax.Array) -> None:
        """Store the j-th pieces in FP8; a group of columns lies in one of them."""
        values, scales = quantised
        ((ref, size, slot, exists),) = windows(turn, where, [values], j)
        x = jnp.broadcast_to(x, size).astype(jnp.float32)
        if size[2] > GROUP:  # to cut nothing would cost shuffles
            x = x.reshape(height, num, size[2] // GROUP, GROUP)
        found = scales_of(x, -1)
        window = ref.at[pl.ds(turn * height, height), pl.ds(slot, num), pl.ds(0, size[2])]
        triton.store(window, to_e4m3(x, found[..., None]).reshape(size), mask=_all(exists))
        found = found.reshape(height, num, size[2] // GROUP)
        row, at, group = (lax.broadcasted_iota(jnp.int32, found.shape, axis) for axis in range(3))
        groups = where.width // GROUP
        exists = [first_row + turn * height + row < num_rows] if num_rows % (height * turns) else []
        exists += [group < groups] if size[2] != where.width else []
        triton.store(scales.at[(slot + at) * groups + group, turn * height + row], found, mask=_all(exists))

    def emit(turn, out: Out, where: Piece, arrays, j: int, x: jax.Array) -> None:
        """Store the j-th pieces as they are and by rows."""
        number, x = len(where.columns) * out.plain, x.astype(out.dtype)
        if out.plain:
            store(turn, where, arrays[:number], j, x)
        if out.by_rows:
            by_rows(turn, where, arrays[number : number + 2], j, x)

    def rows_in_fp8(turn, out: Out, x: jax.Array) -> jax.Array:
        """A part's piece of 128 columns, whose columns are quantised: rows that there are not are zero."""
        x = x.astype(out.dtype).reshape(height, GROUP).astype(jnp.float32)
        exists = first_row + turn * height + lax.broadcasted_iota(jnp.int32, x.shape, 0) < num_rows
        return jnp.where(exists, x, 0.0) if num_rows % GROUP else x

    def columns_of(j: int):
        """The rows of the transposed array that are a part's j-th piece, of 128 columns."""
        return pl.ds((j * parts + part) * GROUP, GROUP)

    def store_columns(turn, out: Out, arrays, j: int, x: jax.Array, scales: jax.Array) -> None:
        """Store a piece transposed."""
        quantised = to_e4m3(rows_in_fp8(turn, out, x), scales).T
        exists = first_row + turn * height + lax.broadcasted_iota(jnp.int32, quantised.shape, 1) < num_rows
        window = arrays[-2].at[columns_of(j), pl.ds(turn * height, height)]
        triton.store(window, quantised, mask=exists if num_rows % GROUP else None)

    def computed(turn) -> list[Any]:
        """What the tile function returns."""
        seen = []
        for operand, where, arrays in rows:
            if operand.spread:
                width, sign = operand.spread
                seen.append(load_spread(turn, where, arrays[0], width, sign))
                continue
            for j in range(operand.pieces or 1):
                seen.append(load(turn, where, arrays, j))
                if operand.half:
                    partner = load(turn, where, arrays, j, operand.half)
                    exchanged = lambda f, own=(), other=(), partner=partner: f(partner, *other)
                    seen.append(Lanes(exchanged, apart=apart_if_interpreted("gpu")))
        return list(call.tile(*seen, *factors))

    def copied(turn) -> list[Any]:
        """The first result's piece, and sums to which nothing is added."""
        return [load(turn, *rows[0][1:], 0), *(jnp.zeros((height, *ref.shape), jnp.float32) for ref in sums)]

    def one_part(results_of, stored: list[tuple[Out, Piece, Any, int]]) -> None:
        """Walk the rows. Columns in FP8 want the largest of all of them first: they are walked again, computed again, out of a cache."""
        in_columns = [(i, out, arrays, j) for i, (out, _, arrays, j) in enumerate(stored) if out.by_columns]

        def first(turn, carry):
            totals, largest = carry
            results = results_of(turn)
            for each, x in zip(stored, results, strict=False):
                emit(turn, *each, x)
            magnitudes = [finite_magnitude(rows_in_fp8(turn, out, results[i])).max(0) for i, out, *_ in in_columns]
            added = zip(totals, results[len(stored) :], strict=True)
            return [total + terms for total, terms in added], list(map(jnp.maximum, largest, magnitudes))

        def second(turn, scales):
            results = results_of(turn)
            for (i, out, arrays, j), own in zip(in_columns, scales, strict=True):
                store_columns(turn, out, arrays, j, results[i], own)
            return scales

        walk = lambda turn, carry: lax.fori_loop(0, turns, turn, carry) if turns > 1 else turn(0, carry)
        start = [jnp.zeros((height, *ref.shape), jnp.float32) for ref in sums], [jnp.zeros(GROUP, jnp.float32) for _ in in_columns]
        totals, largest = walk(first, start)
        for (width, _), ref, total in zip(weights, sums, totals, strict=False):
            triton.store(ref, total.sum(0), mask=_all(inside(ref.shape, width)))
        scales = [group_scales(x, False) for x in largest]
        for (_, _, arrays, j), own in zip(in_columns, scales, strict=True):
            triton.store(arrays[-1].at[columns_of(j)], own)
        if in_columns:
            walk(second, scales)

    factors = [_load(ref, _all(inside(ref.shape, width)))[None] for width, ref in weights]
    stored = [(out, where, arrays, j) for out, where, arrays in outs for j in range(out.pieces)]
    if call.copied:
        pl.when(part < parts - call.copied)(lambda: one_part(computed, stored))
        pl.when(part >= parts - call.copied)(lambda: one_part(copied, stored[:1]))
    else:
        one_part(computed, stored)


def _layouts(out: Out, where: Piece) -> list[str]:
    """How each of a result's arrays lies: as rows of pieces, as such rows' scales, as columns, or as their scales."""
    rows, columns = ["rows", "row scales"] * out.by_rows, ["columns", "column scales"] * out.by_columns
    return ["rows"] * (len(where.columns) * out.plain) + rows + columns


def _parts(call: Pass, most: int) -> int:
    """The parts of a row; if it may be cut anywhere, into the widest pieces that are powers of two, or else into one."""
    if call.parts:
        return call.parts
    width = pieces(call.rows[0], 1).width
    piece = min(width & -width, most)
    return width // piece if piece >= min(most, 128) else 1


def run(call: Pass) -> tuple[list[tuple[jax.Array, ...]], list[jax.Array]]:
    """See `rows.Run`."""
    exchanged = any(operand.half for operand in call.rows)
    choice = tiles.of(
        tiles.FUSED_LAYERS_GPU_HEADS if exchanged else tiles.FUSED_LAYERS_GPU_REDUCING if call.turns else tiles.FUSED_LAYERS_GPU
    )
    parts = _parts(call, choice.entries)
    emitting = [out for out in call.outs if out.by_rows or out.by_columns]
    if any(pieces(out, parts).width % GROUP for out in emitting):
        return quantised_after(run, call)
    by_columns = any(out.by_columns for out in emitting)
    if call.parts and (by_columns or (not call.gradient and any(not out.plain for out in emitting))):
        # A norm's part may be wider than the columns of which a program can quantise 128 rows, and to compute it twice costs more than
        # to read it. And how a sum is taken could depend on what is stored: whatever is wanted of a forward in FP8, its rows come from
        # one program.
        return quantised_after(run, call, by_rows=False)
    if by_columns:
        choice, parts = tiles.of(tiles.FUSED_LAYERS_GPU_COLUMNS), _parts(call, GROUP)
    arrays, num_rows = [x for operand in call.rows for x in operand.arrays], call.rows[0].arrays[0].shape[0]
    places = [pieces(x, parts) for x in (*call.rows, *call.outs)]
    outs = shapes(call, num_rows, parts)
    # The parts of a program are side by side in one array, and all computed or all copied.
    counts = [size // where.width for where in places if len(where.columns) > 1 for size in where.columns]
    widest = max(_power_of_two(where.width) for where in places)
    common = math.gcd(parts, call.copied, *counts)
    num = min(common & -common, max(1, choice.entries // widest), choice.parts)
    height = max(1, choice.entries // (widest * num))
    turns = max(1, choice.rows // height) if call.sums or by_columns else 1
    assert not by_columns or (height * turns, widest, num) == (GROUP, GROUP, 1)
    num_blocks = pl.cdiv(num_rows, height * turns)

    def of_rows(shape: tuple[int, ...], layout: str = "rows") -> pl.BlockSpec:
        if layout == "column scales":
            return pl.BlockSpec((None, shape[1]), lambda p, i: (i, 0))
        if layout != "rows":
            return pl.BlockSpec((shape[0], height * turns), lambda p, i: (0, i))
        return pl.BlockSpec((height * turns, shape[1], _power_of_two(shape[2])), lambda p, i: (i, 0, 0))

    def of_weight(w: jax.Array) -> pl.BlockSpec:
        whole = w.shape[0] == 1
        return pl.BlockSpec((1 if whole else num, _power_of_two(w.shape[1])), lambda p, i: (0 if whole else p, 0))

    widths = [where.width for where in places[: len(call.rows)] for _ in where.columns]
    views = [(num_rows, x.shape[1] // width, width) for x, width in zip(arrays, widths, strict=True)]
    layouts = [(how, where.width) for out, where in zip(call.outs, places[len(call.rows) :], strict=True) for how in _layouts(out, where)]
    out_views = [
        (num_rows, x.shape[1] // width, width) if how == "rows" else x.shape for x, (how, width) in zip(outs, layouts, strict=True)
    ]
    summed = call.weights[: call.sums]
    assert all(w.shape[0] == parts for w in summed)
    results = pl.pallas_call(
        functools.partial(_kernel, call=call, parts=parts, num=num, height=height, turns=turns, num_rows=num_rows),
        name=call.name,
        grid=(parts // num, num_blocks),
        in_specs=[*map(of_rows, views), *map(of_weight, call.weights)],
        out_specs=[
            *(of_rows(view, how) for view, (how, _) in zip(out_views, layouts, strict=True)),
            *(pl.BlockSpec((None, num, _power_of_two(w.shape[1])), lambda p, i: (i, p, 0)) for w in summed),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct(view, x.dtype) for view, x in zip(out_views, outs, strict=True)),
            *(jax.ShapeDtypeStruct((num_blocks, *w.shape), jnp.float32) for w in summed),
        ],
        compiler_params=triton.CompilerParams(num_warps=choice.warps, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved((arrays, outs, call.weights))),
        interpret=interpreted("gpu"),
    )(*(x.reshape(view) for x, view in zip(arrays, views, strict=True)), *call.weights)
    flat = [x.reshape(out.shape) for x, out in zip(results, outs, strict=False)]
    return grouped(call, flat), [x.sum(0) for x in results[len(outs) :]]
