"""Flash attention for TPUs: a grid of (batch row, group of key heads, tiles of queries, step of a few key blocks), the softmax in VMEM.

The rows of a tile are a few positions with all query heads of a key head, one head after another: [B, T, H K] then needs no transposition,
a head is a slice of lanes. Steps begin at the first key block that a program sees; behind its last one a block's index does not change, so
nothing moves. What is one number a row lies along the lanes in HBM; a program turns it into columns once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles
from pallas_kernels.compat import dot_cast, interpreted
from pallas_kernels.flash_attention import pallas, tile
from pallas_kernels.flash_attention.tile import KEY_BLOCK, Softmax

_LANES = 128
_MAX_SCALARS = 5 << 15
"""Entries of a page table and of the programs' ranges of key blocks at most: they are in scalar memory."""


class _Layout(NamedTuple):
    """A program's part: positions of a tile, query heads of a key head, key heads, tiles, key blocks of a step; sizes of heads.

    `together`: key blocks that the softmax takes in at once.
    """

    positions: int
    repeat: int
    group: int
    tiles: int
    blocks: int
    key_size: int
    value_size: int
    together: int = 1

    @property
    def rows(self) -> int:
        return self.positions * self.repeat

    @property
    def tokens(self) -> int:
        return self.positions * self.tiles


def _layout(q, key_pages, value_pages, choice: tiles.FlashTpu, num_blocks: int, aligned: bool) -> _Layout:
    (batch, num_tokens, heads, key_size), (groups, value_size) = q.shape, value_pages.shape[2:]
    repeat = heads // groups
    positions = max(1, choice.rows // repeat)
    if not interpreted("tpu") and (key_size % _LANES or value_size % _LANES or positions % 8 or positions * repeat % _LANES):
        raise NotImplementedError(
            f"head sizes {key_size} and {value_size}, and {positions} positions of {repeat} heads, are not whole tiles of lanes"
        )
    num_tiles = min(choice.tiles, pl.cdiv(num_tokens, positions))
    programs = batch * pl.cdiv(num_tokens, positions * num_tiles)
    most = max(1, groups // choice.cores) if programs % choice.cores else groups  # every core gets as many programs as the others
    group = next(d for d in range(min(most, choice.heads), 0, -1) if groups % d == 0)
    blocks = min(choice.wide if not aligned else choice.blocks if num_tiles > 1 else choice.decode_blocks, num_blocks)
    return _Layout(positions, repeat, group, num_tiles, blocks, key_size, value_size, 1 if aligned else blocks)


def _words() -> tile.Words:
    """Numbers of a row are columns, as wide as the lanes where values are so too."""
    total = _interpreted_total if interpreted("tpu") else (lambda x: x.sum(-1, keepdims=True))
    return tile.Words(largest=lambda x: x.max(-1, keepdims=True), total=total, spread=lambda x, beside: _wide(x, beside.shape[-1]))


def _interpreted_total(x: jax.Array) -> jax.Array:
    """The sum of each row of some key blocks, as a column."""
    return tile.row_sum(x.reshape(*x.shape[:-1], -1, KEY_BLOCK)).sum(-1, keepdims=True)


def _wide(x: jax.Array, width: int) -> jax.Array:
    """Columns beside an array of this width, a multiple of theirs; a single one is broadcast anyway."""
    return x if x.shape[-1] in (1, width) else jnp.tile(x, (*(1,) * (x.ndim - 1), width // x.shape[-1]))


def _head(ref, g: int, group: int) -> slice:
    """The lanes of head g of the `group` that a block's lanes hold."""
    size = ref.shape[2] // group
    return slice(g * size, (g + 1) * size)


def _read_rows(ref, n: int, layout: _Layout) -> jax.Array:
    """Tile n of a block [1, tokens, heads x size], as [group, R, size]."""
    at, heads = slice(n * layout.positions, (n + 1) * layout.positions), layout.group * layout.repeat
    head = lambda g, r: ref[0, at, _head(ref, g * layout.repeat + r, heads)]
    return jnp.stack([jnp.concatenate([head(g, r) for r in range(layout.repeat)]) for g in range(layout.group)])


def _write_rows(ref, n: int, layout: _Layout, x: jax.Array) -> None:
    at, heads = slice(n * layout.positions, (n + 1) * layout.positions), layout.group * layout.repeat
    for h in range(heads):
        group, first = h // layout.repeat, h % layout.repeat * layout.positions
        ref[0, at, _head(ref, h, heads)] = x[group, first : first + layout.positions].astype(ref.dtype)


def _read_page(ref, layout: _Layout) -> jax.Array:
    """A block [1, KEY_BLOCK, group x size] as [group, KEY_BLOCK, size]."""
    return jnp.stack([ref[0, :, _head(ref, g, layout.group)] for g in range(layout.group)])


def _read_pages(refs, layout: _Layout) -> jax.Array:
    """Blocks that the softmax takes in at once, as [group, keys, size]."""
    return jnp.concatenate([_read_page(ref, layout) for ref in refs], axis=1)


def _column(row: jax.Array) -> jax.Array:
    """[1, R] -> [R, KEY_BLOCK]: as wide as scores."""
    return jnp.broadcast_to(row, (KEY_BLOCK, row.shape[1])).T


def _step(first_ref, last_ref, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The first key block of this step, and whether the program sees any of it."""
    at = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    block = first_ref[at] + pl.program_id(3) * blocks
    return block, block < last_ref[at]


def _first_step():
    return pl.when(pl.program_id(3) == 0)


def _last_step():
    return pl.when(pl.program_id(3) == pl.num_programs(3) - 1)


def _forward_kernel(first_ref, last_ref, *refs, layout: _Layout):
    (*_, q_ref), refs = refs[: -2 * layout.blocks - 9], refs[-2 * layout.blocks - 9 :]  # perhaps a page table in front
    keys, values, refs = refs[: layout.blocks], refs[layout.blocks : 2 * layout.blocks], refs[2 * layout.blocks :]
    start_in, stop_in, o_ref, log_ref, start_ref, stop_ref, *softmax_refs = refs
    block, live = _step(first_ref, last_ref, layout.blocks)

    @_first_step()
    def _first():
        for n in range(layout.tiles):
            start_ref[n], stop_ref[n] = _column(start_in[0, n]), _column(stop_in[0, n])
        for ref, value in zip(softmax_refs, (tile.UNSEEN, 0.0, 0.0), strict=True):
            ref[...] = jnp.full(ref.shape, value, jnp.float32)

    @pl.when(live)
    def _live():
        for n in range(layout.tiles):
            q, softmax = _read_rows(q_ref, n, layout), Softmax(*(ref[n] for ref in softmax_refs))
            width = layout.together * KEY_BLOCK
            bounds = _wide(start_ref[n], width), _wide(stop_ref[n], width)
            for i in range(0, layout.blocks, layout.together):
                own = slice(i, i + layout.together)
                scores = tile.scores(q, _read_pages(keys[own], layout), tile.seen(*bounds, (block + i) * KEY_BLOCK, size=width))
                softmax = tile.add_block(softmax, scores, _read_pages(values[own], layout), _words())
            for ref, x in zip(softmax_refs, softmax, strict=True):
                ref[n] = x

    @_last_step()
    def _last():
        for n in range(layout.tiles):
            out, log_total = tile.finish(Softmax(*(ref[n] for ref in softmax_refs)), _words())
            _write_rows(o_ref, n, layout, out)
            for g in range(layout.group):
                log_ref[0, g, n] = jnp.broadcast_to(log_total[g], (layout.rows, KEY_BLOCK)).T[:1]


def _query_kernel(first_ref, last_ref, q_ref, *refs, layout: _Layout):
    """The gradient of tiles of query rows."""
    keys, values, refs = refs[: layout.blocks], refs[layout.blocks : 2 * layout.blocks], refs[2 * layout.blocks :]
    *rows_in, d_out_ref, log_in, delta_in, out_ref, start_ref, stop_ref, log_ref, delta_ref, dq_ref = refs
    block, live = _step(first_ref, last_ref, layout.blocks)

    @_first_step()
    def _first():
        for n in range(layout.tiles):
            for ref, row in zip((start_ref, stop_ref), rows_in, strict=True):
                ref[n] = _column(row[0, n])
            for ref, row in ((log_ref, log_in), (delta_ref, delta_in)):
                for g in range(layout.group):
                    ref[n, g] = _column(row[0, g, n])
        dq_ref[...] = jnp.zeros(dq_ref.shape, jnp.float32)

    @pl.when(live)
    def _live():
        for n in range(layout.tiles):
            q, d_out = _read_rows(q_ref, n, layout), _read_rows(d_out_ref, n, layout)
            k, v, width = _read_pages(keys, layout), _read_pages(values, layout), layout.blocks * KEY_BLOCK
            start, stop, log_total, delta = (_wide(ref[n], width) for ref in (start_ref, stop_ref, log_ref, delta_ref))
            scores = tile.scores(q, k, tile.seen(start, stop, block * KEY_BLOCK, size=width))
            _, d_scores = tile.gradients(scores, tile.product(d_out, v, (1, 1)), log_total, delta)
            dq_ref[n] = tile.product(dot_cast(d_scores, k.dtype), k, (1, 0), dq_ref[n])

    @_last_step()
    def _last():
        for n in range(layout.tiles):
            _write_rows(out_ref, n, layout, layout.key_size**-0.5 * dq_ref[n])


def _key_value_kernel(first_ref, last_ref, q_ref, key_ref, value_ref, *refs, layout: _Layout):
    """The gradients of a block of keys and values: a step has a few tiles of the query rows that see it. The scores are transposed."""
    start_ref, stop_ref, d_out_ref, log_ref, delta_ref, key_out, value_out, dk_ref, dv_ref = refs
    (_, live), block = _step(first_ref, last_ref, 1), pl.program_id(2)

    @_first_step()
    def _first():
        dk_ref[...], dv_ref[...] = jnp.zeros(dk_ref.shape, jnp.float32), jnp.zeros(dv_ref.shape, jnp.float32)

    @pl.when(live)
    def _live():
        k, v = _read_page(key_ref, layout), _read_page(value_ref, layout)
        q, d_out = (jnp.concatenate([_read_rows(ref, n, layout) for n in range(layout.tiles)], axis=1) for ref in (q_ref, d_out_ref))
        beside = lambda row: jnp.concatenate([row(n) for n in range(layout.tiles)], axis=-1)
        start, stop = (beside(lambda n, ref=ref: ref[0, n]) for ref in (start_ref, stop_ref))
        log_total, delta = (beside(lambda n, ref=ref: ref[0, :, n]) for ref in (log_ref, delta_ref))
        scores = tile.scores(k, q, tile.seen(start, stop, block * KEY_BLOCK, axis=0))
        both = tile.gradients(scores, tile.product(v, d_out, (1, 1)), log_total, delta)
        weights, d_scores = (dot_cast(x, q.dtype) for x in both)
        dk_ref[...] = tile.product(d_scores, q, (1, 0), dk_ref[...])
        dv_ref[...] = tile.product(weights, d_out, (1, 0), dv_ref[...])

    @_last_step()
    def _last():
        for g in range(layout.group):
            key_out[0, :, _head(key_out, g, layout.group)] = (layout.key_size**-0.5 * dk_ref[g]).astype(key_out.dtype)
            value_out[0, :, _head(value_out, g, layout.group)] = dv_ref[g].astype(value_out.dtype)


def _whole(x: jax.Array, tokens: int) -> jax.Array:
    """Pad [B, T, ...] to whole programs."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tokens), *((0, 0),) * (x.ndim - 2)))


def _bound_rows(x: jax.Array, layout: _Layout) -> jax.Array:
    """Bounds [B, T] -> [B, tiles, 1, R]."""
    x = _whole(x, layout.tokens).reshape(x.shape[0], -1, 1, layout.positions)
    return jnp.tile(x, (1, 1, 1, layout.repeat))


def _head_rows(x: jax.Array, layout: _Layout, groups: int) -> jax.Array:
    """Numbers of heads [B, T, H] -> [B, G, tiles, 1, R]."""
    x = _whole(x, layout.tokens).reshape(x.shape[0], -1, layout.positions, groups, layout.repeat)
    return x.transpose(0, 3, 1, 4, 2).reshape(x.shape[0], groups, -1, 1, layout.rows)


class _Specs:
    """Block specs: `tokens` of heads, `bounds` and `numbers` as rows, pages; index(b, i, s, first, last) says which tiles a step has."""

    def __init__(self, layout: _Layout, index):
        at, tiled = layout.repeat * layout.group, lambda b, g, i, s, first, last, *_: index(b, i, s, first, last)
        self.layout = layout
        self.tokens = lambda size: pl.BlockSpec((1, layout.tokens, at * size), lambda b, g, *i: (b, tiled(b, g, *i), g))
        self.bounds = pl.BlockSpec((1, layout.tiles, 1, layout.rows), lambda b, g, *i: (b, tiled(b, g, *i), 0, 0))
        self.numbers = pl.BlockSpec((1, layout.group, layout.tiles, 1, layout.rows), lambda b, g, *i: (b, g, tiled(b, g, *i), 0, 0))

    def page(self, size: int, page_of) -> pl.BlockSpec:
        """The page that page_of(b, i, s, first, last, *table) names."""
        return pl.BlockSpec((1, KEY_BLOCK, self.layout.group * size), lambda b, g, *i: (page_of(b, *i), 0, g))


def _pages_of_step(layout: _Layout, programs: int, num_blocks: int):
    """For each key block of a step the function that names its page; the last that the program sees stays behind the end."""

    def page(i, b, p, s, first, last, *table):
        begin, end = first[b * programs + p], last[b * programs + p]
        turn = jnp.minimum(s, lax.div(jnp.maximum(end - begin - 1 - i, 0), jnp.int32(layout.blocks)))
        block = jnp.clip(begin + turn * layout.blocks + i, 0, jnp.maximum(end - 1, 0))
        return table[0][b * num_blocks + block] if table else b * num_blocks + block

    return [functools.partial(page, i) for i in range(layout.blocks)]


def _flat(x: jax.Array) -> jax.Array:
    """[..., heads, size] -> [..., heads x size]."""
    return x.reshape(*x.shape[:2], -1)


def _call(kernel, name: str, layout: _Layout, grid, scalars, specs, arrays, outs, scratch, choice: tiles.FlashTpu, flops: float) -> Any:
    """Run a kernel; specs are those of the arrays, then those of `outs`."""
    return pl.pallas_call(
        functools.partial(kernel, layout=layout),
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=specs[: len(arrays)],
            out_specs=specs[len(arrays) :],
            scratch_shapes=scratch,
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=choice.vmem,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(flops), bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outs)), transcendentals=0
        ),
        interpret=interpreted("tpu"),
    )(*scalars, *arrays)


def _programs(start, stop, layout: _Layout):
    """How many programs share a row's queries, and the first and one past the last key block of each, [B * programs]."""
    bounds = (_whole(x, layout.tokens).reshape(x.shape[0], -1, layout.tokens) for x in (start, stop))
    first, last = tile.block_range(*bounds)
    return first.shape[1], first.reshape(-1), last.reshape(-1)


def _forward(q, key_pages, value_pages, page_table, start, stop, aligned):
    choice, (batch, num_tokens, heads, _), groups = tiles.of(tiles.FLASH_TPU), q.shape, key_pages.shape[2]
    num_blocks = key_pages.shape[0] // batch if page_table is None else page_table.shape[1]
    layout = _layout(q, key_pages, value_pages, choice, num_blocks, aligned)
    programs, first, last = _programs(start, stop, layout)
    # Without pages the gradient has a range for each key block, too.
    num_scalars = 2 * first.size + page_table.size if page_table is not None else 2 * batch * max(programs, num_blocks)
    if num_scalars > _MAX_SCALARS:
        raise NotImplementedError(f"{num_scalars} entries of page tables and ranges are more than scalar memory holds: {_MAX_SCALARS}")
    specs = _Specs(layout, lambda b, i, s, first, last: i)
    pages = _pages_of_step(layout, programs, num_blocks)
    rows, lanes = (layout.tiles, layout.group, layout.rows), _LANES if layout.value_size == _LANES else 1
    column = pltpu.VMEM((layout.tiles, layout.rows, KEY_BLOCK), jnp.int32)
    out, log_total = _call(
        _forward_kernel,
        "flash_forward",
        layout,
        (batch, groups // layout.group, programs, pl.cdiv(num_blocks, layout.blocks)),
        (first, last, *(() if page_table is None else (page_table.reshape(-1),))),
        [
            specs.tokens(layout.key_size),
            *(specs.page(size, page) for size in (layout.key_size, layout.value_size) for page in pages),
            *(specs.bounds, specs.bounds, specs.tokens(layout.value_size), specs.numbers),
        ],
        [
            _flat(_whole(q, layout.tokens)),
            *(_flat(x) for x in (key_pages, value_pages) for _ in pages),
            *(_bound_rows(x, layout) for x in (start, stop)),
        ],
        [
            jax.ShapeDtypeStruct((batch, programs * layout.tokens, heads * layout.value_size), q.dtype),
            jax.ShapeDtypeStruct((batch, groups, programs * layout.tiles, 1, layout.rows), jnp.float32),
        ],
        [column, column, *(pltpu.VMEM((*rows, width), jnp.float32) for width in (lanes, lanes, layout.value_size))],
        choice,
        2 * q.size * num_blocks * KEY_BLOCK * (1 + layout.value_size / layout.key_size),
    )
    log_total = log_total.reshape(batch, groups, -1, layout.repeat, layout.positions).transpose(0, 2, 4, 1, 3)
    log_total = log_total.reshape(batch, -1, heads)
    return out[:, :num_tokens].reshape(batch, num_tokens, heads, -1), log_total[:, :num_tokens]


def _backward(q, key_pages, value_pages, start, stop, d_out, log_total, delta):
    choice, (batch, num_tokens, _, key_size), groups = tiles.of(tiles.FLASH_TPU_BACKWARD), q.shape, key_pages.shape[2]
    num_blocks = key_pages.shape[0] // batch
    layout = _layout(q, key_pages, value_pages, choice, num_blocks, aligned=False)
    programs, *ranges = _programs(start, stop, layout)
    rows = [_bound_rows(x, layout) for x in (start, stop)]
    numbers = [_head_rows(x, layout, groups) for x in (log_total, delta)]
    queries, d_out, keys, values = (_flat(x) for x in (_whole(q, layout.tokens), _whole(d_out, layout.tokens), key_pages, value_pages))
    flops = 2 * q.size * num_blocks * KEY_BLOCK * (2 + layout.value_size / key_size)
    specs, pages = _Specs(layout, lambda b, i, s, first, last: i), _pages_of_step(layout, programs, num_blocks)
    of_row, of_head = (layout.tiles, layout.rows), (layout.tiles, layout.group, layout.rows)
    scratch = [pltpu.VMEM((*of_row, KEY_BLOCK), jnp.int32)] * 2 + [pltpu.VMEM((*of_head, KEY_BLOCK), jnp.float32)] * 2
    (dq,) = _call(
        _query_kernel,
        "flash_dq",
        layout,
        (batch, groups // layout.group, programs, pl.cdiv(num_blocks, layout.blocks)),
        ranges,
        [
            specs.tokens(key_size),
            *(specs.page(size, page) for size in (key_size, layout.value_size) for page in pages),
            *(specs.bounds, specs.bounds, specs.tokens(layout.value_size), specs.numbers, specs.numbers, specs.tokens(key_size)),
        ],
        [queries, *([keys] * len(pages)), *([values] * len(pages)), *rows, d_out, *numbers],
        [jax.ShapeDtypeStruct(queries.shape, q.dtype)],
        [*scratch, pltpu.VMEM((*of_head, key_size), jnp.float32)],
        choice,
        flops,
    )
    ranges = pallas.query_ranges(start, stop, layout.tokens, num_blocks)

    def tiles_of_step(b, j, s, first, last):
        begin, end = first[b * num_blocks + j], last[b * num_blocks + j]
        return jnp.clip(begin + s, 0, jnp.maximum(end - 1, 0))

    specs, own = _Specs(layout, tiles_of_step), lambda b, j, s, first, last: b * num_blocks + j
    page = [specs.page(size, own) for size in (key_size, layout.value_size)]
    dk, dv = _call(
        _key_value_kernel,
        "flash_dkv",
        layout,
        (batch, groups // layout.group, num_blocks, programs),
        [x.reshape(-1) for x in ranges],
        [
            *(specs.tokens(key_size), *page, specs.bounds, specs.bounds),
            *(specs.tokens(layout.value_size), specs.numbers, specs.numbers, *page),
        ],
        [queries, keys, values, *rows, d_out, *numbers],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)],
        [pltpu.VMEM((layout.group, KEY_BLOCK, size), jnp.float32) for size in (key_size, layout.value_size)],
        choice,
        4 * flops / 3,
    )
    return dq[:, :num_tokens].reshape(q.shape), dk.reshape(key_pages.shape), dv.reshape(value_pages.shape)


flash_attention = functools.partial(pallas.flash_attention, _forward, _backward)
flash_attention_paged = functools.partial(pallas.flash_attention_paged, _forward)
