"""The grouped product: right in value and gradient for any load of the experts, and rows that do not see their neighbours."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat
from pallas_kernels import tiles as tables
from pallas_kernels.fused_layers import reference as layers
from pallas_kernels.fused_layers import swiglu
from pallas_kernels.grouped_matmul import (
    combine_groups,
    gather_grouped_matmul,
    gather_groups,
    gather_weights,
    group_rows,
    grouped_matmul,
    grouped_mlp,
    reference,
    row_tile_for,
    take_rows,
)
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS
from pallas_kernels.grouped_matmul.cases import TEST_CASES, Case, inputs
from tests.pallas_kernels.programs import DTYPES, ON_GPU, in_float64, jit, jit_of, modes_and_dtypes, on_host, random_like, with_gradients
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits

KERNELS = ("pallas_tpu", "pallas_gpu")
native = pytest.param("pallas_gpu", marks=ON_GPU, id="native")
every_implementation = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, native])
every_implementation_and_dtype = pytest.mark.parametrize(
    ("implementation", "dtype"),
    [*((name, "fp32") for name in IMPLEMENTATIONS), ("xla", "bf16"), pytest.param(*native.values, "fp32", marks=ON_GPU, id="native")],
)
"""Interpreted kernels differ from plain JAX in their loads and stores, not in their roundings: one dtype."""
RELEASED = {"released": Case(300, 8, 2048, 1024, 32), "released_skewed": Case(300, 8, 512, 2048, 32, "skewed")}


def ffn(x, w, experts, *, implementation, aligned=True):
    """Return each slot's product [N * A, F] by way of the groups' tiles, and each token's sum of them, gathered in the product."""
    num_slots, num_experts = experts.shape[1], w.shape[0]
    how = {"row_tile": row_tile_for(experts.size, num_experts, aligned=aligned), "implementation": implementation}
    groups = group_rows(experts.reshape(-1), num_experts, how["row_tile"])
    combine = functools.partial(combine_groups, groups=groups, implementation=implementation)
    slots = combine(grouped_matmul(gather_groups(x, groups, num_slots), w, groups.tiles, **how), num_slots=1)
    return slots, combine(gather_grouped_matmul(x, w, groups, num_slots, **how), num_slots=num_slots)


def directly(x, w, experts):
    """Return the same from the reference."""
    slots = reference.grouped_matmul(jnp.repeat(x, experts.shape[1], 0), w, experts.reshape(-1))
    return slots, slots.reshape(*experts.shape, -1).sum(1)


@functools.cache
def program(implementation, aligned=True, gradients=True, op=ffn):
    """Return the op's compiled function (arguments, experts, cotangents) -> (results, gradients), or of results alone."""
    f = functools.partial(op, implementation=implementation, aligned=aligned)
    if not gradients:
        return jit_of(implementation)(f)
    return jit_of(implementation)(lambda arguments, experts, cotangents: with_gradients(lambda *a: f(*a, experts))(arguments, cotangents))


def truth(arguments, experts, cotangents):
    """Return the reference's values and gradients."""
    return with_gradients(lambda *a: directly(*a, experts))(arguments, cotangents)


def arguments_of(case, dtype, seed=0):
    """Return (x, w), the experts and cotangents of the results."""
    *arguments, experts = inputs(case, dtype, seed)
    results = [jax.ShapeDtypeStruct((num, case.F), dtype) for num in (case.N * case.A, case.N)]
    return tuple(arguments), experts, random_like(tuple(results))


SLOW = {
    *itertools.product(KERNELS, ("more_experts_than_rows", "experts_of_a_model"), ("bf16",)),
    *itertools.product(("xla fast",), ("experts_of_a_model",), DTYPES),
    *itertools.product(("xla", "pallas_gpu"), ("experts_of_a_model",), ("fp32",)),
}
"""These compile programs that no other test runs; the other routings share one."""
VALUE_CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if case in SLOW else [])
    for case in itertools.product(["xla fast", *IMPLEMENTATIONS], TEST_CASES, DTYPES)
]
NATIVE = [
    pytest.param("pallas_gpu", name, dtype, marks=ON_GPU, id=f"native-{name}-{dtype}") for name in TEST_CASES | RELEASED for dtype in DTYPES
]


@pytest.mark.parametrize(("implementation", "name", "dtype"), VALUE_CASES + NATIVE)
def test_value_and_gradients(name, dtype, implementation):
    """Of an interpreted kernel, too: what it does not write, or reads from behind an array, is NaN there."""
    case, dtype = (TEST_CASES | RELEASED)[name], DTYPES[dtype]
    run = program(implementation.removesuffix(" fast"), aligned=implementation != "xla fast")
    arguments, experts, cotangents = arguments_of(case, dtype)
    halves = [cotangents]
    if dtype == jnp.bfloat16:  # what is rounded on the way costs as much as at the end: one path at a time
        halves = [tuple(c * (i == half) for i, c in enumerate(cotangents)) for half in range(2)]
    for half in halves:
        out, gradients = run(arguments, experts, half)
        assert out[0].dtype == out[1].dtype == dtype
        (slots, y), expected = in_float64(truth, arguments, experts, half)
        if dtype == jnp.bfloat16:
            y = in_float64(lambda slots: slots.sum(1), out[0].reshape(*experts.shape, -1))
            gradients = jax.tree.map(lambda g: g.astype(dtype), gradients)
        assert_close((out, gradients), ((slots, y), expected), dtype)
    unused = np.setdiff1d(np.arange(case.E), experts)
    assert not np.asarray(gradients[1])[unused].any()
    nowhere = np.asarray(experts) >= case.E
    assert not np.asarray(out[0])[nowhere.reshape(-1)].any()


def test_row_tiles_follow_the_load_unless_aligned():
    sizes = {row_tile_for(num, 8, aligned=True) for num in (1, 100, 10**6)}
    assert len(sizes) == 1
    assert [row_tile_for(num, 8, aligned=False) for num in (1, 8, 200, 1024, 10**6)] == [1, 2, 8, 32, 256]
    for kind in ("v5p", "h200"):  # kernels cut tiles of their own
        with compat.compiling_for(kind):
            assert {row_tile_for(num, 8, aligned=aligned) for num in (1, 10**6) for aligned in (False, True)} == {16}


@pytest.mark.parametrize(("implementation", "dtype"), modes_and_dtypes(IMPLEMENTATIONS))
def test_rows_do_not_depend_on_their_neighbours(dtype, implementation):
    """The same rows with the same experts: alone, in part, and under every routing of the others."""
    (x, w), experts, _ = on_host(arguments_of)(Case(90, 3, 48, 40, 8), DTYPES[dtype])
    run = program(implementation, gradients=False)
    by_token = lambda x, experts: [part.reshape(len(x), -1) for part in run(x, w, experts)]
    everything = by_token(x, experts)
    for num in (1, 17):
        assert_same_bits(by_token(x[-num:], experts[-num:]), [part[-num:] for part in everything])
    for others in (0, 7, 8):  # the others all to the first expert, to the last, to none
        routed = by_token(x, np.concatenate([experts[:10], np.full_like(experts[10:], others)]))
        assert_same_bits([part[:10] for part in routed], [part[:10] for part in everything])
    order = np.random.default_rng(1).permutation(90)
    assert_same_bits(by_token(x[order], experts[order]), [part[order] for part in everything])


@every_implementation_and_dtype
def test_finite_garbage_in_padding_rows_changes_nothing(implementation, dtype):
    (x, w), experts, _ = arguments_of(TEST_CASES["skewed"], DTYPES[dtype])
    groups = group_rows(experts.reshape(-1), 8, 16)
    rows = gather_groups(x, groups, experts.shape[1])
    padding = (groups.source == experts.size)[:, None]
    product = jit_of(implementation)(functools.partial(grouped_matmul, row_tile=16, implementation=implementation))
    combine = jit(functools.partial(combine_groups, num_slots=1))
    clean, dirty = (combine(product(r, w, groups.tiles), groups) for r in (rows, jnp.where(padding, 1e3, rows)))
    assert_same_bits(dirty, clean)
    beyond = int(groups.tiles.sum()) * 16
    assert not product(rows, w, groups.tiles)[beyond:].any()


@every_implementation_and_dtype
def test_the_forward_has_the_same_bits_under_a_gradient(implementation, dtype):
    arguments, experts, cotangents = arguments_of(TEST_CASES["skewed"], DTYPES[dtype])
    assert_same_bits(
        program(implementation)(arguments, experts, cotangents)[0], program(implementation, gradients=False)(*arguments, experts)
    )


@every_implementation
def test_gathered_rows_and_combined_slots_have_the_bits_of_the_moves(implementation):
    """The fused gather has the bits of the plain one, and the sum rounds every sum, in order."""
    (x, w), experts, _ = arguments_of(Case(90, 3, 48, 40, 8, "some"), jnp.float32)
    slots, y = program(implementation, gradients=False)(x, w, experts)
    first, *others = (np.asarray(slots).reshape(90, 3, -1)[:, a] for a in range(3))
    assert_same_bits(y, functools.reduce(np.add, others, first))


def experts_of(x, w_in, w_out, weights, experts, *, implementation, aligned=True):
    """Return each token's weighted sum of its experts [N, D]."""
    row_tile = row_tile_for(experts.size, w_in.shape[0], aligned=aligned)
    groups = group_rows(experts.reshape(-1), w_in.shape[0], row_tile)
    how = {"row_tile": row_tile, "aligned": aligned, "implementation": implementation}
    return grouped_mlp(x, w_in, w_out, groups, weights, **how)


def directly_of(x, w_in, w_out, weights, experts):
    """Return the same from the references: the weights multiply what the experts return."""
    flat = experts.reshape(-1)
    hidden = layers.swiglu(reference.grouped_matmul(jnp.repeat(x, experts.shape[1], 0), w_in, flat))
    return reference.combine(reference.grouped_matmul(hidden, w_out, flat).reshape(*experts.shape, -1), weights)


def mlp_truth(arguments, experts, cotangent):
    return with_gradients(lambda *a: directly_of(*a, experts))(arguments, cotangent)


def mlp_arguments_of(case, dtype):
    """Return (x, w_in, w_out, weights), the experts and a cotangent."""
    x, w_in, experts = inputs(case, dtype)
    rng = np.random.default_rng(2)
    w_out = jnp.asarray((rng.standard_normal((case.E, case.F // 2, case.D)) * (case.F / 2) ** -0.5).astype(dtype))
    weights = jnp.asarray(rng.random((case.N, case.A), np.float32))
    (cotangent,) = random_like((jax.ShapeDtypeStruct((case.N, case.D), dtype),))
    return (x, w_in, w_out, weights), experts, cotangent


MLP_CASES = TEST_CASES | {
    "lanes": Case(77, 3, 48, 256, 8, "skewed"),
    "odd_width": Case(77, 3, 48, 26, 8, "some"),
    "high_load": Case(150, 3, 48, 40, 8, "skewed"),
}
"""At the high load of the last, fast numerics take four tiles of a group in a turn, and one where fewer are left."""
QUICK_MLP = {
    *itertools.product(("xla fast", "xla"), set(TEST_CASES) - {"experts_of_a_model"}),
    ("xla fast", "high_load"),
    *itertools.product(KERNELS, ("lanes", "skewed", "none")),
    ("pallas_gpu", "odd_width"),
}
MLP = [
    pytest.param(*case, marks=[] if case in QUICK_MLP else [pytest.mark.slow])
    for case in itertools.product(["xla fast", *IMPLEMENTATIONS], MLP_CASES)
]


NATIVE_MLP = [pytest.param("pallas_gpu", name, marks=ON_GPU, id=f"native-{name}") for name in ("lanes", "odd_width", "skewed", "none")]


@pytest.mark.parametrize(("implementation", "name"), [*MLP, *NATIVE_MLP])
def test_both_products_of_an_expert(implementation, name):
    case = MLP_CASES[name]
    arguments, experts, cotangent = mlp_arguments_of(case, jnp.float32)
    run = program(implementation.removesuffix(" fast"), aligned=implementation != "xla fast", op=experts_of)
    out, gradients = run(arguments, experts, cotangent)
    assert_close((out, gradients), in_float64(mlp_truth, arguments, experts, cotangent), jnp.float32)
    nowhere = np.asarray(experts) >= case.E
    assert not np.asarray(gradients[3])[nowhere].any()
    assert not np.asarray(out)[nowhere.all(1)].any()


def take_a_tpus_tiles(monkeypatch, **sizes):
    """Let a GPU's kernel take these: XLA:CPU multiplies tiles of other sizes in other ways, and sums of several depths are in pieces."""
    size = tables.GROUPED_GPU_FP32["cpu"]._replace(rows=tables.GROUPED_TPU["cpu"].rows, **sizes)
    monkeypatch.setattr(tables, "GROUPED_GPU_FP32", {"cpu": size})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["skewed", "some"])
def test_interpreted_kernels_have_equal_bits(name, dtype, monkeypatch):
    case = TEST_CASES[name]
    take_a_tpus_tiles(monkeypatch, columns=case.F, depth=case.D)
    arguments, experts, _ = arguments_of(case, DTYPES[dtype])
    assert_same_bits(*(jit_of(kernel)(functools.partial(ffn, implementation=kernel))(*arguments, experts) for kernel in KERNELS))


def test_interpreted_experts_have_equal_bits(monkeypatch):
    """In fp32: on a CPU a GPU's kernel leaves what is between the products of bf16 rows unrounded, as operands are held there."""
    take_a_tpus_tiles(monkeypatch, columns=256, depth=128)  # half of the columns are gate, half up
    arguments, experts, _ = mlp_arguments_of(Case(77, 3, 128, 256, 8, "skewed"), jnp.float32)
    assert_same_bits(*(jit_of(kernel)(functools.partial(experts_of, implementation=kernel))(*arguments, experts) for kernel in KERNELS))


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_any_routing_of_experts(implementation):
    """From all rows to one expert, or none, to a few to each."""
    case = MLP_CASES["skewed"]
    arguments, _, cotangent = mlp_arguments_of(case, jnp.float32)

    @settings(deadline=None, max_examples=6)
    @given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.01, 0.3, 10.0]))
    def run(seed, spread):
        rng = np.random.default_rng(seed)
        load = rng.dirichlet(np.full(case.E + 1, spread))
        experts = rng.choice(case.E + 1, (case.N, case.A), p=load).astype(np.int32)
        actual = program(implementation, op=experts_of)(arguments, experts, cotangent)
        assert_close(actual, in_float64(mlp_truth, arguments, experts, cotangent), jnp.float32)

    run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_products_have_the_bits_of_each(dtype):
    """In one loop or in two with a layer between them."""
    arguments, experts, _ = mlp_arguments_of(Case(90, 3, 48, 40, 8, "skewed"), DTYPES[dtype])

    def apart(x, w_in, w_out, weights, experts):
        how = {"row_tile": row_tile_for(experts.size, 8, aligned=True), "implementation": "xla"}
        groups = group_rows(experts.reshape(-1), 8, how["row_tile"])
        y = gather_grouped_matmul(x, w_in, groups, experts.shape[1], **how)
        hidden = swiglu(y, gather_weights(weights, groups), aligned=True, implementation="xla")
        return combine_groups(grouped_matmul(hidden, w_out, groups.tiles, **how), groups, experts.shape[1])

    assert_same_bits(jit_of("xla")(apart)(*arguments, experts), program("xla", gradients=False, op=experts_of)(*arguments, experts))


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("xla", "fp32"), ("xla", "bf16"), ("pallas_gpu", "fp32"), pytest.param(*native.values, "bf16", marks=ON_GPU, id="native")],
)
def test_an_expert_has_the_same_bits_under_a_gradient_and_alone(implementation, dtype):
    arguments, experts, cotangent = on_host(mlp_arguments_of)(Case(90, 3, 48, 40, 8, "skewed"), DTYPES[dtype])
    x, *matrices, weights = arguments
    run = program(implementation, gradients=False, op=experts_of)
    everything = run(*arguments, experts)
    assert everything.dtype == DTYPES[dtype]
    assert_same_bits(program(implementation, op=experts_of)(arguments, experts, cotangent)[0], everything)
    for num in (1, 17):
        assert_same_bits(run(x[-num:], *matrices, weights[-num:], experts[-num:]), everything[-num:])


@pytest.mark.parametrize(("implementation", "dtype"), [*((name, "fp32") for name in IMPLEMENTATIONS), ("xla", "bf16")])
def test_a_token_of_experts_does_not_depend_on_its_neighbours(implementation, dtype):
    """Nor on the weight of a slot that goes nowhere, NaN here."""
    (x, *matrices, weights), experts, _ = on_host(mlp_arguments_of)(Case(90, 3, 48, 256, 8, "some"), DTYPES[dtype])
    run = program(implementation, gradients=False, op=experts_of)
    everything = run(x, *matrices, weights, experts)
    for others in (0, 7, 8):  # the others all to the first expert, to the last, to none
        changed = np.where(experts < 8, weights, np.float32(np.nan)) * np.where(np.arange(90) < 10, 1, np.float32(3))[:, None]
        routed = np.concatenate([experts[:10], np.full_like(experts[10:], others)])
        assert_same_bits(run(x, *matrices, changed, routed)[:10], everything[:10])
    order = np.random.default_rng(1).permutation(90)
    assert_same_bits(run(x[order], *matrices, weights[order], experts[order]), everything[order])


NATIVE_BF16 = [pytest.param("pallas_gpu", case, marks=ON_GPU, id=f"native-{name}") for name, case in RELEASED.items()]


@pytest.mark.parametrize(("implementation", "case"), [*((name, MLP_CASES["lanes"]) for name in IMPLEMENTATIONS), *NATIVE_BF16])
def test_experts_in_bf16(implementation, case):
    """What is rounded between the products weighs more than the last rounding: by norm, and four of its steps."""
    arguments, experts, cotangent = mlp_arguments_of(case, jnp.bfloat16)
    actual = program(implementation, op=experts_of)(arguments, experts, cotangent)
    for one, exact in zip(jax.tree.leaves(actual), jax.tree.leaves(in_float64(mlp_truth, arguments, experts, cotangent)), strict=True):
        assert np.linalg.norm(np.asarray(one, np.float64) - exact) <= 2.0**-7 * np.linalg.norm(exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_of_another_dtype(implementation):
    """They are what they are in fp32; the gradient is rounded to theirs at the end."""
    (*others, weights), experts, cotangent = mlp_arguments_of(MLP_CASES["lanes"], jnp.float32)
    half, run = weights.astype(jnp.bfloat16), program(implementation, op=experts_of)
    out, gradients = run((*others, half), experts, cotangent)
    same, expected = run((*others, half.astype(jnp.float32)), experts, cotangent)
    assert_same_bits((out, gradients), (same, (*expected[:3], expected[3].astype(jnp.bfloat16))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_rows_taken_as_on_a_tpu(dtype):
    """There a row of zeros stands behind the others in place of a fill."""
    index = jnp.array([4, 0, 5, 2, 1 << 20, 4], jnp.int32)
    for x in (jnp.arange(1, 16).reshape(5, 3).astype(dtype), jnp.arange(1, 6).astype(dtype)):
        with compat.compiling_for("v5p"):
            found = jax.jit(lambda x: take_rows(x, index, jnp.zeros((5, 1), jnp.int32)))(x)
        assert_same_bits(found, jnp.take(x, index, axis=0, mode="fill", fill_value=0))


@pytest.mark.parametrize("implementation", KERNELS)
@settings(deadline=None, max_examples=15)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_any_routing(data, seed, implementation):
    """Small whole numbers: every sum is exact, whatever its order, so not one row may be missing, or counted for two experts."""
    experts = np.array(data.draw(st.lists(st.integers(0, 5), min_size=44, max_size=44)), np.int32).reshape(22, 2)
    rng = np.random.default_rng(seed)
    x, w = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((22, 40), (5, 40, 24)))
    cotangents = tuple(rng.integers(-2, 3, shape).astype(np.float32) for shape in ((44, 24), (22, 24)))
    actual = program(implementation)((x, w), experts, cotangents)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(exact((x, w), experts, cotangents)), strict=True):
        np.testing.assert_array_equal(one, other)


exact = jax.jit(truth)


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e", "h200"])
def test_one_tile_for_any_number_of_rows(kind):
    """The kernel multiplies the same shapes for 1 and 8192 tokens: only the list of its tiles is longer."""

    def products(num):
        arguments = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((num * 16, 2048), (256, 2048, 1024)))
        with compat.compiling_for(kind):
            program = lambda x, w, tiles: grouped_matmul(x, w, tiles, row_tile=16)
            jaxpr = jax.make_jaxpr(program)(*arguments, jax.ShapeDtypeStruct((256,), jnp.int32))
        (call,) = (e for e in compat.equations(jaxpr) if e.primitive.name == "pallas_call")
        assert not call.params["interpret"]
        dots = (e for e in compat.equations(call.params["jaxpr"]) if e.primitive.name in ("dot_general", "accumulating_dot"))
        return [[x.aval.shape for x in (*e.invars, *e.outvars)] for e in dots]

    assert products(1) == products(64) == products(8192) != []


def test_refusals():
    x, w, tiles = jnp.ones((16, 1 << 20), jnp.bfloat16), jnp.ones((1, 1 << 20, 8), jnp.bfloat16), jnp.ones(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="128 columns of 1048576 terms do not fit in VMEM twice"):
        jax.eval_shape(functools.partial(grouped_matmul, row_tile=16, implementation="pallas_tpu"), x, w, tiles)
    for name in KERNELS:
        with pytest.raises(NotImplementedError, match="the operands are float16 and float32"):
            grouped_matmul(jnp.ones((16, 8), jnp.float16), jnp.ones((1, 8, 8)), tiles, row_tile=16, implementation=name)


grouped = {tile: jax.jit(functools.partial(group_rows, num_groups=5, row_tile=tile)) for tile in (1, 16)}


@settings(deadline=None, max_examples=40)
@given(num=st.sampled_from([1, 24, 70]), tile=st.sampled_from([1, 16]), data=st.data())
def test_every_assignment_has_one_row_in_a_tile_of_its_group(num, tile, data):
    group = np.array(data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 9]), min_size=num, max_size=num)), np.int32)
    source, destination, tiles = (np.asarray(x) for x in grouped[tile](jnp.asarray(group)))
    placed = group < 5
    assert len(source) % tile == 0
    assert tiles.sum() * tile <= len(source)
    np.testing.assert_array_equal(tiles, -(-np.bincount(group[placed], minlength=5)[:5] // tile))
    np.testing.assert_array_equal(source[destination[placed]], np.flatnonzero(placed))  # one another's inverse
    assert (np.sort(source[source < num]) == np.flatnonzero(placed)).all()
    assert (destination[~placed] == len(source)).all()
    owner = np.repeat(np.arange(5), tiles)
    np.testing.assert_array_equal(owner[destination[placed] // tile], group[placed])
    for one in range(5):  # stable: a group's rows keep their order
        assert (np.diff(destination[group == one]) == 1).all()
