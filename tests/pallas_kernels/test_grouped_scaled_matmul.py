"""Grouped FP8 products: every implementation against float64 products of the numbers that operands stand for, for any load of experts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import gather_groups, group_rows
from pallas_kernels.grouped_matmul.cases import inputs
from pallas_kernels.grouped_scaled_matmul import fp8_gather_grouped_matmul, fp8_grouped_matmul, grouped_scaled_matmul, reference
from pallas_kernels.grouped_scaled_matmul.api import IMPLEMENTATIONS
from pallas_kernels.grouped_scaled_matmul.cases import TEST_CASES
from pallas_kernels.scaled_matmul import Quantized, quantize, quantize_rows, quantize_weights
from tests.pallas_kernels.programs import DTYPES, ON_GPU, in_float64, jit_for_values, jit_of, random_like, with_gradients
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits, fp8_tolerance

ROW_TILE = 16
native = pytest.param("pallas_gpu", marks=ON_GPU, id="native")
every_implementation = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, native])
quantize = jax.jit(quantize, static_argnames="transpose")
quantize_weights = jax.jit(quantize_weights)


@functools.cache
def program(implementation, power_of_two=False):
    """Return the compiled function (x, w), tiles, dy -> product of quantised operands, product quantised on the way, and its gradients."""
    how = {"row_tile": ROW_TILE, "implementation": implementation}

    def run(arguments, tiles, dy):
        quantised = grouped_scaled_matmul(quantize(arguments[0]), quantize_weights(arguments[1]), tiles, **how)
        fp8 = functools.partial(fp8_grouped_matmul, tiles=tiles, power_of_two=power_of_two, **how)
        return quantised, with_gradients(lambda x, w: fp8(x, w))(arguments, dy)

    return jit_of(implementation)(run)


def grouped(case, dtype, seed=0, experts=None):
    """Return rows in their groups' tiles, matrices, tiles, the group of each row and a cotangent that is zero for padding."""
    x, w, routed = inputs(case, dtype, seed)
    experts = routed if experts is None else experts
    groups = group_rows(experts.reshape(-1), case.E, ROW_TILE)
    rows = gather_groups(x, groups, case.A)
    owner = np.append(np.repeat(np.arange(case.E), np.asarray(groups.tiles) * ROW_TILE), np.full(len(rows), case.E))[: len(rows)]
    dy = random_like(jax.ShapeDtypeStruct((len(rows), case.F), dtype))
    return rows, w, groups.tiles, owner, jnp.where((groups.source < experts.size)[:, None], dy, 0)


def check(implementation, x, w, tiles, owner, dy):
    """Compare the product and its gradients with the float64 reference."""
    quantised, (y, (dx, dw)) = program(implementation)((x, w), tiles, dy)
    blocks = quantize_weights(w)
    expected = in_float64(reference.grouped_scaled_matmul, quantize(x), blocks, owner)
    tolerance = fp8_tolerance(implementation)
    assert_close((quantised, y), (expected, expected), jnp.float32, tolerance)
    transposed = Quantized(*(jnp.swapaxes(part, 1, 2) for part in blocks))
    assert_close(dx, in_float64(reference.grouped_scaled_matmul, quantize(dy), transposed, owner), jnp.float32, tolerance)
    columns, dy_columns = quantize(x, transpose=True), quantize(dy, transpose=True)
    assert_close(dw, in_float64(weight_gradient, columns, dy_columns, owner, tiles), jnp.float32, tolerance)
    assert not np.asarray(dw)[np.setdiff1d(np.arange(len(tiles)), owner)].any()


SLOW = {("xla", "experts_of_a_model"), ("pallas_tpu", "experts_of_a_model")}
"""A TPU kernel's interpreter copies all matrices' gradients in each step."""


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *(pytest.param(*how, marks=[pytest.mark.slow] if how in SLOW else []) for how in itertools.product(IMPLEMENTATIONS, TEST_CASES)),
        *(pytest.param(*native.values, name, marks=ON_GPU, id=f"native-{name}") for name in TEST_CASES),
    ],
)
def test_product_and_gradients(name, implementation):
    check(implementation, *grouped(TEST_CASES[name], jnp.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_routing(implementation):
    """From all rows to one expert, or none, to a few to each."""
    case = TEST_CASES["uniform"]

    @settings(deadline=None, max_examples=5)
    @given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.01, 0.3, 10.0]))
    def run(seed, spread):
        rng = np.random.default_rng(seed)
        load = rng.dirichlet(np.full(case.E + 1, spread))
        experts = rng.choice(case.E + 1, (case.N, case.A), p=load).astype(np.int32)
        check(implementation, *grouped(case, jnp.float32, seed, jnp.asarray(experts)))

    run()


@pytest.mark.parametrize("name", ["some", "skewed"])
@every_implementation
def test_tokens_are_quantised_once(implementation, name):
    """And gathered in FP8: the product and its gradients have the bits of gathered rows."""
    case = TEST_CASES[name]
    x, w, experts = inputs(case, jnp.float32)
    groups = group_rows(experts.reshape(-1), case.E, ROW_TILE)
    how = {"row_tile": ROW_TILE, "implementation": implementation}
    valid = (groups.source < experts.size)[:, None]
    dy = jnp.where(valid, random_like(jax.ShapeDtypeStruct((len(groups.source), case.F), jnp.float32)), 0)
    ways = (
        lambda x, w: fp8_grouped_matmul(gather_groups(x, groups, case.A), w, groups.tiles, **how),
        lambda x, w: fp8_gather_grouped_matmul(x, w, groups, case.A, **how),
    )
    expected, actual = (jit_of(implementation)(with_gradients(way))((x, w), dy) for way in ways)
    assert_same_bits(actual, expected)
    assert np.asarray(expected[0]).any()


def test_tokens_without_plain_rows_have_no_gradient():
    case = TEST_CASES["some"]
    x, w, experts = inputs(case, jnp.float32)
    groups = group_rows(experts.reshape(-1), case.E, ROW_TILE)
    tokens, product = quantize_rows(x)._replace(plain=None), functools.partial(fp8_gather_grouped_matmul, row_tile=ROW_TILE)
    with pytest.raises(ValueError, match="emitted no plain ones cannot be gathered"):
        product(tokens, w, groups, case.A)
    with pytest.raises(ValueError, match="emitted no plain ones cannot be moved"):
        tokens.moved(lambda rows: gather_groups(rows, groups, case.A))
    tokens = tokens._replace(carrier=None)
    expected = product(x, w, groups, case.A)
    assert_same_bits(product(tokens, w, groups, case.A, out_dtype=jnp.float32), expected)
    assert_same_bits(product(x, quantize_weights(w), groups, case.A), expected)
    with pytest.raises(ValueError, match="a weight that is in FP8 already has no gradient"):
        jax.grad(lambda x: product(x, quantize_weights(w), groups, case.A).sum())(x)
    with pytest.raises(ValueError, match="has no gradient"):
        jax.grad(lambda w: product(tokens, w, groups, case.A, out_dtype=jnp.float32).sum())(w)


def weight_gradient(x, dy, owner, tiles):
    """Return the reference's, for as many groups as have a number of tiles."""
    return reference.weight_gradient(x, dy, owner, len(tiles))


@pytest.mark.parametrize("name", ["uniform", "some"])
def test_interpreted_kernels_have_equal_bits(name):
    x, w, tiles, _, dy = grouped(TEST_CASES[name], jnp.float32)
    assert_same_bits(program("pallas_tpu")((x, w), tiles, dy), program("pallas_gpu")((x, w), tiles, dy))


@every_implementation
def test_rows_do_not_depend_on_their_neighbours(implementation):
    """The same rows of the same expert, with all of the others, and with them elsewhere."""
    x, w, tiles, owner, dy = grouped(TEST_CASES["uniform"], jnp.float32)
    everything = program(implementation)((x, w), tiles, dy)[1][0]
    first = int(np.argmax(owner == 3))
    moved = jnp.roll(x, -first, axis=0)  # expert 3's rows in front, and nobody else
    alone = program(implementation)((moved, w), jnp.where(jnp.arange(5) == 3, tiles, 0), dy)[1][0]
    number = int(tiles[3]) * ROW_TILE
    assert_same_bits(alone[:number], everything[first : first + number])
    assert not alone[number:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_rounds_once(implementation):
    x, w, tiles, owner, _ = grouped(TEST_CASES["skewed"], DTYPES["bf16"])
    y = jit_for_values(functools.partial(fp8_grouped_matmul, row_tile=ROW_TILE, implementation=implementation))(x, w, tiles)
    assert_close(y, in_float64(reference.grouped_scaled_matmul, quantize(x), quantize_weights(w), owner), jnp.bfloat16)


def test_operands_that_do_not_fit_are_refused():
    x, w, tiles, *_ = grouped(TEST_CASES["uniform"], jnp.float32)
    a, b = quantize(x), quantize_weights(w)
    with pytest.raises(ValueError, match=r"expected scales \(2, 208\), b \(5, 128, 256\) with scales \(5, 2, 1\)"):
        grouped_scaled_matmul(a, b._replace(scales=b.scales[:, :1]), tiles, row_tile=ROW_TILE)
    for name in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(NotImplementedError, match="96 is not a multiple of 128"):
            fp8_grouped_matmul(x[:, :96], w[:, :96], tiles, row_tile=ROW_TILE, implementation=name)
