"""Flash attention: right in value and gradient, and one set of bits for a query in training, prefill and decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import GRID
from pallas_kernels.flash_attention import flash_attention, flash_attention_paged, reference
from pallas_kernels.flash_attention.cases import TEST_CASES, CacheCase, Case, Inputs, cache_inputs, inputs
from tests.pallas_kernels.programs import (
    DTYPES,
    ON_GPU,
    in_float64,
    jit,
    jit_for_values,
    jit_of,
    modes_and_dtypes,
    on_host,
    random_like,
    with_gradients,
)
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits

MODES = {
    "fast": {"aligned": False, "implementation": "xla"},
    "aligned": {"aligned": True, "implementation": "xla"},
    "pallas_tpu fast": {"aligned": False, "implementation": "pallas_tpu"},
    "pallas_tpu": {"aligned": True, "implementation": "pallas_tpu"},
    "pallas_gpu": {"aligned": True, "implementation": "pallas_gpu"},
}
"""How the op is computed; kernels are interpreted here: what they do not write, or read from outside of an array, is NaN there."""
KERNELS = ["pallas_tpu", "pallas_gpu"]
exact_modes_and_dtypes = pytest.mark.parametrize(("mode", "dtype"), modes_and_dtypes(["aligned", *KERNELS]))
PROMPT = Case(2, 333, 4, 2, 16, V=32)
CACHE = 512
QUICK_IN_BF16 = {"pallas_tpu fast": "segments", "pallas_tpu": "odd_length", "pallas_gpu": "segments"}
"""Interpreted kernels differ from plain JAX in their loads and stores, not in their roundings: one case by default."""
RELEASED = Case(2, 384, 16, 4, 128, segments=True)
"""Heads as the released models have them: a GPU's tiles as they are there."""
REFUSED_BY_GPUS = {"heads_not_power_of_two": "head size of 8", "value_size_differs": "head size of 24"}


@functools.cache
def forward(mode):
    """Return the op as a program."""
    return jit_of(mode)(functools.partial(flash_attention, **MODES[mode]))


@functools.cache
def paged(mode):
    """Return the op over pages as a program."""
    return jit_of(mode)(functools.partial(flash_attention_paged, **MODES[mode]))


def truth(differentiable, start, stop, cotangent):
    """Return the reference's value and gradients."""
    return with_gradients(lambda q, k, v: reference.flash_attention(q, k, v, start, stop))(differentiable, cotangent)


@functools.cache
def both(mode, compiled=jit):
    """Return value and gradients as a program of (q, k, v), bounds and cotangent."""
    f = lambda inputs, start, stop, cotangent: with_gradients(lambda q, k, v: flash_attention(q, k, v, start, stop, **MODES[mode]))(
        inputs, cotangent
    )
    return compiled(f)


def check(arguments, dtype, mode):
    """Compare value and gradients with the float64 reference; return both."""
    q, k, v, start, stop = arguments
    cotangent = random_like(jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), dtype))
    actual = both(mode, jit_for_values)((q, k, v), start, stop, cotangent)
    assert actual[0].dtype == dtype
    assert_close(actual, in_float64(truth, (q, k, v), start, stop, cotangent), dtype)
    return actual


@pytest.mark.parametrize(
    ("mode", "name", "dtype"),
    [
        pytest.param(mode, name, dtype, marks=[pytest.mark.slow] if dtype == "bf16" and QUICK_IN_BF16.get(mode, name) != name else [])
        for mode in MODES
        for name in TEST_CASES
        for dtype in DTYPES
    ]
    + [
        pytest.param("pallas_gpu", name, dtype, marks=ON_GPU, id=f"native-{name}-{dtype}")
        for name in (*TEST_CASES, "released")
        for dtype in DTYPES
    ],
)
def test_value_and_gradients(name, dtype, mode):
    arguments = inputs(RELEASED if name == "released" else TEST_CASES[name], DTYPES[dtype])
    if mode == "pallas_gpu" and name in REFUSED_BY_GPUS:
        with pytest.raises(NotImplementedError, match=REFUSED_BY_GPUS[name]):
            forward(mode)(*arguments)
    else:
        check(arguments, DTYPES[dtype], mode)


@pytest.mark.parametrize("mode", MODES)
def test_queries_without_keys_give_zeros_and_get_no_gradient(mode):
    arguments = inputs(Case(2, 40, 4, 2, 16), jnp.float32)
    nothing = np.arange(40) % 3 == 0
    start, stop = (np.array(x) for x in arguments[3:])
    start[:, nothing], stop[:, nothing] = 7, [[0], [7]]  # stop before start in one row, at start in the other
    out, (dq, _, _) = check(arguments._replace(start=jnp.array(start), stop=jnp.array(stop)), jnp.float32, mode)
    assert not out[:, nothing].any()
    assert not dq[:, nothing].any()
    empty = jnp.zeros_like(arguments.stop)
    out, gradients = check(arguments._replace(start=empty, stop=empty), jnp.float32, mode)
    assert not out.any()
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("mode", MODES)
def test_large_scores_do_not_overflow(mode):
    arguments = inputs(TEST_CASES["odd_length"], jnp.float32)
    out = forward(mode)(arguments.q * 1e4, *arguments[1:])
    best = in_float64(reference.flash_attention, arguments.q * 1e4, *arguments[1:])
    np.testing.assert_allclose(out, best, atol=1e-3)  # scores of 1e4 carry an error of 1e-3 into the exponent


def cached(x, rows, seed):
    """Return keys or values [B, CACHE, G, K] that begin with x and hold finite garbage behind; a cache slot for each of `rows`."""
    rng = np.random.default_rng(seed)
    x = np.asarray(x)[rows]
    garbage = (1e3 * rng.standard_normal((x.shape[0], CACHE, *x.shape[2:]))).astype(x.dtype)
    garbage[:, : x.shape[1]] = x
    return garbage


@exact_modes_and_dtypes
def test_decode_queries_have_the_bits_of_training(mode, dtype):
    """Positions of the prompt, as slots of one batch against a longer cache, whose keys past each position are garbage."""
    aligned, given = forward(mode), inputs(PROMPT, DTYPES[dtype])
    out = aligned(*given)
    position = np.arange(PROMPT.T) if mode == "aligned" else np.array([0, 1, 3, 127, 128, 130, 255, 256, 331, 332])
    row = position % 2
    keys, values = (cached(x, row, seed) for seed, x in enumerate((given.k, given.v)))
    garbage = np.random.default_rng(3).standard_normal(keys.shape[-1]).astype(keys.dtype)
    keys[position[:, None] < np.arange(CACHE)] = garbage  # nothing past a slot's own position is true
    query = np.asarray(given.q)[row, position][:, None]
    slots = Inputs(query, keys, values, np.zeros((len(position), 1), np.int32), position[:, None] + 1)
    rows = np.asarray(out)[row, position][:, None]
    assert_same_bits(aligned(*slots), rows)
    for chosen in ([0], [130], [332], [127, 3, 128]) if mode == "aligned" else ([5], [3, -1, 4]):
        assert_same_bits(aligned(*(x[chosen] for x in slots)), rows[chosen])


@exact_modes_and_dtypes
@pytest.mark.parametrize(("first", "count"), [(0, 77), (77, 60)])
def test_a_piece_of_a_prompt_has_the_bits_of_the_whole(mode, dtype, first, count):
    aligned, given = forward(mode), on_host(inputs)(PROMPT, DTYPES[dtype])
    keys, values = (cached(x, [0, 1], seed) for seed, x in enumerate((given.k, given.v)))
    piece = slice(first, first + count)
    start, stop = given.start[:, piece], given.stop[:, piece]
    assert_same_bits(aligned(given.q[:, piece], keys, values, start, stop), aligned(*given)[:, piece])


@pytest.mark.parametrize(
    ("mode", "dtype", "heads"),
    [*modes_and_dtypes(["aligned"], [(4, 1)], []), *modes_and_dtypes(["aligned", *KERNELS], [(4, 2), (6, 2)], [(6, 2)])],
)  # 6 / 2: a tile's positions do not divide the offset
def test_bits_do_not_depend_on_batch_or_place_in_a_packed_row(mode, dtype, heads):
    aligned, given = forward(mode), on_host(inputs)(Case(2, 3 * GRID, *heads, 16), DTYPES[dtype])
    length = 150
    out = aligned(*given)
    alone = [x[:1, :length] for x in given[:3]]
    start, stop = np.zeros((1, length), np.int32), 1 + np.arange(length, dtype=np.int32)[None]
    one = aligned(*alone, start, stop)
    assert_same_bits(one, out[:1, :length])
    here = slice(GRID, GRID + length)
    packed = given._replace(**{name: getattr(given, name).copy() for name in ("q", "k", "v", "start")})
    for x, y in zip(packed[:3], alone, strict=True):
        x[1, here] = y[0]
    packed.start[1, here] = GRID
    assert_same_bits(aligned(*packed)[1, here], one[0])


@exact_modes_and_dtypes
def test_pages_have_the_bits_of_flat_keys(mode, dtype):
    """Pages in any order, shared by rows; tables end in any numbers, and pages that only hold unseen keys in garbage."""
    given, rng = on_host(inputs)(Case(2, 40, 4, 2, 16), DTYPES[dtype]), np.random.default_rng(0)
    flat = [cached(x, [0, 1], seed) for seed, x in enumerate((given.k, given.v))]
    start, stop = np.array([[0] * 40, [130] * 40]), np.array([[1 + 5 * i for i in range(40)], [131 + i for i in range(40)]])
    table = np.array([[5, 2, 999, -7], [0, 2, 6, 2]])  # page 2 is of both rows
    for x in flat:
        x[1, GRID : 2 * GRID] = x[0, GRID : 2 * GRID]
    pages = [(1e3 * rng.standard_normal((8, GRID, *x.shape[2:]))).astype(x.dtype) for x in flat]
    for page, x in zip(pages, flat, strict=True):
        for row, block in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
            page[table[row, block]] = x[row, block * GRID : (block + 1) * GRID]
    whole = forward(mode)(given.q, flat[0], flat[1], start, stop)
    assert_same_bits(paged(mode)(given.q, pages[0], pages[1], table, start, stop), whole)
    query, *bounds = (x[:, 39:] for x in (given.q, start, stop))
    assert_same_bits(paged(mode)(query, pages[0], pages[1], table, *bounds), whole[:, 39:])


@pytest.mark.parametrize("mode", ["aligned", *KERNELS])
def test_any_page_table(mode):
    """Rows share pages or do not, and numbers of pages that no query sees are any."""
    q = on_host(inputs)(Case(2, 40, 4, 2, 16), jnp.float32).q

    @settings(deadline=None, max_examples=8)
    @given(seed=st.integers(0, 2**32 - 1))
    def run(seed):
        rng = np.random.default_rng(seed)
        pages = rng.standard_normal((2, 8, GRID, 2, 16), np.float32)
        table, block = rng.integers(0, 8, (2, CACHE // GRID)), np.arange(CACHE // GRID)
        keys, values = pages[:, table].reshape(2, 2, CACHE, 2, 16)
        first, last = np.sort(rng.integers(0, CACHE + 1, (2, 2, 1)), axis=0)
        start, stop = rng.integers(first, last + 1, (2, 2, 40))
        table = np.where((first < (block + 1) * GRID) & (block * GRID < last), table, rng.integers(-9, 999, table.shape))
        assert_same_bits(paged(mode)(q, *pages, table, start, stop), forward(mode)(q, keys, values, start, stop))

    run()


LONGEST = 1 << 19
"""Keys of the released models' longest context. The interpreter of TPU kernels copies them in each step."""


@functools.cache
def query_on(num_keys):
    """Return a query that sees so many keys, what it should give, and pages of the keys in any order with their table."""
    given, order = cache_inputs(CacheCase(1, 1, num_keys, 2, 1, 16), jnp.float32), np.random.default_rng(0).permutation(num_keys // GRID)
    pages = [x.reshape(-1, GRID, *x.shape[2:])[order] for x in given[1:3]]
    return given, in_float64(reference.flash_attention, *given), (*pages, np.argsort(order)[None])


@pytest.mark.parametrize(
    ("mode", "num_keys"),
    [
        *((mode, LONGEST) for mode in ("fast", "aligned", "pallas_gpu")),
        ("pallas_tpu fast", LONGEST // 64),
        ("pallas_tpu", LONGEST // 16),
        pytest.param("pallas_tpu", LONGEST, marks=pytest.mark.slow),
    ],
)
def test_a_query_on_very_many_keys(mode, num_keys):
    given, expected, pages = query_on(num_keys)
    out = forward(mode)(*given)
    assert_close(out, expected, jnp.float32)
    assert_same_bits(paged(mode)(given.q, *pages, *given[3:]), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd_length", "segments"])
def test_interpreted_kernels_have_equal_bits(name, dtype):
    """The same tile functions on the same tiles, whatever a step or a program has of them."""
    given = inputs(TEST_CASES[name], DTYPES[dtype])
    assert_same_bits(forward("pallas_tpu")(*given), forward("pallas_gpu")(*given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_kernels_have_equal_bits_over_pages(dtype):
    q, rng = inputs(Case(2, 40, 4, 2, 16), DTYPES[dtype]).q, np.random.default_rng(0)
    pages, table = rng.standard_normal((2, 8, GRID, 2, 16)).astype(q.dtype), rng.integers(0, 8, (2, CACHE // GRID))
    start, stop = np.sort(rng.integers(0, CACHE + 1, (2, 2, 40)), axis=0)
    assert_same_bits(*(paged(mode)(q, *pages, table, start, stop) for mode in KERNELS))


@pytest.mark.parametrize("mode", KERNELS)
def test_kernels_take_keys_as_a_cpu_holds_them(mode):
    given = inputs(TEST_CASES["odd_length"], jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in given[1:3]]
    assert_same_bits(forward(mode)(given.q, *wide, *given[3:]), forward(mode)(*given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_has_the_same_bits_under_a_gradient(dtype):
    given = inputs(TEST_CASES["segments"], DTYPES[dtype])
    out = forward("aligned")(*given)
    assert_same_bits(both("aligned")(given[:3], given.start, given.stop, random_like(out))[0], out)


def test_key_heads_that_do_not_divide_the_query_heads_are_refused():
    with pytest.raises(ValueError, match="3 key-value heads do not divide 4 query heads"):
        flash_attention(*inputs(Case(1, 4, 4, 3, 8), jnp.float32))


def test_what_kernels_do_not_do_is_refused():
    q, k, v, start, stop = inputs(TEST_CASES["one_token"], jnp.float32)
    with pytest.raises(ValueError, match="pages of 64 keys and 64 values do not hold 128"):
        flash_attention_paged(q, k[:, :1].repeat(64, 1), v[:, :1].repeat(64, 1), jnp.zeros((2, 1), int), start, stop)
    for mode in KERNELS:
        with pytest.raises(NotImplementedError, match="not all bfloat16 or all float32"):
            flash_attention(q, k, v.astype(jnp.bfloat16).astype(jnp.float16), start, stop, implementation=mode)
    many = inputs(Case(1, 1, 64, 1, 16), jnp.float32)
    with pytest.raises(NotImplementedError, match="64 query heads of a key head are more than a tile's rows"):
        flash_attention(*many, implementation="pallas_gpu")
    of_slots = lambda slots, pages: (
        *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((slots, 1, 16, 128), (64, GRID, 4, 128), (64, GRID, 4, 128))),
        *(jax.ShapeDtypeStruct((slots, n), jnp.int32) for n in (pages, 1, 1)),
    )
    paged = functools.partial(flash_attention_paged, implementation="pallas_tpu")
    jax.eval_shape(paged, *of_slots(32, 4096))
    with pytest.raises(NotImplementedError, match="262272 entries of page tables and ranges"):
        jax.eval_shape(paged, *of_slots(64, 4096))
    rows = [jax.ShapeDtypeStruct((32, 2**19, heads, 128), jnp.bfloat16) for heads in (16, 4, 4)]
    rows += [jax.ShapeDtypeStruct((32, 2**19), jnp.int32)] * 2
    with pytest.raises(NotImplementedError, match="entries of page tables and ranges"):
        jax.eval_shape(functools.partial(flash_attention, implementation="pallas_tpu"), *rows)


@pytest.mark.parametrize(("mode", "examples"), [("fast", 15), ("aligned", 15), ("pallas_tpu", 6), ("pallas_gpu", 6)])
def test_any_range_of_keys(mode, examples):
    @settings(deadline=None, max_examples=examples)
    @given(seed=st.integers(0, 2**32 - 1))
    def run(seed):
        rng = np.random.default_rng(seed)
        q, k, v, _, _ = on_host(inputs)(Case(1, 300, 4, 2, 16), jnp.float32, seed)
        start, stop = rng.integers(0, 301, (2, 1, 24)).astype(np.int32)
        out = forward(mode)(q[:, :24], k, v, start, stop)
        assert_close(out, in_float64(reference.flash_attention, q[:, :24], k, v, start, stop), jnp.float32)

    run()
