"""A softmax-only base of the family as the start of a hybrid: key and value heads widened, gates and group norms new.

Layers that become linear attend with as many key and value heads as query heads (arXiv 2510.19338, section 4): each head of the base is
repeated over its group. The gate's weight is random, the group norm's is ones. Everything else is copied.
"""

import json
import pathlib
from typing import Any

import numpy as np

from ring_jax.config import HF_ARCHITECTURE, HF_MODEL_TYPE, ModelConfig, from_hf
from ring_jax.convert.shards import Entry, Tensors

BASE_ARCHITECTURE = "BailingMoeV2ForCausalLM"


def hybrid_fields(folder: pathlib.Path, period: int, norm_groups: int) -> dict[str, Any]:
    """Return the config.json of the hybrid of a base folder. Raises ValueError naming a folder that holds another model."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(fields, dict) or BASE_ARCHITECTURE not in (fields.get("architectures") or []):
        fields = fields if isinstance(fields, dict) else {}
        raise ValueError(f"{folder} holds {fields.get('architectures')}, not a softmax-only base ({BASE_ARCHITECTURE})")
    if not isinstance(fields.get("num_hidden_layers"), int):
        raise ValueError(f"{folder / 'config.json'} has no num_hidden_layers")
    if not 1 <= period <= fields["num_hidden_layers"]:
        raise ValueError(f"layer-group-size must lie between 1 and the {fields['num_hidden_layers']} layers, not {period}")
    ours = {"architectures": [HF_ARCHITECTURE], "model_type": HF_MODEL_TYPE, "layer_group_size": period, "group_norm_size": norm_groups}
    return {name: value for name, value in fields.items() if name != "auto_map"} | ours


class Widened(Tensors):
    """The tensors of a base folder as those of the hybrid."""

    def __init__(self, folder: pathlib.Path, config: ModelConfig, seed: int):
        super().__init__(folder)
        self._seed, self._scale, size = seed, config.init_scale, config.num_heads * config.head_size
        self._group, self._size = config.num_heads // config.num_kv_heads, config.head_size
        self.new: set[str] = set()
        self.widened: set[str] = set()
        heads, kv = config.num_heads, config.num_kv_heads
        self._head_rows = [
            *range(heads),
            *(heads + h // self._group for h in range(heads)),
            *(heads + kv + h // self._group for h in range(heads)),
        ]
        for layer in range(config.num_layers):
            if config.mixer(layer) != "linear":
                continue
            prefix = f"model.layers.{layer}.attention."
            base = self.entries.get(prefix + "query_key_value.weight")
            if base is None or base.shape != ((heads + 2 * kv) * self._size, config.hidden_size):
                continue  # the check of all tensors names it
            self.entries[prefix + "query_key_value.weight"] = base._replace(shape=(3 * size, config.hidden_size))
            self.widened.add(prefix + "query_key_value.weight")
            dtype = self.dtype(prefix + "query_key_value.weight")
            self.entries[prefix + "g_proj.weight"] = Entry(base.file, dtype, (size, config.hidden_size), -1)
            self.entries[prefix + "g_norm.weight"] = Entry(base.file, dtype, (size,), -1)
            self.new |= {prefix + "g_proj.weight", prefix + "g_norm.weight"}

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return rows of a tensor of the hybrid."""
        entry = self.entries[name]
        count = entry.shape[0] - first if count is None else count
        if name.endswith("g_norm.weight") and name in self.new:
            return np.ones(count, entry.dtype)
        if name in self.new:
            rng = np.random.default_rng([self._seed, int(name.split(".")[2])])
            return (self._scale * rng.standard_normal(entry.shape, np.float32)).astype(entry.dtype)[first : first + count]
        if name not in self.widened:
            return super().read(name, first, count)
        rows = []
        while count:  # a head, or what is asked of it, at a time
            head, row = divmod(first, self._size)
            taken = min(self._size - row, count)
            rows.append(super().read(name, self._head_rows[head] * self._size + row, taken))
            first, count = first + taken, count - taken
        return np.concatenate(rows)

    def report(self) -> str:
        """Return what was copied, widened and made new."""
        copied = len(self.names) - len(self.new) - len(self.widened)
        return (
            f"{copied} tensors copied; {len(self.widened)} query_key_value widened (each key and value head {self._group} times); "
            f"{len(self.new)} new (g_proj random with scale {self._scale}, seed {self._seed}; g_norm ones)"
        )


def open_base(folder: pathlib.Path, period: int, norm_groups: int, seed: int) -> tuple[dict[str, Any], ModelConfig, Widened]:
    """Return the config.json, the config and the tensors of the hybrid of a base folder."""
    fields = hybrid_fields(folder, period, norm_groups)
    generation = folder / "generation_config.json"
    config = from_hf(fields, json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else None)
    return fields, config, Widened(folder, config, seed)
