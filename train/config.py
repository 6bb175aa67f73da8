"""The training configuration and its command line. Imports no jax, so that --help is instant."""

import argparse
import dataclasses
import math
import pathlib
import types
import typing
from typing import Any

from ring_jax.command_line import KERNELS, Parser
from ring_jax.config import PRESETS, ModelConfig, preset, read_config


def _check_least(config: Any, section: str, least: dict[str, float]) -> None:
    """Raise ValueError that names the first field below its least value, or not finite."""
    for name, value in ((name, getattr(config, name)) for name in least):
        if value is not None and not least[name] <= value < math.inf:
            raise ValueError(f"{section}{name if section else name.replace('_', '-')} must be at least {least[name]}, not {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW: decoupled weight decay that spares norms and biases, clipping by the global norm."""

    learning_rate: float = 3e-3
    schedule: str = "constant"
    """After the warmup: constant, cosine or linear (the last two fall to `final_fraction` of the rate at the last step)."""
    final_fraction: float = 0.1
    warmup: int = 20
    """Steps of linear warmup."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest global gradient norm; 0 for none."""
    balance_rate: float = 1e-3
    """Step of the routers' balancing bias (aux-loss-free); 0 for none."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the router logits; the released recipe uses 3.5e-6."""
    mtp_weight: float = 0.1
    """Weight of the multi-token-prediction loss, where the model has such layers."""
    accumulate: int = 1
    """Steps a batch is computed in; the gradient is that of the whole batch."""

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"unknown schedule {self.schedule!r}; known: constant, cosine, linear")
        zero_or_more = ("learning_rate", "final_fraction", "warmup", "weight_decay", "clip", "balance_rate", "z_loss", "mtp_weight")
        _check_least(self, "optimizer.", {"accumulate": 1, **dict.fromkeys(zero_or_more, 0)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 50
    """Steps between checkpoints; the last step always writes one."""
    keep_last: int = 3
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""

    def __post_init__(self):
        _check_least(self, "checkpoint.", {"every": 1, "keep_last": 1, "keep_every": 1})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = 50
    """Steps between evaluations; 0 for none. The last step always evaluates."""
    batches: int = 4
    """Batches of held-out text an evaluation reads (at most; the same ones each time)."""
    fraction: float = 0.02
    """Share of the documents held out."""

    def __post_init__(self):
        _check_least(self, "eval.", {"every": 0, "batches": 0, "fraction": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run is."""

    model: str = "demo"
    """A preset, or a folder whose weights training starts from: a run, one of its checkpoints, or a Hugging Face folder."""
    data: tuple[str, ...] = ()
    """Text, jsonl, parquet or arrayrecord files or folders, PATH or PATH:WEIGHT; default: the interpreter's standard library."""
    tokenizer: str = "train:4096"
    """bytes, a tokenizer.json or its folder, or train:N (a BPE of N tokens trained on the data); a folder as model brings its own."""
    mesh: str = "1x1"
    """FSDPxEXPERT, or named axes as in data=2,fsdp=4,expert=8."""
    steps: int = 200
    batch_size: int = 64
    """Rows of a step, over all devices."""
    seq_len: int = 128
    output: str | None = None
    """Run folder; default runs/MODEL."""
    resume: bool = False
    """Continue from the newest checkpoint of the output folder (from the start if it has none)."""
    overwrite: bool = False
    """Delete an existing output folder first."""
    precision: str = "bf16"
    """Of products: bf16, fp32, or fp8 (both operands of a product with a weight, in blocks). Master weights, states, statistics and logits
    are fp32 in any case."""
    numerics: str = "fast"
    """fast, or aligned: token log-probabilities then have the bits that inference gives."""
    kernels: str = "auto"
    """How ops are computed: auto (the platform's best), xla, pallas (on a CPU: interpreted, slow). The log names what runs."""
    remat: str = "none"
    """What the gradient recomputes: none, mixers (all but mixers' outputs), full."""
    unroll: int = 0
    """Layers that one turn of a loop over layers computes; 0: 4 on a CPU, else 1."""
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        for name, known in (
            ("precision", ("bf16", "fp8", "fp32")),
            ("numerics", ("fast", "aligned")),
            ("remat", ("none", "mixers", "full")),
            ("kernels", KERNELS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        _check_least(self, "", {"steps": 1, "batch_size": 1, "seq_len": 1, "unroll": 0, "seed": 0})
        if self.seed >= 1 << 32:
            raise ValueError(f"seed must be below {1 << 32}, not {self.seed}")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues the output folder, --overwrite replaces it: give one of them")
        if self.batch_size % self.optimizer.accumulate:
            raise ValueError(f"accumulate {self.optimizer.accumulate} does not divide the batch size {self.batch_size}")


def _parser_of(kind: Any) -> Any:
    """How a field's text is read; None for fields the command line does not offer."""
    options = [k for k in typing.get_args(kind) if k is not types.NoneType] if isinstance(kind, types.UnionType) else [kind]
    return options[0] if options[0] in (int, float, str) else _parse_bool if options[0] is bool else None


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() == "true"


def _doc(cls: type, name: str) -> str:
    """The string literal under a field, as its help."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(cls)).body[0].body  # pyright: ignore
    for field, after in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and field.target.id == name and isinstance(after, ast.Expr):  # pyright: ignore
            return after.value.value.replace("%", "%%")  # pyright: ignore
    return ""


def _add_fields(parser: Any, cls: type, prefix: str, shown: bool) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag, kind = f"--{prefix}{field.name.replace('_', '-') if not prefix else field.name}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            group = parser.add_argument_group(f"{field.name}: {(kind.__doc__ or '').splitlines()[0]}")
            _add_fields(group, typing.cast(type, kind), f"{field.name}.", True)
        elif field.name == "data" and not prefix:
            parser.add_argument(
                flag, dest="data", nargs="+", metavar="PATH[:WEIGHT]", default=argparse.SUPPRESS, help=_doc(cls, field.name)
            )
        elif kind is bool and not prefix:
            parser.add_argument(flag, dest=field.name, action="store_true", default=argparse.SUPPRESS, help=_doc(cls, field.name))
        elif (read := _parser_of(kind)) is not None:
            default = "" if field.default in (None, dataclasses.MISSING) else f" (default {field.default})"
            help_text = _doc(cls, field.name) + default if shown else argparse.SUPPRESS
            parser.add_argument(
                flag, dest=prefix + field.name, type=read, metavar=field.name.upper(), default=argparse.SUPPRESS, help=help_text
            )


def parse_args(arguments: list[str]) -> tuple[TrainConfig, ModelConfig, bool]:
    """Return the run's configuration, its model (the preset's or the folder's, with overrides), and whether the vocabulary is fixed.

    Raises ValueError for a value that is not allowed; exits with one line for arguments that cannot be read.
    """
    parser = Parser(
        prog="python -m ring_jax.train",
        description="Train a Ring-linear hybrid model.",
        epilog=f"Presets: {', '.join(PRESETS)}. Every model field can be overridden: --model.num_layers 10, --model.hidden_size 512, ...",
        allow_abbrev=False,
    )
    _add_fields(parser, TrainConfig, "", True)
    _add_fields(parser, ModelConfig, "model.", False)
    given = vars(parser.parse_args(arguments))
    return from_values(given)


def from_values(given: dict[str, Any]) -> tuple[TrainConfig, ModelConfig, bool]:
    """Return the configuration of values by dotted name; see `parse_args`."""
    top = {name: value for name, value in given.items() if "." not in name}
    if "data" in top:
        top["data"] = tuple(top["data"])
    nested: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        if "." in name:
            section, field = name.split(".")
            nested.setdefault(section, {})[field] = value
    overrides = nested.pop("model", {})
    for section, values in nested.items():
        default = next(field.default for field in dataclasses.fields(TrainConfig) if field.name == section)
        top[section] = dataclasses.replace(default, **values)  # pyright: ignore
    config = TrainConfig(**top)
    folder = starting_folder(config)
    if folder is None:
        run = run_folder(config)
        # A run that started from a folder which is gone goes on from what it has saved.
        saved = config.resume and config.model not in PRESETS and (run / "config.json").is_file()
        return config, dataclasses.replace(read_config(run) if saved else preset(config.model), **overrides), "vocab_size" in overrides
    if "tokenizer" not in top:
        run = folder.parent.parent if (folder / "meta").is_dir() else folder  # a run's tokenizer.json is the run folder's
        if not (run / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json: give --tokenizer")
        top["tokenizer"] = str(run)
    return TrainConfig(**top), dataclasses.replace(read_config(folder), **overrides), True


def run_folder(config: TrainConfig) -> pathlib.Path:
    """Return the run folder a configuration names."""
    return pathlib.Path(config.output or f"runs/{pathlib.Path(config.model).name}")


def starting_folder(config: TrainConfig) -> pathlib.Path | None:
    """Return the folder whose weights a run starts from, None if its model is a preset."""
    return pathlib.Path(config.model) if config.model not in PRESETS and pathlib.Path(config.model).is_dir() else None
