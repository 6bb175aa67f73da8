"""The alignment report: no bit differs, and where one does, the first layer and operator are named."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_jax import checkpoint
from ring_jax.infer import align
from ring_jax.infer.__main__ import main
from ring_jax.model import Ring
from ring_jax.numerics import Table, name
from ring_jax.scoring import host_batch
from tests.ring_jax.models import GOLDEN, SMALL, TWO_LAYERS, write_hf
from tests.ring_jax.random_tensors import random_tensors

CONFIG = dataclasses.replace(SMALL, num_layers=3)
DOCUMENTS = [np.random.default_rng(length).integers(0, 96, length).tolist() for length in (9, 150, 70)]
NAMING_MODULES = ["ring_jax.attention", "ring_jax.block", "ring_jax.linear_attention", "ring_jax.model", "ring_jax.moe", "ring_jax.scoring"]
PLANTED = 2**-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("align"), CONFIG, random_tensors(CONFIG))


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("align"), TWO_LAYERS, random_tensors(TWO_LAYERS))


def programs(folder, precision=None, remat="none", kernels="auto") -> align.Programs:
    how = {"precision": precision, "remat": remat, "kernels": kernels}
    loaded = [checkpoint.load(folder, stacked=stacked, gradients=stacked, **how).model for stacked in (True, False)]
    return align.Programs(*loaded)


def assert_aligned(rows: list[align.Row]) -> None:
    assert rows
    for row in rows:
        assert (row.differing_bits, row.differing_values, row.max_delta, row.kl, row.where) == (0, 0, 0.0, 0.0, ""), row
        assert row.tokens > 0


@pytest.mark.slow  # `make gates` has the command's own reports, in fp32, in bf16 with remat, and of interpreted kernels
@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize(("precision", "remat"), [("fp32", "mixers"), ("bf16", "mixers"), ("fp32", "full")])
def test_report(two_layers, monkeypatch, precision, remat):
    monkeypatch.setattr(align, "DECODE_BATCHES", (5,))
    monkeypatch.setattr(align, "PIECES", (100, 28))
    monkeypatch.setattr(align, "PAGED_PIECES", (100, 1))
    rows = align.report(programs(two_layers, precision, remat), DOCUMENTS, [])
    assert_aligned(rows)
    names = [row.name for row in rows]
    assert names == [
        "scoring forward",
        "packed in one row",
        "alone",
        "prefill",
        "prefill, left-padded",
        "prefill in pieces of 100, 28",
        "pages, pieces of 100, 1",
        "decode, batch 3",
        "decode, batch 5",
    ]
    tokens = dict(zip(names, (row.tokens for row in rows), strict=True))
    assert tokens["prefill"] == tokens["decode, batch 3"] == sum(map(len, DOCUMENTS)) - 3
    assert tokens["alone"] == 149


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "sizes"),
    [
        ("pallas_tpu", {"hidden_size": 256, "head_size": 128, "num_heads": 2, "num_kv_heads": 1, "expert_size": 128}),
        ("pallas_gpu", {"hidden_size": 64, "head_size": 16}),
    ],
)
def test_report_of_interpreted_kernels(kernels, sizes, monkeypatch, tmp_path):
    """By name: one that refuses its case is an error. A long document folds chunks and has several blocks of keys."""
    monkeypatch.setattr(align, "DECODE_BATCHES", (5,))
    monkeypatch.setattr(align, "PIECES", (100, 28))
    config = dataclasses.replace(TWO_LAYERS, **sizes)
    folder = write_hf(tmp_path, config, random_tensors(config))
    assert_aligned(align.report(programs(folder, kernels=kernels), DOCUMENTS, []))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_name", ["periodic", "trailing"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_golden_checkpoints(checkpoint_name, precision):
    assert_aligned(align.report(programs(GOLDEN / checkpoint_name, precision), DOCUMENTS, []))


# What a report is made of.


def test_pad_and_pack():
    documents = [[1, 2, 3], [4, 5] * 80, [6]]
    batch = align.pad(documents)
    assert batch.tokens.shape == (3, 256)
    assert batch.positions[0, :4].tolist() == [0, 1, 2, -1]
    left = align.pad(documents, left=True)
    assert left.positions[0, -4:].tolist() == [-1, 0, 1, 2]
    assert left.tokens[0, -3:].tolist() == [1, 2, 3]
    packed, starts = align.pack(documents)
    assert starts == [(0, 384), (0, 128), (0, 0)]
    assert packed.tokens.shape == (1, 512)
    for number, ((_, start), document) in enumerate(zip(starts, documents, strict=True)):
        span = slice(start, start + len(document))
        assert packed.tokens[0, span].tolist() == document
        assert packed.positions[0, span].tolist() == list(range(len(document)))
        assert set(packed.segment_ids[0, span]) == {number + 1}
    assert (packed.segment_ids > 0).sum() == sum(map(len, documents))


def test_compare_counts_bits():
    a = np.array([9.0, -1.0, -2.0, -3.0], np.float32)
    b = a.copy()
    b[0] = 1.0  # a document's first token has no log-probability
    assert align.compare([a], [b]) == (3, 0, 0, 0.0, 0.0)
    b[2] = np.nextafter(b[2], np.float32(-3))
    b[3] = -2.5
    tokens, bits, values, largest, kl = align.compare([a, a], [a, b])
    assert (tokens, values, largest) == (6, 2, 0.5)
    assert bits == 1 + int(np.bitwise_count(np.float32(-3).view(np.uint32) ^ np.float32(-2.5).view(np.uint32)))
    assert kl == pytest.approx((np.expm1(0.5) - 0.5) / 6, rel=1e-5)


@pytest.mark.parametrize(("total", "limit"), [(16, 1000), (300, 1000), (2048, 100)])
def test_split_documents(total, limit):
    tokens = list(range(total))
    documents = align.split_documents(tokens, limit)
    assert all(1 < len(d) <= limit for d in documents)
    flat = [t for d in documents for t in d]
    assert len(set(flat)) == len(flat)
    if total == 300:
        assert len(documents) == 8
        assert len(set(map(len, documents))) == 8


# Planted differences.


class Plants:
    """Each named value of a marked model times 1 + plants[i], i counting the names as they are traced.

    Which one is changed is decided when the program runs: one compilation serves all operators.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self._values, self._next, forward = None, 0, Ring.__call__

        def call(model, *args, **kwargs):
            self._values, self._next = (model.plants[...], 0) if hasattr(model, "plants") else (None, 0)
            return forward(model, *args, **kwargs)

        def planted(x, label):
            if self._values is not None:
                x = x * (1 + self._values[self._next]).astype(x.dtype)
                self._next += 1
            return name(x, label)

        patch.setattr(Ring, "__call__", call)
        for module in [*NAMING_MODULES, "ring_jax.infer.align"]:
            patch.setattr(f"{module}.name", planted)


@pytest.fixture(scope="module")
def plants():
    with pytest.MonkeyPatch.context() as patch:
        yield Plants(patch)


@pytest.mark.usefixtures("unoptimised")
def test_every_operator_is_named(folder, plants):
    """A difference of 2**-10 in any operator of the decode step is seen in the log-probabilities, and that operator is named."""
    documents = [DOCUMENTS[0], DOCUMENTS[1][:6]]
    both, batch = programs(folder), align.Batch(*(x[:, :9] for x in align.pad(documents)))
    both.unstacked.plants = Table(jnp.zeros(100))
    plant = lambda index: both.unstacked.plants.set_value(jnp.zeros(100).at[index].set(PLANTED))
    decoded = lambda: align._per_document(align._joined(both.prefill(batch, [1], align._everything)[1]), documents)
    plain, _ = both.train(batch)
    tapped, values = both.train(batch, align._everything)
    reference = align._per_document(values, documents)
    found = lambda: align.first_difference(both.stacked, reference, decoded(), [len(d) for d in documents])
    differing = lambda: align.compare(*(align._cut(logprobs, documents) for logprobs in (plain, both.prefill(batch, [1])[0])))[1]
    np.testing.assert_array_equal(plain, tapped)
    assert differing() == 0
    assert found() is None
    order = decoded()[0].order
    kinds = {-1: "before the layers", 0: "layer 0 (linear)", 1: "layer 1 (linear)", 2: "layer 2 (softmax)", 3: "after the layers"}
    labels = {layer: [label for number, label in order if number == layer] for layer in kinds}
    ffn = ["router", "experts", "shared", "ffn", "block"]
    linear = ["mixer_norm", "query", "key", "value", "mixer", "gated", "mixer_out", "residual", "ffn_norm"]
    assert labels == {
        -1: ["embedding"],
        0: [*linear, "ffn", "block"],
        1: linear + ffn,
        2: ["mixer_norm", "query", "key", "value", "mixer", "mixer_out", "residual", "ffn_norm", *ffn],
        3: ["final_norm", "logprobs"],
    }
    for index, (layer, label) in enumerate(order):
        plant(index)
        where = found()
        assert where is not None, label
        assert where.startswith(f"{kinds[layer]}, {label}, document 0 position"), f"{label} of layer {layer}: {where}"
        assert differing() > 0, f"{label} of layer {layer} is not seen"
    # The names of the training program are the same, in the same order.
    assert [key for key in sorted(reference[0].order, key=lambda key: key[0])] == order


@pytest.mark.usefixtures("unoptimised")
def test_command_names_a_difference(two_layers, monkeypatch, capsys, tmp_path):
    """Exit status 1, and the row says where; the other rows are still zero."""
    from ring_jax import linear_attention

    def planted(x, label):
        return name(x * (1 + PLANTED) if label == "gated" and x.shape[:2] == (8, 1) else x, label)

    variants = align.variants
    wanted = ("scoring forward", "decode, batch 8")
    monkeypatch.setattr(linear_attention, "name", planted)
    monkeypatch.setattr(align, "SIMULATED_DEVICES", 1)
    monkeypatch.setattr(align, "variants", lambda *args: [v for v in variants(*args) if v.name in wanted])
    report = tmp_path / "report.json"
    assert main(["align", "--checkpoint", str(two_layers), "--tokens", "300", "--json", str(report)]) == 1
    out, err = capsys.readouterr()
    assert "layer 0 (linear), gated, document 0 position 0" in out
    assert "random ids, seed 0 (the folder has no tokenizer)" in out
    assert err == "not aligned: decode, batch 8\n"
    rows = json.loads(report.read_text())
    assert [(row["name"], row["differing_bits"] > 0) for row in rows] == [(wanted[0], False), (wanted[1], True)]
    assert rows[1]["max_delta"] > 0
    assert rows[1]["kl"] > 0


def test_difference_that_tapping_hides():
    """Where the tapped programs agree, operators are looked at one by one, and the answer says so."""
    labels = ["mixer_norm", "query", "gated"]

    def values(wanted, off=0.0):
        taken = [(1, label) for index, label in enumerate(labels) if wanted(index)]
        hidden = {key: np.ones((1, 4, 2)) + (off if wanted is not align._everything and key[1] == "query" else 0) for key in taken}
        return align.Values(taken, hidden)

    def variant(off):
        return align.Variant("decode", [[1, 2, 3]], lambda ds: [], lambda ds, wanted: align._per_document(values(wanted, off), ds))

    class Fake(align.Programs):
        def __init__(self):
            self.stacked = nnx.eval_shape(lambda: Ring(CONFIG, rngs=nnx.Rngs(0)))

        def train(self, batch, wanted=None):
            return None, values(wanted)

    batch = host_batch(np.ones((1, 4), np.int32), np.arange(4, dtype=np.int32)[None])
    search = lambda off: align.search(Fake(), [[1, 2, 3]], batch, variant(off))
    assert search(PLANTED) == "layer 1 (linear), query, document 0 position 0 (differs only untapped)"
    assert search(0.0) == "differs only untapped; no single operator shows it"


@pytest.mark.slow
def test_sharded(folder):
    """What `make gates` looks at too, of other models. The command as it is: four simulated devices, rows over fsdp, experts and both."""
    command = [sys.executable, "-m", "ring_jax.infer", "align", "--checkpoint", str(folder), "--tokens", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simulating 4 devices on the CPU" in done.stdout
    for row in ("sharded fsdp=4", "sharded expert=4", "sharded fsdp=2 expert=2", "decode, batch 64"):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(row + " "))
        assert line.split()[-4:] == ["0", "0", "0.000e+00", "0.00e+00"], line
    assert done.stderr.splitlines()[-1].startswith("aligned: ")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["4x1", "1x4", "2x2"])
def test_difference_on_a_mesh_is_named(folder, mesh):
    script = f"""
        import jax
        jax.config.update("jax_num_cpu_devices", 4)
        from ring_jax import moe, sharding
        from ring_jax.infer import align
        from tests.infer.test_align import DOCUMENTS, PLANTED, programs

        name = moe.name
        moe.name = lambda x, label: name(x * (1 + PLANTED) if label == "shared" and sharding.manual_axes() else x, label)
        variants = align.variants
        align.variants = lambda *args: [v for v in variants(*args) if v.name.startswith("sharded")]
        rows = align.report(programs({str(folder)!r}), DOCUMENTS, [sharding.make_mesh(sharding.parse_mesh({mesh!r}))])
        print("found:", rows[0].where)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=800, check=False)
    assert "found: layer 1 (linear), shared, document 0 position 0" in done.stdout, done.stdout + done.stderr


# The command's mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "many"], "invalid int value"),
        (["--remat", "half"], "invalid choice: 'half'"),
        (["--text", "nothing.txt"], "no text file nothing.txt"),
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_mistakes_take_one_line(folder, monkeypatch, capsys, tmp_path, arguments, message):
    from ring_jax.tokenizer import Tokenizer

    with_tokenizer = tmp_path / "with_tokenizer"
    with_tokenizer.mkdir()
    for file in folder.iterdir():
        (with_tokenizer / file.name).symlink_to(file)
    (with_tokenizer / "tokenizer.json").write_text(Tokenizer.bytes().to_json())
    monkeypatch.setattr(align, "SIMULATED_DEVICES", 1)
    try:
        status = main(["align", "--checkpoint", str(with_tokenizer), *arguments])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
