"""LM head and cross entropy: right in value and gradient over pieces of the vocabulary, and the same bits for a row everywhere."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat, tiles
from pallas_kernels.cross_entropy import head_logits, reference, token_logprobs
from pallas_kernels.cross_entropy.api import IMPLEMENTATIONS
from pallas_kernels.cross_entropy.cases import TEST_CASES, Case, inputs
from pallas_kernels.cross_entropy.pallas import piece_size
from tests.pallas_kernels.programs import DTYPES, ON_GPU, in_float64, jit, jit_for_values, jit_of, on_host, random_like, with_gradients
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits

KERNELS = ["pallas_tpu", "pallas_gpu"]
logprobs = {name: jit_of(name)(functools.partial(token_logprobs, aligned=True, implementation=name)) for name in IMPLEMENTATIONS}
logits = {name: jit_of(name)(functools.partial(head_logits, aligned=True, implementation=name)) for name in IMPLEMENTATIONS}
RELEASED = {"released": Case(150, 2048, 157184)}
CASES = [
    pytest.param(how, name, dtype, marks=[pytest.mark.slow] if how in KERNELS and dtype == "bf16" and name != "odd_rows" else [])
    for how, name, dtype in itertools.product(IMPLEMENTATIONS, TEST_CASES, DTYPES)
]
"""Interpreted kernels differ from plain JAX in their loads and stores, not in their roundings: one case in bf16 by default."""


def truth(differentiable, targets, cotangents):
    """Return the reference's value and gradients."""
    return with_gradients(lambda hidden, w: reference.token_logprobs(hidden, w, targets))(differentiable, cotangents)


@functools.cache
def wanted(name, dtype):
    """Return a case's inputs, cotangents, and float64 values and gradients."""
    hidden, w, targets = inputs((TEST_CASES | RELEASED)[name], dtype)
    row = jax.ShapeDtypeStruct(targets.shape, jnp.float32)
    cotangents = random_like((row, row))
    return (hidden, w, targets), cotangents, in_float64(truth, (hidden, w), targets, cotangents)


@pytest.mark.parametrize(
    ("implementation", "name", "dtype"),
    [
        *(("xla fast", name, dtype) for name in TEST_CASES for dtype in DTYPES),
        *CASES,
        *(pytest.param("pallas_gpu", x, "bf16", marks=ON_GPU, id=f"native-{x}") for x in (*TEST_CASES, *RELEASED)),
    ],
)
def test_value_and_gradients(name, dtype, implementation):
    """Of an interpreted kernel, too: what it does not write, or reads from outside of an array, is NaN there."""
    dtype, aligned, implementation = DTYPES[dtype], implementation != "xla fast", implementation.removesuffix(" fast")
    (hidden, w, targets), cotangents, (values, gradients) = wanted(name, dtype)
    f = lambda hidden, w: token_logprobs(hidden, w, targets, aligned=aligned, implementation=implementation)
    actual = jit_for_values(with_gradients(f))((hidden, w), cotangents)
    assert_close(actual[0], values, jnp.float32)  # fp32 logits whatever the dtype of the operands
    assert_close(actual[1], gradients, dtype)
    if implementation == "pallas_gpu":
        assert_same_bits(actual[0], logprobs[implementation](hidden, w, targets))  # the forward is the same under a gradient


@pytest.mark.parametrize("name", TEST_CASES)
def test_fast_head_logits_are_the_product_and_its_log_sum(name):
    hidden, w, _ = inputs(TEST_CASES[name], jnp.bfloat16)
    assert_close(jit_for_values(head_logits)(hidden, w), in_float64(products, hidden, w), jnp.float32)


def products(hidden, w):
    """Return the logits and their log-sum-exp."""
    return hidden @ w, jax.nn.logsumexp(hidden @ w, axis=-1)


@pytest.mark.parametrize(
    ("implementation", "name", "dtype"),
    [
        *CASES,
        *(pytest.param("pallas_gpu", x, "bf16", marks=ON_GPU, id=f"native-{x}") for x in (*TEST_CASES, *RELEASED)),
    ],
)
def test_sampled_logits_have_the_bits_of_the_log_probabilities(name, dtype, implementation):
    hidden, w, targets = on_host(inputs)((TEST_CASES | RELEASED)[name], DTYPES[dtype])
    rows, total = logits[implementation](hidden, w)
    assert_close((rows, total), in_float64(products, hidden, w), jnp.float32)
    assert_same_bits((rows[np.arange(len(targets)), targets] - total, total), logprobs[implementation](hidden, w, targets))


@pytest.mark.parametrize(
    ("implementation", "vocab", "dtype"),
    [
        *(("xla", vocab, dtype) for vocab in (100, 20001) for dtype in DTYPES),
        *((how, vocab, dtype) for how in KERNELS for vocab, dtype in ((20001, "fp32"), (100, "bf16"))),
        *(pytest.param("pallas_gpu", vocab, "bf16", marks=ON_GPU, id=f"native-{vocab}") for vocab in (100, 20001)),
    ],
)
def test_rows_do_not_depend_on_how_many_there_are(dtype, vocab, implementation):
    hidden, w, targets = on_host(inputs)(Case(150, 16, vocab), DTYPES[dtype])
    run, rows_of = logprobs[implementation], logits[implementation]
    everything = run(hidden, w, targets)
    for num in (1, 64, 77) if implementation == "xla" else (1, 77):
        assert_same_bits(run(hidden[-num:], w, targets[-num:]), jax.tree.map(lambda x, num=num: x[-num:], everything))
    rows, total = rows_of(hidden[:1], w)  # a sampler's single row
    assert_same_bits((rows[0, targets[0]] - total[0], total[0]), (everything[0][0], everything[1][0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd_rows", "several_tiles"])
def test_interpreted_kernels_have_equal_logits(name, dtype, monkeypatch):
    """Of tiles of one size, and log-sum-exps that differ by the order of their sums: a TPU's lanes first, or along a row."""
    size = tiles.CROSS_ENTROPY_TPU["cpu"]
    narrow = tiles.CROSS_ENTROPY_GPU_FP32["cpu"]._replace(rows=size.rows, columns=size.columns)
    monkeypatch.setattr(tiles, "CROSS_ENTROPY_GPU_FP32", {"cpu": narrow})
    hidden, w, _ = inputs(TEST_CASES[name], DTYPES[dtype])
    programs = (jit_of(how)(functools.partial(head_logits, implementation=how)) for how in KERNELS)
    (rows, totals), (other_rows, other_totals) = (run(hidden, w) for run in programs)
    assert_same_bits(rows, other_rows)
    np.testing.assert_allclose(totals, other_totals, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_kernels_have_equal_bits_where_sums_are_exact(dtype):
    """Of equal logits, each of which weighs 1, in whole pieces and in parts of some."""
    hidden, w, targets = inputs(Case(20, 16, 300), DTYPES[dtype])
    w = jnp.broadcast_to(w[:, :1], w.shape)
    assert_same_bits(*(logprobs[how](hidden, w, targets) for how in KERNELS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_has_the_same_bits_under_a_gradient(dtype):
    hidden, w, targets = inputs(TEST_CASES["odd_rows"], DTYPES[dtype])
    out = logprobs["xla"](hidden, w, targets)
    f = lambda hidden, w: token_logprobs(hidden, w, targets, aligned=True)
    assert_same_bits(jit(with_gradients(f))((hidden, w), random_like(out))[0], out)


@pytest.mark.parametrize("how", ["xla fast", *IMPLEMENTATIONS])
def test_large_logits_do_not_overflow(how):
    hidden, w, targets = inputs(TEST_CASES["odd_rows"], jnp.float32)
    run = logprobs[how] if how in logprobs else jit(token_logprobs)
    assert_close(run(1e4 * hidden, w, targets), in_float64(reference.token_logprobs, 1e4 * hidden, w, targets), jnp.float32)


@settings(deadline=None, max_examples=15)
@given(vocab=st.sampled_from([1, 37, 130]), size=st.floats(-2, 2), seed=st.integers(0, 2**32 - 1), how=st.sampled_from([*IMPLEMENTATIONS]))
def test_probabilities_over_the_vocabulary_sum_to_one(vocab, size, seed, how):
    hidden, w, _ = on_host(inputs)(Case(1, 16, vocab), jnp.float32, seed)
    rows = np.repeat(np.float32(10**size) * hidden, vocab, 0)
    logprob, total = logprobs[how](rows, w, np.arange(vocab, dtype=np.int32))
    assert (total == total[0]).all()
    np.testing.assert_allclose(np.exp(np.asarray(logprob, np.float64)).sum(), 1, rtol=1e-4)


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e", "h200"])
def test_one_tile_for_any_number_of_rows(kind):
    """The kernel's blocks are the same for 1 and 8192 rows, and for all logits: only the grid differs."""

    def kernels(f, *rows):
        arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (rows[0], (2048, 4096))]
        arguments += [jax.ShapeDtypeStruct(rows[0][:1], jnp.int32)] if len(rows) > 1 else []
        with compat.compiling_for(kind):
            jaxpr = jax.make_jaxpr(lambda *x: f(*x))(*arguments)
        calls = [e.params for e in compat.equations(jaxpr) if e.primitive.name == "pallas_call"]
        assert len(calls) == 2
        assert not any(call["interpret"] for call in calls)
        return [[str(block.block_aval) for block in call["grid_mapping"].block_mappings] for call in calls]

    first, combined = kernels(token_logprobs, (64, 2048), True)
    assert [first, combined] == kernels(token_logprobs, (8192, 2048), True)
    logits_first, logits_combined = kernels(head_logits, (8192, 2048))
    assert (first[:2], combined) == (logits_first[:2], logits_combined)


@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 33), (8192, 157184), (8192, 20001), (1 << 17, 157184), (1 << 22, 157184)])
def test_pieces_of_the_gradient(num_rows, vocab):
    size = piece_size(num_rows, vocab)
    assert size == vocab or size % 2048 == 0
    assert size <= 2**14
    assert num_rows * size <= 2**28 or size == 2048
    assert -(-vocab // size) * size < 1.05 * vocab


@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_refuse_other_operands(implementation):
    hidden, w, targets = inputs(TEST_CASES["one_row"], jnp.float16)
    with pytest.raises(NotImplementedError, match="the operands are float16 and float16"):
        token_logprobs(hidden, w, targets, implementation=implementation)
    with pytest.raises(NotImplementedError, match="the operands are float16 and float32"):
        head_logits(hidden, w.astype(jnp.float32), implementation=implementation)


def test_a_tpu_refuses_rows_that_do_not_fit():
    hidden, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 1 << 16), (1 << 16, 512)))
    with pytest.raises(NotImplementedError, match="rows of 65536 4-byte terms are too long"):
        jax.eval_shape(functools.partial(head_logits, implementation="pallas_tpu"), hidden, w)
