"""LM head and cross entropy: right in value and gradient over pieces of the vocabulary, and the same bits for a row everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.cross_entropy import head_logits, reference, token_logprobs
from pallas_kernels.cross_entropy.cases import TEST_CASES, Case, inputs
from tests.pallas_kernels.programs import DTYPES, in_float64, jit, random_like, with_gradients
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits

logprobs = jit(functools.partial(token_logprobs, aligned=True))
logits = jit(functools.partial(head_logits, aligned=True))


def truth(differentiable, targets, cotangents):
    """Return the reference's value and gradients."""
    return with_gradients(lambda hidden, w: reference.token_logprobs(hidden, w, targets))(differentiable, cotangents)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TEST_CASES)
def test_value_and_gradients(name, dtype, aligned):
    dtype = DTYPES[dtype]
    hidden, w, targets = inputs(TEST_CASES[name], dtype)
    f = lambda hidden, w: token_logprobs(hidden, w, targets, aligned=aligned)
    cotangents = random_like(jax.eval_shape(f, hidden, w))
    values, gradients = jit(with_gradients(f))((hidden, w), cotangents)
    wanted, wanted_gradients = in_float64(truth, (hidden, w), targets, cotangents)
    assert_close(values, wanted, jnp.float32)  # fp32 logits whatever the dtype of the operands
    assert_close(gradients, wanted_gradients, dtype)


@pytest.mark.parametrize("name", TEST_CASES)
@pytest.mark.parametrize("aligned", [False, True])
def test_head_logits_are_the_product_and_its_log_sum(name, aligned):
    hidden, w, _ = inputs(TEST_CASES[name], jnp.bfloat16)
    wanted = in_float64(lambda h, w: (h @ w, jax.nn.logsumexp(h @ w, axis=-1)), hidden, w)
    assert_close(jit(functools.partial(head_logits, aligned=aligned))(hidden, w), wanted, jnp.float32)


@pytest.mark.parametrize("name", TEST_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_logits_have_the_bits_of_the_log_probabilities(name, dtype):
    hidden, w, targets = inputs(TEST_CASES[name], DTYPES[dtype])
    rows, total = logits(hidden, w)
    assert_same_bits((rows[jnp.arange(len(targets)), targets] - total, total), logprobs(hidden, w, targets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [100, 20001])
def test_rows_do_not_depend_on_how_many_there_are(dtype, vocab):
    hidden, w, targets = inputs(Case(130, 16, vocab), DTYPES[dtype])
    everything = logprobs(hidden, w, targets)
    for num in (1, 64, 77):
        assert_same_bits(logprobs(hidden[-num:], w, targets[-num:]), jax.tree.map(lambda x, num=num: x[-num:], everything))
    rows, total = logits(hidden[:1], w)  # a sampler's single row
    assert_same_bits((rows[0, targets[0]] - total[0], total[0]), (everything[0][0], everything[1][0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_has_the_same_bits_under_a_gradient(dtype):
    hidden, w, targets = inputs(TEST_CASES["odd_rows"], DTYPES[dtype])
    out = logprobs(hidden, w, targets)
    f = lambda hidden, w: token_logprobs(hidden, w, targets, aligned=True)
    assert_same_bits(jit(with_gradients(f))((hidden, w), random_like(out))[0], out)


@pytest.mark.parametrize("aligned", [False, True])
def test_large_logits_do_not_overflow(aligned):
    hidden, w, targets = inputs(TEST_CASES["odd_rows"], jnp.float32)
    actual = jit(functools.partial(token_logprobs, aligned=aligned))(1e4 * hidden, w, targets)
    assert_close(actual, in_float64(reference.token_logprobs, 1e4 * hidden, w, targets), jnp.float32)


@settings(deadline=None, max_examples=15)
@given(vocab=st.sampled_from([1, 37, 130]), size=st.floats(-2, 2), seed=st.integers(0, 2**32 - 1))
def test_probabilities_over_the_vocabulary_sum_to_one(vocab, size, seed):
    hidden, w, _ = inputs(Case(1, 16, vocab), jnp.float32, seed)
    rows = jnp.repeat(10**size * hidden, vocab, 0)
    logprob, total = logprobs(rows, w, jnp.arange(vocab))
    assert (total == total[0]).all()
    np.testing.assert_allclose(np.exp(np.asarray(logprob, np.float64)).sum(), 1, rtol=1e-4)
