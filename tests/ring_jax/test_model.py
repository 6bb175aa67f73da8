"""The model: one forward in every mode, with caches and without, stacked and unrolled."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import GRID
from ring_jax import cache as caches
from ring_jax import checkpoint, numerics, scoring
from ring_jax.config import PRESETS
from ring_jax.model import Ring, layer_pattern
from ring_jax.numerics import Numerics, inference_weights, num_bytes
from tests.ring_jax.models import SMALL, TWO_LAYERS, Programs, pad, same_bits, write_hf
from tests.ring_jax.random_tensors import random_tensors

LENGTHS = (200, 131, 64)
WIDTHS = (100, 1)
CACHE = 256


def make(config, *, stacked=True, **how) -> Programs:
    """Return the programs of a random model whose balancing biases are not zero, which holds its weights as a loaded one does."""
    model = Ring(config, Numerics(**how), rngs=nnx.Rngs(0), stacked=stacked)
    graph, params, balance, tables = scoring.split(model)
    balance = jax.tree.map(lambda b: b + 0.1 * jnp.sin(jnp.arange(b.size, dtype=jnp.float32)).reshape(b.shape), balance)
    return Programs(nnx.merge(graph, inference_weights(params, model.numerics), balance, tables))


@pytest.fixture(scope="module")
def documents(tokens) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, SMALL.vocab_size, length).astype(np.int32) for length in LENGTHS]


def is_layer(x) -> bool:
    return isinstance(x, caches.LinearCache | caches.SoftmaxCache)


def in_pages(model, batch) -> caches.Cache:
    """Return an empty cache whose slots have pages from all over a memory that held other things, and none behind CACHE positions."""
    per_slot = CACHE // GRID
    cache = model.init_cache(batch, CACHE + GRID, 2 * batch * per_slot)
    assert (np.asarray(cache.pages) == 2 * batch * per_slot).all()
    table = np.random.default_rng(7).permutation(2 * batch * per_slot)[: batch * per_slot].reshape(batch, per_slot)
    dirty = lambda layer: jax.tree.map(lambda x: x + 3, layer) if isinstance(layer, caches.SoftmaxCache) else layer
    layers = jax.tree.map(dirty, cache.layers, is_leaf=is_layer)
    return cache._replace(layers=layers, pages=cache.pages.at[:, :per_slot].set(table))


def through_cache(programs, documents, seed, steps_only_after=None, paged=False) -> list[np.ndarray]:
    """Return the hidden states of documents that go through a cache in random pieces, padded anywhere, some slots resting."""
    rng, batch = np.random.default_rng(seed), len(documents)
    cache, done = in_pages(programs.model, batch) if paged else programs.model.init_cache(batch, CACHE), [0] * batch
    found = [np.zeros((len(d), programs.model.config.hidden_size), programs.model.numerics.dtype) for d in documents]
    while any(at < len(d) for at, d in zip(done, documents, strict=True)):
        width = 1 if steps_only_after is not None and min(done) >= steps_only_after else int(rng.choice(WIDTHS))
        tokens, positions, where = np.full((batch, width), 7, np.int32), np.full((batch, width), -1, np.int32), []
        for slot, document in enumerate(documents):
            count = min(int(rng.integers(0, width + 1)), len(document) - done[slot])
            first = int(rng.integers(0, width - count + 1))
            tokens[slot, first : first + count] = document[done[slot] : done[slot] + count]
            positions[slot, first : first + count] = np.arange(done[slot], done[slot] + count)
            where.append((first, count))
        hidden, cache = programs.cached(tokens, positions, cache)
        for slot, (first, count) in enumerate(where):
            found[slot][done[slot] : done[slot] + count] = hidden[slot, first : first + count]
            done[slot] += count
        np.testing.assert_array_equal(cache.length, done)
    return found


SPLITS = [
    pytest.param({"stacked": True, "dtype": "float32"}, 64, id="fp32-64"),
    pytest.param({"stacked": False, "dtype": "bfloat16"}, 128, id="bf16-128", marks=pytest.mark.slow),
    pytest.param({"stacked": False, "dtype": "float32"}, 128, id="fp32-128", marks=pytest.mark.slow),
    pytest.param({"stacked": True, "dtype": "bfloat16"}, 64, id="bf16-64", marks=pytest.mark.slow),
    pytest.param({"stacked": False, "dtype": "bfloat16", "fp8": True}, 64, id="fp8-64", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("options", "chunk"), SPLITS)
def test_forward_is_prefill_plus_decode(documents, options, chunk):
    """To the last bit in aligned numerics: several slots of different length, any split, padding anywhere, packed or alone."""
    programs = make(dataclasses.replace(SMALL, num_layers=3, chunk_size=chunk), **options)
    tokens, positions = pad(documents, 256)
    whole = programs.hidden(tokens, positions)
    assert np.isfinite(whole).all()
    whole = [rows[: len(d)] for rows, d in zip(whole, documents, strict=True)]
    for seed, steps_only_after, paged in ((0, None, False), (1, None, False), (2, 60, False), (3, 60, True)):
        assert same_bits(through_cache(programs, documents, seed, steps_only_after, paged), whole)
    if chunk == 64:
        at = (256, 0, 512)
        packed, places, segments = np.zeros((1, 640), np.int32), np.full((1, 640), -1, np.int32), np.zeros((1, 640), np.int32)
        for number, (start, document) in enumerate(zip(at, documents, strict=True)):
            span = slice(start, start + len(document))
            packed[0, span], places[0, span], segments[0, span] = document, np.arange(len(document)), number + 1
        hidden = programs.hidden(packed, places, segments)[0]
        assert same_bits([hidden[start : start + len(d)] for start, d in zip(at, documents, strict=True)], whole)
        alone = programs.hidden(tokens[1:2], positions[1:2])[0]
        assert same_bits(alone[: LENGTHS[1]], whole[1])


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_forward_is_prefill_plus_decode_in_fast_numerics(documents, dtype):
    programs = make(TWO_LAYERS, aligned=False, dtype=dtype)
    whole = programs.hidden(*pad(documents, 256))
    cached = through_cache(programs, documents, 0)
    error = np.concatenate([a.astype(np.float64) - b[: len(a)].astype(np.float64) for a, b in zip(cached, whole, strict=True)])
    if dtype == "float32":
        assert np.abs(error).max() < 1e-4
    else:  # a rounding may flip a token's experts, so most rows are near, not all
        assert np.median(np.abs(error).max(-1)) < 0.05


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("num_dense_layers", [0, 1])
def test_fp8_products_of_a_layer_cost_a_few_percent(documents, num_dense_layers):
    """And they do quantise. A rounding may flip a token's experts, so most rows are near, not all.

    A model without gradients holds its weights in FP8: the same numbers, in fewer bytes.
    """
    config = dataclasses.replace(SMALL, num_layers=1, num_dense_layers=num_dense_layers)
    tokens, positions = pad(documents, 256)
    exact_model, trained = (make(config, aligned=False, dtype="bfloat16", fp8=fp8) for fp8 in (False, True))
    exact, found = (model.hidden(tokens, positions)[positions >= 0].astype(np.float64) for model in (exact_model, trained))
    for_inference = make(config, aligned=False, dtype="bfloat16", fp8=True, gradients=False)
    np.testing.assert_array_equal(for_inference.hidden(tokens, positions)[positions >= 0], found)
    mixer, ffn = (getattr(for_inference.model.segments[0][0], part) for part in ("mixer", "ffn"))
    for weight in (mixer.qkv, mixer.out, ffn.gate_up, ffn.down):
        values, scales = weight.get_value()
        assert (values.dtype, scales.dtype) == (jnp.float8_e4m3fn, jnp.float32)
        assert num_bytes(weight) < 1.1 * math.prod(weight.get_metadata("full_shape"))
    assert for_inference.model.head[...].dtype == exact_model.model.head[...].dtype
    error = np.median(np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1))
    assert 0.01 < error < 0.15, error


@pytest.mark.usefixtures("unoptimised")
def test_state_of_a_resting_slot_is_kept(documents):
    """A step of the other slots changes no bit of a slot that rests."""
    programs = make(SMALL)
    _, cache = programs.cached(*pad([d[:30] for d in documents], 64), programs.model.init_cache(3, CACHE))
    before = jax.tree.map(np.asarray, cache)
    _, after = programs.cached(np.array([[1], [2], [3]], np.int32), np.array([[30], [-1], [30]], np.int32), cache)
    slot = lambda c, i: [x[:, :, i] for x in jax.tree.leaves(c.layers)]
    assert same_bits(slot(after, 1), slot(before, 1))
    assert not same_bits(slot(after, 0), slot(before, 0))
    np.testing.assert_array_equal(after.length, [31, 30, 31])
    emptied = caches.reset_slots(after, jnp.array([True, False, False]))
    np.testing.assert_array_equal(emptied.length, [0, 30, 31])
    assert same_bits(slot(emptied, 2), slot(after, 2))
    # An emptied slot starts over: what its last sequence left behind is not read.
    first = pad([documents[1][:30], [], []], 64)
    again, _ = programs.cached(*first, emptied)
    fresh, _ = programs.cached(*first, programs.model.init_cache(3, CACHE))
    assert same_bits(again[0, :30], fresh[0, :30])


@pytest.mark.usefixtures("unoptimised")
def test_pages_are_shared_and_what_has_none_is_dropped(documents):
    """Two slots read one page of a beginning that they share; tokens of a slot without pages write nowhere."""
    programs, beginning = make(SMALL), documents[0][:GRID]
    tails = [documents[1][:40], documents[2][:40]]
    whole = programs.hidden(*pad([np.concatenate([beginning, tail]) for tail in tails], 256))
    cache = in_pages(programs.model, 3)
    _, cache = programs.cached(*pad([beginning, [], []], GRID), cache)
    linear = lambda layer: jax.tree.map(lambda x: x.at[:, :, 1].set(x[:, :, 0]), layer) if isinstance(layer, caches.LinearCache) else layer
    layers = jax.tree.map(linear, cache.layers, is_leaf=is_layer)
    pages = cache.pages.at[1, 0].set(cache.pages[0, 0]).at[2].set(-1)
    cache = cache._replace(layers=layers, length=cache.length.at[1].set(GRID), pages=pages)
    tokens, positions = pad([*tails, tails[0]], 64)
    positions = np.where((positions >= 0) & (np.arange(3) < 2)[:, None], positions + GRID, positions)
    hidden, after = programs.cached(tokens, positions, cache)
    assert same_bits(hidden[:2, :40], whole[:, GRID : GRID + 40])
    np.testing.assert_array_equal(after.length, [GRID + 40, GRID + 40, 40])
    softmax = lambda cache: [x for x in jax.tree.leaves(cache.layers, is_leaf=is_layer) if isinstance(x, caches.SoftmaxCache)]
    own = np.asarray(pages[:2, 1])
    for before, then in zip(softmax(cache), softmax(after), strict=True):
        changed = (np.asarray(before.key) != np.asarray(then.key)).any(axis=(0, 1, 3, 4))
        assert set(np.flatnonzero(changed)) == set(own)


@pytest.mark.usefixtures("unoptimised")
def test_the_copy_of_the_state_is_the_rounded_state(documents):
    """What an accelerator's bf16 decode step reads: it follows the state through pieces, folds and resets."""
    programs = make(dataclasses.replace(TWO_LAYERS, chunk_size=64), dtype="bfloat16")
    is_linear = lambda layer: isinstance(layer, caches.LinearCache)
    linear = lambda cache: [layer for layer in jax.tree.leaves(cache.layers, is_leaf=is_linear) if is_linear(layer)]
    plain = programs.model.init_cache(3, CACHE)
    assert [layer.copy for layer in linear(plain)] == [None]  # a CPU's products take fp32
    add = lambda layer: layer._replace(copy=layer.state.astype(jnp.bfloat16)) if is_linear(layer) else layer
    copied = plain._replace(layers=jax.tree.map(add, plain.layers, is_leaf=is_linear))

    def advance(tokens, positions):
        nonlocal plain, copied
        (_, plain), (found, copied) = programs.cached(tokens, positions, plain), programs.cached(tokens, positions, copied)
        assert np.isfinite(found.astype(np.float32)).all()
        for layer, other in zip(linear(copied), linear(plain), strict=True):
            assert same_bits(layer.state, other.state)  # of the first layer: no output of a state comes before it
            assert same_bits(layer.copy, layer.state.astype(jnp.bfloat16))

    def states():
        return [np.asarray(layer.state) for layer in linear(copied)]

    advance(*pad([d[:62] for d in documents], 64))
    assert not any(state.any() for state in states())
    for position in range(62, 65):  # the second of these fills the chunk
        advance(np.array([[d[position % len(d)]] for d in documents], np.int32), np.full((3, 1), position, np.int32))
    assert all(state.any((-1, -2)).all() for state in states())
    copied = caches.reset_slots(copied, jnp.array([False, True, False]))
    assert all(same_bits(layer.copy, layer.state.astype(jnp.bfloat16)) for layer in linear(copied))


@pytest.mark.parametrize(
    ("num_dense_layers", "stacked"),
    [(1, True), (2, False), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((1, False), (2, True)))],
)
def test_hidden_state_of_one_column(documents, num_dense_layers, stacked):
    """It has the bits that it has among those of all columns, and so has the cache, wherever the padding is.

    The last layer, sparse or dense, is a segment of its own, or (stacked) the end of one.
    """
    config = dataclasses.replace(TWO_LAYERS, num_dense_layers=num_dense_layers)
    assert len(layer_pattern(config, stacked)[-1]) == (2 if stacked else 1)
    model = make(config, stacked=stacked).model
    graph, state = nnx.split(model)

    def piece(state, tokens, positions, cache, only):
        output = nnx.merge(graph, state)(tokens, positions, cache, only=only)
        return output.hidden, output.cache

    run = numerics.jit(piece, model.numerics)
    tokens, positions = pad([d[:n] for d, n in zip(documents, (64, 31, 5), strict=True)], 64)
    tokens[1], positions[1] = np.roll(tokens[1], 20), np.roll(positions[1], 20)
    only = np.array([63, 50, 4], np.int32)
    everything, cache = run(state, tokens, positions, model.init_cache(3, CACHE), None)
    hidden, after = run(state, tokens, positions, model.init_cache(3, CACHE), only)
    assert hidden.shape == (3, 1, config.hidden_size)
    assert same_bits(hidden[:, 0], everything[np.arange(3), only])
    assert same_bits(jax.tree.leaves(after), jax.tree.leaves(cache))


@pytest.mark.slow  # `make gates` compares the layouts of the golden checkpoints: training's and inference's
def test_stacked_is_unstacked(tmp_path, documents):
    """The layout of the parameters, and so the scan, changes no bit."""
    config = dataclasses.replace(SMALL, num_layers=7, period=2)  # a group with the dense layer, a scan of two groups, a trailing layer
    folder = write_hf(tmp_path, config, random_tensors(config))
    assert [len(segment[0].layers) for segment in layer_pattern(config)] == [1, 2, 1]
    hidden = [Programs(checkpoint.load(folder, stacked=s).model).hidden(*pad(documents[1:2], 256)) for s in (True, False)]
    assert same_bits(*[h[:, : LENGTHS[1]] for h in hidden])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unrolled_is_looped(documents, dtype):
    """How many layers a turn computes changes no bit of the training forward, gradients and all."""
    config = dataclasses.replace(PRESETS["test"], num_layers=10, period=5, num_dense_layers=0)
    assert max(len(run.layers[0]) for segment in layer_pattern(config) for run in segment) == 4
    tokens, positions = pad([[token % config.vocab_size for token in documents[1]]], 256)
    batch = scoring.host_batch(np.asarray(tokens), np.asarray(positions))

    def logprobs(unroll):
        numeric = Numerics(dtype=dtype, unroll=unroll)
        graph, params, balance, tables = scoring.split(Ring(config, numeric, rngs=nnx.Rngs(0)))

        def program(params, batch):
            def loss(params):
                logprobs = scoring.token_logprobs(scoring.merge(graph, params, balance, tables, dtype), batch)
                return logprobs.sum(), logprobs

            return jax.value_and_grad(loss, has_aux=True)(params)

        (_, logprobs), gradients = numerics.jit(program, numeric)(params, batch)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
        return np.asarray(logprobs)

    looped = logprobs(1)
    assert (looped[:, 1 : LENGTHS[1]] < 0).all()
    assert same_bits(logprobs(4), looped)
