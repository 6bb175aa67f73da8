"""One training step: it learns, it accumulates, it survives a NaN, it balances experts, and it is the same however it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import GRID
from ring_jax import numerics, scoring
from ring_jax.config import preset
from ring_jax.model import Ring
from ring_jax.moe import balance
from ring_jax.numerics import Numerics
from ring_jax.scoring import Batch
from ring_jax.train import step as steps
from ring_jax.train.config import OptimizerConfig

pytestmark = pytest.mark.usefixtures("all_unoptimised")

# Both mixers, both FFNs: a linear layer with a dense FFN, a softmax layer with experts.
MODEL = dataclasses.replace(preset("test"), num_layers=2, period=2)
FAST = Numerics(aligned=False)
Z_LOSS = 0.01


def make_batch(rows=4, seq_len=2 * GRID, seed=0):
    """Rows of documents of unequal lengths, with padding, as the packer makes them."""
    rng = np.random.default_rng(seed)
    tokens, positions, segments = np.zeros((rows, seq_len), int), np.full((rows, seq_len), -1), np.zeros((rows, seq_len), int)
    for row in range(rows):
        for segment, column in enumerate(range(0, seq_len, GRID), 1):
            length = int(rng.integers(2, GRID + 1))
            place = np.s_[row, column : column + length]
            tokens[place], positions[place], segments[place] = rng.integers(1, MODEL.vocab_size, length), np.arange(length), segment
    return Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)))


@functools.cache
def program(model=MODEL, how=FAST, **optimizer):
    # Without clipping, the first moments after the first step are a tenth of the gradient.
    config = OptimizerConfig(**{"warmup": 0, "learning_rate": 0.01, "clip": 0.0, "z_loss": Z_LOSS, **optimizer})
    return steps.make_program(model, how, config, steps=100, seed=0, mesh=None)


def run(program, batch, num_steps=1, state=None):
    state, metrics = state or program.init(), []
    for _ in range(num_steps):
        state, found = program.step(jax.tree.map(jnp.copy, state), program.tables, batch)
        metrics.append(jax.device_get(found))
    return state, metrics


def same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def gradients(state):
    """The gradients of a first step, times a tenth."""
    return state.optimizer[1].mu


def close(one, other, tolerance):
    """Each array within `tolerance` of the largest value of the other one."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(jnp.abs(b).max()), 1e-6))


def test_loss_of_a_repeated_batch_falls():
    state, metrics = run(program(), make_batch(), 12)
    losses = [m.loss for m in metrics]
    assert 4 < losses[0] < 7  # about ln 96, more for the large initial scale of this preset
    assert losses[-1] < 0.75 * losses[0]
    assert losses[-1] == min(losses)
    assert int(state.step) == 12
    assert int(state.skipped) == 0
    assert metrics[0].loss == pytest.approx(metrics[0].nll / metrics[0].num_tokens, rel=0.05)  # bar the z-loss
    assert int(metrics[0].num_tokens) == int(scoring.scored(make_batch()).sum())


def test_evaluation_is_the_loss_of_the_next_step():
    state, batch = program().init(), make_batch()
    nll, count = program().evaluate(state.params, state.balance, program().tables, batch)
    _, (metrics,) = run(program(), batch)
    assert float(nll) == pytest.approx(float(metrics.nll), rel=1e-6)
    assert float(count) == float(metrics.num_tokens)


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    batch = make_batch()
    whole, (expected,) = run(program(), batch)
    parts, (found,) = run(program(accumulate=2), jax.tree.map(lambda x: x.reshape(2, 2, -1), batch))
    halves = scoring.scored(batch).reshape(2, -1).sum(1)
    assert halves[0] != halves[1]  # else the mean of the means would do
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    assert found.num_tokens == expected.num_tokens
    close(gradients(parts), gradients(whole), 1e-5)
    close(parts.balance, whole.balance, 1e-6)


def test_nan_skips_the_step():
    batch = make_batch()
    good, _ = run(program(), batch)
    broken = good._replace(params=jax.tree.map(jnp.copy, good.params))
    broken.params["norm"]["weight"][...] = broken.params["norm"]["weight"][...].at[3].set(jnp.nan)
    state = broken
    for count in (1, 2):
        state, (metrics,) = run(program(), batch, state=state)
        assert np.isnan(metrics.loss)
        assert int(state.step) == 1 + count
        assert int(metrics.skipped) == int(metrics.skipped_in_a_row) == count
        same_bits((state.params, state.optimizer, state.balance), (broken.params, broken.optimizer, broken.balance))
    # The next good step is the step that would have come, and ends the row.
    state, (metrics,) = run(program(), batch, state=state._replace(params=good.params))
    expected, (wanted,) = run(program(), batch, state=good)
    assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (2, 0)
    assert metrics.loss == wanted.loss
    assert metrics.learning_rate == wanted.learning_rate
    same_bits((state.params, state.optimizer, state.balance), (expected.params, expected.optimizer, expected.balance))


@pytest.mark.slow
def test_fp8_gradients_do_not_depend_on_what_layers_emit(monkeypatch):
    """Rows and columns in FP8, with a gradient through their carrier, and gradients in FP8; or plain rows, and products quantise all."""
    batch, how = make_batch(2, GRID), Numerics(aligned=False, fp8=True, remat="mixers")  # fp32: no rounding parts the two
    found = program(how=how)
    emitted, metrics = run(found, batch)
    start = found.init()
    nll, _ = found.evaluate(start.params, start.balance, found.tables, batch)  # without gradients
    np.testing.assert_allclose(nll, metrics[0].nll, rtol=1e-5)
    monkeypatch.setattr(Numerics, "emit", lambda self, plain=False: ("plain",))
    plain, of_plain = run(program.__wrapped__(how=dataclasses.replace(how, gradients=False)), batch)
    np.testing.assert_allclose(metrics[0].loss, of_plain[0].loss, rtol=1e-6)
    close(gradients(emitted), gradients(plain), 1e-5)


def test_balancing_bias_moves_against_the_load():
    bias, load = jnp.array([[0.5, 0.0, -0.5, 0.0]]), jnp.array([[9.0, 1.0, 4.0, 6.0]])
    moved = balance(bias, load, 0.1)
    assert moved.sum() == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(moved - bias, [[-0.1, 0.1, 0.1, -0.1]], atol=1e-6)


def test_every_router_is_balanced_by_its_own_load():
    """Over several segments and runs and an MTP layer: the statistics and the biases are listed differently."""
    model = dataclasses.replace(preset("test"), num_layers=11, num_mtp_layers=1)
    graph, params, biases, tables = scoring.split(nnx.eval_shape(lambda: Ring(model, FAST, rngs=nnx.Rngs(0))))
    batch = make_batch()

    def router(params, biases, tables):
        merged = scoring.merge(graph, params, biases, tables, FAST.dtype)
        return scoring.loss(merged, batch, scoring.totals(batch, 1))[1].router

    rng = np.random.default_rng(0)
    loads = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 99, x.shape), x.dtype), jax.eval_shape(router, params, biases, tables))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), biases)
    moved = steps._balanced(zeros, loads, 0.5)
    leaves, _ = jax.tree_util.tree_flatten_with_path(moved, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert len(leaves) == 6  # two runs in the head group, two in the repeated one, the tail, and the MTP layer
    for path, bias in leaves:
        first, *index = (key.key for key in path)
        stats = loads[1][index[0]] if first == "mtp" else loads[0][index[0]][index[1]]
        np.testing.assert_allclose(bias.get_value(), balance(jnp.zeros_like(stats.load), stats.load, 0.5), atol=1e-6)
        np.testing.assert_allclose(bias.get_value().mean(-1), 0, atol=1e-6)


def test_balancing_bias_changes_the_choice_and_has_no_gradient():
    state, batch = program().init(), make_batch()
    after, (metrics,) = run(program(), batch)
    (bias,) = jax.tree.leaves(after.balance)
    assert float(jnp.abs(bias).max()) > 0
    np.testing.assert_allclose(bias.mean(-1), 0, atol=1e-8)
    # Its size is the rate's, whatever the gradients are; and no optimiser moments exist for it.
    np.testing.assert_allclose(jnp.abs(bias).max(), OptimizerConfig().balance_rate, rtol=1)
    assert len(jax.tree.leaves(state.optimizer[1].mu)) == len(jax.tree.leaves(state.params))
    favour = jax.tree.map(lambda x: x.at[..., 0].set(10.0), state.balance)
    _, (skewed,) = run(program(), batch, state=state._replace(balance=favour))
    assert skewed.load_imbalance > 3 > metrics.load_imbalance  # all tokens take expert 0: 4 times the mean of 8 experts with 2 active


def test_z_loss():
    state, batch = program().init(), make_batch()
    graph, tables = program().graph, program().tables

    def z_loss(params):
        model = scoring.merge(graph, params, state.balance, tables, FAST.dtype)
        plain, stats = scoring.loss(model, batch, scoring.totals(batch, 0))
        return scoring.loss(model, batch, scoring.totals(batch, 0), z_loss=0.5)[0] - plain, steps._stats(stats.router)

    (value, (stats,)), grads = jax.jit(jax.value_and_grad(z_loss, has_aux=True))(state.params)
    mean = float(stats.z_sum.sum() / (batch.segment_ids > 0).sum())
    assert mean > 0.5 * np.log(MODEL.num_experts) ** 2  # the squared log-sum-exp of 8 logits about 0
    assert float(value) == pytest.approx(0.5 * mean, rel=1e-4)
    assert float(jnp.abs(grads["segments"][0][1]["ffn"]["router"][...]).max()) > 1e-3
    _, (metrics,) = run(program(), batch)
    assert metrics.loss - metrics.nll / metrics.num_tokens == pytest.approx(Z_LOSS * mean, rel=1e-3)


def test_multi_token_prediction():
    model = dataclasses.replace(MODEL, num_mtp_layers=1)
    batch = make_batch()
    _, metrics = run(program(model, z_loss=0.0), batch, 12)
    main = np.array([m.nll / m.num_tokens for m in metrics])
    further = (np.array([m.loss for m in metrics]) - main) / 0.1  # its weight
    assert 4 < further[0] < 7
    assert further[-1] < 0.8 * further[0]
    assert main[-1] < 0.75 * main[0]
    # The token two positions on: the same documents are scored, one position fewer of each.
    lengths = [int((row == segment).sum()) for row in np.asarray(batch.segment_ids) for segment in (1, 2)]
    assert int(scoring.scored(batch, 2).sum()) == sum(max(n - 2, 0) for n in lengths)
    assert int(scoring.scored(batch, 1).sum()) == sum(n - 1 for n in lengths)


def test_bf16_keeps_fp32_masters():
    how, batch = Numerics(aligned=False, dtype="bfloat16"), make_batch()
    start = program(MODEL, how, learning_rate=1e-6).init()
    state, (metrics,) = run(program(MODEL, how, learning_rate=1e-6), batch)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.balance, state.optimizer)) if x.ndim} == {jnp.dtype("float32")}
    before, after = start.params["embedding"][...], state.params["embedding"][...]
    moved = np.asarray(before != after)[np.unique(batch.tokens)]
    assert moved.mean() > 0.99  # a step far below the resolution of bf16 is not lost
    assert np.mean(np.asarray(before.astype(jnp.bfloat16) != after.astype(jnp.bfloat16))) < 0.1
    _, (exact,) = run(program(), batch)
    assert metrics.loss == pytest.approx(exact.loss, rel=0.02)
    assert metrics.loss != exact.loss


@pytest.mark.parametrize("aligned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_packed_documents_do_not_see_each_other(aligned):
    graph, params, biases, tables = scoring.split(Ring(MODEL, Numerics(aligned=aligned), rngs=nnx.Rngs(0)))
    logprobs = jax.jit(lambda batch: scoring.token_logprobs(nnx.merge(graph, params, biases, tables), batch))
    packed = make_batch(rows=2)
    together = logprobs(packed)
    for row, column in ((0, 0), (0, GRID), (1, GRID)):
        segment = packed.segment_ids[row, column]
        length = int((packed.segment_ids[row] == segment).sum())
        alone = Batch(jnp.zeros_like(packed.tokens), jnp.full_like(packed.tokens, -1), jnp.zeros_like(packed.tokens))
        place, source = np.s_[0, :length], np.s_[row, column : column + length]
        alone = Batch(*(a.at[place].set(p[source]) for a, p in zip(alone, packed, strict=True)))
        alone = alone._replace(segment_ids=jnp.minimum(alone.segment_ids, 1))
        found, expected = np.asarray(logprobs(alone)[place]), np.asarray(together[source])
        assert np.count_nonzero(expected) == length - 1
        if aligned:
            assert found.tobytes() == expected.tobytes()
        else:
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("remat", ["mixers", pytest.param("full", marks=pytest.mark.slow)])
def test_remat_changes_nothing(remat):
    batch = make_batch()
    expected, (plain,) = run(program(), batch)
    found, (metrics,) = run(program(MODEL, dataclasses.replace(FAST, remat=remat)), batch)
    assert metrics.loss == pytest.approx(plain.loss, rel=1e-6)
    close(gradients(found), gradients(expected), 1e-5)


LANES = dataclasses.replace(
    MODEL,
    hidden_size=256,
    num_heads=2,
    num_kv_heads=1,
    head_size=128,
    ffn_size=256,
    expert_size=128,
    shared_expert_size=128,
    init_scale=0.1,
)
"""Of sizes that all kernels take, for TPUs, too."""


@functools.cache
def gradients_of(kernels):
    """The loss, its sums and gradients of two rows: a document of four chunks and two key blocks, and packed ones with padding."""
    how = dataclasses.replace(FAST, kernels=kernels)
    graph, params, biases, tables = scoring.split(Ring(LANES, how, rngs=nnx.Rngs(0)))
    whole = Batch(*(jnp.asarray(x, jnp.int32) for x in (np.random.default_rng(1).integers(1, 96, 200), np.arange(200), np.ones(200))))
    whole = jax.tree.map(lambda x, fill: jnp.pad(x, (0, 56), constant_values=fill), whole, Batch(0, -1, 0))
    batch = jax.tree.map(lambda one, rows: jnp.concatenate([one[None], rows]), whole, make_batch(rows=1))
    run = numerics.jit(functools.partial(scoring.loss_and_gradients, graph, how, z_loss=Z_LOSS), how)
    return jax.device_get(run(params, biases, tables, batch))


@pytest.mark.parametrize("kernels", ["pallas_tpu", pytest.param("pallas_gpu", marks=pytest.mark.slow)])
def test_kernels_give_the_loss_and_gradients_of_plain_jax(kernels):
    """Asked for by name: one that does not take its case is an error."""
    (loss, stats, gradients), (plain_loss, plain_stats, plain) = gradients_of(kernels), gradients_of("xla")
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    assert stats.router is not None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, plain_stats)
    for (path, own), (_, other) in zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (gradients, plain)), strict=True):
        assert np.abs(other).max() > 0, path
        np.testing.assert_allclose(own, other, rtol=0, atol=2e-5 * np.abs(other).max(), err_msg=str(path))
