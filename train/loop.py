"""A training run: data, steps, evaluation, checkpoints, interrupts; resumed runs continue bit for bit."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ring_jax import checkpoint, flops, sharding
from ring_jax.config import ModelConfig
from ring_jax.convert.assets import with_tokenizer
from ring_jax.numerics import DTYPES
from ring_jax.scoring import Batch, host_batch
from ring_jax.train.config import TrainConfig, run_folder, starting_folder
from ring_jax.train.data import Data, load_data
from ring_jax.train.metrics import Metrics, Progress
from ring_jax.train.step import Program, StepMetrics, TrainState, make_program, numerics_of

MOST_SKIPPED = 10
"""Steps in a row without a finite loss and gradient after which a run stops."""


class Interrupted(NamedTuple):
    """How a run ended: the last finished step, and the signal that stopped it (None if it ran to its end)."""

    step: int
    signal: int | None


def check_folder(config: TrainConfig) -> pathlib.Path:
    """Return the run folder, untouched. Raises ValueError if it exists and may be neither continued nor replaced."""
    folder = run_folder(config)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file: name another --output")
    source = starting_folder(config)
    if source is not None and not config.resume and (folder.resolve() == source.resolve() or folder.resolve() in source.resolve().parents):
        raise ValueError(f"output {folder} is where the weights come from: name another --output")
    if folder.is_dir() and any(folder.iterdir()) and not (config.resume or config.overwrite):
        raise ValueError(f"output folder {folder} exists: continue it with --resume, replace it with --overwrite, or name another --output")
    return folder


def _saved_model(
    manager: checkpoint.Manager, step: int, model: ModelConfig, vocab_given: bool, folder: pathlib.Path
) -> tuple[ModelConfig, str]:
    """The model and tokenizer of the checkpoint to resume. Raises ValueError if the arguments ask for another model."""
    saved = ModelConfig.from_json(json.dumps(manager.meta(step)["model"]))
    # What the run took from its tokenizer is not in the arguments.
    vocab_size = model.vocab_size if vocab_given else saved.vocab_size
    asked = dataclasses.replace(model, vocab_size=vocab_size, stop_tokens=saved.stop_tokens)
    different = [f.name for f in dataclasses.fields(saved) if getattr(saved, f.name) != getattr(asked, f.name)]
    if different:
        changes = ", ".join(f"{name} {getattr(saved, name)} -> {getattr(asked, name)}" for name in different)
        raise ValueError(f"cannot resume {folder}: its model differs ({changes})")
    text = manager.tokenizer(step)
    assert text is not None, "a training run always has a tokenizer"
    return saved, text


def train(config: TrainConfig, model: ModelConfig, vocab_given: bool) -> Interrupted:
    """Train and return how the run ended. Raises ValueError for a user's mistake, in one line; nothing is overwritten then."""
    from ring_jax.tokenizer import Tokenizer

    sizes = sharding.parse_mesh(config.mesh)
    sharding.check_mesh(sizes, model, config.batch_size // config.optimizer.accumulate)
    if config.seq_len > model.num_positions:
        raise ValueError(
            f"seq-len {config.seq_len} exceeds the {model.num_positions} positions of the model: --model.max_positions or YaRN extends them"
        )
    if said := sharding.prepare_devices(sizes):
        print(said, file=sys.stderr)
    folder = check_folder(config)
    open_manager = lambda: checkpoint.Manager(folder, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
    manager = open_manager() if config.resume and folder.is_dir() else None
    latest = manager.latest() if manager else None
    if manager and latest is not None and "train" not in manager.meta(latest):
        raise ValueError(f"{folder} holds converted weights, no run to resume: train from them with --model {folder} and another --output")
    start = latest or 0
    text = ""
    if manager and start:
        model, text = _saved_model(manager, start, model, vocab_given, folder)
    data = load_data(
        config.data,
        Tokenizer.from_json(text) if start else config.tokenizer,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        eval_fraction=config.eval.fraction,
    )
    from_folder = starting_folder(config)
    if not start:
        model = _fit_vocabulary(model, data, vocab_given, keep_stops=_own_tokenizer(config))
    mesh = sharding.make_mesh(sizes)
    program = make_program(model, numerics_of(config), config.optimizer, config.steps, config.seed, mesh)
    if manager and start:
        state, hf = _restore(manager, start, program), manager.hf(start)
    elif from_folder is not None:
        params, balance, hf = checkpoint.load_weights(from_folder, model, _abstract(program).params, _abstract(program).balance)
        state, hf = program.start(params, balance), hf and with_tokenizer(hf, data.tokenizer.to_json())
    else:
        state, hf = program.init(), None
    if manager is None:  # the arguments and the data are good: only now is an old run replaced
        if config.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        manager = open_manager()
    (folder / "config.json").write_text(json.dumps({"train": dataclasses.asdict(config), "model": dataclasses.asdict(model)}, indent=1))
    (folder / "tokenizer.json").write_text(data.tokenizer.to_json(), encoding="utf-8")
    fill = f"rows {data.fill:.0%} full"
    print(
        f"{flops.num_params(model):,} parameters, {flops.num_active_params(model):,} active; {data.num_tokens:,} training tokens, {fill}; "
        f"{config.precision}, {config.numerics} numerics; {folder}{f' from step {start}' if start else ''}",
        file=sys.stderr,
    )
    run = _Run(config, model, data, program, manager, folder, start, hf)
    try:
        ended = run.to_the_end(state)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):  # on a full disk this fails too: the first error is the one to tell
            run.close()
        raise
    run.close()
    return ended


def _own_tokenizer(config: TrainConfig) -> bool:
    """Whether a run uses the tokenizer of the folder it starts from."""
    folder = starting_folder(config)
    return folder is not None and pathlib.Path(config.tokenizer) in (folder, folder.parent.parent)


def _fit_vocabulary(model: ModelConfig, data: Data, fixed: bool, keep_stops: bool) -> ModelConfig:
    """The model with the tokenizer's vocabulary, rounded up so that it shards, unless its size was given; and its stop tokens."""
    size = data.tokenizer.vocab_size
    if fixed and size > model.vocab_size:
        raise ValueError(f"the tokenizer has {size} tokens, more than the model's vocabulary of {model.vocab_size}")
    fitted = model.vocab_size if fixed else -(-size // 128) * 128
    stops = model.stop_tokens if keep_stops and model.stop_tokens else tuple(data.tokenizer.eos_ids)
    return dataclasses.replace(model, vocab_size=fitted, stop_tokens=stops)


def _trees(state: TrainState) -> dict[str, Any]:
    """The state as a checkpoint's items."""
    rest = {"state": state.optimizer, "step": state.step, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    return {"params": state.params, "balance": state.balance, "optimizer": rest}


def _abstract(program: Program) -> TrainState:
    """The shapes of a state, with their shardings."""
    with_sharding = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(with_sharding, program.abstract, program.state_shardings)


def _restore(manager: checkpoint.Manager, step: int, program: Program) -> TrainState:
    trees = manager.restore(step, _trees(_abstract(program)))
    rest = trees["optimizer"]
    return TrainState(rest["step"], trees["params"], trees["balance"], rest["state"], rest["skipped"], rest["skipped_in_a_row"])


class _Run:
    """The moving parts of a run."""

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        data: Data,
        program: Program,
        manager: checkpoint.Manager,
        folder: pathlib.Path,
        start: int,
        hf: dict[str, Any] | None,
    ):
        self.hf = hf
        self.config, self.model, self.data, self.program, self.manager, self.start = config, model, data, program, manager, start
        self.metrics, self.progress = Metrics(folder, start), Progress(start, config.steps)
        self.flops = flops.training_flops_per_token(model, config.seq_len)
        self.ceiling = flops.matmul_ceiling(DTYPES[config.precision])
        self.signal: int | None = None
        self._handlers = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}

    def _interrupt(self, number: int, _frame: Any) -> None:
        self.signal = number

    def to_the_end(self, state: TrainState) -> Interrupted:
        """Run the steps that are left."""
        config, last_saved, step = self.config, self.start, self.start
        before = time.monotonic()
        batches = self.data.train.iterate(self.start)
        try:
            for batch in batches:
                if step >= config.steps or self.signal is not None:
                    break
                state, metrics = self.program.step(state, self.program.tables, self._place(batch))
                step += 1
                metrics = jax.device_get(metrics)
                now = time.monotonic()
                self._report(step, metrics, now - before)
                self._check(step, metrics)
                if step == config.steps or (config.eval.every and step % config.eval.every == 0):
                    self._evaluate(step, state)
                if step == config.steps or step % config.checkpoint.every == 0:
                    self._save(step, state)
                    last_saved = step
                before = time.monotonic()
        finally:
            batches.close()
        if last_saved < step:
            self._save(step, state)
        self.manager.wait()
        return Interrupted(step, self.signal)

    def _place(self, batch: dict[str, np.ndarray]) -> Batch:
        placed = host_batch(batch["tokens"], batch["positions"], batch["segment_ids"])
        if (steps := self.config.optimizer.accumulate) > 1:
            placed = jax.tree.map(lambda x: x.reshape(steps, -1, x.shape[-1]), placed)
        return jax.device_put(placed, self.program.batch_sharding)

    def _report(self, step: int, metrics: StepMetrics, seconds: float) -> None:
        tokens = self.config.batch_size * self.config.seq_len
        values = {name: float(getattr(metrics, name)) for name in ("loss", "learning_rate", "gradient_norm", "load_imbalance")}
        values |= {
            "nll": float(metrics.nll / max(metrics.num_tokens, 1)),
            "tokens_per_second": tokens / seconds,
            "mfu": self.flops * tokens / seconds / (self.ceiling * jax.device_count()) if self.ceiling else math.nan,
            "scored_tokens": int(metrics.num_tokens),
            "skipped_steps": int(metrics.skipped),
        }
        self.metrics.write(step, {name: value for name, value in values.items() if name != "mfu" or math.isfinite(value)})
        self.progress.update(step, values["loss"], values["tokens_per_second"])

    def _check(self, step: int, metrics: StepMetrics) -> None:
        if metrics.skipped_in_a_row:
            self.progress.say(f"step {step}: the loss or a gradient is not finite; step skipped ({int(metrics.skipped_in_a_row)} in a row)")
        if metrics.skipped_in_a_row >= MOST_SKIPPED:
            raise ValueError(
                f"stopped at step {step}: {MOST_SKIPPED} steps in a row without a finite loss and gradient; lower "
                "--optimizer.learning_rate or --optimizer.clip, or look at the data (the checkpoints hold no such step)"
            )

    def _evaluate(self, step: int, state: TrainState) -> None:
        nll = tokens = 0.0
        for index in range(min(self.config.eval.batches, len(self.data.eval))):
            batch = self.data.eval.batch(index)
            placed = jax.device_put(host_batch(batch["tokens"], batch["positions"], batch["segment_ids"]), self._eval_sharding())
            part, count = jax.device_get(self.program.evaluate(state.params, state.balance, self.program.tables, placed))
            nll, tokens = nll + float(part), tokens + float(count)
        if not tokens:
            return
        loss = nll / tokens
        bits = loss / math.log(2) / self.data.bytes_per_token
        perplexity = math.exp(min(loss, 700.0))
        self.metrics.write(step, {"eval_loss": loss, "eval_perplexity": perplexity, "eval_bits_per_byte": bits})
        self.progress.say(f"step {step}: held-out loss {loss:.3f}, perplexity {perplexity:.1f}, {bits:.3f} bits per byte")

    def _eval_sharding(self) -> Any:
        rows = self.program.batch_sharding
        return rows if rows is None else jax.sharding.NamedSharding(rows.mesh, sharding.batch_spec())

    def _save(self, step: int, state: TrainState) -> None:
        meta = {
            "step": step,
            "data_position": step,
            "precision": self.config.precision,
            "model": dataclasses.asdict(self.model),
            "train": dataclasses.asdict(self.config),
        }
        self.manager.save(step, **_trees(state), meta=meta, tokenizer=self.data.tokenizer.to_json(), hf=self.hf)

    def close(self) -> None:
        """Restore the signal handlers and finish the files."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.progress.close()
        self.metrics.close()
        self.manager.close()
