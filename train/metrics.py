"""What a run tells: metrics.jsonl, TensorBoard events, loss.png, and progress on the terminal."""

import json
import math
import pathlib
import sys
import time
from typing import Any

PLAIN_LINE_SECONDS = 10.0
"""Between progress lines where stderr is no terminal."""


class Metrics:
    """Writes the metrics of a run folder. On resume, lines past the restored step are cut."""

    def __init__(self, folder: pathlib.Path, start_step: int):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self._cut(start_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = _Events(folder / "events", start_step)

    def _cut(self, start_step: int) -> None:
        lines = read_metrics(self.path)
        kept = [line for line in lines if line["step"] <= start_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.rename(self.path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add one line, and a scalar each to the TensorBoard events. JSON has no NaN: what is not finite is null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            self._events.write(step, {name: value for name, value in finite.items() if value is not None})
        except OSError as error:
            raise ValueError(f"the metrics in {self.folder} could not be written ({error.strerror}); the checkpoints are whole") from error

    def close(self) -> None:
        """Finish the files and draw loss.png."""
        self._file.close()
        self._events.close()
        draw_loss(self.folder)


class _Events:
    """TensorBoard events, written at once: tensorboardX's own writer has a thread, which dies on a full disk and is then waited for."""

    def __init__(self, folder: pathlib.Path, start_step: int):
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if start_step:  # TensorBoard forgets what comes after the restored step
            self._add(step=start_step + 1, session_log={"status": "START"})

    def write(self, step: int, values: dict[str, float]) -> None:
        self._add(step=step, summary={"value": [{"tag": name, "simple_value": value} for name, value in values.items()]})

    def _add(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self._writer.write_event(Event(wall_time=time.time(), **fields))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line that a killed run left half-written is dropped."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def draw_loss(folder: pathlib.Path) -> None:
    """Draw the training loss (raw and smoothed), the held-out loss and the gradient norm of a run as loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(folder / "metrics.jsonl")
    train = [(x["step"], x["loss"], x["gradient_norm"]) for x in lines if x.get("loss") is not None]
    held_out = [(x["step"], x["eval_loss"]) for x in lines if x.get("eval_loss") is not None]
    if not train:
        return
    steps, losses, norms = zip(*train, strict=True)
    smooth, average = [], losses[0]
    for loss in losses:
        average += 0.1 * (loss - average)
        smooth.append(average)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained")
    top.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
    top.plot(steps, smooth, color="#08519c", linewidth=2, label="training, smoothed")
    if held_out:
        top.plot(*zip(*held_out, strict=True), "o-", color="#d94801", label=f"held out (last {held_out[-1][1]:.3f})")
    top.set(ylabel="loss (nats per token)", title=f"{folder.name}: {losses[0]:.2f} to {smooth[-1]:.2f} in {steps[-1]} steps")
    top.legend(frameon=False)
    bottom.plot(steps, norms, color="#636363", linewidth=1)
    bottom.set(xlabel="step", ylabel="gradient norm", yscale="log")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    partial = folder / "loss.partial.png"
    figure.savefig(partial, dpi=120)
    partial.rename(folder / "loss.png")
    plt.close(figure)


class Progress:
    """A bar with loss, tokens/s and time left on a terminal, plain lines elsewhere."""

    def __init__(self, start_step: int, steps: int):
        self._steps, self._started, self._start_step, self._last = steps, time.monotonic(), start_step, 0.0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start_step, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show one finished step."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_LINE_SECONDS or step == self._steps:
            self._last = now
            left = (now - self._started) / max(step - self._start_step, 1) * (self._steps - step)
            print(
                f"step {step}/{self._steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {left / 60:.1f} min left", file=sys.stderr
            )

    def say(self, line: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()
