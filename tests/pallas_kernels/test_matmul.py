"""The row-tiled product: right in value and gradient, and rows that do not see their neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat
from pallas_kernels.fused_layers import gated_group_norm, qk_norm_rope
from pallas_kernels.fused_layers import reference as layers
from pallas_kernels.matmul import ROW_TILE, map_row_tiles, matmul, pallas, reference
from pallas_kernels.matmul.api import IMPLEMENTATIONS
from pallas_kernels.matmul.cases import TEST_CASES, Case, inputs
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
    with_native,
)
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits, rms

ROW_COUNTS = (1, 8, ROW_TILE - 1, ROW_TILE, ROW_TILE + 1, 64, 200, 300)
FEW_COUNTS = (1, ROW_TILE + 1, 200)
truth = with_gradients(reference.matmul)
aligned = {name: jit_of(name)(functools.partial(matmul, aligned=True, implementation=name)) for name in IMPLEMENTATIONS}
native = pytest.param("pallas_gpu", marks=ON_GPU, id="native")
every_implementation = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, native])
RELEASED = {"released_training": Case((300,), 2048, 6144), "released_decode": Case((3,), 5120, 2048)}


@pytest.mark.parametrize(("implementation", "name"), with_native(["xla fast", *IMPLEMENTATIONS], TEST_CASES, RELEASED))
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(name, dtype, implementation):
    """Of an interpreted kernel, too: what it does not write, or reads from outside of a matrix, is NaN there."""
    dtype, is_aligned, implementation = DTYPES[dtype], implementation != "xla fast", implementation.removesuffix(" fast")
    x, w = inputs((TEST_CASES | RELEASED)[name], dtype)
    cotangent = random_like(jax.eval_shape(matmul, x, w))
    actual = jit_for_values(with_gradients(functools.partial(matmul, aligned=is_aligned, implementation=implementation)))((x, w), cotangent)
    assert_close(actual, in_float64(truth, (x, w), cotangent), dtype)


@pytest.mark.parametrize("name", ["odd_rows", "several_tiles"])
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_value_and_gradients_of_rounded_operands(implementation, name, monkeypatch):
    """Kernels take bf16 as on a chip, in the tiles for it, and the gradient of an fp32 result is rounded to it."""
    monkeypatch.setattr(pallas, "dot_operand", compat.compiling_for("gpu")(compat.dot_operand))
    x, w = inputs(TEST_CASES[name], jnp.bfloat16)
    f = functools.partial(matmul, out_dtype=jnp.float32, implementation=implementation)
    cotangent = random_like(jax.eval_shape(f, x, w))
    y, gradients = jit_for_values(with_gradients(f))((x, w), cotangent)
    exact, wanted = in_float64(truth, (x, w), cotangent)
    assert_close(y, exact, jnp.float32)
    assert_close(gradients, wanted, jnp.bfloat16)
    for rounded, gradient in zip(gradients, wanted, strict=True):
        floor = rms(gradient.astype(jnp.bfloat16).astype(np.float64) - gradient)
        assert rms(rounded - gradient) > 1.2 * floor  # it is the floor where dy is not rounded


@every_implementation
@pytest.mark.parametrize("is_aligned", [False, True])
def test_out_dtype_keeps_the_accumulator(is_aligned, implementation):
    x, w = inputs(TEST_CASES["odd_rows"], jnp.bfloat16)
    y = jit_for_values(functools.partial(matmul, aligned=is_aligned, out_dtype=jnp.float32, implementation=implementation))(x, w)
    assert_close(y, in_float64(reference.matmul, x, w), jnp.float32)


@pytest.mark.parametrize(
    ("implementation", "dtype", "sizes"),
    modes_and_dtypes(IMPLEMENTATIONS, [(96, 8), (96, 40), (400, 150)], [(96, 8), (96, 40), (400, 150), (2048, 2048), (2048, 6144)]),
)
def test_rows_do_not_depend_on_how_many_there_are(sizes, dtype, implementation):
    x, w = on_host(inputs)(Case((max(ROW_COUNTS),), *sizes), DTYPES[dtype])
    run = aligned[implementation]
    y = run(x, w)
    for num in ROW_COUNTS if implementation == "xla" else FEW_COUNTS:
        assert_same_bits(run(x[:num], w), y[:num])
        assert_same_bits(run(x[-num:], w), y[-num:])  # at another place in their tiles


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
@settings(deadline=None, max_examples=5)
@given(
    num=st.integers(1, 70), terms=st.integers(1, 300), columns=st.integers(1, 200), aligned=st.booleans(), seed=st.integers(0, 2**32 - 1)
)
def test_any_shape(num, terms, columns, aligned, seed, implementation):
    """Small whole numbers: every sum is exact, whatever its order, so not one product may be missing or taken in twice."""
    rng = np.random.default_rng(seed)
    x, w, dy = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((num, terms), (terms, columns), (num, columns)))
    y, gradients = with_gradients(functools.partial(matmul, aligned=aligned, implementation=implementation))((x, w), jnp.asarray(dy))
    for actual, expected in zip((y, *gradients), (x @ w, dy @ w.T, x.T @ dy), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e", "h200"])
def test_one_tile_for_any_number_of_rows(kind):
    """The kernel's blocks and products are the same for 1 and 8192 rows; what differs is the grid, and a GPU's masks of the last tile."""

    def kernel(num):
        arguments = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((num, 2048), (2048, 6144)))
        with compat.compiling_for(kind):
            jaxpr = jax.make_jaxpr(lambda x, w: matmul(x, w, aligned=True))(*arguments)
        (call,) = (e for e in compat.equations(jaxpr) if e.primitive.name == "pallas_call")
        assert not call.params["interpret"]
        blocks = [str(block.block_aval) for block in call.params["grid_mapping"].block_mappings]
        products = (e for e in compat.equations(call.params["jaxpr"]) if e.primitive.name == "dot_general")
        return blocks, [(str(e), *(str(x.aval) for x in e.invars)) for e in products]

    assert kernel(1) == kernel(64) == kernel(256) == kernel(8192)


@every_implementation
@pytest.mark.parametrize("num", [1, 130])
def test_rows_do_not_depend_on_what_stands_around_the_product(num, implementation):
    x, w = inputs(Case((num,), 96, 8), jnp.bfloat16)
    product = functools.partial(matmul, aligned=True, out_dtype=jnp.float32, implementation=implementation)
    inside = jit(lambda x, w: (product(2 * x, w), jax.nn.silu(product(2 * x, w)) + 1))
    assert_same_bits(inside(x, w)[0], jit(product)(2 * x, w))


def gated(y, o, weight, **how):
    """A layer with a reduction and products that a compiler might contract."""
    return gated_group_norm(o, y, weight, num_groups=2, eps=1e-6, **how)


def epilogue_inputs(num, dtype=jnp.float32):
    x, w = on_host(inputs)(Case((max(ROW_COUNTS),), 33, 256), dtype)
    return x[:num], w, *random_like((jax.ShapeDtypeStruct((max(ROW_COUNTS), 256), dtype), jax.ShapeDtypeStruct((256,), dtype)))


def fused(x, w, o, weight, how, implementation):
    return matmul(x, w, gated, rows=[o[: len(x)]], weights=[weight], aligned=how, implementation=implementation)


def rotated(x, w, cos, sin, query, key, implementation):
    heads = functools.partial(qk_norm_rope, num_kv_heads=3, eps=1e-6)
    num = len(x)
    return matmul(x, w, heads, rows=[cos[:num], sin[:num]], weights=[query, key], aligned=True, implementation=implementation)


def rotated_inputs(dtype):
    """Of the `demo` preset's linear attention."""
    num, half = max(ROW_COUNTS), 16
    x, w = on_host(inputs)(Case((num,), 192, 576), dtype)
    angle = (np.arange(num)[:, None] / 1e6 ** (np.arange(half) / half)).astype(np.float32)
    return x, w, np.cos(angle), np.sin(angle), *random_like((jax.ShapeDtypeStruct((64,), dtype),) * 2)


@every_implementation
@pytest.mark.parametrize("is_aligned", [False, True])
@pytest.mark.parametrize("num", [1, 70])
def test_epilogue_value_and_gradients(num, is_aligned, implementation):
    arguments = epilogue_inputs(num)
    plain = lambda x, w, o, weight: layers.gated_group_norm(o[: len(x)], reference.matmul(x, w), weight, num_groups=2, eps=1e-6)
    cotangents = random_like(jax.eval_shape(plain, *arguments))
    actual = jit_for_values(with_gradients(functools.partial(fused, how=is_aligned, implementation=implementation)))(arguments, cotangents)
    assert_close(actual, in_float64(with_gradients(plain), arguments, cotangents), jnp.float32)


EPILOGUES = {
    "gated": (functools.partial(fused, how=True), lambda dtype: epilogue_inputs(max(ROW_COUNTS), dtype)),
    "rotated": (rotated, rotated_inputs),
}


# A TPU's kernel of the layer refuses heads of 64.
EVERY_EPILOGUE = modes_and_dtypes(IMPLEMENTATIONS, ["gated"], ["gated"]) + modes_and_dtypes(["xla"], ["rotated"], ["rotated"])


@pytest.mark.parametrize(("implementation", "dtype", "epilogue"), EVERY_EPILOGUE)
def test_epilogue_rows_do_not_depend_on_how_many_there_are(epilogue, dtype, implementation):
    """Nor on whether the gradient keeps the product."""
    function, make = EPILOGUES[epilogue]
    x, *others = make(DTYPES[dtype])
    function = functools.partial(function, implementation=implementation)
    run = jit_of(implementation)(function)
    everything = run(x, *others)
    kept = jit_of(implementation)(lambda *arguments: jax.vjp(function, *arguments))(x, *others)[0]
    assert_same_bits(kept, everything)
    for num in ROW_COUNTS if implementation == "xla" else FEW_COUNTS:
        assert_same_bits(run(x[:num], *others), jax.tree.map(lambda y, num=num: y[:num], everything))


def test_epilogue_of_leading_axes():
    def both(y, scale, *, aligned, implementation):
        assert (aligned, implementation) == (False, "xla")  # it is in a tile of rows
        return y * scale[:, None], y.sum(-1)

    x, w = inputs(TEST_CASES["leading_axes"], jnp.float32)
    y = matmul(x, w, both, rows=[jnp.full(x.shape[:-1], 2.0)], aligned=True)
    assert [part.shape for part in y] == [(*x.shape[:-1], w.shape[1]), x.shape[:-1]]
    assert_same_bits(y[0], 2 * matmul(x, w, aligned=True))


def test_map_row_tiles_sees_whole_tiles():
    """The last one moved to fit, or padded with zeros if it is the only one."""
    first = jit(lambda x: map_row_tiles(lambda t: jnp.broadcast_to(t[0], t.shape), x))(jnp.arange(ROW_TILE + 3))
    np.testing.assert_array_equal(first, [0] * 3 + [3] * ROW_TILE)
    total = jit(lambda x: map_row_tiles(lambda t: jnp.broadcast_to(t.sum(), t.shape), x))(jnp.ones(3))
    np.testing.assert_array_equal(total, [3] * 3)


def test_unknown_implementation_names_the_known_ones():
    with pytest.raises(ValueError, match="no implementation 'cuda'; it has xla, pallas_tpu, pallas_gpu"):
        matmul(jnp.ones((1, 2)), jnp.ones((2, 1)), implementation="cuda")


@settings(deadline=None, max_examples=12)
@given(num=st.sampled_from([3, 65, 150]), columns=st.sampled_from([8, 40]), seed=st.integers(0, 2**32 - 1))
def test_permuted_rows_give_the_permuted_product(num, columns, seed):
    x, w = on_host(inputs)(Case((num,), 96, columns), jnp.float32, seed)
    order = np.random.default_rng(seed).permutation(num)
    assert_same_bits(aligned["xla"](x[order], w), aligned["xla"](x, w)[order])
