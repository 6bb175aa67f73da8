"""FP8 products: every implementation against float64 products of the numbers the operands stand for, and what quantisation promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # jax has no public name for it

from pallas_kernels import compat, tiles
from pallas_kernels.compat import INTERPRETS_CLUSTERS
from pallas_kernels.scaled_matmul import Quantized, fp8_matmul, quantize_rows, quantize_weights, reference, scaled_matmul
from pallas_kernels.scaled_matmul import quantize as quantize_array
from pallas_kernels.scaled_matmul.cases import TEST_CASES, Case, inputs, operand
from pallas_kernels.scaled_matmul.quantized import GROUP, LARGEST, SMALLEST_SCALE
from tests.pallas_kernels.programs import DTYPES, ON_GPU, in_float64, jit_for_values, jit_of, random_like, with_gradients
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits, fp8_tolerance, rms

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
OUT_DTYPES = (jnp.float32, jnp.bfloat16)
KERNELS = {
    (name, out): jit_of(name)(functools.partial(scaled_matmul, implementation=name, out_dtype=out, aligned=True))
    for name in IMPLEMENTATIONS
    for out in OUT_DTYPES
}
native = pytest.param("pallas_gpu", marks=ON_GPU, id="native")
every_implementation = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, native])
RELEASED = Case(300, 2048, 6144)
compiled_quantize = jax.jit(quantize_array, static_argnames=("block", "transpose", "power_of_two"))


def product(name, out_dtype=jnp.float32):
    return KERNELS[name, out_dtype]


def quantize(x, **how):
    return compiled_quantize(jnp.asarray(x), **how)


def operands(case, block, seed=0, **how):
    """Return x by rows and w.T by blocks or by rows."""
    x, w = inputs(case, jnp.float32, seed)
    return quantize(x, **how), quantize(w, block=block, transpose=True, **how)


def numbers(x):
    """Return what a quantised operand stands for, float64."""
    return in_float64(reference.dequantize, x)


@pytest.mark.parametrize(("name", "block"), [(name, True) for name in TEST_CASES] + [("whole_tiles", False), ("all_odd", False)])
def test_products_of_every_implementation(name, block):
    a, b = operands(TEST_CASES[name], block)
    truth = in_float64(reference.scaled_matmul, a, b)
    np.testing.assert_allclose(truth, numbers(a) @ numbers(b).T, rtol=1e-12, atol=1e-12)
    results = {implementation: product(implementation)(a, b) for implementation in IMPLEMENTATIONS}
    for y in results.values():
        assert_close(y, truth, jnp.float32)  # finite, too: a kernel's result starts as NaN
    assert_same_bits(results["pallas_gpu"], results["pallas_tpu"])
    if name == "all_odd" and block:
        for implementation in IMPLEMENTATIONS:
            assert_close(product(implementation, jnp.bfloat16)(a, b), truth, jnp.bfloat16)
        assert_close(jit_for_values(scaled_matmul)(a, b), truth, jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=4, phases=[Phase.generate])
@given(
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 400), st.integers(1, 200)),
    block=st.booleans(),
    spread=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_scales(implementation, sizes, block, spread, seed):
    """Of any values, denormal ones, too: each result is as exact as its own terms are large, however its neighbours are scaled."""
    rng, (rows, depth, columns) = np.random.default_rng(seed), sizes
    every = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    finite = every[np.isfinite(every.astype(np.float32))]

    def operand(rows, block):
        scales = 2 ** rng.uniform(-spread, spread, (-(-depth // GROUP), -(-rows // GROUP) if block else rows))
        return Quantized(jnp.asarray(rng.choice(finite, (rows, depth))), jnp.asarray(scales, jnp.float32))

    a, b = operand(rows, False), operand(columns, block)
    truth, largest = (in_float64(reference.scaled_matmul, *x) for x in ((a, b), jax.tree.map(jnp.abs, (a, b))))
    assert (np.abs(product(implementation)(a, b) - truth) <= fp8_tolerance(implementation) * largest).all()


@every_implementation
def test_rows_do_not_depend_on_how_many_there_are(implementation):
    a, b = operands(Case(300, 256, 128), True)
    everything = product(implementation)(a, b)
    for rows in (1, 128, 129):
        for part in (slice(rows), slice(300 - rows, None)):
            assert_same_bits(product(implementation)(Quantized(a.values[part], a.scales[:, part]), b), everything[part])


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e", "h200"])
def test_one_tile_for_any_number_of_rows(kind):
    """The products of a kernel's program are the same for 1 and 8192 rows; what differs is the grid."""

    def products(rows):
        with compat.compiling_for(kind):
            f = functools.partial(scaled_matmul, out_dtype=jnp.bfloat16, aligned=True)
            jaxpr = jax.make_jaxpr(f)(operand(rows, 2048, False), operand(6144, 2048, True))
        (call,) = (e for e in compat.equations(jaxpr) if e.primitive.name == "pallas_call")
        found = (e for e in compat.equations(call.params["jaxpr"]) if "dot" in e.primitive.name)
        return [(str(e), *(str(x.aval) for x in e.invars)) for e in found]

    assert products(1) == products(64) == products(300) == products(8192)
    assert products(1)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=ON_GPU, id=name) for name, case in (TEST_CASES | {"released": RELEASED}).items()]
)
def test_products_on_a_gpu(case, block):
    a, b = operands(case, block)
    truth = in_float64(reference.scaled_matmul, a, b)
    for out_dtype in (jnp.float32, jnp.bfloat16):
        assert_close(product("pallas_gpu", out_dtype)(a, b), truth, out_dtype, fp8_tolerance("pallas_gpu"))


def test_a_row_is_quantised_by_itself():
    x, _ = inputs(Case(40, 300, 1), jnp.float32)
    everything = quantize(x)
    alone = quantize(x[7:9])
    assert_same_bits(alone.values.astype(jnp.float32), everything.values[7:9].astype(jnp.float32))
    assert_same_bits(alone.scales, everything.scales[:, 7:9])


def quantised_truth(x, w, dy, power_of_two):
    """Return the float64 product of the quantised operands and its gradients, each from operands quantised for it."""
    how = {"power_of_two": power_of_two}
    blocks = quantize(w, block=True, transpose=True, **how)
    y = numbers(quantize(x, **how)) @ numbers(blocks).T
    dx = numbers(quantize(dy, **how)) @ numbers(blocks)
    dw = numbers(quantize(x, transpose=True, **how)) @ numbers(quantize(dy, transpose=True, **how)).T
    return y, (dx, dw)


@pytest.mark.parametrize(
    ("name", "implementation", "dtype"),
    [
        ("one_row", "xla", "fp32"),
        ("all_odd", "xla", "bf16"),
        ("all_odd", "pallas_tpu", "bf16"),
        ("all_odd", "pallas_gpu", "fp32"),
        ("whole_tiles", "pallas_gpu", "bf16"),
        pytest.param("all_odd", "pallas_gpu", "fp32", marks=ON_GPU, id="native-fp32"),
        pytest.param("whole_tiles", "pallas_gpu", "bf16", marks=ON_GPU, id="native-bf16"),
    ],
)
def test_fp8_matmul_and_its_gradients(name, implementation, dtype):
    x, w = inputs(TEST_CASES[name], DTYPES[dtype])
    f = functools.partial(fp8_matmul, implementation=implementation, power_of_two=dtype == "bf16")
    dy = random_like(jax.eval_shape(f, x, w))
    compiled = jit_of(implementation)
    actual = compiled(with_gradients(f))((x, w), dy)
    assert_close(actual, quantised_truth(x, w, dy, dtype == "bf16"), DTYPES[dtype], fp8_tolerance(implementation))
    assert_same_bits(compiled(f)(x, w), actual[0])


def test_fp8_costs_a_few_percent():
    x, w = (jnp.asarray(v) for v in np.random.default_rng(0).standard_normal((2, 256, 256)).astype(np.float32))
    dy = random_like(x)
    exact = in_float64(with_gradients(lambda x, w: x @ w), (x, w), dy)
    for found, wanted in zip(jax.tree.leaves(jit_for_values(with_gradients(fp8_matmul))((x, w), dy)), jax.tree.leaves(exact), strict=True):
        assert rms(found - wanted) < 0.05 * rms(wanted)


def test_rows_that_are_in_fp8_already():
    """The same product and gradients, also where their layer left the columns, and a carrier that is not read."""
    x, w = inputs(TEST_CASES["all_odd"], jnp.float32)
    x, dy = x.reshape(3, -1, x.shape[1])[:, :5], random_like(jax.ShapeDtypeStruct((3, 5, w.shape[1]), jnp.float32))
    run = lambda f: jit_for_values(with_gradients(f))((x, w), dy)
    expected = run(fp8_matmul)
    assert_same_bits(run(lambda x, w: fp8_matmul(quantize_rows(x), w)), expected)
    columns = quantize(x.reshape(-1, x.shape[-1]), transpose=True)
    emitted = lambda x: quantize_rows(x)._replace(plain=None, columns=columns, carrier=x - jax.lax.stop_gradient(x))
    assert_same_bits(run(lambda x, w: fp8_matmul(emitted(x), w)), expected)
    alone = quantize_rows(x)._replace(plain=None, carrier=None)
    assert_same_bits(jit_for_values(functools.partial(fp8_matmul, out_dtype=jnp.float32))(alone, w), expected[0])
    with pytest.raises(ValueError, match="needs an out_dtype"):
        fp8_matmul(alone, w)
    with pytest.raises(ValueError, match="no powers of two"):
        fp8_matmul(alone, w, power_of_two=True)
    with pytest.raises(ValueError, match="neither plain rows nor columns has no gradient"):
        jax.grad(lambda w: fp8_matmul(alone, w, out_dtype=jnp.float32).sum())(w)


def test_a_weight_that_is_in_fp8_already():
    x, w = inputs(TEST_CASES["all_odd"], jnp.float32)
    assert_same_bits(jit_for_values(fp8_matmul)(x, jax.jit(quantize_weights)(w)), jit_for_values(fp8_matmul)(x, w))
    with pytest.raises(ValueError, match="a weight that is in FP8 already has no gradient"):
        jax.grad(lambda x: fp8_matmul(x, quantize_weights(w)).sum())(x)


def test_leading_axes_and_out_dtype():
    x, w = inputs(Case(24, 128, 128), jnp.bfloat16)
    y = fp8_matmul(x.reshape(2, 3, 4, 128), w, out_dtype=jnp.float32)
    assert_same_bits(y.reshape(24, 128), fp8_matmul(x, w, out_dtype=jnp.float32))
    assert (y.shape, y.dtype) == ((2, 3, 4, 128), jnp.float32)


def spacing(values):
    """Return the distance between e4m3 neighbours at these magnitudes."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6))) - 3)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1), (3, 130), (130, 200)]),
    exponent=st.integers(-100, 100),
    spread=st.floats(0, 20),
    block=st.booleans(),
    transpose=st.booleans(),
    power_of_two=st.booleans(),
)
def test_numbers_are_within_half_a_spacing(seed, shape, exponent, spread, block, transpose, power_of_two):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(spread * rng.standard_normal(shape) / 4) * 2.0**exponent
    x = np.clip(x, -1e38, 1e38).astype(np.float32)  # finite: what is not is another test's
    q = quantize(x, block=block, transpose=transpose, power_of_two=power_of_two)
    wanted = (x.T if transpose else x).astype(np.float64)
    unit = numbers(Quantized(jnp.ones_like(q.values), q.scales))  # the scale of each entry
    assert (np.abs(numbers(q) - wanted) <= (0.5 + 1e-5) * spacing(wanted / unit) * unit).all()
    groups = -(-wanted.shape[1] // GROUP)
    assert q.scales.shape == (groups, -(-wanted.shape[0] // GROUP) if block else wanted.shape[0])
    largest = np.array([[np.abs(group).max() for group in np.array_split(row, range(GROUP, row.size, GROUP))] for row in wanted]).T
    largest = np.stack([largest[:, i : i + GROUP].max(1) for i in range(0, largest.shape[1], GROUP)], 1) if block else largest
    if power_of_two:
        mantissa, _ = np.frexp(q.scales)
        assert (mantissa == 0.5).all()
        assert ((largest <= LARGEST * np.asarray(q.scales, np.float64)) & (largest > LARGEST / 2 * np.asarray(q.scales, np.float64))).all()
    else:
        np.testing.assert_allclose(q.scales, largest / LARGEST, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-100, -8, 0, 7, 100])
def test_power_of_two_scales_are_exact(exponent):
    """e4m3 values times a power of two come back to the bit, also where the largest is 448, the edge of the next scale."""
    every = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
    x = np.stack([np.where(np.isfinite(every), every, 0), np.where(np.isfinite(every), every, 0) / 2])[:, : 2 * GROUP]
    x = (x * 2.0**exponent).astype(np.float32)
    x[:, [0, GROUP]] = LARGEST * 2.0**exponent  # in each group
    q = quantize(x, power_of_two=True)
    assert (np.asarray(q.scales) == 2.0**exponent).all()
    assert_same_bits(numbers(q)[0], x[0].astype(np.float64))
    beyond = quantize(x * np.float32(1 + 2**-23), power_of_two=True)
    assert (np.asarray(beyond.scales) == 2.0 ** (exponent + 1)).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_zeros_denormals_and_tiny_groups_have_the_smallest_scale(power_of_two):
    x = np.zeros((4, GROUP), np.float32)
    x[1, 3], x[2, :2], x[3, 0] = 1e-41, (448 * SMALLEST_SCALE, -SMALLEST_SCALE), 1e-30
    q = quantize(x, power_of_two=power_of_two)
    assert (np.asarray(q.scales)[0, :3] == SMALLEST_SCALE).all()
    assert q.scales[0, 3] > SMALLEST_SCALE
    values = np.asarray(q.values).astype(np.float64)
    assert not values[:2].any()
    assert values[2, :2].tolist() == [448, -1]
    for largest in (1, LARGEST):
        other = quantize(np.full((2, GROUP), largest, np.float32), power_of_two=power_of_two)
        truth, scales = numbers(q) @ numbers(other).T, np.asarray(q.scales, np.float64).T * np.asarray(other.scales, np.float64)
        for implementation in IMPLEMENTATIONS:
            y, normal = np.asarray(product(implementation)(q, other)), scales >= SMALLEST_SCALE
            np.testing.assert_allclose(y[normal], truth[normal], rtol=fp8_tolerance(implementation))
            assert (np.abs(y) <= 1.01 * np.abs(truth)).all()  # others may vanish


def test_values_saturate_at_the_largest():
    x = np.full((2, GROUP), 3e38, np.float32)
    x[1] = np.linspace(-7.3, 7.3, GROUP)
    q = quantize(x)
    assert np.abs(np.asarray(q.values).astype(np.float64)).max(1).tolist() == [LARGEST, LARGEST]
    np.testing.assert_allclose(numbers(q)[:, -1], x[:, -1].astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", [False, True])
def test_what_is_not_finite_becomes_nan_and_leaves_its_neighbours_alone(bad, block):
    x, _ = inputs(TEST_CASES["odd_depth"], jnp.float32)
    clean, spoilt = (quantize(x.at[4, 150].set(value), block=block) for value in (0, bad))
    assert_same_bits(spoilt.scales, clean.scales)
    clean, spoilt = (np.array(q.values, np.float32) for q in (clean, spoilt))
    assert np.argwhere(np.isnan(spoilt)).tolist() == [[4, 150]]
    spoilt[4, 150] = 0
    assert_same_bits(spoilt, clean)


@every_implementation
def test_nan_enters_exactly_its_own_sums(implementation):
    x, w = inputs(TEST_CASES["odd_depth"], jnp.float32)
    a, b = quantize(x.at[4, 150].set(jnp.inf)), quantize(w.at[7, 100].set(jnp.nan), block=True, transpose=True)
    wanted = np.zeros((40, 128), bool)
    wanted[4], wanted[:, 100] = True, True
    np.testing.assert_array_equal(np.isnan(product(implementation)(a, b)), wanted)


def test_transposed_blocks_are_the_blocks_of_the_transpose():
    _, w = inputs(TEST_CASES["all_odd"], jnp.float32)
    one, other = quantize(w, block=True), quantize(w, block=True, transpose=True)
    assert_same_bits(one.values.T.astype(jnp.float32), other.values.astype(jnp.float32))
    assert_same_bits(one.scales.T, other.scales)


def test_operands_that_do_not_fit_are_refused():
    a, b = operands(TEST_CASES["whole_tiles"], True)
    with pytest.raises(ValueError, match=r"b is \(256, 256\) with scales \(3, 2\); expected \(256, 384\)"):
        scaled_matmul(a, b._replace(values=b.values[:, :256]))
    with pytest.raises(ValueError, match=r"a is \(256, 384\) with scales \(3, 2\); expected \(256, 384\) with scales \(3, 256\)$"):
        scaled_matmul(b, a)


needs_clusters = pytest.mark.skipif(not INTERPRETS_CLUSTERS, reason="the interpreter of jax before 0.12 knows no clusters")


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("whole_tiles", True, "cpu"),
        pytest.param("all_odd", False, "cpu", marks=pytest.mark.slow),
        pytest.param("all_odd", True, "h200", marks=needs_clusters),
        pytest.param("all_odd", False, "h200", marks=needs_clusters),
    ],
)
def test_mosaic_gpus_kernel_has_no_races(name, block, kind, monkeypatch):
    """Interpreted, with its threads and clusters. A row alone has its bits, too."""
    size = tiles.SCALED_MATMUL_MOSAIC[kind]._replace(stages=2)
    monkeypatch.setattr(tiles, "SCALED_MATMUL_MOSAIC", {"cpu": size})
    a, b = operands(TEST_CASES[name], block)
    run = jit_for_values(functools.partial(scaled_matmul, implementation="mosaic_gpu"))
    everything = run(a, b)
    assert not get_races().races_found  # from jax 0.12 on the interpreter raises, too
    assert_close(everything, in_float64(reference.scaled_matmul, a, b), jnp.float32)  # finite, too: memory starts as NaN
    assert_same_bits(run(Quantized(a.values[-3:], a.scales[:, -3:]), b), everything[-3:])


def test_mosaic_gpus_kernel_has_gradients():
    x, w = inputs(TEST_CASES["odd_depth"], jnp.bfloat16)
    f = functools.partial(fp8_matmul, implementation="mosaic_gpu")
    dy = random_like(jax.eval_shape(f, x, w))
    assert_close(jit_for_values(with_gradients(f))((x, w), dy), quantised_truth(x, w, dy, False), jnp.bfloat16)


NATIVE_CASES = TEST_CASES | {"released": RELEASED, "bands": Case(2600, 1100, 700)}
"""With tiles of shared memory that are filled again and again, several bands of clusters, and a last one that is not whole."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("case", [pytest.param(case, marks=ON_GPU, id=f"native-{name}") for name, case in NATIVE_CASES.items()])
def test_mosaic_gpus_kernel_on_a_gpu(case, block, out_dtype):
    a, b = operands(case, block)
    y = jit_for_values(functools.partial(scaled_matmul, implementation="mosaic_gpu", out_dtype=out_dtype))(a, b)
    assert_close(y, in_float64(reference.scaled_matmul, a, b), out_dtype, fp8_tolerance("pallas_gpu"))


def test_jax_triton_refuses_in_one_line_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match="jax-triton") as refusal:
        scaled_matmul(*operands(TEST_CASES["one_row"], True), implementation="jax_triton")
    assert "\n" not in str(refusal.value)
