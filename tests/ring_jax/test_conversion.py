"""The conversion command: round trips to the byte, stops and mistakes that lose nothing, verification."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ring_jax import checkpoint
from ring_jax.config import PRESETS, ModelConfig
from ring_jax.convert import from_hf as streaming
from ring_jax.convert.__main__ import main
from ring_jax.convert.hybrid import BASE_ARCHITECTURE
from ring_jax.convert.names import parameters
from ring_jax.convert.shards import Tensors, parse_size
from ring_jax.convert.store import Writer
from ring_jax.model import Ring
from ring_jax.reference import Twin
from ring_jax.tokenizer import Tokenizer
from tests.ring_jax.models import GOLDEN, SMALL, TWO_LAYERS, Programs, same_bits, write_hf
from tests.ring_jax.random_tensors import random_tensors

pytestmark = pytest.mark.usefixtures("all_unoptimised")

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = dataclasses.replace(SMALL, num_mtp_layers=1, stop_tokens=(7, 9))


def convert(*arguments, status=0):
    assert main([str(argument) for argument in arguments]) == status


def mistake(capsys, *arguments):
    """The one line that a user's mistake gives."""
    capsys.readouterr()
    convert(*arguments, status=2)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def tensors():
    """A bf16 checkpoint, as released ones are: all but the balancing bias."""
    return {
        name: tensor if name.endswith("expert_bias") else tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in random_tensors(CONFIG).items()
    }


@pytest.fixture(scope="module")
def released(tmp_path_factory, tensors):
    """A folder with all that released ones hold: several files and their index, tokenizer, settings, fields we do not know."""
    folder = write_hf(tmp_path_factory.mktemp("hf") / "released", CONFIG, {}, torch_dtype="bfloat16", use_cache=True, novelty={"a": [1]})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        own = {name: np.ascontiguousarray(tensors[name]) for name in names if where[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_parameters": 7, "total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(Tokenizer.bytes().to_json())
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}",\r\n "eos_token": "<|endoftext|>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.6}')
    (folder / "vocab.model").write_bytes(bytes(range(256)))
    return folder


@pytest.mark.parametrize("name", [pytest.param("periodic", marks=pytest.mark.slow), "trailing"])
def test_golden_checkpoints_go_round_trip(tmp_path, name, capsys):
    convert("from-hf", GOLDEN / name, tmp_path / "ours", "--verify")
    assert f"layer {ModelConfig.num_dense_layers} " in capsys.readouterr().out
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs", "--verify")
    assert files(tmp_path / "theirs") == files(GOLDEN / name)


def test_a_released_folder_goes_round_trip(tmp_path, released):
    """Every file comes back as it was, the weights too: bf16 stays bf16."""
    convert("from-hf", released, tmp_path / "ours", "--check-finite")
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs")
    back, there = files(tmp_path / "theirs"), files(released)
    assert back.keys() == there.keys()
    for file in there:
        if file.endswith(".safetensors"):
            mine, yours = load_file(tmp_path / "theirs" / file), load_file(released / file)
            assert mine.keys() == yours.keys()
            assert all(mine[name].dtype == yours[name].dtype for name in yours)
            assert same_bits([mine[name] for name in yours], list(yours.values()))
        else:
            assert back[file] == there[file], file


def test_what_is_converted_computes_the_same(tmp_path, released, tokens):
    convert("from-hf", released, tmp_path / "ours")
    direct, ours = checkpoint.load(released), checkpoint.load(tmp_path / "ours")
    assert ours.config == direct.config
    assert ours.model.numerics.dtype == "bfloat16"
    assert ours.tokenizer is not None
    assert ours.tokenizer.vocab_size == 257
    assert same_bits(Programs(ours.model).forward(tokens[:64]).logits, Programs(direct.model).forward(tokens[:64]).logits)


def test_other_files_and_dtypes(tmp_path, released, tensors):
    convert("from-hf", released, tmp_path / "ours", "--dtype", "fp32")
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs", "--max-shard-size", "20KB", "--dtype", "bf16")
    shards = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(shards) > 5
    assert shards[-1] == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    found = Tensors(tmp_path / "theirs")
    assert found.names == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.read(name), tensor, err_msg=name)
        assert found.dtype(name) == tensor.dtype
    weight_map = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: entry.file.name for name, entry in found.entries.items()} == weight_map
    convert("to-hf", tmp_path / "ours", tmp_path / "wide", "--dtype", "fp32")
    fields = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert fields == json.loads((released / "config.json").read_text()) | {"torch_dtype": "float32"}
    assert Tensors(tmp_path / "wide").dtype("lm_head.weight") == np.float32


def test_mixed_dtypes_come_back(tmp_path, tensors):
    """Tensors of one parameter may differ in dtype; each comes back in its own."""
    mixed = {name: t.astype(np.float32) if "experts.3.gate" in name or "layers.1.input" in name else t for name, t in tensors.items()}
    convert("from-hf", write_hf(tmp_path / "hf", CONFIG, mixed), tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs")
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {name: t.dtype for name, t in back.items()} == {name: t.dtype for name, t in mixed.items()}
    assert same_bits([back[name] for name in mixed], list(mixed.values()))


def test_tied_embeddings(tmp_path):
    config = dataclasses.replace(SMALL, tie_embeddings=True)
    folder = write_hf(tmp_path / "hf", config, random_tensors(config))
    convert("from-hf", folder, tmp_path / "ours", "--verify")
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs")
    assert "lm_head.weight" not in load_file(tmp_path / "theirs" / "model.safetensors")
    assert files(tmp_path / "theirs")["config.json"] == files(folder)["config.json"]


def test_large_parts_are_cut(tmp_path, tensors, monkeypatch):
    """The embedding and the head are read and written a block of rows at a time."""
    monkeypatch.setattr(streaming, "BLOCK", 1000)
    monkeypatch.setattr("ring_jax.convert.to_hf.BLOCK", 700)
    folder = write_hf(tmp_path / "hf", CONFIG, tensors)
    convert("from-hf", folder, tmp_path / "ours", "--verify")
    assert len(list((tmp_path / "ours/checkpoints/0/params/head").glob("0.*"))) == 13
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs", "--verify")
    assert same_bits(*[[load_file(f / "model.safetensors")[name] for name in tensors] for f in (folder, tmp_path / "theirs")])


def test_block_scaled_fp8(tmp_path, tokens, capsys):
    """An FP8 tensor is its values times the scale of each 128 x 128 block, rounded to bf16; or it is kept, and computes the same."""
    config = dataclasses.replace(TWO_LAYERS, hidden_size=144, expert_size=160)
    plain, rng = random_tensors(config), np.random.default_rng(0)
    stored, expected = {}, {}
    for name, tensor in plain.items():
        if ".experts." not in name and "shared_experts" not in name:
            stored[name] = expected[name] = tensor.astype(ml_dtypes.bfloat16) if tensor.ndim == 2 else tensor
            continue
        values = (tensor * 50).astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.01, 0.03, [-(-n // 128) for n in tensor.shape]).astype(np.float32)
        spread = np.kron(scales, np.ones((128, 128), np.float32))[: tensor.shape[0], : tensor.shape[1]]
        stored[name], stored[name + "_scale_inv"] = values, scales
        expected[name] = (values.astype(np.float32) * spread).astype(ml_dtypes.bfloat16)
    folder = write_hf(tmp_path / "hf", config, stored)
    convert("from-hf", folder, tmp_path / "ours", "--verify")
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs")
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert back.keys() == expected.keys()
    assert same_bits([back[name] for name in expected], list(expected.values()))
    convert("from-hf", folder, tmp_path / "kept", "--keep-fp8", "--verify")
    convert("to-hf", tmp_path / "kept", tmp_path / "as_it_was", "--verify")
    back, there = (Tensors(f, keep_fp8=True) for f in (tmp_path / "as_it_was", folder))
    assert back.entries.keys() == there.entries.keys()
    assert all(same_bits(back.read_raw(name), there.read_raw(name)) for name in stored)
    assert files(tmp_path / "as_it_was")["config.json"] == files(folder)["config.json"]
    convert("to-hf", tmp_path / "kept", tmp_path / "wide", "--dtype", "bf16", "--verify")
    bits = [Programs(checkpoint.load(tmp_path / name).model).forward(tokens[:64]).logits for name in ("hf", "ours", "kept")]
    assert same_bits(bits[0], bits[1])
    assert same_bits(bits[0], bits[2])
    line = mistake(capsys, "from-hf", folder, tmp_path / "x", "--keep-fp8", "--dtype", "bf16")
    assert "goes with neither --dtype nor --to-hybrid" in line
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    one_wide = {n: t for n, t in stored.items() if n != name + "_scale_inv"} | {name: expected[name]}
    line = mistake(capsys, "from-hf", write_hf(tmp_path / "partly", config, one_wide), tmp_path / "x", "--keep-fp8")
    assert "only some tensors of segments.0.1.ffn.gate_up are FP8" in line
    del stored["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight_scale_inv \[2, 2\] is missing"):
        Tensors(write_hf(tmp_path / "hf", config, stored))


# Stops.

KILLED = """
import os, signal, sys
from ring_jax.convert.__main__ import main
from ring_jax.convert.{module} import {owner}
left, real = [{count}], {owner}.{method}
def counted(*args, **kwargs):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{owner}.{method} = counted
sys.exit(main(sys.argv[1:]))
"""


def killed(module, owner, method, count, *arguments):
    text = KILLED.format(module=module, owner=owner, method=method, count=count)
    done = subprocess.run([sys.executable, "-c", text, *map(str, arguments)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_conversion_continues(tmp_path, released):
    convert("from-hf", released, tmp_path / "whole")
    killed("store", "Writer", "write", 60, "from-hf", released, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    partial = tmp_path / "ours.partial"
    before = {path: path.stat().st_mtime_ns for path in partial.rglob("*") if path.is_file() and path.name[0].isdigit()}
    assert len(before) > 20
    convert("from-hf", released, tmp_path / "ours")
    assert not partial.exists()
    again = {path: tmp_path / "ours" / path.relative_to(partial) for path in before}
    assert all(path.stat().st_mtime_ns == before[old] for old, path in again.items()), "what was done is not done again"
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "ours" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_a_killed_way_back_continues(tmp_path, released):
    convert("from-hf", released, tmp_path / "ours")
    killed("store", "Reader", "read", 100, "to-hf", tmp_path / "ours", tmp_path / "theirs")
    partial = tmp_path / "theirs.partial"
    done = list(partial.glob("*.safetensors"))
    assert done
    assert not (tmp_path / "theirs").exists()
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs")
    assert Tensors(tmp_path / "theirs").names == Tensors(released).names
    assert files(tmp_path / "theirs").keys() == files(released).keys()


def test_what_is_left_of_another_conversion_is_kept(tmp_path, released, capsys):
    killed("store", "Writer", "write", 5, "from-hf", released, tmp_path / "ours")
    assert "left from another conversion: remove it first" in mistake(capsys, "from-hf", released, tmp_path / "ours", "--dtype", "fp32")
    assert "left from another conversion" in mistake(capsys, "from-hf", GOLDEN / "periodic", tmp_path / "ours")
    convert("from-hf", released, tmp_path / "ours")


def test_interrupt(tmp_path, released, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", stop)
        convert("from-hf", released, tmp_path / "ours", status=130)
    assert f"the same command continues (what is done is in {tmp_path / 'ours'}.partial)" in capsys.readouterr().err
    convert("from-hf", released, tmp_path / "ours")


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_a_disk_that_is_full(tmp_path, released, way):
    """No file may grow beyond a limit: what a full disk is to a writer."""
    source = released
    if way == "to-hf":
        source = tmp_path / "source"
        convert("from-hf", released, source)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)); from ring_jax.convert.__main__ import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, way, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    convert(way, source, tmp_path / "out")


# Mistakes.


def test_mistakes_change_nothing(tmp_path, released, capsys):
    def changed(name, **edits):
        folder = shutil.copytree(released, tmp_path / name)
        for file, edit in edits.items():
            edit(
                folder
                / {"config": "config.json", "index": "model.safetensors.index.json"}.get(file, f"model-0000{file[-1]}-of-00003.safetensors")
            )
        return folder

    def share(file):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        first, second = [fields for name, fields in header.items() if fields.get("shape") == [CONFIG.hidden_size]][:2]
        second["data_offsets"] = first["data_offsets"]
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        file.write_bytes(data[:8] + text + data[8 + length :])

    cut = changed("cut", shard2=lambda file: file.write_bytes(file.read_bytes()[:-100]))
    missing = changed("missing", shard2=lambda file: file.unlink())
    renamed = lambda file: file.write_text(file.read_text().replace("00003-of", "00004-of"))
    other = lambda file: file.write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((released / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    out = tmp_path / "out"
    for source, message in {
        cut: "model-00002-of-00003.safetensors cannot be read as safetensors: it is cut short: model.",
        changed("shared", shard2=share): "share bytes",
        missing: "names model-00002-of-00003.safetensors, which is not there",
        changed("renamed", index=renamed): "names model-00004-of-00003.safetensors, which is not there",
        changed("family", config=other): "model_type 'llama' (LlamaForCausalLM) is not 'bailing_moe_linear'",
        pickled: "holds pickled weights (pytorch_model.bin): reading them can run code",
        tmp_path / "nowhere": "no Hugging Face folder at",
    }.items():
        assert message in mistake(capsys, "from-hf", source, out)
        assert not list(tmp_path.glob("out*"))
    assert "pickled weights" in str(pytest.raises(ValueError, checkpoint.load, pickled).value)
    (tmp_path / "there").mkdir()
    assert "output" in (line := mistake(capsys, "from-hf", released, tmp_path / "there"))
    assert "exists" in line
    assert "exists" in mistake(capsys, "to-hf", released, tmp_path / "there")
    assert "is a Hugging Face folder already" in mistake(capsys, "to-hf", released, out)
    assert "no checkpoint at" in mistake(capsys, "to-hf", tmp_path / "nowhere", out)
    assert "size '5 apples' is not one such as 5GB" in mistake(capsys, "to-hf", released, out, "--max-shard-size", "5 apples")


def test_all_problems_of_values_at_once(tmp_path, tensors, capsys):
    broken = {name: tensor.copy() for name, tensor in tensors.items()}
    broken["model.layers.2.attention.dense.weight"][3, 4] = np.nan
    broken["model.layers.3.mlp.experts.5.up_proj.weight"][0, 0] = np.inf
    broken["model.layers.0.input_layernorm.weight"] = np.ones(24, np.int32)
    folder = write_hf(tmp_path / "hf", CONFIG, broken)
    assert "model.layers.0.input_layernorm.weight is of dtype int32" in mistake(capsys, "from-hf", folder, tmp_path / "out")
    broken["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"]
    write_hf(tmp_path / "hf", CONFIG, broken)
    for _ in range(2):  # a second run does not forget
        line = mistake(capsys, "from-hf", folder, tmp_path / "out", "--check-finite").splitlines()[-1]
        assert "model.layers.2.attention.dense.weight" in line
        assert "model.layers.3.mlp.experts.5.up_proj.weight" in line
        assert "gate_proj" not in line
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_looked_at_again(tmp_path, tensors, capsys):
    """A conversion that was stopped without the check is not finished with it; what a narrower dtype cannot hold is not dropped."""
    broken = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    broken["model.layers.2.attention.dense.weight"][3, 4] = 3.4e38
    folder = write_hf(tmp_path / "hf", CONFIG, broken)
    line = mistake(capsys, "from-hf", folder, tmp_path / "out", "--check-finite", "--dtype", "bf16")
    assert "model.layers.2.attention.dense.weight" in line
    assert "left from another conversion" in mistake(capsys, "from-hf", folder, tmp_path / "out", "--dtype", "bf16")


def test_a_missing_chunk_is_an_error(tmp_path, released, capsys):
    convert("from-hf", released, tmp_path / "ours")
    next((tmp_path / "ours/checkpoints/0/params/segments.0.1.ffn.down").glob("0.0.3.*")).unlink()
    assert "segments.0.1.ffn.down cannot be read" in mistake(capsys, "to-hf", tmp_path / "ours", tmp_path / "out")
    with pytest.raises(ValueError, match=r"is damaged or not of this model: segments\.0\.1\.ffn\.down cannot be read"):
        checkpoint.load(tmp_path / "ours")


def test_names_that_lead_elsewhere(tmp_path, released, capsys):
    folder = shutil.copytree(released, tmp_path / "hf")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))
    assert "'../model-00001-of-00003.safetensors' is not the name of a file" in mistake(capsys, "from-hf", folder, tmp_path / "ours")
    convert("from-hf", released, tmp_path / "ours")
    item = tmp_path / "ours/checkpoints/0/hf/metadata"
    item.write_text(item.read_text().replace('"vocab.model"', '"../vocab.model"'))
    assert "'../vocab.model' is not the name of a file" in mistake(capsys, "to-hf", tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "vocab.model").exists()


def test_the_index_decides(tmp_path, tensors, capsys):
    """A stale copy of a tensor in another file is not read; without an index it is a mistake."""
    folder = write_hf(tmp_path / "hf", CONFIG, tensors)
    name = "model.norm.weight"
    save_file({name: np.zeros_like(tensors[name])}, folder / "other.safetensors")
    assert f"{name} is in other.safetensors and in model.safetensors" in mistake(capsys, "from-hf", folder, tmp_path / "ours")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(Tensors(folder).read(name), tensors[name])


def test_verify_compares_the_configs(tmp_path, released, capsys):
    from ring_jax.convert.verify import verify

    convert("from-hf", released, tmp_path / "ours")
    item = tmp_path / "ours/checkpoints/0/meta/metadata"
    item.write_text(json.dumps(meta := json.loads(item.read_text())).replace('"decay_layer_offset": 0', '"decay_layer_offset": 1'))
    assert meta["model"]["decay_layer_offset"] == 0
    assert not verify(released, tmp_path / "ours", print)
    assert "config: decay_layer_offset is 0 in the folder and 1 in the checkpoint" in capsys.readouterr().out


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "500MB", "4GiB", "1.5k", "7")] == [5 * 10**9, 500 * 10**6, 2**32, 1500, 7]


# Verification.


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.6.down_proj.weight", "lm_head.weight", "model.layers.4.eh_proj.weight"])
def test_verify_names_a_corrupted_tensor(tmp_path, tensors, name, capsys):
    """Whatever the value is worth: an expert that no token chose as well."""
    folder = write_hf(tmp_path / "hf", CONFIG, tensors)
    convert("from-hf", folder, tmp_path / "ours")
    corrupted = {n: t.copy() for n, t in tensors.items()}
    corrupted[name][1, 2] += 1
    write_hf(folder, CONFIG, corrupted)
    capsys.readouterr()
    from ring_jax.convert.verify import verify

    assert not verify(folder, tmp_path / "ours", print)
    out = capsys.readouterr().out
    assert f"{name} differs" in out
    assert out.count("differs") == 1


def test_verify_sees_a_mistake_in_the_table(tmp_path, tensors, monkeypatch, capsys):
    """Gate and up exchanged: every tensor is where the table says, and the layers compute something else."""
    from ring_jax.convert import names

    monkeypatch.setitem(names.EXPERTS, "ffn.gate_up", names.EXPERTS["ffn.gate_up"][::-1])
    folder = write_hf(tmp_path / "hf", CONFIG, tensors)
    convert("from-hf", folder, tmp_path / "ours", "--verify", status=1)
    assert "does not compute what" in capsys.readouterr().err


# The table.


@pytest.mark.parametrize("preset", ["ring-mini-linear-2.0", "ring-flash-linear-2.0"])
@pytest.mark.parametrize("num_mtp_layers", [0, 1])
def test_names_and_shapes_of_the_released_models(preset, num_mtp_layers):
    """Every tensor of the model's description and no other."""
    config = dataclasses.replace(PRESETS[preset], num_mtp_layers=num_mtp_layers)
    width, heads, kv, size = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size
    expected = {"model.word_embeddings.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    expected["lm_head.weight"] = (config.vocab_size, width)

    def swiglu(prefix, ffn):
        expected.update({f"{prefix}.{name}_proj.weight": (ffn, width) for name in ("gate", "up")})
        expected[f"{prefix}.down_proj.weight"] = (width, ffn)

    for layer in range(config.num_layers + num_mtp_layers):
        p = f"model.layers.{layer}"
        linear = layer < config.num_layers and (layer + 1) % config.period != 0
        shapes = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "attention.query_key_value": ((3 * heads if linear else heads + 2 * kv) * size, width),
            "attention.query_layernorm": (size,),
            "attention.key_layernorm": (size,),
            "attention.dense": (width, heads * size),
        }
        if linear:
            shapes |= {"attention.g_proj": (heads * size, width), "attention.g_norm": (heads * size,)}
        if layer >= config.num_layers:
            shapes |= {"enorm": (width,), "hnorm": (width,), "final_layernorm": (width,), "eh_proj": (width, 2 * width)}
        expected.update({f"{p}.{name}.weight": shape for name, shape in shapes.items()})
        if layer == 0:
            swiglu(f"{p}.mlp", config.ffn_size)
            continue
        expected[f"{p}.mlp.gate.weight"], expected[f"{p}.mlp.gate.expert_bias"] = (256, width), (256,)
        for name in (*(f"experts.{e}" for e in range(256)), "shared_experts"):
            swiglu(f"{p}.mlp.{name}", config.expert_size)
    found = parameters(nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0))))
    assert {name: part.stored_shape for p in found for part in p.slices for name in part.tensors} == expected


# From a softmax-only base.


def test_to_hybrid(tmp_path, tokens, capsys):
    config = dataclasses.replace(SMALL, period=1)  # softmax layers only
    base = {name: t.astype(ml_dtypes.bfloat16) for name, t in random_tensors(config).items()}
    fields = {"architectures": [BASE_ARCHITECTURE], "model_type": "bailing_moe_v2", "torch_dtype": "bfloat16", "auto_map": {"x": "y"}}
    folder = write_hf(tmp_path / "base", config, base, **fields)
    assert "model_type 'bailing_moe_v2'" in mistake(capsys, "from-hf", folder, tmp_path / "plain")
    hybrid = ["from-hf", folder, tmp_path / "ours", "--to-hybrid"]
    assert "--to-hybrid and --layer-group-size go together" in mistake(capsys, *hybrid)
    assert "layer-group-size must lie between 1 and the 4 layers, not 9" in mistake(capsys, *hybrid, "--layer-group-size", 9)
    assert "not a softmax-only base" in mistake(
        capsys, "from-hf", GOLDEN / "periodic", tmp_path / "ours", "--to-hybrid", "--layer-group-size", 3
    )
    convert(*hybrid, "--layer-group-size", 3, "--group-norm-size", 3)
    assert "2 query_key_value widened (each key and value head 2 times); 4 new" in capsys.readouterr().err
    convert("to-hf", tmp_path / "ours", tmp_path / "theirs")
    out = load_file(tmp_path / "theirs" / "model.safetensors")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (written["model_type"], written["layer_group_size"], "auto_map" in written) == ("bailing_moe_linear", 3, False)
    for layer in (0, 1):
        p = f"model.layers.{layer}.attention."
        q, k, v = np.split(base[p + "query_key_value.weight"].reshape(12, 8, 24), [6, 9])
        widened = np.concatenate([q, np.repeat(k, 2, 0), np.repeat(v, 2, 0)]).reshape(-1, 24)
        np.testing.assert_array_equal(out.pop(p + "query_key_value.weight"), widened)
        assert (out.pop(p + "g_norm.weight") == 1).all()
        assert 0.015 < out.pop(p + "g_proj.weight").astype(np.float32).std() < 0.025
        del base[p + "query_key_value.weight"]
    assert out.keys() == base.keys()
    assert same_bits([out[name] for name in base], list(base.values()))
    loaded = checkpoint.load(tmp_path / "theirs", precision="fp32")
    exact = Twin(loaded.config, load_file(tmp_path / "theirs" / "model.safetensors"))(tokens[:32]).logits
    assert np.abs(Programs(loaded.model).forward(tokens[:32]).logits - exact).max() < 2e-5 * np.abs(exact).max()


# Onto a mesh.

ON_A_MESH = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from flax import nnx
from ring_jax import checkpoint, sharding
from ring_jax.convert import load

largest, real = [0], load.read_region
def counted(*args):
    out = real(*args)
    largest[0] = max(largest[0], out.nbytes)
    return out
load.read_region = counted
mesh = sharding.make_mesh(sharding.parse_mesh("2x2"))
for folder, precision in [*((folder, None) for folder in sys.argv[1:]), (sys.argv[1], "fp8")]:
    whole, spread = checkpoint.load(folder, precision=precision).model, None
    largest[0] = 0
    spread = checkpoint.load(folder, mesh, precision=precision).model
    for a, b in zip(jax.tree.leaves(nnx.state(whole, nnx.Param)), jax.tree.leaves(nnx.state(spread, nnx.Param)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    held = [(x.nbytes, x.addressable_shards[0].data.nbytes) for x in jax.tree.leaves(nnx.state(spread, nnx.Param))]
    print(sum(all for all, _ in held), sum(one for _, one in held), max(all for all, _ in held), largest[0])
"""


def test_onto_a_mesh(tmp_path):
    """Each device reads its own part of the files, and no part is read whole first."""
    convert("from-hf", GOLDEN / "periodic", tmp_path / "ours")
    command = [sys.executable, "-c", ON_A_MESH, str(GOLDEN / "periodic"), str(tmp_path / "ours")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    direct, ours, fp8 = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    for total, on_a_device, largest, _ in (direct, ours, fp8):
        assert on_a_device < 0.35 * total
        assert largest > 0
    assert direct[3] <= direct[2] // 2
    assert fp8[0] < 0.7 * direct[0]


SCORED_ON_A_MESH = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from ring_jax import checkpoint, sharding
from ring_jax.infer import align

model = checkpoint.load(sys.argv[1], precision="fp8").model
assert model.segments[0][0].mixer.qkv.get_value().scales.shape[2:] == (4, 9)
programs = align.Programs(model, model)
batch = align.pad([list(range(5 + row, 70 + row)) for row in range(4)])
alone, _ = programs.score(batch)
assert np.isfinite(alone).all() and alone.any()
for mesh in ("4x1", "1x4", "2x2"):
    np.testing.assert_array_equal(programs.score(batch, sharding.make_mesh(sharding.parse_mesh(mesh)))[0], alone)
"""


@pytest.mark.slow
def test_weights_in_fp8_on_a_mesh(tmp_path):
    """A model that holds its weights in FP8, of several blocks each way, computes the same bits where they are spread over devices."""
    config = dataclasses.replace(TWO_LAYERS, hidden_size=512, head_size=64, expert_size=256, shared_expert_size=256)
    folder = write_hf(tmp_path / "model", config, random_tensors(config))
    command = [sys.executable, "-c", SCORED_ON_A_MESH, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
