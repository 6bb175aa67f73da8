"""Generation: what is streamed and when it ends, whatever the batch; the command and its errors."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ring_jax import checkpoint
from ring_jax.infer.__main__ import main
from ring_jax.infer.generate import Decoder, Generation, Step, bucket
from ring_jax.infer.sampling import Sampling
from ring_jax.tokenizer import Tokenizer
from tests.ring_jax.models import SMALL, same_bits, write_hf
from tests.ring_jax.random_tensors import random_tensors

GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=0.9, top_k=50, top_p=0.95)
SEED = 3
PROMPTS = [list(b"def f(x):"), list(b"a"), list(b"class Ring: # a longer prompt than the others, of more than a chunk of tokens.")]
NEW = 24


class Scripted(Decoder):
    """A decoder that gives the tokens it is told, one row a prompt; None once a row is over, which nobody may ask for."""

    def __init__(self, *rows, stop_tokens=()):
        config = dataclasses.replace(SMALL, stop_tokens=stop_tokens)
        self.model, self.rows, self.at = SimpleNamespace(config=config), rows, 0
        self.rested, self.compile_seconds = [], 0.0

    def init_cache(self, batch, size):
        assert batch == len(self.rows)
        return size

    def prefill(self, prompts, cache):
        return cache, None

    def _step(self):
        tokens = np.array([row[self.at] if self.at < len(row) else 0 for row in self.rows], np.int32)
        self.at += 1
        return Step(tokens, -tokens.astype(np.float32))

    def first_tokens(self, hidden, positions, sampling, seed):
        return self._step()

    def step(self, tokens, positions, cache, sampling, seed):
        self.rested.append(np.flatnonzero(positions < 0).tolist())
        assert (positions < cache).all()
        return self._step(), cache


def replies(generation, num=1) -> list[list]:
    """Return the pieces of each prompt."""
    found = [[] for _ in range(num)]
    for piece in generation:
        assert not (found[piece.index] and found[piece.index][-1].finished), "a finished reply gives no more"
        found[piece.index].append(piece)
    assert all(pieces[-1].finished for pieces in found)
    return found


def scripted(text: str | list[int], stops=(), max_tokens=100, **options):
    """Return the pieces of text of a scripted reply."""
    tokens = list(text.encode()) if isinstance(text, str) else text
    generation = Generation(
        Scripted(tokens, **options), Tokenizer.bytes(), [[1]], max_tokens=min(max_tokens, len(tokens)), sampling=GREEDY, seed=0, stops=stops
    )
    return [piece.text for piece in replies(generation)[0]]


# What is streamed.


@pytest.mark.parametrize("text", ["plain text", "naïve 日本語 🙂🙂!", "cut off 🙂"[:-1] + "é"])
def test_pieces_join_to_the_text(text):
    pieces = scripted(text)
    assert len(pieces) == len(text.encode())
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces[:-1])


def test_each_token_is_streamed_at_once():
    assert scripted("abc") == ["a", "b", "c"]
    assert scripted("aé!") == ["a", "", "é", "!"]


def test_unfinished_character_at_the_end():
    assert "".join(scripted([97, 0xC3])) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello END more", ["END"], "hello "),
        ("hello END more", ["XX", "more", "END"], "hello "),
        ("END", ["END"], ""),
        ("aEND", ["ND", "END"], "a"),  # the earliest match counts, not the first finished
        ("a EN b ENDE", ["END"], "a EN b "),
        ("EEEND", ["END"], "EE"),
        ("aabaabaac", ["aabaac"], "aab"),
        ("no stop EN", ["END"], "no stop EN"),  # what is held back comes out at the end
        ("naïve日本", ["日"], "naïve"),
        ("line\n\nnext", ["\n\n"], "line"),
        ("all", [""], "all"),
    ],
)
def test_stop_strings(text, stops, expected):
    assert "".join(scripted(text, stops)) == expected


def test_stop_string_ends_the_reply_early():
    pieces = scripted("ab END never seen", ["END"])
    assert pieces == ["a", "b", " ", "", "", ""]
    assert scripted("xEy", ["END"]) == ["x", "", "Ey"]


def test_stop_string_inside_one_token():
    tokenizer = Tokenizer.train(["stop here " * 50], 270)
    (token,) = tokenizer.encode("stop")
    generation = Generation(Scripted([97, token, 98]), tokenizer, [[1]], max_tokens=3, sampling=GREEDY, seed=0, stops=["to"])
    assert [piece.text for piece in replies(generation)[0]] == ["a", "s"]


@pytest.mark.parametrize("stop", [258, 259, 256])
def test_every_stop_token_ends_a_reply(stop):
    """Both of the model's and the tokenizer's own (256); nothing of it is text, and what was held back comes out."""
    pieces = scripted([97, 69, stop, 98], ["END"], stop_tokens=(258, 259))
    assert pieces == ["a", "", "E"]


def test_max_tokens():
    assert "".join(scripted("abcdef", max_tokens=4)) == "abcd"
    assert len(scripted("abcdef", max_tokens=1)) == 1


def test_slots_end_alone():
    decoder = Scripted(list(b"ab"), [97, 258], list(b"abcdef"), stop_tokens=(258,))
    generation = Generation(decoder, Tokenizer.bytes(), [[1], [1, 2], [3]], max_tokens=6, sampling=GREEDY, seed=0, stops=["b"])
    texts = ["".join(piece.text for piece in pieces) for pieces in replies(generation, 3)]
    assert texts == ["a", "a", "a"]
    decoder = Scripted([97, 258], list(b"abcdef"), stop_tokens=(258,))
    generation = Generation(decoder, Tokenizer.bytes(), [[1], [1]], max_tokens=6, sampling=GREEDY, seed=0, stops=[])
    assert ["".join(p.text for p in pieces) for pieces in replies(generation, 2)] == ["a", "abcdef"]
    assert decoder.rested == [[], [0], [0], [0], [0]], "a finished slot rests"
    assert generation.timing.decode_tokens == 6
    assert generation.timing.prefill_tokens == 2


# The model.


def generate(model, prompts, sampling, max_tokens=NEW, seed=SEED) -> list[tuple[list[int], np.ndarray]]:
    generation = Generation(model.decoder, model.tokenizer, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed, stops=[])
    return [([p.token for p in pieces], np.array([p.logprob for p in pieces], np.float32)) for pieces in replies(generation, len(prompts))]


@pytest.fixture(scope="module")
def together(model):
    return {sampling: generate(model, PROMPTS, sampling) for sampling in (GREEDY, RANDOM)}


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_same_text_in_any_batch(model, together, sampling):
    """Alone, in a batch of unequal lengths, and in another slot: the same tokens and the same bits of their log-probabilities."""
    assert len({tuple(tokens) for tokens, _ in together[sampling]}) == len(PROMPTS)
    assert same_bits(generate(model, PROMPTS[::-1], sampling)[::-1], together[sampling])
    for i in (0, 2):
        assert same_bits(generate(model, PROMPTS[i : i + 1], sampling)[0], together[sampling][i])


def test_seed(model, together):
    assert together[RANDOM][0][0] != together[GREEDY][0][0]
    compiled = model.decoder.compile_seconds
    texts = {tuple(generate(model, PROMPTS, RANDOM, seed=seed)[2][0]) for seed in range(4)}
    assert len(texts) > 1
    assert model.decoder.compile_seconds == compiled, "the seed is an input of the program"


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_score_gives_generation_s_bits(model, together, sampling):
    for prompt, (tokens, logprobs) in zip(PROMPTS, together[sampling], strict=True):
        (scores,) = model.scorer([prompt + tokens])
        assert same_bits(scores[len(prompt) :], logprobs)
        assert (scores[1:] < 0).all()


def test_greedy_takes_the_likeliest(model, together):
    prompt, (tokens, logprobs) = PROMPTS[0], together[GREEDY][0]
    others = [prompt + tokens[:3] + [token] for token in range(32, 127)]
    scores = [row[-1] for row in model.scorer(others)]
    assert 32 + int(np.argmax(scores)) == tokens[3]
    assert max(scores) == logprobs[3]


def test_prompt_in_pieces(model):
    """A prompt longer than a piece leaves the state it leaves at once."""
    prompt = np.random.default_rng(0).integers(32, 127, 200).tolist()
    decoder, cache = model.decoder, lambda: model.decoder.init_cache(1, 256)
    _, once = decoder.prefill([prompt], cache())
    _, pieces = decoder.prefill([prompt], cache(), piece=128)
    assert same_bits(pieces, once)
    first, _ = decoder.prefill([prompt[:70]], cache(), piece=128)
    _, continued = decoder.prefill([prompt[70:]], first, starts=[70], piece=128)
    assert same_bits(continued, once)


def test_bucket():
    assert [bucket(n) for n in (1, 2, 128, 129, 1000, 1024, 1025, 1280, 1281, 4097)] == [
        128,
        128,
        128,
        256,
        1024,
        1024,
        1280,
        1280,
        1536,
        5120,
    ]
    assert all(bucket(n) >= n and bucket(n) % 128 == 0 for n in range(1, 5000))


def test_errors_before_anything_runs(model):
    def start(prompts, max_tokens=10):
        return Generation(model.decoder, model.tokenizer, prompts, max_tokens=max_tokens, sampling=GREEDY, seed=0, stops=[])

    with pytest.raises(ValueError, match="an empty prompt"):
        start([[1], []])
    with pytest.raises(ValueError, match=r"prompt of 291 tokens and 10 new ones exceed the 300 positions.*rope_scaling"):
        start([[1], [1] * 291])
    start([[1] * 290])
    with pytest.raises(ValueError, match="token 260 is outside the model's vocabulary of 260"):
        start([[260]])


# The command.


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


def test_command(model, together, capsys, tmp_path):
    """One prompt streams its text; a file gives a line of JSON a prompt, in order; both say the speed on stderr."""
    options = ("--checkpoint", model.folder, "--max-tokens", NEW, "--temperature", RANDOM.temperature, "--top-k", RANDOM.top_k)
    options += ("--top-p", RANDOM.top_p, "--seed", SEED)
    texts = [bytes(prompt).decode() for prompt in PROMPTS]
    replies = [model.tokenizer.decode(tokens) for tokens, _ in together[RANDOM]]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    status, out, err = run(capsys, *options, "--prompts", file)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line["prompt"] for line in lines] == texts
    assert [line["text"] for line in lines] == replies
    assert [line["tokens"] for line in lines] == [tokens for tokens, _ in together[RANDOM]]
    assert same_bits([np.array(line["logprobs"], np.float32) for line in lines], [logprobs for _, logprobs in together[RANDOM]])
    assert "prefill" in err
    assert "tokens/s" in err
    assert len(err.splitlines()) == 1
    stop = replies[0][5:8]
    status, out, _ = run(capsys, *options, "--prompt", texts[0], "--stop", stop)
    assert (status, out) == (0, replies[0][: replies[0].index(stop)] + "\n")


def test_prompt_from_stdin(model, together, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(bytes(PROMPTS[0]).decode()))
    status, out, _ = run(capsys, "--checkpoint", model.folder, "--max-tokens", NEW, "--temperature", 0)
    assert (status, out) == (0, model.tokenizer.decode(together[GREEDY][0][0]) + "\n")


@pytest.mark.usefixtures("unoptimised")
def test_fast_numerics_and_bf16(model, capsys):
    status, out, err = run(
        capsys, "--checkpoint", model.folder, "--prompt", "a", "--numerics", "fast", "--precision", "bf16", "--max-tokens", 2
    )
    assert status == 0
    assert "fast numerics, bf16" in err
    assert out.endswith("\n")


@pytest.fixture
def no_tokenizer(model, tmp_path):
    folder = tmp_path / "no_tokenizer"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(model.folder / name)
    return folder


def mistakes(folder, tmp_path):
    """Yield arguments and a part of the line that says what is wrong with them."""
    checkpoint = ("--checkpoint", folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "broken.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    (tmp_path / "blank.jsonl").write_text('{"prompt": ""}\n')
    yield ("--prompt", "a"), "--checkpoint"
    yield ("--checkpoint", tmp_path / "nowhere", "--prompt", "a"), "nowhere: no such folder"
    yield ("--checkpoint", tmp_path / "empty", "--prompt", "a"), "neither a run folder"
    yield (*checkpoint, "--prompt", ""), "no prompt"
    yield (*checkpoint, "--prompt", "a" * 290, "--max-tokens", 11), "exceed the 300 positions"
    yield (*checkpoint, "--prompt", "a", "--prompts", tmp_path / "bad.jsonl"), "not both"
    yield (*checkpoint, "--prompts", tmp_path / "missing.jsonl"), "no prompts file"
    yield (*checkpoint, "--prompts", tmp_path / "empty.jsonl"), "has no prompts"
    yield (*checkpoint, "--prompts", tmp_path / "bad.jsonl"), "bad.jsonl:2: expected"
    yield (*checkpoint, "--prompts", tmp_path / "broken.jsonl"), "broken.jsonl:2: expected"
    yield (*checkpoint, "--prompts", tmp_path / "blank.jsonl"), "blank.jsonl:1: expected"
    yield (*checkpoint, "--prompt", "a", "--temperature", -1), "temperature must be at least 0, not -1.0"
    yield (*checkpoint, "--prompt", "a", "--top-p", 2), "top-p must be above 0 and at most 1, not 2.0"
    yield (*checkpoint, "--prompt", "a", "--max-tokens", 0), "max-tokens must be at least 1, not 0"
    yield (*checkpoint, "--prompt", "a", "--seed", -1), f"seed must be from 0 to {(1 << 32) - 1}, not -1"
    yield (*checkpoint, "--prompt", "a", "--max-tokens", "many"), "invalid int value: 'many'"
    yield (*checkpoint, "--prompt", "a", "--precision", "fp4"), "invalid choice: 'fp4'"
    yield (*checkpoint, "--prompt", "a", "--colour", "blue"), "--colour"
    yield ("scores", *checkpoint, "--prompt", "a"), "scores"


def test_mistakes_take_one_line(model, no_tokenizer, capsys, tmp_path):
    for arguments, message in mistakes(model.folder, tmp_path):
        status, out, err = run(capsys, *arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1), (arguments, err)
        assert message in err
        assert err.startswith("error: ")
    status, out, err = run(capsys, "--checkpoint", no_tokenizer, "--prompt", "a")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "has no tokenizer.json" in err


def test_damaged_checkpoints_take_one_line(capsys, tmp_path):
    tensors = random_tensors(SMALL)
    folder = write_hf(tmp_path / "truncated", SMALL, tensors)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    other = write_hf(tmp_path / "other", SMALL, tensors, model_type="llama", architectures=["LlamaForCausalLM"])
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    missing = write_hf(tmp_path / "missing", SMALL, tensors)
    for damaged, messages in (
        (folder, ["cannot be read as safetensors"]),
        (other, ["'llama'", "bailing_moe_linear"]),
        (missing, ["missing lm_head.weight", "missing model.norm.weight"]),
    ):
        status, out, err = run(capsys, "--checkpoint", damaged, "--prompt", "a")
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        assert all(message in err for message in messages)


def test_error_of_the_process(tmp_path):
    command = [sys.executable, "-m", "ring_jax.infer", "--checkpoint", str(tmp_path / "nowhere"), "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no checkpoint at {tmp_path / 'nowhere'}: no such folder\n"


def test_more_prompts_than_slots(model, monkeypatch):
    """Prompts past the most that decode together follow in batches of their own."""
    monkeypatch.setattr("ring_jax.infer.generate.MOST_SLOTS", 3)
    prompts = [PROMPTS[i % 3] for i in range(6)]
    once = generate(model, prompts[:3], GREEDY, 4)
    assert same_bits(generate(model, prompts, GREEDY, 4), once + once)


def test_decoder_of_a_stacked_model(model, together):
    stacked = Decoder(checkpoint.load(model.folder).model)
    assert same_bits(generate(model._replace(decoder=stacked), PROMPTS, GREEDY), together[GREEDY])
