"""The layers in plain JAX: aligned, a loop over tiles of rows, so that a row's bits do not depend on how many stand beside it."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compat import pin
from pallas_kernels.fused_layers import tile
from pallas_kernels.fused_layers.rows import Pass, grouped, pieces, quantised_after, spread_before
from pallas_kernels.matmul import map_row_tiles


def run(call: Pass, *, aligned: bool) -> tuple[list[tuple[jax.Array, ...]], list[jax.Array]]:
    """See `rows.Run`. Gradients, and layers without a reduction, treat all rows at once: a loop over tiles is many times slower."""
    if any(out.by_rows or out.by_columns for out in call.outs):
        return quantised_after(functools.partial(run, aligned=aligned), call)
    call, parts = spread_before(call), call.parts or 1
    computed = parts - call.copied
    # No axis of size 1: with one XLA's CPU compiler (jax 0.10) fuses a row's sum into what reads it, and computes it again and again.
    axes = (parts,) if parts > 1 else ()

    def tile_pieces(operand, arrays):
        """An operand's pieces [R, parts, width], of one part [R, width], and their partners."""
        where = pieces(operand, parts)
        rows = jnp.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]
        if not operand.pieces:
            return [rows[:, None] if axes else rows]
        found = list(jnp.moveaxis(rows.reshape(rows.shape[0], operand.pieces, *axes, where.width), 1, 0))
        found = [x[:, :computed] for x in found] if axes else found
        if operand.half:
            return [y for x in found for y in (x, tile.Lanes(lambda f, own=(), other=(), x=x: tile.partner(f(x, *own), operand.half)))]
        return found

    def on_rows(*arrays):
        rest, seen = list(arrays), []
        for operand in call.rows:
            seen += tile_pieces(operand, [rest.pop(0) for _ in operand.arrays])
        weights = [w if w.shape[0] == 1 else w[:computed] for w in call.weights]
        results = list(call.tile(*seen, *weights))
        if call.copied:
            copied = arrays[len(call.rows[0].arrays) - 1][:, -call.copied * seen[0].shape[-1] :]
            copied = copied.reshape(len(copied), call.copied, -1).astype(call.outs[0].dtype)
            results[0] = jnp.concatenate([results[0].astype(copied.dtype), copied], axis=1)
        outs = []
        for out in call.outs:
            where, found = pieces(out, parts), [results.pop(0) for _ in range(out.pieces)]
            columns = jnp.stack([x[..., : where.width] for x in found], axis=1).reshape(arrays[0].shape[0], -1).astype(out.dtype)
            first = 0
            for size in where.columns:
                outs.append(columns[:, first : first + size])
                first += size
        return outs, results

    arrays = [x for operand in call.rows for x in operand.arrays]
    if aligned and call.parts and not call.gradient:
        return grouped(call, map_row_tiles(lambda *tiles: on_rows(*tiles)[0], *arrays)), []
    outs, terms = pin(on_rows(*pin(arrays, aligned)), aligned)
    sums = [x.sum(0).reshape(computed, -1) for x in terms]
    return grouped(call, outs), [jnp.pad(x, ((0, call.copied), (0, 0))) for x in sums]
