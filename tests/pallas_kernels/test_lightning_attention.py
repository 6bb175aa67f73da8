"""Lightning attention: right in value and gradient, and one set of bits in training, prefill and decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import GRID, compat
from pallas_kernels.lightning_attention import (
    lightning_attention,
    lightning_attention_step,
    lightning_attention_verify,
    pallas,
    reference,
    tile,
)
from pallas_kernels.lightning_attention.cases import TEST_CASES, Case, inputs
from tests.pallas_kernels.programs import (
    DTYPES,
    ON_GPU,
    in_float64,
    jit,
    jit_for_values,
    modes_and_dtypes,
    on_host,
    random_like,
    with_gradients,
)
from tests.pallas_kernels.tolerances import assert_close, assert_same_bits, rms

MODES = {
    "fast": {"aligned": False, "implementation": "xla"},
    "aligned": {"aligned": True, "implementation": "xla"},
    "pallas_tpu": {"implementation": "pallas_tpu"},
    "pallas_gpu": {"implementation": "pallas_gpu"},
}
"""How the op is computed; kernels are interpreted here: what they do not write, or read from outside of an array, is NaN there."""
native = pytest.param("pallas_gpu", marks=ON_GPU, id="native")
every_mode = pytest.mark.parametrize("mode", [*MODES, native])
EXACT = [mode for mode in MODES if mode != "fast"]
"""Those whose rows have one set of bits."""
every_exact_mode = pytest.mark.parametrize("mode", [*EXACT, native])
exact_modes_and_dtypes = pytest.mark.parametrize(("mode", "dtype"), modes_and_dtypes(EXACT))


def exact_modes_and_chunks(plain, kernel):
    """Parametrise by mode, dtype, chunk size, and head sizes: `plain` (dtype, chunk size), in a kernel slow if not in `kernel[name]`."""
    slow = lambda mode, how: [] if how in kernel.get(mode, plain) else [pytest.mark.slow]

    def param(name, mode, how, sizes, marks):
        return pytest.param(mode, *how, sizes, marks=marks, id="-".join(map(str, (name, *how, *sizes))))

    here = [param(mode, mode, how, (16, 32), slow(mode, how)) for mode in EXACT for how in plain]
    native = [param("native", "pallas_gpu", how, sizes, ON_GPU) for how in plain for sizes in ((16, 32), (128, 128))]
    return pytest.mark.parametrize(("mode", "dtype", "chunk_size", "sizes"), [*here, *native])


RELEASED = Case(2, 197, 2, 128, 128, state=True, segments=True)
"""Heads as the released models have them: a GPU's tiles as they are there."""


@pytest.fixture
def rounding(monkeypatch):
    """What goes into a product is in bf16 as on a chip; the products, exact in fp32, stay a CPU's. For programs that are traced here."""
    on_a_chip = compat.compiling_for("gpu")
    monkeypatch.setattr(pallas, "dot_operand", on_a_chip(compat.dot_operand))
    monkeypatch.setattr(tile, "dot_cast", on_a_chip(compat.dot_cast))


@functools.cache
def forward(chunk_size, mode="aligned"):
    """Return the forward as a program."""
    return jit(functools.partial(lightning_attention, chunk_size=chunk_size, **MODES[mode]))


@functools.cache
def step(mode="aligned"):
    """Return the decode step as a program."""
    return jit(functools.partial(lightning_attention_step, **MODES[mode]), static_argnames="may_fold")


def recurrence(q, k, v, log_decay, state, reset, chunk_size):
    """Return the reference's outputs of all tokens, and its state at the last chunk boundary."""
    length = q.shape[1]
    marks = None if reset is None else jnp.zeros((q.shape[0], length), bool).at[:, ::chunk_size].set(reset)
    out, _ = reference.lightning_attention(q, k, v, log_decay, state, marks)
    whole = length // chunk_size * chunk_size
    boundary = (None if x is None else x[:, :whole] for x in (q, k, v, marks))
    q, k, v, marks = boundary
    return out, reference.lightning_attention(q, k, v, log_decay, state, marks)[1]


def split(given):
    """Return the inputs a gradient goes to, and a function that puts them back in a call of f."""
    state = () if given.state is None else (given.state,)

    def call(f, q, k, v, *state):
        return f(q, k, v, given.log_decay, state=state[0] if state else None, reset=given.reset)

    return (given.q, given.k, given.v, *state), call


def case_of(name):
    return RELEASED if name == "released" else TEST_CASES[name]


@functools.cache
def truth(name):
    """Return the float64 program of a case: (inputs, log_decay, reset, cotangents) -> value and gradients."""

    def run(differentiable, log_decay, reset, cotangents):
        f = lambda q, k, v, state=None: recurrence(q, k, v, log_decay, state, reset, case_of(name).C)
        return with_gradients(f)(differentiable, cotangents)

    return run


BF16_CASES = ["odd_length", "segments_and_state", "chunk_128", "strong_decay"]
"""Where another form differs from the aligned one in its loads and stores, not in its roundings."""


@pytest.mark.parametrize(
    ("mode", "name", "dtype"),
    [(mode, name, "fp32") for mode in MODES for name in TEST_CASES]
    + [(mode, name, "bf16") for mode in MODES for name in (TEST_CASES if mode == "aligned" else BF16_CASES)]
    + [
        pytest.param(mode, name, "bf16", marks=pytest.mark.slow)
        for mode in MODES
        for name in TEST_CASES
        if mode != "aligned" and name not in BF16_CASES
    ]
    + [
        pytest.param("pallas_gpu", name, dtype, marks=ON_GPU, id=f"native-{name}-{dtype}")
        for name in (*TEST_CASES, "released")
        for dtype in DTYPES
    ],
)
def test_value_and_gradients(name, dtype, mode):
    dtype, case = DTYPES[dtype], case_of(name)
    given = inputs(case, dtype)
    differentiable, call = split(given)
    f = functools.partial(call, functools.partial(lightning_attention, chunk_size=case.C, **MODES[mode]))
    cotangents = random_like(jax.eval_shape(f, *differentiable))
    actual = jit_for_values(with_gradients(f))(differentiable, cotangents)
    assert actual[0][0].dtype == dtype
    assert actual[0][1].dtype == jnp.float32
    assert_close(actual, in_float64(truth(name), differentiable, given.log_decay, given.reset, cotangents), dtype)


@pytest.mark.parametrize("mode", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize(
    "name", [*BF16_CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in TEST_CASES if name not in BF16_CASES)]
)
def test_value_and_gradients_of_rounded_operands(name, mode, rounding):
    case = TEST_CASES[name]
    given = inputs(case, jnp.bfloat16)
    differentiable, call = split(given)
    f = functools.partial(call, functools.partial(lightning_attention, chunk_size=case.C, **MODES[mode]))
    cotangents = random_like(jax.eval_shape(f, *differentiable))
    actual = jit_for_values(with_gradients(f))(differentiable, cotangents)
    wanted = in_float64(truth(name), differentiable, given.log_decay, given.reset, cotangents)
    assert_close(actual, wanted, jnp.bfloat16)
    if case.T == 1:  # one product each way: its operands' rounding is hardly more than the result's
        return
    for rounded, exact in zip((actual[0][0], *actual[1][:3]), (wanted[0][0], *wanted[1][:3]), strict=True):
        floor = rms(exact.astype(jnp.bfloat16).astype(np.float64) - exact)
        assert rms(rounded - exact) > 1.2 * floor  # it is the floor where operands are not rounded


def test_the_decay_gets_no_gradient():
    given = inputs(TEST_CASES["odd_length"], jnp.float32)
    gradient = jax.jit(jax.grad(lambda g: lightning_attention(*given[:3], g)[0].sum()))(given.log_decay)
    assert not gradient.any()


@pytest.mark.parametrize("decay", [-5.0, -100.0, -1e30])
@every_mode
def test_a_very_strong_decay_leaves_each_token_its_own_value(decay, mode):
    q, k, v, _, _, _ = inputs(Case(1, 200, 1, 16, 16, C=128), jnp.float32)
    f = lambda q, k, v: lightning_attention(q, k, v, jnp.full(1, decay), chunk_size=128, **MODES[mode])
    outputs = jax.eval_shape(f, q, k, v)
    (out, state), gradients = jit_for_values(with_gradients(f))((q, k, v), random_like(outputs))
    assert all(np.isfinite(x).all() for x in (out, state, *gradients))
    if decay < -50:
        np.testing.assert_allclose(out, 16**-0.5 * (q * k).sum(-1, keepdims=True) * v, rtol=1e-5, atol=1e-5)


def test_length_stops_the_state_at_the_boundary_it_has_reached():
    given, lengths = inputs(Case(3, 200, 2, 16, 16, state=True), jnp.float32), [200, 63, 130]
    differentiable = (given.q, given.k, given.v, given.state)

    def op(q, k, v, state, mode="fast"):
        return lightning_attention(q, k, v, given.log_decay, state=state, length=jnp.array(lengths), **MODES[mode])

    d_out, d_state = random_like(jax.eval_shape(op, *differentiable))
    valid = jnp.arange(200) < jnp.array(lengths)[:, None]  # what stands behind is padding, whose outputs nobody reads
    cotangents = d_out * valid[..., None, None], d_state
    results = [jit(with_gradients(functools.partial(op, mode=mode)))(differentiable, cotangents) for mode in MODES]
    for row, length in enumerate(lengths):
        one = lambda x, row=row: x[row : row + 1]

        def alone(q, k, v, state, length=length):
            out, boundary = recurrence(q[:, :length], k[:, :length], v[:, :length], given.log_decay, state, None, 64)
            return jnp.pad(out, ((0, 0), (0, 200 - length), (0, 0), (0, 0))), boundary

        (_, state), wanted = in_float64(with_gradients(alone), jax.tree.map(one, differentiable), jax.tree.map(one, cotangents))
        for (_, states), gradients in results:
            assert_close(one(states), state, jnp.float32)
            assert_close(jax.tree.map(one, gradients), wanted, jnp.float32)


def buffers_at(given, start, rows, chunk_size):
    """Return the open chunk's k and v of each batch row as decode holds them: `rows` [B] true rows, finite garbage behind."""
    rng = np.random.default_rng(7)

    def buffer(x):
        chunk = np.zeros((x.shape[0], chunk_size, *x.shape[2:]), x.dtype)
        taken = np.asarray(x)[:, start : start + chunk_size]
        chunk[:, : taken.shape[1]] = taken
        garbage = (1e3 * rng.standard_normal(chunk.shape)).astype(x.dtype)
        unused = np.arange(chunk_size) >= np.asarray(rows)[:, None]
        return np.where(unused[..., None, None], garbage, chunk).swapaxes(1, 2)

    return buffer(given.k), buffer(given.v)


@exact_modes_and_chunks([("fp32", 64), ("bf16", 64), ("bf16", 128)], {"pallas_tpu": [("fp32", 64)], "pallas_gpu": [("bf16", 64)]})
def test_decode_rows_have_the_bits_of_training_at_every_position(dtype, chunk_size, sizes, mode):
    """Every position of the first two chunks, as 2 C slots of one batch; a third chunk is left open in training."""
    length, width = 2 * chunk_size + 9, 2 * chunk_size
    given = on_host(inputs)(Case(2, length, 2, *sizes, C=chunk_size), DTYPES[dtype])
    run = functools.partial(step(mode), may_fold=False)
    out, _ = forward(chunk_size, mode)(*given[:4])
    for row in range(2):
        one = given._replace(**{name: getattr(given, name)[row : row + 1] for name in "qkv"})
        states, keys, values = [], [], []
        for start in (0, chunk_size):
            _, state = forward(chunk_size, mode)(*one[:4], length=np.array([start]))
            every = one._replace(k=np.repeat(one.k, chunk_size, 0), v=np.repeat(one.v, chunk_size, 0))
            key, value = buffers_at(every, start, np.arange(chunk_size), chunk_size)
            states, keys, values = [*states, np.repeat(state, chunk_size, 0)], [*keys, key], [*values, value]
        slots = [np.asarray(x[0, :width]) for x in one[:3]] + [np.concatenate(x) for x in (states, keys, values)]
        index = np.tile(np.arange(chunk_size), 2)
        assert_same_bits(run(*slots, given.log_decay, index).out, out[row, :width])
        for slot in (0, 1, chunk_size - 1, chunk_size, width - 1) if mode == "aligned" else (1, chunk_size):  # alone, and beside two others
            for chosen in ([slot], [slot, 5, 77]):
                rows = run(*(x[chosen] for x in slots), given.log_decay, index[chosen]).out
                assert_same_bits(rows, out[row, chosen])


@exact_modes_and_chunks([("fp32", 64), ("bf16", 64), ("fp32", 128)], {"pallas_tpu": [("fp32", 128)], "pallas_gpu": [("bf16", 64)]})
def test_full_chunks_are_folded_into_the_states_of_the_forward(dtype, chunk_size, sizes, mode):
    """The last token of a chunk moves the state on; a slot whose chunk stays open, and one without a token, keep theirs."""
    length = 2 * chunk_size
    given = on_host(inputs)(Case(3, length, 2, *sizes, C=chunk_size, state=True), DTYPES[dtype])
    state, (out, _) = given.state, forward(chunk_size, mode)(*given[:4], state=given.state, length=jnp.full(3, length))
    for start in range(0, length, chunk_size):
        last = [x[:, start + chunk_size - 1] for x in given[:3]]
        keys, values = buffers_at(given, start, [chunk_size - 1] * 3, chunk_size)
        copy = state.astype(DTYPES[dtype])
        done = step(mode)(*last, state, keys, values, given.log_decay, jnp.full(3, chunk_size - 1), state_copy=copy)
        wanted = forward(chunk_size, mode)(*given[:4], state=given.state, length=jnp.full(3, start + chunk_size))[1]
        assert_same_bits(done.state, wanted)
        assert_same_bits(done.state_copy, wanted.astype(DTYPES[dtype]))
        if dtype == "fp32":  # in bf16 a CPU's training does not round the state
            assert_same_bits(done.out, out[:, start + chunk_size - 1])
        index = jnp.array([chunk_size - 2, chunk_size - 1, chunk_size])  # open, full, no token
        mixed = step(mode)(*last, state, keys, values, given.log_decay, index, state_copy=copy)
        assert_same_bits(mixed.state, np.stack([state[0], done.state[1], state[2]]))
        assert_same_bits((mixed.key_buffer[2], mixed.value_buffer[2]), (keys[2], values[2]))
        assert_same_bits(mixed.key_buffer[0, :, chunk_size - 2], last[1][0])
        assert_same_bits(mixed.key_buffer[0, :, : chunk_size - 2], keys[0, :, : chunk_size - 2])
        state = done.state


@every_exact_mode
def test_a_step_reads_the_copy_of_the_state(mode):
    """In fp32 the copy is the state itself; another one shows that it is read."""
    given = on_host(inputs)(Case(2, 1, 2, 16, 16, state=True), jnp.float32)
    token, (keys, values) = [x[:, 0] for x in given[:3]], buffers_at(given, 0, [0, 0], 64)
    run = lambda state, copy=None: step(mode)(*token, state, keys, values, given.log_decay, jnp.zeros(2, int), state_copy=copy).out
    assert_same_bits(run(given.state, 2 * given.state), run(2 * given.state))


@every_exact_mode
def test_steps_from_the_bf16_copy_have_the_bits_of_training(mode, rounding):
    """Which rounds its fp32 state. Three steps: in a chunk, up to its end, over it, and from the copy of a state just folded."""
    given, index, slot = on_host(inputs)(Case(5, 3 * 64, 2, 32, 32, state=True), jnp.bfloat16), np.array([0, 30, 61, 62, 63]), np.arange(5)
    program, decode = (jit(functools.partial(f, **MODES[mode])) for f in (lightning_attention, lightning_attention_step))
    training = lambda length: program(*given[:4], state=given.state, length=length)
    (out, _), (_, state) = training(jnp.full(5, 3 * 64)), training(jnp.full(5, 64))
    slots = (state, *buffers_at(given, 64, index, 64), state.astype(jnp.bfloat16))
    for at in 64 + index + np.arange(3)[:, None]:
        row, *slots = decode(*(x[slot, at] for x in given[:3]), *slots[:3], given.log_decay, at % 64, state_copy=slots[3])
        assert_same_bits(row, out[slot, at])
    _, wanted = training(at + 1)
    assert_same_bits((slots[0], slots[3]), (wanted, wanted.astype(jnp.bfloat16)))


PATHS = ((0, 1, 3, 4), (0, 1, 5, -1), (0, 2, -1, -1), (6, -1, -1, -1))


@exact_modes_and_dtypes
def test_a_tree_of_drafts_has_the_bits_of_each_path_in_training(dtype, mode):
    """In every row of a chunk: in the middle of it, over its end, and where the second token begins the next one. Beside any slots."""
    starts, slot = np.arange(64), np.arange(64)[:, None]
    given = on_host(inputs)(Case(64, 64 + 7, 2, 16, 32, state=True), DTYPES[dtype])
    slots = [*(x[:, 64:] for x in given[:3]), given.state, *buffers_at(given, 0, starts, 64)]
    verify = jit(functools.partial(lightning_attention_verify, **MODES[mode]))
    out = verify(*slots, given.log_decay, starts, jnp.array(PATHS))
    few = np.array([63, 17, 61])
    assert_same_bits(verify(*(x[few] for x in slots), given.log_decay, starts[few], jnp.array(PATHS)), out[few])
    for path in PATHS:
        path = np.array([node for node in path if node >= 0])
        rows = starts[:, None] + np.arange(len(path))
        sequence = [x.copy() for x in given[:3]]
        for x in sequence:
            x[slot, rows] = x[:, 64 + path]
        wanted, _ = forward(64, mode)(*sequence, given.log_decay, state=given.state)
        assert_same_bits(out[:, path], wanted[slot, rows])


@pytest.mark.parametrize("name", ["initial_state", "segments", "chunk_128"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_kernels_agree(dtype, name):
    """With each other and with the fast plain form: the same tile functions on the same tiles (a GPU's program here has 16 columns)."""
    given = inputs(TEST_CASES[name], DTYPES[dtype])
    run = lambda mode: forward(TEST_CASES[name].C, mode)(*given[:4], state=given.state, reset=given.reset)
    assert_same_bits(run("pallas_tpu"), run("pallas_gpu"))
    assert_same_bits(run("pallas_tpu"), run("fast"))


@pytest.mark.parametrize("mode", ["fast", "pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_64k_positions_lose_nothing(dtype, mode):
    """With the slowest and the fastest decays of the family, in chunks of 128: against the recurrence over the last positions."""
    length, tail = 65536, 512
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, length, 2, 16)), DTYPES[dtype]) for _ in range(3))
    log_decay = jnp.array([-0.84, -1e-5 * 2.0**-8], jnp.float32)
    out, _ = forward(128, mode)(q, k, v, log_decay)
    with jax.enable_x64(True):
        weights = np.exp(np.asarray(log_decay, np.float64)[:, None] * np.arange(length - tail)[::-1])
        double = [np.asarray(x).astype(np.float64)[0] for x in (q, k, v)]
        state = np.einsum("ht,thk,thv->hkv", weights, *(x[: length - tail] for x in double[1:]))[None]
        last = (jnp.asarray(x[None, length - tail :]) for x in double)
        truth, _ = reference.lightning_attention(*last, jnp.asarray(log_decay, jnp.float64), jnp.asarray(state))
    assert_close(out[:, length - tail :], np.asarray(truth), DTYPES[dtype])


@exact_modes_and_dtypes
def test_bits_do_not_depend_on_batch_length_or_place_in_a_packed_row(dtype, mode):
    given = on_host(inputs)(Case(2, 3 * GRID, 2, 16, 32), DTYPES[dtype])
    first, second = (given._replace(**{name: getattr(given, name)[row : row + 1] for name in "qkv"}) for row in range(2))
    both, states = forward(64, mode)(*given[:4])
    for row, one in enumerate((first, second)):
        out, state = forward(64, mode)(*one[:4])
        assert_same_bits((out[0], state[0]), (both[row], states[row]))
    short = [x[:, :77] for x in first[:3]]
    alone = forward(64, mode)(*short, given.log_decay)[0][0]
    assert_same_bits(alone, both[0, :77])
    packed, here = [x.copy() for x in second[:3]], slice(GRID, GRID + 77)
    for x, y in zip(packed, first[:3], strict=True):
        x[0, here] = y[0, :77]
    reset = (np.arange(3 * GRID // 64) % (GRID // 64) == 0)[None]
    assert_same_bits(forward(64, mode)(*packed, given.log_decay, reset=reset)[0][0, here], alone)


@exact_modes_and_dtypes
def test_a_prompt_in_pieces_has_the_bits_of_the_whole(dtype, mode):
    cut = 64
    given = on_host(inputs)(Case(2, 192, 2, 16, 32, state=True), DTYPES[dtype])
    whole = forward(64, mode)(*given[:4], state=given.state)
    first, state = forward(64, mode)(*(x[:, :cut] for x in given[:3]), given.log_decay, state=given.state)
    rest, state = forward(64, mode)(*(x[:, cut:] for x in given[:3]), given.log_decay, state=state)
    assert_same_bits((np.concatenate([first, rest], 1), state), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_has_the_same_bits_under_a_gradient(dtype):
    given = inputs(TEST_CASES["initial_state"], DTYPES[dtype])
    f = lambda q, k, v: lightning_attention(q, k, v, given.log_decay, aligned=True)
    out = forward(64)(*given[:4])
    assert_same_bits(jit(with_gradients(f))(given[:3], random_like(out))[0], out)


@pytest.mark.parametrize("chunk_size", [1, 8, 48, 256])
def test_a_chunk_of_another_size_is_refused(chunk_size):
    given = inputs(TEST_CASES["one_token"], jnp.float32)
    with pytest.raises(ValueError, match=f"chunk_size {chunk_size} is none of 16, 32, 64, 128"):
        lightning_attention(*given[:4], chunk_size=chunk_size)


def test_a_path_longer_than_a_chunk_is_refused():
    """It could reach a third chunk, which no tile holds."""
    nodes, buffer = jnp.zeros((1, 65, 2, 16)), jnp.zeros((1, 2, 64, 16))
    table = jnp.zeros((1, 2, 16, 16)), buffer, buffer, jnp.zeros(2), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="paths of 65 tokens are longer than a chunk of 64"):
        lightning_attention_verify(nodes, nodes, nodes, *table, jnp.arange(65)[None])


@pytest.mark.parametrize(
    ("kind", "batch", "heads", "programs"),
    [("v5p", 1, heads, programs) for heads, programs in ((2, 2), (4, 2), (6, 2), (8, 2), (16, 2), (32, 4), (9, 3))]
    + [("v5p", 2, 8, 1), ("v5p", 3, 8, 2), ("v5e", 1, 8, 1), ("v6e", 1, 16, 2)],
)
def test_every_core_gets_as_many_programs_as_the_others(kind, batch, heads, programs):
    """A v5p has two; nine heads are no even number of programs. A program has at most eight heads."""
    given = [jax.ShapeDtypeStruct((batch, 256, heads, 128), jnp.bfloat16)] * 3 + [jax.ShapeDtypeStruct((heads,), jnp.float32)]
    with compat.compiling_for(kind):
        jaxpr = jax.make_jaxpr(lambda *given: lightning_attention(*given, implementation="pallas_tpu"))(*given)
    (call,) = (e for e in compat.equations(jaxpr) if e.primitive.name == "pallas_call")
    assert call.params["grid_mapping"].grid[:2] == (batch, programs)


@pytest.mark.parametrize("mode", ["pallas_tpu", "pallas_gpu"])
@settings(deadline=None, max_examples=4, phases=[Phase.generate])
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 200), st.integers(1, 4), st.sampled_from([16, 32]), st.sampled_from([16, 32])),
    decay=st.floats(0, 30),
    packed=st.booleans(),
)
def test_kernels_of_any_shape(mode, shape, decay, packed):
    batch, length, *sizes = shape
    length = -(-length // 64) * 64 if packed else length  # a document that begins in an open chunk leaves no state behind
    given = inputs(Case(batch, length, *sizes, C=64, state=True, segments=packed, decay=decay), jnp.float32)
    f = lambda q, k, v, state: lightning_attention(q, k, v, given.log_decay, state=state, reset=given.reset, **MODES[mode])
    truth = lambda q, k, v, state, log_decay: recurrence(q, k, v, log_decay, state, given.reset, 64)
    differentiable = (given.q, given.k, given.v, given.state)
    cotangents = random_like(jax.eval_shape(f, *differentiable))

    def with_decay(differentiable, cotangents, log_decay):
        return with_gradients(functools.partial(truth, log_decay=log_decay))(differentiable, cotangents)

    actual = jit_for_values(with_gradients(f))(differentiable, cotangents)
    assert_close(actual, in_float64(with_decay, differentiable, cotangents, given.log_decay), jnp.float32)


decode_truth = functools.partial(recurrence, state=None, reset=None, chunk_size=64)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), decay=st.floats(0, 300), index=st.integers(0, 63))
def test_a_decode_step_is_the_recurrence_for_any_decay(seed, decay, index):
    given = on_host(inputs)(Case(1, 128, 2, 16, 16, decay=decay), jnp.float32, seed)
    out, _ = in_float64(decode_truth, *given[:4])
    _, state = forward(64)(*given[:4], length=jnp.array([64]))
    token = (x[:, 64 + index] for x in given[:3])
    row = step()(*token, state, *buffers_at(given, 64, [index], 64), given.log_decay, jnp.array([index]), may_fold=False).out
    assert np.abs(row[0] - out[0, 64 + index]).max() <= 1e-5 * np.abs(out).max()
    assert_same_bits(row[0], forward(64)(*given[:4])[0][0, 64 + index])
