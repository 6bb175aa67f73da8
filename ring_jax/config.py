"""ModelConfig, the presets, and their translation from and to a Hugging Face config.json. Imports no jax."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from pallas_kernels import CHUNK_SIZES

_AT_LEAST_ONE = (
    "vocab_size",
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "period",
    "num_norm_groups",
    "max_positions",
) + ("num_experts", "num_active_experts", "num_expert_groups", "num_active_expert_groups", "chunk_size")
_AT_LEAST_ZERO = ("num_dense_layers", "num_shared_experts", "num_mtp_layers", "ffn_size", "expert_size", "shared_expert_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Ring-linear model: sizes, layer pattern and the constants of its equations (arXiv 2510.19338)."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    """Key-value heads of a softmax layer; linear layers have as many as query heads."""
    head_size: int = 128
    period: int = 5
    """One softmax layer closes each group of this many layers; layers past the last whole group are softmax too."""
    num_norm_groups: int = 4
    """Groups of the output norm of a linear layer (Hugging Face: group_norm_size, which is a number of groups)."""
    ffn_size: int = 0
    """Width of the dense FFN of the first `num_dense_layers` layers."""
    num_dense_layers: int = 1
    expert_size: int = 512
    shared_expert_size: int = 512
    num_experts: int = 256
    num_active_experts: int = 8
    num_shared_experts: int = 1
    num_expert_groups: int = 8
    num_active_expert_groups: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk: bool = True
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    partial_rotary_factor: float = 0.5
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    """YaRN as sorted (name, value) pairs of the Hugging Face dictionary, e.g. (("factor", 4.0), ("rope_type", "yarn"))."""
    max_positions: int = 131072
    tie_embeddings: bool = False
    num_mtp_layers: int = 0
    decay_layer_offset: int = 0
    """0: decay of layer l as trained and served. 1: the off-by-one of the Hugging Face remote code, for parity."""
    chunk_size: int = 64
    """C of Lightning attention, one of CHUNK_SIZES. It travels with the checkpoint, since the bits depend on it."""
    init_scale: float = 0.02
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0

    def __post_init__(self):
        for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, int) or value < least:
                    raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        factor = dict(self.rope_scaling or {"factor": 1}).get("factor")
        if not isinstance(factor, int | float) or factor < 1:
            raise ValueError(f"the factor of rope_scaling must be a number of at least 1, not {factor!r}")
        if self.chunk_size not in CHUNK_SIZES:
            raise ValueError(f"chunk_size must be one of {', '.join(map(str, CHUNK_SIZES))}, not {self.chunk_size}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if (self.num_heads * self.head_size) % self.num_norm_groups:
            raise ValueError(f"num_norm_groups {self.num_norm_groups} must divide {self.num_heads} x {self.head_size} channels")
        if self.num_experts % self.num_expert_groups:
            raise ValueError(f"num_expert_groups {self.num_expert_groups} must divide num_experts {self.num_experts}")
        if self.num_active_expert_groups > self.num_expert_groups:
            raise ValueError(
                f"num_active_expert_groups {self.num_active_expert_groups} is more than num_expert_groups {self.num_expert_groups}"
            )
        in_groups = self.num_experts // self.num_expert_groups * self.num_active_expert_groups
        if self.num_active_experts > in_groups:
            raise ValueError(f"num_active_experts {self.num_active_experts} is more than the {in_groups} experts of the active groups")
        if self.rotary_size % 2:
            raise ValueError(f"partial_rotary_factor {self.partial_rotary_factor} gives an odd rotary size {self.rotary_size}")

    @property
    def rotary_size(self) -> int:
        """Channels of a head that rotate."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def num_positions(self) -> int:
        """Positions the model can address: max_positions, times YaRN's factor."""
        scaling = dict(self.rope_scaling or ())
        if not scaling:
            return self.max_positions
        return math.ceil(scaling["factor"] * scaling.get("original_max_position_embeddings", self.max_positions))

    def mixer(self, layer: int) -> str:
        """Return "softmax" or "linear" for a layer counted from 0."""
        softmax = (layer + 1) % self.period == 0 or layer >= self.num_layers // self.period * self.period
        return "softmax" if softmax else "linear"

    def ffn(self, layer: int) -> str:
        """Return "dense" or "moe" for a layer counted from 0."""
        return "dense" if layer < self.num_dense_layers else "moe"

    def to_json(self) -> str:
        """Return the config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Return the config of `to_json`'s text. Raises ValueError for fields it does not know or that are missing."""
        fields, known = json.loads(text), dataclasses.fields(cls)
        unknown = sorted(set(fields) - {field.name for field in known})
        if unknown:
            raise ValueError(f"unknown model config fields: {', '.join(unknown)}")
        missing = [field.name for field in known if field.default is dataclasses.MISSING and field.name not in fields]
        if missing:
            raise ValueError(f"model config without {', '.join(missing)}")
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = tuple((name, value) for name, value in fields["rope_scaling"])
        fields["stop_tokens"] = tuple(fields.get("stop_tokens", ()))
        return cls(**fields)


_RELEASED = {"vocab_size": 157184, "num_kv_heads": 4, "stop_tokens": (156892, 156895), "pad_token": 156892}

PRESETS: dict[str, ModelConfig] = {
    "ring-mini-linear-2.0": ModelConfig(num_layers=20, hidden_size=2048, num_heads=16, ffn_size=5120, **_RELEASED),
    "ring-flash-linear-2.0": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        period=8,
        ffn_size=9216,
        expert_size=1024,
        shared_expert_size=1024,
        **_RELEASED,
    ),
    "demo": ModelConfig(
        vocab_size=4096,
        num_layers=5,
        hidden_size=192,
        num_heads=3,
        num_kv_heads=1,
        head_size=64,
        num_norm_groups=3,
        ffn_size=512,
        expert_size=192,
        shared_expert_size=192,
        num_experts=8,
        num_active_experts=2,
        num_expert_groups=4,
        num_active_expert_groups=2,
        max_positions=4096,
        init_scale=0.05,
    ),
    "bench-140m": ModelConfig(
        vocab_size=8192,
        num_layers=10,
        hidden_size=512,
        num_heads=4,
        num_kv_heads=1,
        ffn_size=1536,
        expert_size=256,
        shared_expert_size=256,
        num_experts=32,
        num_active_experts=4,
        num_expert_groups=4,
        num_active_expert_groups=2,
        max_positions=8192,
    ),
    "test": ModelConfig(
        vocab_size=96,
        num_layers=6,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        period=3,
        num_norm_groups=2,
        ffn_size=48,
        expert_size=16,
        shared_expert_size=16,
        num_experts=8,
        num_active_experts=2,
        num_expert_groups=4,
        num_active_expert_groups=2,
        max_positions=1024,
        init_scale=0.1,
    ),
}


def preset(name: str) -> ModelConfig:
    """Return the preset of that name. Raises ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def read_config(folder: pathlib.Path) -> ModelConfig:
    """Return the model config of a run folder, one of its checkpoints, or a Hugging Face folder. Raises ValueError naming the folder."""
    for file in (folder / "meta" / "metadata", folder / "config.json"):
        if file.is_file():
            try:
                fields = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is not JSON: {error}") from None
            if isinstance(fields, dict) and isinstance(fields.get("model"), dict):
                return ModelConfig.from_json(json.dumps(fields["model"]))
    return read_hf_config(folder)


HF_ARCHITECTURE = "BailingMoeLinearV2ForCausalLM"
HF_MODEL_TYPE = "bailing_moe_linear"
# Our field, theirs. Fields a config.json may leave out are in HF_DEFAULTS.
HF_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "period": "layer_group_size",
    "num_norm_groups": "group_norm_size",
    "ffn_size": "intermediate_size",
    "num_dense_layers": "first_k_dense_replace",
    "expert_size": "moe_intermediate_size",
    "shared_expert_size": "moe_shared_expert_intermediate_size",
    "num_experts": "num_experts",
    "num_active_experts": "num_experts_per_tok",
    "num_shared_experts": "num_shared_experts",
    "num_expert_groups": "n_group",
    "num_active_expert_groups": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "norm_topk": "norm_topk_prob",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "num_mtp_layers": "num_nextn_predict_layers",
}
HF_DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "num_shared_experts": 0,
    "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "group_norm_size": 1,
}
# Settings whose other values change the equations: refused rather than ignored.
HF_FIXED = {
    "hidden_act": "silu",
    "score_function": "sigmoid",
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "use_rmsnorm": True,
    "linear_silu": False,
    "norm_head": False,
}


def _as_tokens(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def from_hf(fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the config of a Hugging Face config.json (and generation_config.json, which may list more stop tokens).

    Raises ValueError that names every problem: another model family, missing fields, settings this model does not have.
    """
    architectures = fields.get("architectures") or []
    if fields.get("model_type") != HF_MODEL_TYPE and HF_ARCHITECTURE not in architectures:
        raise ValueError(f"model_type {fields.get('model_type')!r} ({', '.join(architectures)}) is not {HF_MODEL_TYPE!r}")
    fields = {**HF_DEFAULTS, **{name: value for name, value in fields.items() if value is not None}}
    if "head_dim" not in fields and {"hidden_size", "num_attention_heads"} <= fields.keys():
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if "moe_shared_expert_intermediate_size" not in fields and "moe_intermediate_size" in fields:
        fields["moe_shared_expert_intermediate_size"] = fields["moe_intermediate_size"] * max(1, fields["num_shared_experts"])
    problems = [f"no {theirs}" for theirs in HF_FIELDS.values() if theirs not in fields]
    problems += [f"{name} is {fields[name]!r}, not {want!r}" for name, want in HF_FIXED.items() if fields.get(name, want) != want]
    scaling = fields.get("rope_scaling")
    if scaling and scaling.get("rope_type", scaling.get("type")) not in ("yarn", "default"):
        problems.append(f"rope_scaling {scaling.get('rope_type', scaling.get('type'))!r}, not 'yarn'")
    problems += [f"rope_scaling with {name}" for name in ("mscale", "mscale_all_dim", "truncate") if name in (scaling or {})]
    if problems:
        raise ValueError(f"config.json of a {HF_MODEL_TYPE} model: {'; '.join(problems)}")
    if scaling and scaling.get("rope_type", scaling.get("type")) == "default":
        scaling = None
    stop = _as_tokens((generation or {}).get("eos_token_id")) or _as_tokens(fields.get("eos_token_id"))
    return ModelConfig(
        **{ours: fields[theirs] for ours, theirs in HF_FIELDS.items()},
        rope_scaling=tuple(sorted(scaling.items())) if scaling else None,
        stop_tokens=stop,
        pad_token=fields.get("pad_token_id", 0),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a Hugging Face config.json."""
    return {
        "architectures": [HF_ARCHITECTURE],
        "model_type": HF_MODEL_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()},
        **HF_FIXED,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "moe_router_enable_expert_bias": True,
        "moe_router_enable_shared_expert": config.num_shared_experts > 0,
        "router_dtype": "fp32",
        "eos_token_id": list(config.stop_tokens) if len(config.stop_tokens) != 1 else config.stop_tokens[0],
        "pad_token_id": config.pad_token,
        "norm_softmax": False,
        "torch_dtype": "float32",
    }


def read_hf_config(folder: pathlib.Path) -> ModelConfig:
    """Return the config of a Hugging Face folder. Raises ValueError naming the file that is missing or not JSON."""

    def read(name: str) -> dict[str, Any]:
        try:
            fields = json.loads((folder / name).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / name} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{folder / name} is not a JSON object")
        return fields

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    return from_hf(read("config.json"), read("generation_config.json") if (folder / "generation_config.json").is_file() else None)
