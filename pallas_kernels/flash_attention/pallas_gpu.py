"""Flash attention for GPUs (Pallas with the Triton lowering): a program has a tile of query rows and loops over the key blocks they see.

The rows of a tile are a few positions with all query heads of a key head. q, k, v and o are read and written where they lie.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tiles, triton_dot
from pallas_kernels.compat import dot_cast, dot_operand, interpreted
from pallas_kernels.flash_attention import pallas, tile
from pallas_kernels.flash_attention.tile import KEY_BLOCK


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0), acc: jax.Array | None = None) -> jax.Array:
    """The product of a program's tiles: which addition the matrix unit's accumulator takes is written, not left to the compiler."""
    a, b = dot_operand(a), dot_operand(b)
    a, b = a.T if axes[0] == 0 else a, b.T if axes[1] == 1 else b
    if a.dtype == jnp.bfloat16 or interpreted("gpu"):
        return triton_dot.dot(a, b, acc)
    y = lax.dot(a, b, precision=lax.DotAlgorithmPreset.TF32_TF32_F32_X3, preferred_element_type=jnp.float32)
    return y if acc is None else acc + y


def _exp2(x: jax.Array) -> jax.Array:
    """2**x by the chip's own instruction; what would be subnormal is 0."""
    (y,) = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=r,r", pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)]
    )
    return y


def _words() -> tile.Words:
    return tile.Words(_dot) if interpreted("gpu") else tile.Words(_dot, total=lambda x: x.sum(-1), exp2=_exp2)


class _Rows:
    """The rows of a tile: `position` and `head` of each [R], and which are not padding; reads and writes arrays [T, heads, ...]."""

    def __init__(self, index: jax.Array, num_rows: int, q_ref):
        num_tokens, repeat, _ = q_ref.shape
        positions, row = num_rows // repeat, jnp.arange(num_rows)
        self.position, self.head = index * positions + lax.div(row, jnp.int32(repeat)), lax.rem(row, jnp.int32(repeat))
        self.inside = self.position < num_tokens
        if positions * repeat < num_rows:
            self.inside &= row < positions * repeat
        self.readable = jnp.minimum(self.position, num_tokens - 1)

    def _at(self, position: jax.Array, size: int) -> tuple[jax.Array, ...]:
        shape = (position.shape[0], size)
        spread = lambda x: jnp.broadcast_to(x[:, None], shape)
        return spread(position), spread(self.head), jnp.broadcast_to(jnp.arange(size), shape)

    def load(self, ref) -> jax.Array:
        """[R, size] of [T, heads, size]; padding is a copy of another row."""
        return triton.load(ref.at[self._at(self.readable, ref.shape[2])])

    def store(self, ref, x: jax.Array) -> None:
        """Write [R, size] into [T, heads, size]."""
        at = self._at(self.position, x.shape[1])
        triton.store(ref.at[at], x.astype(ref.dtype), mask=jnp.broadcast_to(self.inside[:, None], x.shape))

    def load_column(self, ref) -> jax.Array:
        """[R] of [T, heads]."""
        return triton.load(ref.at[self.readable, self.head])

    def store_column(self, ref, x: jax.Array) -> None:
        """Write [R] into [T, heads]."""
        triton.store(ref.at[self.position, self.head], x, mask=self.inside)

    def bounds(self, start_ref, stop_ref) -> tuple[jax.Array, jax.Array]:
        """Start and stop [R]; padding sees no key."""
        start, stop = (triton.load(ref.at[self.readable]) for ref in (start_ref, stop_ref))
        return start, jnp.where(self.inside, stop, 0)


def _query_tile(num_tiles: int) -> jax.Array:
    """A program's tile of rows; late ones, which see the most keys under a causal mask, come first."""
    return num_tiles - 1 - lax.rem(pl.program_id(0), jnp.int32(num_tiles))


def _key_blocks(bounds, table, key_ref, value_ref, add, carry, keys: int = KEY_BLOCK):
    """The carry after add(carry, k, v, seen) for the blocks of so many keys that the rows see, in order.

    `table` holds the page table's row, if there is one.
    """
    (start, stop), parts = bounds, KEY_BLOCK // keys

    def turn(block, carry):
        page, part = lax.div(block, jnp.int32(parts)), lax.rem(block, jnp.int32(parts))
        page, part = table[0][page] if table else page, pl.ds(part * keys, keys)
        seen = tile.seen(start[:, None], stop[:, None], block * keys, size=keys)
        return add(carry, key_ref[page, part, :], value_ref[page, part, :], seen)

    return lax.fori_loop(*tile.block_range(start, stop, size=keys), turn, carry)


def _forward_kernel(start_ref, stop_ref, q_ref, key_ref, value_ref, *refs, num_rows, num_tiles):
    """refs: perhaps a row of the page table, then outputs and their log-sum-exps."""
    *table, o_ref, log_ref = refs
    rows = _Rows(_query_tile(num_tiles), num_rows, q_ref)
    q, words = rows.load(q_ref), _words()

    def add(softmax, k, v, seen):
        return tile.add_block(softmax, tile.scores(q, k, seen, _dot), v, words)

    bounds = rows.bounds(start_ref, stop_ref)
    softmax = _key_blocks(bounds, table, key_ref, value_ref, add, tile.empty((num_rows,), value_ref.shape[2]))
    out, log_total = tile.finish(softmax, words)
    rows.store(o_ref, out)
    rows.store_column(log_ref, log_total)


def _query_kernel(start_ref, stop_ref, q_ref, key_ref, value_ref, d_out_ref, log_ref, delta_ref, dq_ref, *, num_rows, num_tiles, keys):
    """The gradient of a tile of query rows."""
    rows = _Rows(_query_tile(num_tiles), num_rows, q_ref)
    q, d_out = rows.load(q_ref), rows.load(d_out_ref)
    log_total, delta = (rows.load_column(ref)[:, None] for ref in (log_ref, delta_ref))

    def add(dq, k, v, seen):
        _, d_scores = tile.gradients(tile.scores(q, k, seen, _dot), _dot(d_out, v, (1, 1)), log_total, delta, _words())
        return _dot(dot_cast(d_scores, k.dtype), k, (1, 0), dq)

    bounds = rows.bounds(start_ref, stop_ref)
    dq = _key_blocks(bounds, [], key_ref, value_ref, add, jnp.zeros(q.shape, jnp.float32), keys)
    rows.store(dq_ref, q.shape[1] ** -0.5 * dq)


def _key_value_kernel(
    first_ref, last_ref, start_ref, stop_ref, q_ref, key_ref, value_ref, d_out_ref, log_ref, delta_ref, dk_ref, dv_ref, *, num_rows
):
    """The gradients of a block of keys and values, from the tiles of query rows that see it; the scores are transposed."""
    k, v, block = key_ref[...], value_ref[...], lax.rem(pl.program_id(0), jnp.int32(first_ref.shape[0]))
    first_key = block * k.shape[0]

    def turn(index, gradients):
        dk, dv = gradients
        rows = _Rows(index, num_rows, q_ref)
        q, d_out = rows.load(q_ref), rows.load(d_out_ref)
        log_total, delta = (rows.load_column(ref)[None] for ref in (log_ref, delta_ref))
        start, stop = rows.bounds(start_ref, stop_ref)
        scores = tile.scores(k, q, tile.seen(start[None], stop[None], first_key, axis=0, size=k.shape[0]), _dot)
        both = tile.gradients(scores, _dot(v, d_out, (1, 1)), log_total, delta, _words())
        weights, d_scores = (dot_cast(x, q.dtype) for x in both)
        return _dot(d_scores, q, (1, 0), dk), _dot(weights, d_out, (1, 0), dv)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = lax.fori_loop(first_ref[block], last_ref[block], turn, zeros)
    dk_ref[...], dv_ref[...] = (k.shape[1] ** -0.5 * dk).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


def _check(q, key_pages, value_pages) -> None:
    for size in (key_pages.shape[3], value_pages.shape[3]):
        if size & (size - 1) or size < 16:
            raise NotImplementedError(f"a head size of {size} is not a power of two of at least 16")
    repeat = q.shape[2] // key_pages.shape[2]
    if repeat > min(_choice(q, tables).rows for tables in (_FORWARD, _QUERY, _KEY_VALUE)):
        raise NotImplementedError(f"{repeat} query heads of a key head are more than a tile's rows")


_FORWARD = tiles.FLASH_GPU, tiles.FLASH_GPU_FP32
_QUERY = tiles.FLASH_GPU_QUERY, tiles.FLASH_GPU_FP32_QUERY
_KEY_VALUE = tiles.FLASH_GPU_KEY_VALUE, tiles.FLASH_GPU_FP32_KEY_VALUE


def _choice(q, tables) -> tiles.FlashGpu:
    narrow, fp32 = tables
    return tiles.of(narrow if dot_operand(q).dtype == jnp.bfloat16 or interpreted("gpu") else fp32)


class _Specs:
    """Block specs of a program (batch row, key head, index): of bounds [B, T], tokens [B, T, G, H/G, ...], tables [B, n] and pages."""

    def __init__(self, q, programs: int):
        self.num_tokens, self.repeat = q.shape[1], q.shape[3]
        groups, quotient = q.shape[2], lambda p, n: (lax.div(p, jnp.int32(n)), lax.rem(p, jnp.int32(n)))

        def split(p):
            head, index = quotient(p, programs)
            return *quotient(head, groups), index

        self.at = lambda index: lambda p: index(*split(p))
        self.bounds = self.table(self.num_tokens)

    def table(self, size: int) -> pl.BlockSpec:
        """A row of [B, size]."""
        return pl.BlockSpec((None, size), self.at(lambda b, g, i: (b, 0)))

    def tokens(self, *size: int) -> pl.BlockSpec:
        """The tokens' heads that read one key head."""
        shape = (None, self.num_tokens, None, self.repeat, *size)
        return pl.BlockSpec(shape, self.at(lambda b, g, i: (b, 0, g, 0, *(0 for _ in size))))

    def pages(self, x, num: int | None) -> pl.BlockSpec:
        """The `num` pages of a batch row, or all of them."""
        shape = (num or x.shape[0], KEY_BLOCK, None, x.shape[3])
        return pl.BlockSpec(shape, self.at(lambda b, g, i: (b if num else 0, 0, g, 0)))

    def keys(self, x, num: int, size: int) -> pl.BlockSpec:
        """Part `index` of a batch row's `num` pages, so many keys."""
        parts = KEY_BLOCK // size
        page = lambda i: (lax.div(i, jnp.int32(parts)), lax.rem(i, jnp.int32(parts)))
        at = lambda b, g, page, part: (b * num + page, part, g, 0)
        return pl.BlockSpec((None, size, None, x.shape[3]), self.at(lambda b, g, i: at(b, g, *page(i))))


def _call(kernel, name: str, programs: int, specs, arrays, outs, choice: tiles.FlashGpu, flops: float):
    """Run a kernel of so many programs; specs are those of the arrays, then those of `outs`."""
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(programs,),
        in_specs=specs[: len(arrays)],
        out_specs=specs[len(arrays) :],
        out_shape=outs,
        compiler_params=triton.CompilerParams(num_warps=choice.warps, num_stages=choice.stages),
        cost_estimate=pl.CostEstimate(
            flops=int(flops), bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outs)), transcendentals=0
        ),
        interpret=interpreted("gpu"),
    )(*arrays)


def _by_key_head(x: jax.Array, groups: int) -> jax.Array:
    """[B, T, H, ...] -> [B, T, G, H/G, ...]."""
    return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])


def _forward(q, key_pages, value_pages, page_table, start, stop, aligned):
    del aligned  # a tile of more keys does not fit
    _check(q, key_pages, value_pages)
    (batch, num_tokens, heads, key_size), (groups, value_size) = q.shape, value_pages.shape[2:]
    choice, q = _choice(q, _FORWARD), _by_key_head(q, groups)
    num_tiles, num = pl.cdiv(num_tokens, choice.rows // q.shape[3]), None if page_table is not None else key_pages.shape[0] // batch
    specs, tables = _Specs(q, num_tiles), [] if page_table is None else [page_table]
    out = jax.ShapeDtypeStruct((*q.shape[:4], value_size), q.dtype)
    result = _call(
        functools.partial(_forward_kernel, num_rows=choice.rows, num_tiles=num_tiles),
        "flash_forward",
        batch * groups * num_tiles,
        [
            *(specs.bounds, specs.bounds, specs.tokens(key_size), specs.pages(key_pages, num), specs.pages(value_pages, num)),
            *(specs.table(x.shape[1]) for x in tables),
            *(specs.tokens(value_size), specs.tokens()),
        ],
        (start, stop, q, key_pages, value_pages, *tables),
        (out, jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)),
        choice,
        2 * q.size * (key_size + value_size),
    )
    return result[0].reshape(batch, num_tokens, heads, value_size), result[1]


def _backward(q, key_pages, value_pages, start, stop, d_out, log_total, delta):
    shape, (batch, num_tokens), (groups, value_size) = q.shape, q.shape[:2], value_pages.shape[2:]
    q, d_out, delta = (_by_key_head(x, groups) for x in (q, d_out, delta))
    arrays, num = (start, stop, q, key_pages, value_pages, d_out, log_total, delta), key_pages.shape[0] // batch
    choice = _choice(q, _QUERY)
    num_tiles = pl.cdiv(num_tokens, choice.rows // q.shape[3])
    specs = _Specs(q, num_tiles)
    tokens = lambda specs: (specs.tokens(value_size), specs.tokens(), specs.tokens())
    (dq,) = _call(
        functools.partial(_query_kernel, num_rows=choice.rows, num_tiles=num_tiles, keys=choice.keys),
        "flash_dq",
        batch * groups * num_tiles,
        [
            *(specs.bounds, specs.bounds, specs.tokens(shape[3]), specs.pages(key_pages, num), specs.pages(value_pages, num)),
            *(*tokens(specs), specs.tokens(shape[3])),
        ],
        arrays,
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        choice,
        2 * q.size * (2 * shape[3] + value_size),
    )
    choice = _choice(q, _KEY_VALUE)
    num_parts = num * KEY_BLOCK // choice.keys
    specs = _Specs(q, num_parts)
    ranges = pallas.query_ranges(start, stop, choice.rows // q.shape[3], num_parts, choice.keys)
    part = [specs.keys(x, num, choice.keys) for x in (key_pages, value_pages)]
    dk, dv = _call(
        functools.partial(_key_value_kernel, num_rows=choice.rows),
        "flash_dkv",
        batch * groups * num_parts,
        [
            *(specs.table(num_parts), specs.table(num_parts), specs.bounds, specs.bounds, specs.tokens(shape[3]), *part),
            *(*tokens(specs), *part),
        ],
        (*ranges, *arrays),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key_pages, value_pages)],
        choice,
        4 * q.size * (shape[3] + value_size),
    )
    return dq.reshape(shape), dk, dv


flash_attention = functools.partial(pallas.flash_attention, _forward, _backward)
flash_attention_paged = functools.partial(pallas.flash_attention_paged, _forward)
