"""The data pipeline: formats, mistakes, the cache, the split, the packer, and batches as a pure function of their step."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import GRID
from ring_jax.tokenizer import Tokenizer
from ring_jax.train import data, sources, token_store
from ring_jax.train.data import Batches, Spans, TokenDataset, load_data

ROOT = pathlib.Path(__file__).resolve().parents[2]
BYTES = Tokenizer.bytes()
EOS = BYTES.eos_id
TEXTS = ["one", "zwei\r\n", "três 日本 🙂", "x" * 300, "q\na"]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def write_array_record(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def documents(path, cache, tokenizer=BYTES):
    """The token lists of the documents of one source, in order."""
    store = token_store.tokenize(sources.open_source(str(path)), tokenizer, cache)
    return [store.tokens[start:stop].tolist() for start, stop in itertools.pairwise(store.offsets.tolist())]


def expected(texts):
    return [[*text.encode(), EOS] for text in texts]


def load(sources, tmp_path, **changes):
    arguments = {"seq_len": 256, "batch_size": 4, "seed": 0, "cache_dir": tmp_path / "cache"} | changes
    return load_data([str(source) for source in sources], arguments.pop("tokenizer", BYTES), **arguments)


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def segments(batch):
    """The segments of a batch as token tuples; checks the layout of every row on the way."""
    found = []
    for tokens, ids, positions in zip(batch["tokens"], batch["segment_ids"], batch["positions"], strict=True):
        assert tokens.dtype == ids.dtype == positions.dtype == np.int32
        assert np.all(tokens[ids == 0] == 0)
        assert np.all((positions == -1) == (ids == 0))
        numbers = [id for id in dict.fromkeys(ids.tolist()) if id]
        assert numbers == list(range(1, len(numbers) + 1))
        for id in numbers:
            (place,) = np.nonzero(ids == id)
            assert place[0] % GRID == 0
            np.testing.assert_array_equal(place, place[0] + np.arange(len(place)))
            np.testing.assert_array_equal(positions[place], np.arange(len(place)))
            found.append(tuple(tokens[place].tolist()))
    return found


@pytest.fixture
def folder(tmp_path):
    """Sixty documents of 1 to 900 tokens, each token naming its document, as one jsonl file."""
    sizes = np.random.default_rng(0).integers(1, 900, 60)
    write_jsonl(tmp_path / "many.jsonl", [{"text": chr(40 + index) * int(size)} for index, size in enumerate(sizes)])
    return tmp_path


# what is read


def test_text_formats(tmp_path):
    cache = tmp_path / "cache"
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
        assert documents(tmp_path / f"{number}.txt", cache) == expected([text])
    (tmp_path / "readme.odd").write_bytes("\ufeffodd".encode())
    assert documents(tmp_path / "readme.odd", cache) == expected(["odd"])

    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "other": 1} for text in TEXTS])
    assert documents(tmp_path / "a.jsonl", cache) == expected(TEXTS)
    (tmp_path / "b.json").write_text(
        '\ufeff{"question": "q", "answer": "a"}\n\n  {"tokens": [1, 2, 256]}\n{"tokens": [3]}\n{"text": ""}', "utf-8"
    )
    assert documents(tmp_path / "b.json", cache) == [*expected(["q\na"]), [1, 2, EOS], [3, EOS]]

    write_parquet(tmp_path / "a.parquet", {"id": list(range(6)), "text": [*TEXTS, None]})
    assert documents(tmp_path / "a.parquet", cache) == expected(TEXTS)

    records = ["plain", '{"text": "json"}', "{ not json", '{"tokens": [5, 6]}', "[1]"]
    for suffix in ("arrayrecord", "array_record"):
        write_array_record(tmp_path / f"a.{suffix}", [record.encode() for record in records])
        wanted = [*expected(["plain", "json", "{ not json"]), [5, 6, EOS], *expected(["[1]"])]
        assert documents(tmp_path / f"a.{suffix}", cache) == wanted


def test_folders_are_walked_in_order(tmp_path):
    root = tmp_path / "corpus"
    for name, text in (("b.txt", "2"), ("a/z.md", "1"), ("a/.hidden.txt", "no"), (".git/x.txt", "no"), ("c.bin", "no"), ("d.py", "3")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert documents(root, tmp_path / "cache") == expected(["1", "2", "3"])


def test_long_documents_are_streamed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", 10)
    monkeypatch.setattr(token_store, "GROUP_CHARS", 25)
    texts = ["line one\nline two is long\n\nend", "é" * 95, "short"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    (tmp_path / "long.txt").write_text(texts[0])
    pieces = list(sources.read_pieces(tmp_path / "a.jsonl"))
    assert max(len(piece) for piece in pieces if piece is not None) <= 10
    assert documents(tmp_path / "a.jsonl", tmp_path / "cache") == expected(texts)
    assert documents(tmp_path / "long.txt", tmp_path / "cache") == expected(texts[:1])


def test_pieces_do_not_change_the_tokens(tmp_path, monkeypatch):
    text = pathlib.Path(sources.__file__).read_text(encoding="utf-8")
    tokenizer = Tokenizer.train([text], 1000)
    monkeypatch.setattr(sources, "PIECE_CHARS", 1000)
    (tmp_path / "data.py").write_text(text, encoding="utf-8")
    assert len(list(sources.read_pieces(tmp_path / "data.py"))) > 10
    assert documents(tmp_path / "data.py", tmp_path / "cache", tokenizer) == [[*tokenizer.encode(text), EOS]]


def test_store_types_and_byte_counts(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS] + [{"tokens": list("é".encode())}])
    source = sources.open_source(str(tmp_path / "a.jsonl"))
    store = token_store.tokenize(source, BYTES, tmp_path / "cache")
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.dtype == np.uint16
    assert store.num_bytes.tolist() == [len(text.encode()) for text in [*TEXTS, "é"]]
    assert np.diff(store.offsets).tolist() == [len(text.encode()) + 1 for text in [*TEXTS, "é"]]

    big = json.loads(BYTES.to_json())
    big["model"]["vocab"]["far"] = 100_000
    big["added_tokens"] = []
    del big["model"]["vocab"]["<|endoftext|>"]  # and without eos, documents end as they are
    tokenizer = Tokenizer.from_json(json.dumps(big))
    write_jsonl(tmp_path / "b.jsonl", [{"tokens": [100_000, 7]}, {"text": "a"}])
    store = token_store.tokenize(sources.open_source(str(tmp_path / "b.jsonl")), tokenizer, tmp_path / "cache")
    assert store.tokens.dtype == np.uint32
    assert store.tokens.tolist() == [100_000, 7, 97]
    assert store.offsets.tolist() == [0, 2, 3]


def test_default_is_the_standard_library(tmp_path):
    whole = sources.stdlib_source(1 << 24)
    names = [str(file) for file in whole.files]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any(part in name for name in names for part in ("/site-packages/", "/test/", "/tests/", "/lib2to3/"))
    assert names == sorted(names)
    small = sources.stdlib_source(100_000)
    assert small == sources.stdlib_source(100_000)
    assert 50_000 < sum(file.stat().st_size for file in small.files) <= 100_000
    assert set(small.files) < set(whole.files)
    loaded = load([], tmp_path, tokenizer="train:300", stdlib_bytes=100_000)
    assert loaded.tokenizer.vocab_size == 300
    assert 1 < loaded.bytes_per_token < 4
    with pytest.raises(ValueError, match="within 10 bytes"):
        load([], tmp_path, stdlib_bytes=10)


@pytest.mark.parametrize(
    ("spec", "path", "weight"),
    [("a/b", "a/b", 1), ("a:2", "a", 2), ("a:b:0.25", "a:b", 0.25), ("a:b", "a:b", 1), ("C:x/y:1e-3", "C:x/y", 1e-3), ("a:", "a:", 1)],
)
def test_source_specs(spec, path, weight):
    assert sources.parse_source(spec) == (path, weight)


def test_a_file_whose_name_ends_like_a_weight(tmp_path):
    (tmp_path / "log:2024").write_text("text")
    assert sources.parse_source(str(tmp_path / "log:2024")) == (str(tmp_path / "log:2024"), 1)
    assert sources.parse_source(str(tmp_path / "log:2024:3")) == (str(tmp_path / "log:2024"), 3)


# what is refused


@pytest.mark.parametrize("spec", ["", ":2", "a:0", "a:-1", "a:nan", "a:inf"])
def test_bad_source_specs(spec, tmp_path):
    with pytest.raises(ValueError, match="expected PATH|must be a positive number") as error:
        load([spec], tmp_path)
    assert repr(spec) in str(error.value)


LINES = b'{"text": "fine"}\n\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no document"),
        ("a.txt", b"abc\xff", "a.txt: not UTF-8 text"),
        ("a.jsonl", b"\n\n", "no document"),
        ("a.jsonl", LINES + b"{oops", "a.jsonl, line 3: not JSON"),
        ("a.jsonl", LINES + b"\xff{}", "a.jsonl, line 3: not UTF-8"),
        ("a.jsonl", LINES + b"[1, 2]", "line 3: expected an object with 'text'"),
        ("a.jsonl", LINES + b'{"question": "only"}', "line 3: expected an object with 'text'"),
        ("a.jsonl", LINES + b'{"text": 5}', "line 3: expected text, found 5"),
        ("a.jsonl", LINES + b'{"question": "q", "answer": null}', "line 3: expected text, found null"),
        ("a.jsonl", LINES + b'{"text": "\\ud800"}', "line 3: the text is not valid Unicode"),
        ("a.jsonl", LINES + b'{"tokens": "abc"}', "line 3: expected an object"),
        ("a.jsonl", LINES + b'{"tokens": [1.5]}', "line 3: 'tokens' must be a list of whole numbers"),
        ("a.jsonl", LINES + b'{"tokens": [[1]]}', "line 3: 'tokens' must be a list of whole numbers"),
        ("a.jsonl", LINES + b'{"tokens": ["a"]}', "line 3: 'tokens' must be a list of whole numbers"),
        ("a.jsonl", LINES + b'{"tokens": [9, 257]}', "line 3: token id 257 is not in the vocabulary; expected 0 to 256"),
        ("a.jsonl", LINES + b'{"tokens": [-1]}', "line 3: token id -1 is not"),
        ("a.parquet", b"", "a.parquet: not a readable parquet file"),
        ("a.parquet", b"PAR1" * 40, "a.parquet: not a readable parquet file"),
        ("a.arrayrecord", b"", "a.arrayrecord: not a readable arrayrecord file"),
        ("a.arrayrecord", b"abc" * 40_000, "a.arrayrecord: not a readable arrayrecord file"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load([tmp_path / name], tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "cache") == []  # nothing half-written


def test_bad_parquet_and_array_record(tmp_path):
    cache = tmp_path / "cache"
    write_parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; its columns are body, id"):
        documents(tmp_path / "a.parquet", cache)
    write_parquet(tmp_path / "b.parquet", {"text": [1, 2]})
    with pytest.raises(ValueError, match=r"b\.parquet: expected text, found 1"):
        documents(tmp_path / "b.parquet", cache)
    write_parquet(tmp_path / "c.parquet", {"text": [str(number) * 500 for number in range(50)]})
    whole = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"c\.parquet: not a readable parquet file"):
        documents(tmp_path / "c.parquet", cache)
    (tmp_path / "d.parquet").write_bytes(whole[:4] + bytes(800) + whole[804:])
    with pytest.raises(ValueError, match=r"d\.parquet: ") as error:
        documents(tmp_path / "d.parquet", cache)
    assert "\n" not in str(error.value)

    write_array_record(tmp_path / "a.arrayrecord", [b"fine", b"\xff"])
    with pytest.raises(ValueError, match=r"a\.arrayrecord, record 2: not UTF-8"):
        documents(tmp_path / "a.arrayrecord", cache)
    write_array_record(tmp_path / "b.arrayrecord", [b"fine", b'{"title": 1}'])
    with pytest.raises(ValueError, match=r"b\.arrayrecord, record 2: expected an object"):
        documents(tmp_path / "b.arrayrecord", cache)
    write_array_record(tmp_path / "c.arrayrecord", [b"fine" * 20] * 10)
    damaged = bytearray((tmp_path / "c.arrayrecord").read_bytes())
    damaged[40:120] = bytes(80)
    (tmp_path / "c.arrayrecord").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"c\.arrayrecord: not a readable arrayrecord file") as error:
        documents(tmp_path / "c.arrayrecord", cache)
    assert "\n" not in str(error.value)


def test_bad_arguments(folder):
    source = folder / "many.jsonl"
    for changes, message in (
        ({"seq_len": 200}, "sequence length 200: expected a multiple of 128"),
        ({"seq_len": 0}, "sequence length 0: expected a multiple"),
        ({"batch_size": 0}, "batch size 0"),
        ({"seed": -1}, "seed -1"),
        ({"eval_fraction": 1}, "held-out fraction 1"),
        ({"eval_fraction": -0.1}, "held-out fraction -0.1"),
        ({"tokenizer": "train:9"}, "tokenizer 'train:9'"),
    ):
        with pytest.raises(ValueError) as error:
            load([source], folder, **changes)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="no such file or folder"):
        load([folder / "nowhere"], folder)
    (folder / "empty").mkdir()
    (folder / "empty" / "image.png").write_bytes(b"\x89")
    with pytest.raises(ValueError, match="no file to read in this folder"):
        load([folder / "empty"], folder)
    write_jsonl(folder / "tokens.jsonl", [{"tokens": [1, 2, 3]}])
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        load([folder / "tokens.jsonl"], folder, tokenizer="train:300")
    (folder / "tiny.txt").write_text("a")
    with pytest.raises(ValueError, match="2 tokens: too little"):
        load([folder / "tiny.txt"], folder)


def test_cache_folder_that_cannot_be_written(folder):
    (folder / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written") as error:
        load([folder / "many.jsonl"], folder, cache_dir=folder / "file" / "cache")
    assert str(folder / "file" / "cache") in str(error.value)


# the cache


def test_cache_is_reused_until_something_changes(folder, monkeypatch):
    source, cache = folder / "many.jsonl", folder / "cache"
    first = load([source], folder)
    (entry,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(token_store, "read_pieces", lambda *_: pytest.fail("read again"))
        again = load([source], folder)
    equal(first.train.batch(3), again.train.batch(3))
    assert list(cache.iterdir()) == [entry]
    load([source], folder, tokenizer="train:300")
    assert len(list(cache.iterdir())) == 2
    os.utime(source, ns=(1, 1))
    load([source], folder)
    assert len(list(cache.iterdir())) == 3


def test_half_written_caches_are_never_read(folder):
    cache = folder / "cache"
    wanted = load([folder / "many.jsonl"], folder).train.batch(0)
    (entry,) = cache.iterdir()
    killed, old = cache / f"{entry.name}.abc.partial", cache / "0123.def.partial"
    for name in (killed, old):
        name.mkdir()
        (name / "tokens.npy").write_bytes(b"half")
    os.utime(old / "tokens.npy", (1, 1))
    os.utime(old, (1, 1))
    entry.rename(folder / "kept")
    equal(load([folder / "many.jsonl"], folder).train.batch(0), wanted)
    assert killed.exists()  # perhaps another process's
    assert not old.exists()

    with open(entry / "tokens.npy", "r+b") as file:
        file.truncate(500)
    with pytest.raises(ValueError, match="damaged.*delete this folder") as error:
        load([folder / "many.jsonl"], folder)
    assert str(entry) in str(error.value)
    assert "\n" not in str(error.value)


def test_two_processes_may_write_the_same_cache(folder, monkeypatch):
    write = token_store._write_store

    def write_second(source, tokenizer, partial):
        final = partial.with_name(partial.name.split(".")[0])
        final.mkdir()
        write(source, tokenizer, final)  # what the other process has done when this one is ready
        write(source, tokenizer, partial)

    monkeypatch.setattr(token_store, "_write_store", write_second)
    load([folder / "many.jsonl"], folder)
    assert len(list((folder / "cache").iterdir())) == 1


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert token_store.default_cache_dir() == tmp_path / "ring_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_store.default_cache_dir() == tmp_path / ".cache" / "ring_jax"


# the split


def store_of(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return token_store.TokenStore(np.arange(offsets[-1]), offsets, 2 * np.asarray(lengths, np.int64))


def indices(spans):
    return [index for start, length in zip(spans.starts, spans.lengths, strict=True) for index in range(start, start + length)]


@pytest.mark.parametrize("lengths", [[1000], [4], [5, 900], [900, 5], [7] * 30, list(range(1, 400))])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_held_out_tokens_are_apart_and_complete(lengths, fraction):
    train, held = data.hold_out(store_of(lengths), fraction)
    assert sorted(indices(train) + indices(held)) == list(range(sum(lengths)))
    assert indices(train)
    assert indices(held)
    assert train.num_bytes + held.num_bytes == pytest.approx(2 * sum(lengths))
    assert held.num_bytes == pytest.approx(2 * held.lengths.sum())


def test_held_out_share():
    train, held = data.hold_out(store_of([3] * 20_000), 0.01)
    assert 140 < len(held.lengths) < 260
    assert (held.starts.min() < 5_000, held.starts.max() > 55_000) == (True, True)  # from everywhere
    longer = data.hold_out(store_of([3] * 20_001), 0.01)[1]
    np.testing.assert_array_equal(held.starts, longer.starts[: len(held.starts)])  # more data moves nothing
    assert data.hold_out(store_of([5, 900]), 0.01)[1].lengths.tolist() == [5]
    assert data.hold_out(store_of([1000]), 0.01)[1].lengths.tolist() == [10]
    train, held = data.hold_out(store_of([1000]), 0.0)
    assert (train.lengths.tolist(), held.lengths.tolist()) == ([1000], [])


def test_evaluation_batches(folder):
    loaded = load([folder / "many.jsonl"], folder, eval_fraction=0.2)
    assert 0 < len(loaded.eval) < 20
    batches = list(loaded.eval.iterate())
    assert len(batches) == len(loaded.eval)
    assert all(batch["tokens"].shape == (4, 256) for batch in batches)
    held = {tokens[0] for batch in batches for tokens in segments(batch)}
    num_tokens = sum(len(tokens) for batch in batches for tokens in segments(batch))
    trained = {tokens[0] for step in range(100) for tokens in segments(loaded.train.batch(step))}
    assert held.isdisjoint(trained - {EOS})
    assert loaded.num_tokens + num_tokens == len(np.concatenate(documents(folder / "many.jsonl", folder / "cache")))
    # every document is one character over and over, one byte long: its tokens but the eos are its bytes
    num_ends = sum(tokens[-1] == EOS for batch in batches for tokens in segments(batch))
    assert num_ends > 0
    assert loaded.bytes_per_token == pytest.approx((num_tokens - num_ends) / num_tokens)
    equal(batches[0], load([folder / "many.jsonl"], folder, eval_fraction=0.2, seed=9).eval.batch(0))  # whatever the seed
    with pytest.raises(IndexError):
        loaded.eval.batch(len(loaded.eval))
    nothing = load([folder / "many.jsonl"], folder, eval_fraction=0)
    assert (len(nothing.eval), list(nothing.eval.iterate())) == (0, [])
    assert nothing.bytes_per_token > 0.9


def test_last_evaluation_batch_is_padded_with_empty_rows(folder):
    loaded = load([folder / "many.jsonl"], folder, eval_fraction=0.2, batch_size=64)
    batch = loaded.eval.batch(len(loaded.eval) - 1)
    assert batch["tokens"].shape == (64, 256)
    assert not batch["segment_ids"][-1].any()
    assert (batch["positions"][-1] == -1).all()


# the packer


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 300), st.integers(1, 5000)), min_size=1, max_size=60), st.integers(1, 6))
def test_rows_hold_every_token_once(lengths, width):
    seq_len = width * GRID
    lengths = np.asarray(lengths)
    tokens = 1 + np.arange(lengths.sum())
    dataset = TokenDataset(tokens, Spans(np.cumsum(lengths) - lengths, lengths, 0.0), seq_len)
    rows = [dataset[row] for row in range(len(dataset))]
    pieces = segments({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    assert sorted(itertools.chain.from_iterable(pieces)) == tokens.tolist()
    assert dataset.num_tokens == len(tokens)
    # a piece stays within its document, and a document has as few pieces as it can
    document = np.repeat(np.arange(len(lengths)), lengths)
    assert all(len(set(document[np.asarray(piece) - 1])) == 1 for piece in pieces)
    assert len(pieces) == (-(-lengths // seq_len)).sum()
    # first fit decreasing: never two rows that could be one, so above half full
    free = sorted(width - len(set(np.nonzero(row["segment_ids"])[0] // GRID)) for row in rows)
    assert len(free) < 2 or free[-1] + free[-2] < width


def test_fill_of_many_documents():
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(6, 1.3, 200_000).astype(np.int64) + 1, 1_000_000)
    for seq_len in (512, 4096):
        dataset = TokenDataset(np.zeros(1), Spans(np.cumsum(lengths) - lengths, lengths, 0.0), seq_len)
        pieces = data.cut(Spans(np.cumsum(lengths) - lengths, lengths, 0.0), seq_len)[1]
        needed = (-(-pieces // GRID)).sum() * GRID / seq_len  # rows, if every slot were taken
        assert len(dataset) < 1.001 * needed
    lengths = np.asarray([100_000, 55_555, 70_001])
    dataset = TokenDataset(np.zeros(1), Spans(np.cumsum(lengths) - lengths, lengths, 0.0), 512)
    assert dataset.num_tokens / (len(dataset) * 512) > 0.99


# batches


def test_any_batch_at_any_time(folder):
    train = load([folder / "many.jsonl"], folder).train
    in_order = [train.batch(step) for step in range(30)]
    fresh = load([folder / "many.jsonl"], folder).train
    for step in (29, 3, 17, 0):
        equal(fresh.batch(step), in_order[step])
    other = load([folder / "many.jsonl"], folder, seed=1).train
    assert any((other.batch(step)["tokens"] != in_order[step]["tokens"]).any() for step in range(3))
    fresh.batch(10**9)  # far along, at no cost


def test_epochs_hold_every_token_once_in_new_orders(folder):
    loaded = load([folder / "many.jsonl"], folder, batch_size=1, eval_fraction=0)
    num_rows = round(loaded.num_tokens / loaded.fill / 256)
    epochs = [[segments(loaded.train.batch(epoch * num_rows + step)) for step in range(num_rows)] for epoch in range(3)]
    wanted = sorted(np.concatenate(documents(folder / "many.jsonl", folder / "cache")).tolist())
    for epoch in epochs:
        assert sorted(token for row in epoch for segment in row for token in segment) == wanted
    for one, other in itertools.combinations(epochs, 2):
        assert one != other
        assert sorted(one) == sorted(other)


def test_neighbouring_seeds_do_not_share_epochs(folder):
    one, other = (load([folder / "many.jsonl"], folder, batch_size=1, seed=seed) for seed in (0, 1))
    num_rows = round(one.num_tokens / one.fill / 256)
    later = [one.train.batch(num_rows + step)["tokens"] for step in range(10)]
    assert any((other.train.batch(step)["tokens"] != later[step]).any() for step in range(10))


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_share_one_global_batch(folder, num_hosts):
    batches = load([folder / "many.jsonl"], folder, batch_size=8).train
    size = 8 // num_hosts
    for step in (0, 5, 100):
        parts = [batches.batch(step, rows=slice(host * size, (host + 1) * size)) for host in range(num_hosts)]
        equal(batches.batch(step), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def test_a_host_reads_only_its_rows():
    read = []

    class Rows:
        def __len__(self):
            return 100

        def __getitem__(self, row):
            read.append(row)
            return data._empty_row(GRID)

    Batches(Rows(), 8, GRID).batch(2, rows=slice(4, 6))
    assert read == [20, 21]


def test_sources_are_mixed_by_weight(tmp_path):
    for name, size in (("a", 500), ("b", 100), ("c", 50)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name * 200}] * size)
    sources = [f"{tmp_path / 'a.jsonl'}:1", f"{tmp_path / 'b.jsonl'}:2.5", f"{tmp_path / 'c.jsonl'}:0.5"]
    train = load(sources, tmp_path, batch_size=100).train
    for start in (0, 50):  # from the start and later, and though the small ones repeat
        rows = np.concatenate([train.batch(step)["tokens"][:, 0] for step in range(start, start + 8)])
        shares = [np.mean(rows == ord(name)) for name in "abc"]
        np.testing.assert_allclose(shares, [0.25, 0.625, 0.125], atol=0.005)
    equal(train.batch(3), load(sources, tmp_path, batch_size=100).train.batch(3))
    plain = load([spec.rsplit(":", 1)[0] for spec in sources], tmp_path, batch_size=99).train.batch(0)["tokens"][:, 0]
    assert [int(np.sum(plain == ord(name))) for name in "abc"] == [33, 33, 33]


def test_iterating_equals_asking(folder):
    batches = load([folder / "many.jsonl"], folder).train
    for step, batch in enumerate(itertools.islice(batches.iterate(7), 5), 7):
        equal(batch, batches.batch(step))
    part = next(batches.iterate(3, rows=slice(1, 2)))
    equal(part, batches.batch(3, rows=slice(1, 2)))


def test_the_thread_ends_with_the_iterator(folder):
    iterator = load([folder / "many.jsonl"], folder).train.iterate()
    next(iterator)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    iterator.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_an_error_in_the_thread_reaches_the_caller():
    class Rows:
        def __len__(self):
            return 100

        def __getitem__(self, row):
            if row >= 6:
                raise OSError("the disk is gone")
            return data._empty_row(GRID)

    iterator = Batches(Rows(), 2, GRID).iterate()
    assert len(list(itertools.islice(iterator, 3))) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_tokenizer_sample_covers_every_file(tmp_path):
    for name, letter in (("a.txt", "a"), ("b.txt", "b"), ("c.txt", "c")):
        (tmp_path / name).write_text((letter * 79 + "\n") * 40_000)
    opened = [sources.open_source(str(tmp_path / name)) for name in ("a.txt", "b.txt", "c.txt")]
    texts = sources.sample_texts(opened, 3_000_000)
    assert texts == sources.sample_texts(opened, 3_000_000)
    assert {text[0] for text in texts} == set("abc")
    assert 3_000_000 <= sum(map(len, texts)) < 4_000_000


def test_importing_needs_no_jax():
    program = "import sys, ring_jax.train.data, ring_jax.tokenizer; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
