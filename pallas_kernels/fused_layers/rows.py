"""How a layer that treats each row by itself is told to a backend: what a row has, the function of one tile, and what it returns.

The columns of a row are cut into `parts` that the tile function treats alike: heads, groups of a norm, or all of the row. A part has one
or several pieces of an array: gate and up of a SwiGLU are two. The pieces of an array stand as [N, pieces, parts, width]; an operand may
also be several arrays, whose columns follow each other (the parts of q, k and v). The tile function sees each piece as [..., width] and
reduces the last axis only, so that a backend may have any rows and parts in front.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.scaled_matmul import quantize
from pallas_kernels.scaled_matmul.quantized import GROUP


class Rows(NamedTuple):
    """An operand: arrays [N, columns], whose columns follow each other.

    `pieces` of each part, or 0 if all parts share the columns. With `half` the tile function also gets, behind each piece, its
    `tile.Lanes`. With `spread` (a width, a sign) the parts share one array's columns x as sign x | x | 0, of that width.
    """

    arrays: tuple[jax.Array, ...]
    pieces: int = 1
    half: int = 0
    spread: tuple[int, int] | None = None


class Out(NamedTuple):
    """A result: arrays [N, columns] of these columns, which follow each other. Without columns it is an array [N, parts].

    What is one array x may be given in FP8, too, or unless `plain` instead: as quantize(x), `by_rows`, then as quantize(x.T),
    `by_columns`; each is two arrays, values and scales (see `scaled_matmul.Quantized`).
    """

    columns: tuple[int, ...]
    dtype: DTypeLike
    pieces: int = 1
    plain: bool = True
    by_rows: bool = False
    by_columns: bool = False


class Pass(NamedTuple):
    """One pass over rows: tile(*row pieces, *weights) returns the pieces of the results, then of `sums` terms to be summed over the rows.

    Weights are [parts, width] or [1, width]. The sums are fp32, one for each of the first weights, with its shape. The last `copied`
    parts are not computed: their first piece is copied to the first result. With 0 parts the backend may cut the pieces anywhere. With
    `turns` the tile function takes `axis`, that of a row's columns: it may be given pieces [width, rows] and -2. A gradient promises no
    bits.
    """

    name: str
    tile: Callable[..., tuple[Any, ...]]
    rows: tuple[Rows, ...]
    weights: tuple[jax.Array, ...]
    outs: tuple[Out, ...]
    sums: int = 0
    parts: int = 1
    copied: int = 0
    turns: bool = False
    gradient: bool = False


class Piece(NamedTuple):
    """Where an operand's or result's pieces lie: its arrays' columns, the pieces a part has (0: all parts share one), and their width."""

    columns: tuple[int, ...]
    pieces: int
    width: int

    def find(self, slot: int) -> tuple[int, int]:
        """Return the array that has the slot-th piece, and the column where it begins."""
        column = slot * self.width
        for array, size in enumerate(self.columns):
            if column < size:
                return array, column
            column -= size
        raise AssertionError(f"no piece {slot} of width {self.width} in columns {self.columns}")


def spread_before(call: Pass) -> Pass:
    """Return the pass of a backend that spreads no operand itself."""

    def spread(operand: Rows) -> Rows:
        if operand.spread is None:
            return operand
        (x,), (width, sign) = operand.arrays, operand.spread
        rest = jnp.zeros((x.shape[0], width - 2 * x.shape[1]), x.dtype)
        return Rows((jnp.concatenate([sign * x, x, rest], axis=1),), operand.pieces)

    return call._replace(rows=tuple(map(spread, call.rows)))


def pieces(operand: Rows | Out, parts: int) -> Piece:
    """Return where an operand's or a result's pieces lie."""
    columns = tuple(x.shape[1] for x in operand.arrays) if isinstance(operand, Rows) else operand.columns or (parts,)
    return Piece(columns, operand.pieces, sum(columns) // (operand.pieces * parts or 1))


def shapes(call: Pass, num_rows: int, parts: int) -> list[jax.ShapeDtypeStruct]:
    """Return the results' arrays, one after the other."""
    found = []
    for out in call.outs:
        columns = pieces(out, parts).columns
        found += [jax.ShapeDtypeStruct((num_rows, size), out.dtype) for size in columns if out.plain]
        found += _quantized(num_rows, columns[0]) * out.by_rows + _quantized(columns[0], num_rows) * out.by_columns
    return found


def _quantized(num_rows: int, depth: int) -> list[jax.ShapeDtypeStruct]:
    """The values and scales of an array."""
    values = jax.ShapeDtypeStruct((num_rows, depth), jnp.float8_e4m3fn)
    return [values, jax.ShapeDtypeStruct((-(-depth // GROUP), num_rows), jnp.float32)]


def grouped(call: Pass, arrays: Sequence[jax.Array]) -> list[tuple[jax.Array, ...]]:
    """Return the results' arrays, a tuple for each result."""
    rest = list(arrays)
    number = lambda out: len(out.columns or (0,)) * out.plain + 2 * (out.by_rows + out.by_columns)
    return [tuple(rest.pop(0) for _ in range(number(out))) for out in call.outs]


def moved(arrays: Any) -> int:
    """Return the bytes of arrays or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def quantised_after(run: "Run", call: Pass, by_rows: bool = True) -> tuple[list[tuple[jax.Array, ...]], list[jax.Array]]:
    """Return what a backend's `run` gives that emits no FP8, or not `by_columns` only, with its results quantised behind it."""
    emitted = lambda out: out._replace(plain=True, by_rows=out.by_rows and not by_rows, by_columns=False)
    found, sums = run(call._replace(outs=tuple(map(emitted, call.outs))))

    def forms(out: Out, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        if not (out.by_rows or out.by_columns):
            return arrays
        plain, *rows = arrays
        rows = [*rows, *(quantize(plain) if out.by_rows and by_rows else ())]
        return (*arrays[: out.plain], *rows, *(quantize(plain, transpose=True) if out.by_columns else ()))

    return [forms(out, arrays) for out, arrays in zip(call.outs, found, strict=True)], sums


Run = Callable[[Pass], tuple[list[tuple[jax.Array, ...]], list[jax.Array]]]
"""A backend's way through the rows: the results' arrays, a tuple each, and the sums."""
