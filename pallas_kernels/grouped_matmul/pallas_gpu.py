"""The grouped product for GPUs (Pallas with the Triton lowering): a program computes a tile of some rows of one group.

A group's rows are cut into tiles from its first row on, and a list of (group, first row, end) says whose tile a program has. Rows of the
next group are masked, so groups may begin anywhere; the rows may also be gathered as they are loaded. The programs of a tile's columns
start together: they share its rows, and those of a group's next tile its matrix, in the L2 cache. A program of an expert's first product
has the same columns of gate and up and leaves their SwiGLU, too; one of the gradient of its second leaves that of gate and up.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tiles as tables
from pallas_kernels import triton_dot
from pallas_kernels.compat import interpreted
from pallas_kernels.fused_layers.tile import swiglu, swiglu_gradient
from pallas_kernels.grouped_matmul import pallas, tile


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], acc: jax.Array) -> jax.Array:
    """bf16: the accumulator is the matrix unit's; fp32: three TF32 products on a GPU."""
    if a.dtype == jnp.float32 and not interpreted("gpu"):
        contract = (((axes[0],), (axes[1],)), ((), ()))
        return acc + lax.dot_general(a, b, contract, precision=lax.DotAlgorithmPreset.TF32_TF32_F32_X3, preferred_element_type=jnp.float32)
    return triton_dot.dot(a.T if axes[0] == 0 else a, b.T if axes[1] == 1 else b, acc)


def _rows(ref, token_ref, start, end, num_rows: int, columns, num_columns: int):
    """A tile of rows [start, start + num_rows), zeros from `end` on, and of `columns` (a slice) below `num_columns`.

    With `token_ref` the rows that it names, zeros where it names none.
    """
    here = start + jnp.arange(num_rows) < end
    column = columns.start + jnp.arange(columns.size)
    inside = here[:, None] & (column < num_columns)[None] if num_columns % columns.size else here[:, None]
    if token_ref is None:
        mask = jnp.broadcast_to(inside, (num_rows, columns.size))
        return triton.load(ref.at[pl.ds(start, num_rows), columns], mask=mask, other=0)
    token = triton.load(token_ref.at[pl.ds(start, num_rows)], mask=here, other=ref.shape[0])
    mask = jnp.broadcast_to(inside & (token < ref.shape[0])[:, None], (num_rows, columns.size))
    index = jnp.broadcast_to(token[:, None], mask.shape), jnp.broadcast_to(column[None], mask.shape)
    return triton.load(ref.at[index], mask=mask, other=0)


class _Place(NamedTuple):
    """Where the tile of the program-th columns lies in a matrix: from `row` and `column` on, and which of its rows and entries are own."""

    program: jax.Array
    row: jax.Array
    column: jax.Array
    rows: jax.Array
    mask: jax.Array

    def _of(self, ref, behind: int):
        num_rows, num_columns = self.mask.shape
        return ref.at[pl.ds(self.row, num_rows), pl.ds(behind + self.column, num_columns)]

    def load(self, ref, behind: int = 0) -> jax.Array:
        return triton.load(self._of(ref, behind), mask=self.mask, other=0)

    def load_weights(self, ref) -> jax.Array:
        """Each row's entry of a vector [R, 1]."""
        return triton.load(ref.at[pl.ds(self.row, self.rows.size)], mask=self.rows, other=0)[:, None]

    def store(self, ref, y: jax.Array, behind: int = 0) -> None:
        triton.store(self._of(ref, behind), y.astype(ref.dtype), mask=self.mask)


def _store(place: _Place, out_ref, y) -> None:
    place.store(out_ref, y)


def _store_gated(place: _Place, weight_ref, y_ref, hidden_ref, *gate_up) -> None:
    """The product gate | up, which the gradient wants, and the SwiGLU of its rounded numbers, times the rows' weights."""
    gate, up = (y.astype(y_ref.dtype) for y in gate_up)
    place.store(y_ref, gate)
    place.store(y_ref, up, hidden_ref.shape[1])
    place.store(hidden_ref, swiglu(gate, up, place.load_weights(weight_ref))[0])


def _store_gated_gradient(place: _Place, y_ref, weight_ref, d_ref, d_weight_ref, *gradients) -> None:
    """The gradient of gate | up for the hidden rows' gradient, and this program's part of the weights'."""
    half, weight = d_ref.shape[1] // 2, place.load_weights(weight_ref)
    of_weight = jnp.zeros(place.rows.shape, jnp.float32)
    for block, d in enumerate(gradients):
        behind = block * (half // len(gradients))
        gate_up = [place.load(y_ref, first + behind) for first in (0, half)]
        found = swiglu_gradient(*gate_up, weight * d)
        of_weight += (swiglu(*gate_up)[0] * d).sum(1)  # computed once more, and before the stores: else it spills
        for first, d_own in zip((0, half), found, strict=True):
            place.store(d_ref, d_own, first + behind)
    triton.store(d_weight_ref.at[place.program, pl.ds(place.row, place.rows.size)], of_weight, mask=place.rows)


def _product_kernel(group_ref, start_ref, end_ref, *refs, contract, size, gathered, blocks, finish):
    """`blocks` blocks of columns, as far apart as they divide the matrix; finish(place in the first, refs, their products) stores."""
    token_ref, (x_ref, w_ref, *refs) = (refs[0], refs[1:]) if gathered else (None, refs)
    num_groups, terms, num_columns = w_ref.shape[0], w_ref.shape[1 + contract], w_ref.shape[2 - contract] // blocks
    visit, width = pl.program_id(1), size.columns // blocks
    group, start, end = group_ref[visit], start_ref[visit], end_ref[visit]
    program = pl.program_id(0)
    column = program * width

    def matrix(depth, block):
        columns = pl.ds(block * num_columns + column, width)
        index: tuple[Any, Any] = (columns, depth) if contract else (depth, columns)
        limits = (column, width, num_columns), (depth.start, size.depth, terms)
        masks = []
        for axis, (first, length, most) in enumerate(limits if contract else limits[::-1]):
            if most % length:
                masks.append(jnp.expand_dims(first + jnp.arange(length) < most, 1 - axis))
        if not masks:
            return w_ref[group, *index]
        mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), tuple(at.size for at in index))
        return triton.load(w_ref.at[group, *index], mask=mask, other=0)

    def add_part(part, totals):
        depth = pl.ds(part * size.depth, size.depth)
        x = _rows(x_ref, token_ref, start, end, size.rows, depth, terms)
        return [tile.product(x, matrix(depth, block), contract, total, _dot) for block, total in enumerate(totals)]

    def store(totals):
        rows = start + jnp.arange(size.rows) < end
        inside = rows[:, None]
        if num_columns % width:
            inside &= (column + jnp.arange(width) < num_columns)[None]
        finish(_Place(program, start, column, rows, jnp.broadcast_to(inside, (size.rows, width))), *refs, *totals)

    zeros = [jnp.zeros((size.rows, width), jnp.float32)] * blocks

    @pl.when(group < num_groups)
    def _of_a_group():
        store(lax.fori_loop(0, pl.cdiv(terms, size.depth), add_part, zeros))

    @pl.when(group == num_groups)
    def _of_none():
        store(zeros)


def _products(name, finish, x, w, tiles, token, contract, row_tile, widths, *, blocks=1, others=(), per_program=False):
    """Each row times its group's matrix, contracting axis `contract` of that, as `finish` leaves it.

    A tile depends on neither rows nor groups. widths: columns of each result; others: what `finish` reads; per_program: a number for each
    row, too, from each of the programs of its columns [programs, rows].
    """
    num_rows = x.shape[0] if token is None else token.shape[0]
    terms, num_columns = w.shape[1 + contract], w.shape[2 - contract]
    size = tables.of(tables.GROUPED_GPU if x.dtype == jnp.bfloat16 else tables.GROUPED_GPU_FP32)
    group, start, end = pallas.cuts(tiles, num_rows, row_tile, size.rows)
    programs = pl.cdiv(num_columns, size.columns)
    outs = [jax.ShapeDtypeStruct((num_rows, width), x.dtype) for width in widths]
    outs += [jax.ShapeDtypeStruct((programs, num_rows), jnp.float32)] * per_program
    return pl.pallas_call(
        functools.partial(_product_kernel, contract=contract, size=size, gathered=token is not None, blocks=blocks, finish=finish),
        name=f"grouped_matmul_{name}",
        grid=(programs, group.shape[0]),
        out_shape=outs,
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        cost_estimate=_cost((x, w, *others, *outs), num_rows * terms * num_columns),
        interpret=interpreted("gpu"),
    )(group, start, end, *([] if token is None else [token]), x, w, *others)


def product(x, w, tiles, token, contract, row_tile):
    """Return each row times its group's matrix, contracting axis `contract` of that."""
    name = "dx" if contract else "forward" if token is None else "gathered"
    return _products(name, _store, x, w, tiles, token, contract, row_tile, (w.shape[2 - contract],))[0]


def gated(x, w, weight, tiles, token, row_tile):
    """Return each row times its group's matrix, gate | up [rows, 2 F], and the SwiGLU of that [rows, F] by the rows' weights [rows]."""
    how = {"blocks": 2, "others": (weight,)}
    return _products("gated", _store_gated, x, w, tiles, token, 0, row_tile, (w.shape[2], w.shape[2] // 2), **how)


def gated_gradient(dy, w, gate_up, weight, tiles, token, row_tile):
    """Return the gradients of gate | up [rows, 2 F] and of the weights [rows] for dy, that of the tokens' sums of hidden [rows, F] w."""
    # Each block is stored before the next one's gate and up are read: more columns at once do not fit in registers.
    how = {"blocks": math.gcd(4, w.shape[1]), "others": (gate_up, weight), "per_program": True}
    d, parts = _products("gated_gradient", _store_gated_gradient, dy, w, tiles, token, 1, row_tile, (2 * w.shape[1],), **how)
    return d, parts.sum(0)


def _gradient_kernel(first_ref, last_ref, *refs, size, named):
    *token_refs, x_ref, dy_ref, out_ref = refs
    x_token, dy_token = (token_refs.pop(0) if there else None for there in named)
    terms, num_columns = out_ref.shape[1:]
    group = pl.program_id(2)
    first, last = first_ref[group], last_ref[group]
    depth, columns = (pl.ds(pl.program_id(i) * n, n) for i, n in ((1, size.rows), (0, size.columns)))

    def add_part(part, total):
        start = first + part * size.depth
        x = _rows(x_ref, x_token, start, last, size.depth, depth, terms)
        dy = _rows(dy_ref, dy_token, start, last, size.depth, columns, num_columns)
        return tile.weight_gradient(x, dy, total, _dot)

    parts = lax.div(last - first + size.depth - 1, jnp.int32(size.depth))
    total = lax.fori_loop(0, parts, add_part, jnp.zeros((size.rows, size.columns), jnp.float32))
    inside = (depth.start + jnp.arange(size.rows) < terms)[:, None] & (columns.start + jnp.arange(size.columns) < num_columns)[None]
    triton.store(out_ref.at[group, depth, columns], total.astype(out_ref.dtype), mask=inside)


def weight_gradient(x, dy, tiles, tokens, row_tile):
    """Return the sum of x^T dy over each group's rows [E, D, F], zeros for a group without rows; `tokens` name rows of x and of dy."""
    num_rows = next(len(rows) for rows in (*tokens, x) if rows is not None)
    terms, num_columns, num_groups = x.shape[1], dy.shape[1], tiles.shape[0]
    size = tables.of(tables.GROUPED_GPU_GRADIENT if x.dtype == jnp.bfloat16 else tables.GROUPED_GPU_FP32)
    out = jax.ShapeDtypeStruct((num_groups, terms, num_columns), x.dtype)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, size=size, named=[token is not None for token in tokens]),
        name="grouped_matmul_dw",
        grid=(pl.cdiv(num_columns, size.columns), pl.cdiv(terms, size.rows), num_groups),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        cost_estimate=_cost((x, dy, out), num_rows * terms * num_columns),
        interpret=interpreted("gpu"),
    )(*(x[:-1] for x in pallas.ranges(tiles, num_rows, row_tile)), *(token for token in tokens if token is not None), x, dy)


def _cost(arrays, products: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=2 * products, bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays), transcendentals=0)


def _gathered(ref, index, num_columns: int, part, mask):
    """The place of rows `index` and of the part-th `num_columns` columns of a matrix, and which of it is inside and unmasked."""
    shape = (index.shape[0], num_columns)
    column = part * num_columns + jnp.arange(num_columns)
    inside = jnp.broadcast_to((mask & (index < ref.shape[0]))[:, None] & (column < ref.shape[1])[None], shape)
    at = jnp.broadcast_to(index[:, None], shape), jnp.broadcast_to(column[None], shape)
    return ref.at[at], inside


def _sum_kernel(index_ref, rows_ref, out_ref, *, size):
    """A tile of tokens, some of their columns."""
    num_tokens, num_slots = index_ref.shape
    token = pl.program_id(1) * size.rows + jnp.arange(size.rows)
    here, part = token < num_tokens, pl.program_id(0)

    def slot(a):
        row = triton.load(index_ref.at[token, jnp.full(size.rows, a)], mask=here, other=rows_ref.shape[0])
        place, inside = _gathered(rows_ref, row, size.columns, part, here)
        return triton.load(place, mask=inside, other=0)

    y = tile.combine([slot(a) for a in range(num_slots)])
    place, inside = _gathered(out_ref, token, size.columns, part, here)
    triton.store(place, y.astype(out_ref.dtype), mask=inside)


def sum_rows(rows, index):
    """See `xla.sum_rows`: each row is read once, and no token's rows are written beside each other."""
    (num_tokens, num_slots), num_columns = index.shape, rows.shape[1]
    size, out = tables.of(tables.COMBINE_GPU), jax.ShapeDtypeStruct((num_tokens, num_columns), rows.dtype)
    return pl.pallas_call(
        functools.partial(_sum_kernel, size=size),
        name="combine_groups",
        grid=(pl.cdiv(num_columns, size.columns), pl.cdiv(num_tokens, size.rows)),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=num_tokens * num_slots * num_columns,
            bytes_accessed=num_tokens * (num_slots + 1) * num_columns * rows.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpreted("gpu"),
    )(index, rows)


grouped_matmul = functools.partial(pallas.grouped_matmul, product, weight_gradient)
grouped_mlp = functools.partial(pallas.grouped_mlp, product, gated, gated_gradient, weight_gradient, sum_rows)
