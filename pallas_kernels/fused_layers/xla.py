"""The layers in plain JAX: aligned, a loop over tiles of rows, so that a row's bits do not depend on how many stand beside it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.compat import pin
from pallas_kernels.fused_layers import tile
from pallas_kernels.fused_layers.rows import Pass, grouped, pieces
from pallas_kernels.matmul import map_row_tiles


def _exchanged(x: jax.Array, half: int) -> jax.Array:
    """`tile.partner`, but for the rest of the channels: without a concatenation where it can be, which would be a pass of its own."""
    if x.shape[-1] % (2 * half):
        return tile.partner(x, half)
    return jnp.flip(x.reshape(*x.shape[:-1], -1, 2, half), -2).reshape(x.shape)


def _cut(arrays: Sequence[jax.Array], sizes: Sequence[int]) -> list[jax.Array]:
    """The columns of the arrays, one array after the other, cut into arrays of these sizes."""
    rest, found = list(arrays), []
    for size in sizes:
        taken = []
        while size:
            first = rest.pop(0)
            taken.append(first[:, :size])
            if first.shape[1] > size:
                rest.insert(0, first[:, size:])
            size -= taken[-1].shape[1]
        found.append(taken[0] if len(taken) == 1 else jnp.concatenate(taken, axis=1))
    return found


def run(call: Pass, *, aligned: bool) -> tuple[list[tuple[jax.Array, ...]], list[jax.Array]]:
    """See `rows.Run`. Gradients, and layers without a reduction, treat all rows at once: a loop over tiles is many times slower."""
    parts = call.parts or 1
    computed = parts - call.copied

    def tile_pieces(operand, arrays):
        """An operand's pieces [R, parts, width] and their partners."""
        where = pieces(operand, parts)
        rows = jnp.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]
        if not operand.pieces:
            return [rows[:, None]]
        found = list(jnp.moveaxis(rows.reshape(rows.shape[0], operand.pieces, parts, where.width), 1, 0)[:, :, :computed])
        if operand.half:
            return [y for x in found for y in (x, tile.Lanes(lambda f, own=(), other=(), x=x: _exchanged(f(x, *own), operand.half)))]
        return found

    def on_rows(*arrays):
        rest, seen = list(arrays), []
        for operand in call.rows:
            seen += tile_pieces(operand, [rest.pop(0) for _ in operand.arrays])
        weights = [w if w.shape[0] == 1 else w[:computed] for w in call.weights]
        results = list(call.tile(*seen, *weights))
        copied = [arrays[len(call.rows[0].arrays) - 1][:, -call.copied * seen[0].shape[-1] :]] if call.copied else []
        outs = []
        for out in call.outs:
            where, found = pieces(out, parts), [results.pop(0) for _ in range(out.pieces)]
            columns = jnp.stack([x[..., : where.width] for x in found], axis=1).reshape(arrays[0].shape[0], -1)
            outs += [x.astype(out.dtype) for x in _cut([columns, *copied], where.columns)]
            copied = []
        return outs, results

    arrays = [x for operand in call.rows for x in operand.arrays]
    if aligned and call.parts and not call.gradient:
        return grouped(call, map_row_tiles(lambda *tiles: on_rows(*tiles)[0], *arrays)), []
    outs, terms = pin(on_rows(*pin(arrays, aligned)), aligned)
    padding = ((0, call.copied), (0, 0))
    return grouped(call, outs), [jnp.pad(x.sum(0), padding) if call.copied else x.sum(0) for x in terms]
