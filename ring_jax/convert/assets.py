"""What a Hugging Face folder holds besides weights, carried by every checkpoint that descends from it: the item "hf"."""

import base64
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from ring_jax.config import ModelConfig
from ring_jax.convert.names import Parameter
from ring_jax.convert.shards import CODE_OF, Tensors, plain
from ring_jax.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
TOKENIZER_FILES += ("tokenizer.model", "chat_template.jinja", "generation_config.json")
LARGEST = 64 * 2**20
"""Bytes of the largest file that is carried (tokenizers are smaller)."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".partial")


def read(tensors: Tensors, wanted: list[Parameter]) -> dict[str, Any]:
    """Return the item "hf" of a folder: its small files, which file each tensor lies in, and what else its index says.

    Also the dtypes of tensors that are unlike their parameter's.
    """
    texts, binaries = {}, {}
    for file in sorted(tensors.folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHTS) and file.stat().st_size <= LARGEST:
            data = file.read_bytes()
            try:
                texts[file.name] = data.decode("utf-8")
            except UnicodeDecodeError:
                binaries[file.name] = base64.b64encode(data).decode("ascii")
    weight_map: dict[str, list[str]] = {}
    for name, entry in tensors.entries.items():
        weight_map.setdefault(entry.file.name, []).append(name)
    names = {name: dtype for p in wanted for dtype in [p.dtype(tensors)] for part in p.slices for name in part.tensors}
    dtypes = {name: CODE_OF[tensors.dtype(name)] for name, dtype in names.items() if tensors.dtype(name) != dtype}
    return {"files": texts, "binaries": binaries, "weight_map": weight_map, "index_metadata": tensors.index_metadata, "dtypes": dtypes}


def with_tokenizer(item: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the item of a model that is trained on with the tokenizer of this tokenizer.json: its own files stay if it is the same."""
    own = item["files"].get("tokenizer.json")
    if own is not None and Tokenizer.from_json(own).to_json() == text:
        return item
    others = {kind: {n: data for n, data in item[kind].items() if n not in TOKENIZER_FILES} for kind in ("files", "binaries")}
    return {**item, **others, "files": others["files"] | {"tokenizer.json": text}}


def write_files(item: dict[str, Any], folder: pathlib.Path) -> None:
    """Write the small files of an item into a folder, byte for byte."""
    for name, text in item["files"].items():
        (folder / plain(name)).write_bytes(text.encode("utf-8"))
    for name, data in item["binaries"].items():
        (folder / plain(name)).write_bytes(base64.b64decode(data))


def write_json_item(step: pathlib.Path, item: str, value: dict[str, Any]) -> None:
    """Write an item of a checkpoint that is one JSON object, as Orbax stores it."""
    (step / item).mkdir(parents=True, exist_ok=True)
    (step / item / "metadata").write_text(json.dumps(value), encoding="utf-8")


def meta(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """Return the metadata of a converted checkpoint."""
    precision = "bf16" if dtype.name == "bfloat16" else "fp32"
    return {"step": 0, "data_position": 0, "precision": precision, "model": dataclasses.asdict(config)}
