"""Training from given weights, and the way of what was trained to a Hugging Face folder."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from ring_jax import checkpoint
from ring_jax.convert.__main__ import main as convert
from ring_jax.infer.__main__ import main as infer
from ring_jax.tokenizer import Tokenizer
from tests.ring_jax.models import TWO_LAYERS, same_bits, write_hf
from tests.ring_jax.random_tensors import random_tensors
from tests.train.test_loop import base, losses, one_line, succeed, train, train_apart  # noqa: F401

pytestmark = pytest.mark.usefixtures("all_unoptimised")

STILL = ["--optimizer.learning_rate", "0", "--optimizer.balance_rate", "0"]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> pathlib.Path:
    folder = write_hf(tmp_path_factory.mktemp("hf") / "small", TWO_LAYERS, random_tensors(TWO_LAYERS), novelty=[1], eos_token_id=[7, 9])
    (folder / "tokenizer.json").write_text(Tokenizer.bytes().to_json())
    (folder / "README.md").write_text("a model")
    return folder


@pytest.fixture(scope="module")
def data(base):  # noqa: F811
    return ["--data", base[-1], "--seq-len", "128", "--batch-size", "4"]


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("mesh", ["1x1", pytest.param("2x2", marks=pytest.mark.slow)])
def test_steps_that_change_nothing_give_the_folder_back(released, data, tmp_path, mesh):
    """With a rate of 0 what comes out is what went in: weights, bias, settings and other files."""
    run, out = tmp_path / "run", tmp_path / "out"
    how = train if mesh == "1x1" else train_apart  # simulated devices must exist before jax starts
    succeed("--model", released, *data, "--precision", "fp32", "--mesh", mesh, "--steps", 2, "--output", run, *STILL, train=how)
    assert convert(["to-hf", str(run), str(out), "--verify"]) == 0
    assert same_bits([tensors(out)[name] for name in tensors(released)], list(tensors(released).values()))
    assert (out / "config.json").read_text() == (released / "config.json").read_text()
    assert (out / "README.md").read_text() == "a model"
    assert checkpoint.load(run).config.stop_tokens == (7, 9)


def test_a_run_continues_another(released, data, tmp_path):
    """A run started from a run's folder begins where that one ended, on its tokenizer; a resumed run needs no starting folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    common = [*data, "--precision", "fp32"]
    succeed("--model", released, *common, "--steps", 3, "--output", first, *STILL)
    succeed("--model", first, *common, "--steps", 3, "--output", second, *STILL)
    assert losses(second) == losses(first)
    succeed("--model", first / "checkpoints" / "3", *common, "--steps", 5, "--output", second, *STILL, "--resume")
    assert losses(second)[:3] == losses(first)
    assert len(losses(second)) == 5
    succeed("--model", tmp_path / "gone", *common, "--steps", 6, "--output", second, *STILL, "--resume")
    assert len(losses(second)) == 6
    done = train("--model", tmp_path / "gone", *common, "--output", tmp_path / "third", "--resume")
    assert "unknown model" in one_line(*done)


@pytest.mark.slow
def test_what_was_trained_computes_the_same_elsewhere(data, tmp_path, capsys):
    """A bf16 run and the folder made of it give the same bits: rounded weights, routers in fp32."""
    run, out, lines = tmp_path / "run", tmp_path / "out", tmp_path / "lines.jsonl"
    succeed("--model", "test", "--tokenizer", "bytes", *data, "--precision", "bf16", "--steps", 4, "--output", run)
    assert convert(["to-hf", str(run), str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    router = tensors(out)["model.layers.1.mlp.gate.weight"]
    assert router.dtype == np.float32
    lines.write_text(json.dumps({"tokens": list(range(60))}) + "\n")
    capsys.readouterr()
    scores = []
    for folder in (run, out):
        assert infer(["score", "--checkpoint", str(folder), "--input", str(lines)]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1]
    assert checkpoint.load(out).tokenizer is not None


@pytest.mark.slow
def test_another_tokenizer(released, data, tmp_path):
    """It goes where the weights go, and what belonged to the old one does not."""
    run, out = tmp_path / "run", tmp_path / "out"
    succeed("--model", released, *data, "--precision", "fp32", "--steps", 1, "--output", run, "--tokenizer", "train:259")
    assert convert(["to-hf", str(run), str(out)]) == 0
    loaded = checkpoint.load(out)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab_size == 259
    assert loaded.config.stop_tokens == loaded.tokenizer.eos_ids
    assert (out / "README.md").read_text() == "a model"


def test_mistakes(released, data, tmp_path):
    folder = write_hf(tmp_path / "bare", TWO_LAYERS, random_tensors(TWO_LAYERS))
    done = train("--model", folder, *data, "--output", tmp_path / "run")
    assert f"{folder} has no tokenizer.json: give --tokenizer" in one_line(*done)
    done = train("--model", released, *data, "--output", tmp_path / "run", "--model.num_layers", 3)
    assert "is not the checkpoint its config.json describes: missing model.layers.2" in one_line(*done)
    converted = tmp_path / "converted"
    assert convert(["from-hf", str(released), str(converted)]) == 0
    before = sorted(path for path in converted.rglob("*"))
    for more in ("--overwrite", "--resume"):
        done = train("--model", converted, *data, "--output", converted, more)
        message = "holds converted weights, no run to resume" if more == "--resume" else "is where the weights come from"
        assert message in one_line(*done)
    assert sorted(path for path in converted.rglob("*")) == before
    done = train("--model", "rnig-mini", *data, "--output", tmp_path / "run")
    assert "unknown model preset 'rnig-mini'" in one_line(*done)
    assert not (tmp_path / "run").exists()
