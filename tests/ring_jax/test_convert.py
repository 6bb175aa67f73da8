"""The reader and the writer of Hugging Face folders."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ring_jax import checkpoint
from ring_jax.config import to_hf as config_to_hf
from ring_jax.convert import to_hf
from ring_jax.convert.names import parameters
from ring_jax.model import Ring
from ring_jax.numerics import Numerics
from ring_jax.reference import Twin
from ring_jax.tokenizer import Tokenizer
from tests.ring_jax.models import GOLDEN, SMALL, Programs, same_bits, write_hf
from tests.ring_jax.random_tensors import random_tensors

pytestmark = pytest.mark.usefixtures("all_unoptimised")

CONFIG = dataclasses.replace(SMALL, num_mtp_layers=1)


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(CONFIG)


def test_bf16_checkpoint(tmp_path, small_tensors, tokens):
    """A bf16 folder loads as bf16, and as fp32 when asked; either way its weights are those stored."""
    stored = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in small_tensors.items()}
    folder = write_hf(tmp_path, SMALL, stored)
    model = checkpoint.load(folder).model
    assert model.numerics.dtype == "bfloat16"
    assert checkpoint.load(folder, precision="fp32").model.numerics.dtype == "float32"
    head = np.asarray(model.head[...]).astype(np.float32).T
    np.testing.assert_array_equal(head, stored["lm_head.weight"].astype(np.float32))
    exact = Twin(SMALL, stored)(tokens[:64]).logits
    rows = Programs(model).forward(tokens[:64]).logits
    # Rounding flips the experts of some tokens, so this is about most rows.
    error = np.abs(rows - exact).max(-1) / np.abs(exact).max()
    assert 1e-4 < np.median(error) < 0.05


def test_fp32_checkpoint_in_bf16(small_tensors, tmp_path):
    folder = write_hf(tmp_path, SMALL, small_tensors)
    assert checkpoint.load(folder).model.numerics.dtype == "float32"
    model = checkpoint.load(folder, precision="bf16").model
    assert model.numerics.dtype == "bfloat16"
    rounded = small_tensors["lm_head.weight"].T.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(model.head[...]).astype(np.float32), rounded)
    blocks = [block for segment in model.segments for block in segment if hasattr(block.ffn, "router")]
    routers = [block.ffn.router[...] for block in blocks]
    theirs = small_tensors["model.layers.1.mlp.gate.weight"].T
    assert any((np.asarray(router).reshape(-1, *theirs.shape) == theirs).all((1, 2)).any() for router in routers), "routers stay fp32"
    biases = [np.asarray(block.ffn.bias[...]).reshape(-1, SMALL.num_experts) for block in blocks]
    theirs = small_tensors["model.layers.1.mlp.gate.expert_bias"]
    assert (theirs != theirs.astype(ml_dtypes.bfloat16)).any()
    assert any((bias == theirs).all(1).any() for bias in biases), "so do balancing biases"
    with pytest.raises(ValueError, match="unknown precision 'fp4'; known: fp32, bf16, fp8"):
        checkpoint.load(folder, precision="fp4")


@pytest.mark.parametrize("stacked", [True, False])
def test_what_is_written_is_read(tmp_path, tensors, stacked):
    model = checkpoint.load(write_hf(tmp_path / "a", CONFIG, tensors), stacked=stacked).model
    to_hf.write_hf(model, tmp_path / "b")
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert same_bits([again[name] for name in tensors], [tensors[name] for name in tensors])
    other = checkpoint.load(tmp_path / "b", stacked=stacked)
    assert dataclasses.replace(other.config, init_scale=CONFIG.init_scale) == CONFIG
    assert same_bits(jax.tree.leaves(nnx.split(model)[1]), jax.tree.leaves(nnx.split(other.model)[1]))


def test_every_parameter_has_its_tensors(tensors):
    """A checkpoint's tensors and the model's parameters are the same numbers, each once."""
    model = nnx.eval_shape(lambda: Ring(CONFIG, Numerics(), rngs=nnx.Rngs(0)))
    names = [name for parameter in parameters(model) for part in parameter.slices for name in part.tensors]
    assert len(names) == len(set(names))
    assert set(names) == tensors.keys()


def test_shards(tmp_path, tensors):
    """Files listed in the index are read; others beside them are not."""
    whole = checkpoint.load(write_hf(tmp_path / "whole", CONFIG, tensors)).model
    folder, names = tmp_path / "shards", sorted(tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
    where = {name: f"model-{1 + i % 3}-of-3.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    save_file({"optimizer.step": np.zeros(1)}, folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    model = checkpoint.load(folder).model
    assert same_bits(jax.tree.leaves(nnx.split(whole)[1]), jax.tree.leaves(nnx.split(model)[1]))
    (folder / "model-2-of-3.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2-of-3\.safetensors"):
        checkpoint.load(folder)
    for text in ("{", "[]", "{}"):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            checkpoint.load(folder)


def test_all_problems_at_once(tmp_path, tensors):
    changed = dict(tensors)
    del changed["model.layers.2.attention.dense.weight"], changed["model.layers.3.mlp.experts.5.up_proj.weight"]
    changed["model.layers.1.attention.slope"] = np.zeros(6, np.float32)
    changed["lm_head.weight"] = np.zeros((259, 24), np.float32)
    changed["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 40), np.float32)
    with pytest.raises(ValueError, match="is not the checkpoint its config.json describes") as error:
        checkpoint.load(write_hf(tmp_path, CONFIG, changed))
    for problem in (
        "missing model.layers.2.attention.dense.weight [24, 48]",
        "missing model.layers.3.mlp.experts.5.up_proj.weight [16, 24]",
        "unexpected model.layers.1.attention.slope",
        "lm_head.weight is [259, 24], not [260, 24]",
        "model.layers.0.mlp.up_proj.weight is [24, 40], not [40, 24]",
    ):
        assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(tmp_path, part):
    folder = shutil.copytree(GOLDEN / "periodic", tmp_path / "periodic")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


def test_what_a_path_may_be(tmp_path, small_tensors):
    with pytest.raises(ValueError, match="no checkpoint at .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a run folder, one of its checkpoints, nor a Hugging Face folder"):
        checkpoint.load(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="neither a run folder"):
        checkpoint.load(tmp_path / "file")
    folder = write_hf(tmp_path / "hf", SMALL, small_tensors, eos_token_id=[7, 9])
    loaded = checkpoint.load(folder)
    assert loaded.tokenizer is None
    assert loaded.config.stop_tokens == (7, 9)
    (folder / "tokenizer.json").write_text(Tokenizer.bytes().to_json())
    tokenizer = checkpoint.load(folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.vocab_size == 257
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        checkpoint.load(folder)
