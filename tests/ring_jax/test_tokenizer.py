"""The tokenizer: round trips, training, what ends a document, streaming, and the errors."""

import json
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from ring_jax.tokenizer import StreamDecoder, Tokenizer, make_tokenizer

TEXTS = ["the cat sat on the mat\n" * 20, "naïve café, 日本語, 🙂🙂 and the hat", "\tdef f(x):\r\n        return x\n"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A tokenizer that is not byte-level: words are marked by a leading ▁, which decoding turns into spaces."""
    vocab = {"▁the": 0, "▁cat": 1, "s": 2, "<unk>": 3, "</s>": 4, "<0xE2>": 5, "<0x82>": 6, "<0xAC>": 7}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return Tokenizer(tokenizer)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(id) for id in ids] + [decoder.flush()]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.eos_ids) == (257, 256, (256,))
    text = "".join(map(chr, range(1, 256))) + "日本🙂\r\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert [tokenizer.decode([byte]) for byte in range(128)] == list(map(chr, range(128)))


@given(st.text())
def test_round_trip(trained, text):
    assert trained.decode(trained.encode(text), skip_special=False) == text
    assert Tokenizer.bytes().decode(Tokenizer.bytes().encode(text), skip_special=False) == text


def test_training(trained):
    assert trained.vocab_size == 300
    assert trained.to_json() == Tokenizer.train(TEXTS, 300).to_json()
    assert trained.eos_id == trained.encode("<|endoftext|>")[0] == 256
    assert trained.encode("q") == [ord("q")]
    assert len(trained.encode("the cat sat")) < len("the cat sat")
    assert Tokenizer.train(["ab"], 4096).vocab_size == 258  # nothing else to merge


def test_encode_batch_equals_encode(trained):
    assert trained.encode_batch([*TEXTS, ""]) == [trained.encode(text) for text in [*TEXTS, ""]]


def test_json_and_files_bring_the_same_tokenizer(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.to_json(), encoding="utf-8")
    again = [Tokenizer.from_json(trained.to_json()), Tokenizer.from_file(tmp_path), Tokenizer.from_file(tmp_path / "tokenizer.json")]
    for tokenizer in again:
        assert tokenizer.to_json() == trained.to_json()
        assert (tokenizer.eos_id, tokenizer.vocab_size) == (256, 300)
        assert tokenizer.encode(TEXTS[1]) == trained.encode(TEXTS[1])


def test_padding_and_truncation_of_the_file_are_ignored():
    inner = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    assert len(Tokenizer.from_json(inner.to_str()).encode("a" * 20)) == 20
    assert len(Tokenizer.from_json(inner.to_str()).encode("a")) == 1


def test_eos_by_name_and_by_the_files_beside(words, tmp_path):
    assert words.eos_ids == (4,)
    plain = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[END]": 1, "[STOP]": 2}, unk_token="a"))
    assert Tokenizer(plain).eos_id is None
    (tmp_path / "tokenizer.json").write_text(plain.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[STOP]"}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 99]}))
    assert Tokenizer.from_file(tmp_path).eos_ids == (2, 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    assert Tokenizer.from_file(tmp_path).eos_id == 1


def test_vocab_size_is_above_every_id():
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 70}, unk_token="a"))
    inner.add_special_tokens(["<new>"])
    assert Tokenizer(inner).vocab_size == max(inner.get_vocab().values()) + 1 > 70


def test_special_tokens_in_the_text(trained):
    ids = trained.encode("a<|endoftext|>b")
    assert ids == [ord("a"), 256, ord("b")]
    assert trained.decode(ids) == "ab"
    assert trained.decode(ids, skip_special=False) == "a<|endoftext|>b"


def test_stream_waits_for_whole_characters():
    ids = Tokenizer.bytes().encode("é日🙂!")
    assert stream(Tokenizer.bytes(), ids) == ["", "é", "", "", "日", "", "", "", "🙂", "!", ""]
    decoder = StreamDecoder(Tokenizer.bytes())
    assert [decoder.push(id) for id in ids[:3]] == ["", "é", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ord("a")) == "a"  # a new stream
    assert stream(Tokenizer.bytes(), [0xE6, 256, 256, 256, 256, 256, 0x97, 256, 0xA5])[-2:] == ["日", ""]


# parts of characters of every length, whole ones, U+FFFD itself, <|endoftext|>, and merged tokens
IDS = [0x41, 0x82, 0xC3, 0xA9, 0xE2, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xEF, 0xBF, 0xBD, 256, 260, 280, 299]


@settings(max_examples=300)
@given(ids=st.lists(st.sampled_from(IDS), max_size=80))
def test_stream_joins_to_decode_whatever_the_bytes(trained, ids):
    assert "".join(stream(trained, ids)) == trained.decode(ids)


def test_stream_joins_to_decode_in_long_broken_streams(trained):
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids = rng.choice(IDS[1:-3], 200).tolist()
        assert "".join(stream(trained, ids)) == trained.decode(ids)


@settings(max_examples=100)
@given(units=st.lists(st.sampled_from([[0], [1], [2], [5, 6, 7]]), max_size=40))
def test_stream_joins_to_decode_without_byte_level(words, units):
    ids = [id for unit in units for id in unit]
    assert "".join(stream(words, ids)) == words.decode(ids)


@pytest.mark.parametrize("id", [ord("a"), 0xFF, 0xE2])
def test_stream_costs_the_same_however_long(id):
    decoder = StreamDecoder(Tokenizer.bytes())
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(4000):
            decoder.push(id)
        seconds.append(time.perf_counter() - start)
    assert len(decoder._ids) <= 25
    assert seconds[2] < 20 * seconds[0] + 1


def test_specs(trained, tmp_path):
    def texts():
        return TEXTS

    (tmp_path / "tokenizer.json").write_text(trained.to_json(), encoding="utf-8")
    assert make_tokenizer("bytes", texts).to_json() == Tokenizer.bytes().to_json()
    assert make_tokenizer("train:300", texts).to_json() == trained.to_json()
    assert make_tokenizer(str(tmp_path), texts).to_json() == trained.to_json()


@pytest.mark.parametrize("spec", ["train:abc", "train:", "train:10", "train:256", "train:-5", "train:4e3", "", "byte", "no/such/folder"])
def test_bad_specs(spec):
    with pytest.raises(ValueError, match="expected") as error:
        make_tokenizer(spec, lambda: pytest.fail("texts were read for a bad spec"))
    assert repr(spec) in one_line(error)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.json: No such file.*expected") as error:
        Tokenizer.from_file(tmp_path / "missing.json")
    one_line(error)
    with pytest.raises(ValueError, match=r"tokenizer\.json: No such file"):
        Tokenizer.from_file(tmp_path)
    for content in (b"", b"{}", b"not json", b'{"model":\n {}}', b"\xff\xfe", Tokenizer.bytes().to_json().encode()[:500]):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not ") as error:
            Tokenizer.from_file(tmp_path)
        assert str(tmp_path) in one_line(error)
    (tmp_path / "tokenizer.json").write_text(Tokenizer.bytes().to_json(), encoding="utf-8")
    for content in ("[1, 2]", "{", "3"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected a JSON object") as error:
            Tokenizer.from_file(tmp_path)
        one_line(error)
    with pytest.raises(ValueError, match="vocabulary 256: expected at least 257"):
        Tokenizer.train(TEXTS, 256)
