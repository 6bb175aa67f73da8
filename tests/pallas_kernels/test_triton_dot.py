"""The product with an explicit accumulator and the fused multiply-add: interpreted, compiled, and lowered to the Triton operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.triton_dot import dot, fma
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "e4m3": jnp.float8_e4m3fn}


def operands(dtype):
    rng = np.random.default_rng(0)
    a, b, acc = (rng.standard_normal(shape) for shape in ((32, 64), (64, 16), (32, 16)))
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype), jnp.asarray(acc, jnp.float32)


def wanted(a, b, acc):
    a, b, acc = (np.asarray(x).astype(np.float64) for x in (a, b, acc))
    return acc + a @ b


def kernel(a_ref, b_ref, acc_ref, out_ref):
    out_ref[...] = fma(jnp.float32(2), dot(a_ref[...], b_ref[...], acc_ref[...]), acc_ref[...])


def call(a, b, acc, interpret):
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(acc.shape, acc.dtype),
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        name="accumulating_dot",
    )(a, b, acc)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_accumulator(dtype):
    a, b, acc = operands(DTYPES[dtype])
    assert_close(jax.jit(dot)(a, b, acc), wanted(a, b, acc), jnp.float32)
    assert_close(dot(a, b, acc), wanted(a, b, acc), jnp.float32)
    assert_same_bits(jax.jit(dot)(a, b), jax.jit(dot)(a, b, jnp.zeros_like(acc)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_in_a_kernel(dtype):
    a, b, acc = operands(DTYPES[dtype])
    truth = 2 * wanted(a, b, acc) + np.asarray(acc).astype(np.float64)
    assert_close(jax.jit(functools.partial(call, interpret=True))(a, b, acc), truth, jnp.float32)


def test_fma_broadcasts():
    acc = operands(jnp.float32)[2]
    assert_same_bits(fma(acc[:, :1], jnp.float32(2), acc), acc[:, :1] * 2 + acc)


def test_operands_that_do_not_fit_are_refused():
    a, b, acc = operands(jnp.float32)
    with pytest.raises(ValueError, match="dtypes float32 and bfloat16"):
        dot(a, b.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"does not fit an accumulator of \(16, 16\)"):
        dot(a, b, acc[:16])
    with pytest.raises(ValueError, match=r"a \(32, 64\) times b \(32, 16\)"):
        dot(a, b[:32])
