"""Scoring: the order and the shape of the output, its exact numbers, and the lines it refuses."""

import json

import numpy as np
import pytest

from ring_jax.infer import score
from ring_jax.infer.__main__ import main
from ring_jax.infer.score import read_lines, score_lines
from ring_jax.reference import Twin
from ring_jax.tokenizer import Tokenizer
from tests.ring_jax.models import same_bits

# Long and short lines mixed, an empty one and one of a single token.
LENGTHS = (5, 140, 1, 17, 0, 200, 3, 64, 140, 2)


@pytest.fixture(scope="module")
def lines() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 260, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def scored(model, lines) -> list[dict]:
    return [json.loads(line) for line in score_lines(model.scorer, iter(lines))]


def test_output_keeps_order_and_shape(lines, scored):
    assert [line["tokens"] for line in scored] == lines
    for line in scored:
        assert line.keys() == {"tokens", "logprobs"}
        assert len(line["logprobs"]) == len(line["tokens"])
        assert line["logprobs"][:1] in ([], [None])
        assert all(x < 0 for x in line["logprobs"][1:])


def test_numbers_are_right(model, lines, scored):
    """Against float64: raw, at temperature 1."""
    from safetensors.numpy import load_file

    twin = Twin(model.decoder.model.config, load_file(model.folder / "model.safetensors"))
    for tokens, line in zip(lines, scored, strict=True):
        if len(tokens) > 1:
            logits = twin(np.array(tokens)).logits
            logits -= logits.max(-1, keepdims=True)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            np.testing.assert_allclose(line["logprobs"][1:], logprobs[np.arange(len(tokens) - 1), tokens[1:]], atol=5e-5)


def test_numbers_read_back_to_the_same_float32(model, lines, scored):
    for tokens, line in zip(lines, scored, strict=True):
        if tokens:
            assert same_bits(np.array(line["logprobs"][1:], np.float32), model.scorer([tokens])[0][1:])


def test_batches_change_nothing(model, lines, scored, monkeypatch):
    monkeypatch.setattr(score, "MOST_TOKENS", 256)
    monkeypatch.setattr(score, "WINDOW", 3)
    assert [json.loads(line) for line in score_lines(model.scorer, iter(lines))] == scored


def test_batches_fill_up_by_length(monkeypatch):
    monkeypatch.setattr(score, "MOST_TOKENS", 512)
    rows = [[0] * length for length in (100, 0, 300, 20, 10, 5, 600, 128, 129)]
    groups = list(score._batches(rows))
    assert sorted(i for group in groups for i in group) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert all(len(group) == 1 or len(group) * score.bucket(max(len(rows[i]) for i in group)) <= 512 for group in groups)
    assert all(len({score.bucket(len(rows[i])) for i in group}) == 1 for group in groups)
    assert len(groups) == 5


def test_nothing_to_score(model):
    assert list(score_lines(model.scorer, iter([]))) == []
    assert [json.loads(line) for line in score_lines(model.scorer, iter([[], [4]]))] == [
        {"tokens": [], "logprobs": []},
        {"tokens": [4], "logprobs": [None]},
    ]


def test_command(model, lines, scored, capsys, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in lines) + '{"text": "def f(x):"}\n')
    assert main(["score", "--checkpoint", str(model.folder), "--input", str(file)]) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert found[:-1] == scored
    assert found[-1]["tokens"] == list(b"def f(x):")


def test_tokens_need_no_tokenizer(model, capsys, tmp_path, lines, scored):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(model.folder / name)
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"tokens": lines[0]}) + "\n")
    assert main(["score", "--checkpoint", str(tmp_path), "--input", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == scored[0]
    file.write_text(json.dumps({"tokens": lines[0]}) + "\n" + json.dumps({"text": "a"}) + "\n")
    assert main(["score", "--checkpoint", str(tmp_path), "--input", str(file)]) == 2
    out, err = capsys.readouterr()
    assert "in.jsonl:2" in err
    assert "no tokenizer" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b"[1, 2]", "expected"),
        (b'{"tokens": [1, 2.5]}', "expected"),
        (b'{"tokens": [true]}', "expected"),
        (b'{"tokens": "1 2"}', "expected"),
        (b'{"prompt": "a"}', "expected"),
        (b'{"tokens": [1, 260]}', "token 260 is outside the vocabulary of 260"),
        (b'{"tokens": [1, -1]}', "token -1 is outside the vocabulary of 260"),
        (b'{"tokens": ' + json.dumps([1] * 301).encode() + b"}", "301 tokens exceed the 300 positions of the model .*YaRN"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"tokens": [1, 2]}\n' + line + b'\n{"tokens": [3]}\n')
    found = read_lines(file, Tokenizer.bytes(), 260, 300)
    assert next(found) == [1, 2]
    with pytest.raises(ValueError, match=f"in.jsonl:2:? .*{message}") as error:
        next(found)
    assert "\n" not in str(error.value)


def test_as_long_as_the_positions(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"tokens": [1] * 300}))
    assert list(read_lines(file, None, 260, 300)) == [[1] * 300]


def test_missing_files_take_one_line(model, capsys, tmp_path):
    for arguments, message in (
        (["--checkpoint", model.folder, "--input", tmp_path / "nothing.jsonl"], "no input file"),
        (["--checkpoint", tmp_path / "nowhere", "--input", __file__], "no such folder"),
    ):
        assert main(["score", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert message in err
