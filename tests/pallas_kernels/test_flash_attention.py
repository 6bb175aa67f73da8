"""Flash attention: right in value and gradient, and one set of bits for a query in training, prefill and decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import GRID
from pallas_kernels.flash_attention import flash_attention, reference
from pallas_kernels.flash_attention.cases import TEST_CASES, Case, Inputs, inputs
from tests.pallas_kernels.programs import DTYPES, in_float64, jit, random_like, with_gradients
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits

aligned = jit(functools.partial(flash_attention, aligned=True))
PROMPT = Case(2, 333, 4, 2, 16, V=24)
CACHE = 512


def truth(differentiable, start, stop, cotangent):
    """Return the reference's value and gradients."""
    return with_gradients(lambda q, k, v: reference.flash_attention(q, k, v, start, stop))(differentiable, cotangent)


def check(arguments, dtype, is_aligned):
    """Compare value and gradients with the float64 reference; return both."""
    q, k, v, start, stop = arguments
    f = lambda q, k, v: flash_attention(q, k, v, start, stop, aligned=is_aligned)
    cotangent = random_like(jax.eval_shape(f, q, k, v))
    actual = jit(with_gradients(f))((q, k, v), cotangent)
    assert actual[0].dtype == dtype
    assert_close(actual, in_float64(truth, (q, k, v), start, stop, cotangent), dtype)
    return actual


@pytest.mark.parametrize("is_aligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TEST_CASES)
def test_value_and_gradients(name, dtype, is_aligned):
    check(inputs(TEST_CASES[name], DTYPES[dtype]), DTYPES[dtype], is_aligned)


@pytest.mark.parametrize("is_aligned", [False, True])
def test_queries_without_keys_give_zeros_and_get_no_gradient(is_aligned):
    arguments = inputs(Case(2, 40, 4, 2, 16), jnp.float32)
    nothing = np.arange(40) % 3 == 0
    start, stop = (np.array(x) for x in arguments[3:])
    start[:, nothing], stop[:, nothing] = 7, [[0], [7]]  # stop before start in one row, at start in the other
    out, (dq, _, _) = check(arguments._replace(start=jnp.array(start), stop=jnp.array(stop)), jnp.float32, is_aligned)
    assert not out[:, nothing].any()
    assert not dq[:, nothing].any()
    empty = jnp.zeros_like(arguments.stop)
    out, gradients = check(arguments._replace(start=empty, stop=empty), jnp.float32, is_aligned)
    assert not out.any()
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("is_aligned", [False, True])
def test_large_scores_do_not_overflow(is_aligned):
    arguments = inputs(TEST_CASES["odd_length"], jnp.float32)
    out = jit(functools.partial(flash_attention, aligned=is_aligned))(arguments.q * 1e4, *arguments[1:])
    best = in_float64(reference.flash_attention, arguments.q * 1e4, *arguments[1:])
    np.testing.assert_allclose(out, best, atol=1e-3)  # scores of 1e4 carry an error of 1e-3 into the exponent


def cached(x, rows, seed):
    """Return keys or values [B, CACHE, G, K] that begin with x and hold finite garbage behind; a cache slot for each of `rows`."""
    rng = np.random.default_rng(seed)
    x = np.asarray(x)[rows]
    garbage = (1e3 * rng.standard_normal((x.shape[0], CACHE, *x.shape[2:]))).astype(x.dtype)
    garbage[:, : x.shape[1]] = x
    return garbage


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_queries_have_the_bits_of_training(dtype):
    """Every position of the prompt, as slots of one batch against a longer cache, whose keys past each position are garbage."""
    given = inputs(PROMPT, DTYPES[dtype])
    out = aligned(*given)
    position = np.arange(PROMPT.T)
    row = position % 2
    keys, values = (cached(x, row, seed) for seed, x in enumerate((given.k, given.v)))
    garbage = np.random.default_rng(3).standard_normal(keys.shape[-1]).astype(keys.dtype)
    keys[position[:, None] < np.arange(CACHE)] = garbage  # nothing past a slot's own position is true
    query = np.asarray(given.q)[row, position][:, None]
    slots = Inputs(query, keys, values, np.zeros((PROMPT.T, 1), np.int32), position[:, None] + 1)
    rows = np.asarray(out)[row, position][:, None]
    assert_same_bits(aligned(*slots), rows)
    for chosen in ([0], [130], [332], [127, 3, 128]):
        assert_same_bits(aligned(*(x[chosen] for x in slots)), rows[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "count"), [(0, 77), (77, 60)])
def test_a_piece_of_a_prompt_has_the_bits_of_the_whole(dtype, first, count):
    given = inputs(PROMPT, DTYPES[dtype])
    keys, values = (cached(x, [0, 1], seed) for seed, x in enumerate((given.k, given.v)))
    piece = slice(first, first + count)
    start, stop = given.start[:, piece], given.stop[:, piece]
    assert_same_bits(aligned(given.q[:, piece], keys, values, start, stop), aligned(*given)[:, piece])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 2)])  # 6 / 2: 5 positions a tile, which does not divide the offset
def test_bits_do_not_depend_on_batch_or_place_in_a_packed_row(dtype, heads):
    given = inputs(Case(2, 3 * GRID, *heads, 16), DTYPES[dtype])
    length = 150
    out = aligned(*given)
    alone = [x[:1, :length] for x in given[:3]]
    start, stop = jnp.zeros((1, length), jnp.int32), 1 + jnp.arange(length)[None]
    one = aligned(*alone, start, stop)
    assert_same_bits(one, out[:1, :length])
    here = slice(GRID, GRID + length)
    packed = [x.at[1, here].set(y[0]) for x, y in zip(given[:3], alone, strict=True)]
    starts, stops = given.start.at[1, here].set(GRID), given.stop
    assert_same_bits(aligned(*packed, starts, stops)[1, here], one[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_has_the_same_bits_under_a_gradient(dtype):
    given = inputs(TEST_CASES["segments"], DTYPES[dtype])
    f = lambda q, k, v: flash_attention(q, k, v, given.start, given.stop, aligned=True)
    out = aligned(*given)
    assert_same_bits(jit(with_gradients(f))(given[:3], random_like(out))[0], out)


def test_key_heads_that_do_not_divide_the_query_heads_are_refused():
    with pytest.raises(ValueError, match="3 key-value heads do not divide 4 query heads"):
        flash_attention(*inputs(Case(1, 4, 4, 3, 8), jnp.float32))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), is_aligned=st.booleans())
def test_any_range_of_keys(seed, is_aligned):
    rng = np.random.default_rng(seed)
    q, k, v, _, _ = inputs(Case(1, 300, 4, 2, 16), jnp.float32, seed)
    start, stop = jnp.asarray(rng.integers(0, 301, (2, 1, 24)), jnp.int32)
    out = programs[is_aligned](q[:, :24], k, v, start, stop)
    assert_close(out, in_float64(reference.flash_attention, q[:, :24], k, v, start, stop), jnp.float32)


programs = {False: jit(flash_attention), True: aligned}
