"""The grouped product: right in value and gradient for any load of the experts, and rows that do not see their neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import gather_groups, group_rows, grouped_matmul, reference, row_tile_for, scatter_groups
from pallas_kernels.grouped_matmul.cases import TEST_CASES, Case, inputs
from tests.pallas_kernels.programs import DTYPES, in_float64, jit, random_like, with_gradients
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits


def by_expert(x, w, experts, aligned):
    """Return each slot's product [N * A, F] by way of the groups' tiles."""
    num_slots = experts.shape[1]
    row_tile = row_tile_for(experts.size, w.shape[0], aligned=aligned)
    groups = group_rows(experts.reshape(-1), w.shape[0], row_tile)
    rows = grouped_matmul(gather_groups(x, groups, num_slots), w, groups.tiles, row_tile=row_tile)
    return scatter_groups(rows, groups)


def directly(x, w, experts):
    """Return the same from the reference."""
    return reference.grouped_matmul(jnp.repeat(x, experts.shape[1], 0), w, experts.reshape(-1))


def truth(differentiable, experts, cotangent):
    """Return the reference's value and gradients."""
    return with_gradients(lambda x, w: directly(x, w, experts))(differentiable, cotangent)


aligned_program = jit(functools.partial(by_expert, aligned=True))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TEST_CASES)
def test_value_and_gradients(name, dtype, aligned):
    dtype = DTYPES[dtype]
    x, w, experts = inputs(TEST_CASES[name], dtype)
    f = lambda x, w: by_expert(x, w, experts, aligned)
    cotangent = random_like(jax.eval_shape(f, x, w))
    out, (dx, dw) = jit(with_gradients(f))((x, w), cotangent)
    assert out.dtype == dtype
    assert_close((out, (dx, dw)), in_float64(truth, (x, w), experts, cotangent), dtype)
    unused = np.setdiff1d(np.arange(w.shape[0]), experts)
    assert not np.asarray(dw)[unused].any()
    assert not np.asarray(out)[np.asarray(experts).reshape(-1) >= w.shape[0]].any()


def test_row_tiles_follow_the_load_unless_aligned():
    sizes = {row_tile_for(num, 8, aligned=True) for num in (1, 100, 10**6)}
    assert len(sizes) == 1
    assert [row_tile_for(num, 8, aligned=False) for num in (1, 8, 200, 1024, 10**6)] == [1, 2, 8, 32, 256]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_neighbours(dtype):
    """The same rows with the same experts: alone, in part, and under every routing of the others."""
    x, w, experts = inputs(Case(90, 3, 48, 40, 8), DTYPES[dtype])
    everything = np.asarray(aligned_program(x, w, experts)).reshape(90, 3, 40)
    for num in (1, 17):
        assert_same_bits(aligned_program(x[-num:], w, experts[-num:]).reshape(num, 3, 40), everything[-num:])
    for others in (0, 7, 8):  # the others all to the first expert, to the last, to none
        routed = experts.at[10:].set(others)
        assert_same_bits(aligned_program(x, w, routed).reshape(90, 3, 40)[:10], everything[:10])
    order = np.random.default_rng(1).permutation(90)
    assert_same_bits(aligned_program(x[order], w, experts[order]).reshape(90, 3, 40), everything[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_garbage_in_padding_rows_changes_nothing(dtype):
    x, w, experts = inputs(TEST_CASES["skewed"], DTYPES[dtype])
    groups = group_rows(experts.reshape(-1), 8, 16)
    rows = gather_groups(x, groups, experts.shape[1])
    padding = (groups.source == experts.size)[:, None]
    product = jit(functools.partial(grouped_matmul, row_tile=16))
    clean, dirty = (scatter_groups(product(r, w, groups.tiles), groups) for r in (rows, jnp.where(padding, 1e3, rows)))
    assert_same_bits(dirty, clean)
    beyond = int(groups.tiles.sum()) * 16
    assert not product(rows, w, groups.tiles)[beyond:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_has_the_same_bits_under_a_gradient(dtype):
    x, w, experts = inputs(TEST_CASES["skewed"], DTYPES[dtype])
    out = aligned_program(x, w, experts)
    f = lambda x, w: by_expert(x, w, experts, True)
    assert_same_bits(jit(with_gradients(f))((x, w), random_like(out))[0], out)


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
