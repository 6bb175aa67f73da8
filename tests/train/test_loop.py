"""A training run as its user sees it: its files, resuming, kills at any moment, signals, and one line for every mistake."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from ring_jax import checkpoint
from ring_jax.train.__main__ import main

pytestmark = pytest.mark.usefixtures("all_unoptimised")

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIELDS = {"loss", "nll", "learning_rate", "gradient_norm", "load_imbalance", "tokens_per_second", "scored_tokens", "skipped_steps"}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The arguments of every run: a tiny model on tiny data. With a constant rate they all share their compiled programs."""
    path = tmp_path_factory.mktemp("data") / "some text.jsonl"  # a name that a shell would split
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "boil", "potions"]
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words, k=choose.randint(5, 40))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = ["--model", "test", "--model.num_layers", "2", "--model.period", "2"]
    sizes = ["--seq-len", "128", "--batch-size", "4", "--precision", "fp32", "--tokenizer", "bytes", "--optimizer.warmup", "2"]
    return [*model, *sizes, "--data", str(path)]


def start(arguments, command=("-m", "ring_jax.train")):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command, *map(str, arguments)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Ended(NamedTuple):
    """The status of a run's command, and what it wrote to stderr."""

    returncode: int | str | None
    err: str


def train(*arguments):
    """The command in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return Ended(code, err.getvalue())


def train_apart(*arguments, **options):
    """The command in a process of its own."""
    process = start(arguments, **options)
    _, err = process.communicate(timeout=600)
    return Ended(process.returncode, err)


def succeed(*arguments, train=train):
    done = train(*arguments)
    assert done.returncode == 0, done.err
    assert "Traceback" not in done.err
    return done


def one_line(code, err):
    """The one line on stderr of a user's mistake."""
    assert code == 2, err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert err.rstrip().endswith(errors[0])
    return errors[0]


def metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(folder):
    return [(line["step"], line["loss"]) for line in metrics(folder) if "loss" in line]


def steps_saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def contents(folder):
    """Every file of a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """An uninterrupted run of 8 steps, and its stderr."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    options = ["--checkpoint.every", 2, "--checkpoint.keep_last", 2, "--checkpoint.keep_every", 4, "--eval.every", 4]
    return folder, succeed(*base, *options, "--steps", 8, "--output", folder).err


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to do harm to."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_metrics_have_a_line_a_step(finished):
    lines = metrics(finished[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all(set(line) >= FIELDS for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["learning_rate"] for line in steps] == pytest.approx([1.5e-3] + [3e-3] * 7)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert all({"eval_perplexity", "eval_bits_per_byte"} < set(line) and "loss" not in line for line in evaluations)


def test_the_run_folder(finished):
    folder, err = finished
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (events,) = (folder / "events").glob("events.out.tfevents.*")
    assert events.read_bytes().count(b"gradient_norm") == 8
    assert events.read_bytes().count(b"eval_loss") == 2
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 8
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert steps_saved(folder) == [4, 6, 8]  # every fourth, and the last two
    assert f"ring_jax.infer --checkpoint {folder}" in err.splitlines()[-1]


@pytest.mark.slow
def test_alignment_of_the_run(finished):
    """The report reads a run folder, whose arrays come back on one device, and shards it over four."""
    command = [sys.executable, "-m", "ring_jax.infer", "align", "--checkpoint", str(finished[0]), "--tokens", "150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sharded fsdp=2 expert=2" in done.stdout


def test_a_checkpoint_is_whole_by_itself(copied):
    alone = copied.parent / "elsewhere" / "checkpoints"
    shutil.copytree(copied / "checkpoints" / "6", alone / "6")
    loaded = checkpoint.load(alone / "6")
    assert loaded.tokenizer.to_json() == (copied / "tokenizer.json").read_text()
    assert json.loads(loaded.config.to_json()) == json.loads((copied / "config.json").read_text())["model"]
    assert loaded.config.stop_tokens == (256,)


def test_resume_without_a_run_starts_clean(base, finished, tmp_path):
    succeed(*base, "--steps", 2, "--output", tmp_path / "new", "--resume")
    assert losses(tmp_path / "new") == losses(finished[0])[:2]


def test_resume_continues_and_cuts_the_metrics(base, finished, copied):
    for step in (6, 8):
        shutil.rmtree(copied / "checkpoints" / str(step))
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a run killed while it wrote
    done = succeed(*base, "--steps", 8, "--output", copied, "--resume")
    assert "from step 4" in done.err
    assert losses(copied) == losses(finished[0])
    assert [line["eval_loss"] for line in metrics(copied) if "eval_loss" in line] == [
        line["eval_loss"] for line in metrics(finished[0]) if "eval_loss" in line
    ]


def test_overwrite_replaces(base, finished, copied):
    (copied / "old").touch()
    succeed(*base, "--steps", 2, "--output", copied, "--overwrite")
    assert losses(copied) == losses(finished[0])[:2]
    assert steps_saved(copied) == [2]
    assert not (copied / "old").exists()


def wait_for(process, condition):
    """Wait until the condition holds; fails if the process ends before."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def test_killed_runs_resume_with_the_same_bits(base, tmp_path):
    steps, whole, killed = 20, tmp_path / "whole", tmp_path / "killed"
    succeed(*base, "--steps", steps, "--output", whole)
    saving = lambda step: any((killed / "checkpoints").glob(f"{step}.*tmp*"))
    moments = [
        lambda: len(losses_so_far(killed)) >= 2,  # before the first checkpoint: the next run starts clean
        lambda: len(losses_so_far(killed)) >= 8 and 5 in steps_saved(killed),  # after it: lines past step 5 are cut
        lambda: saving(10),  # while a checkpoint is written
        lambda: saving(15),  # and somewhat later
    ]
    delays = [0, 0, 0, random.Random(0).uniform(0, 0.1)]
    command = [*base, "--steps", steps, "--output", killed, "--checkpoint.every", 5, "--resume"]
    for moment, delay in zip(moments, delays, strict=True):
        process = start(command)
        wait_for(process, moment)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    succeed(*command)
    assert [step for step, _ in losses(killed)] == list(range(1, steps + 1))
    assert losses(killed) == losses(whole)
    assert steps_saved(killed) == [10, 15, 20]
    assert not list((killed / "checkpoints").glob("*tmp*"))


def losses_so_far(folder):
    """The losses of a run that is writing them: its last line may be half of one."""
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines()[:-1] if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_saves(base, finished, tmp_path, number):
    process = start([*base, "--steps", 100000, "--output", tmp_path / "a run", "--checkpoint.every", 100000])
    wait_for(process, lambda: len(losses_so_far(tmp_path / "a run")) >= 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    (last, _) = losses(tmp_path / "a run")[-1]
    assert steps_saved(tmp_path / "a run") == [last]
    assert f"{number.name}: saved step {last}" in err
    command = shlex.split(err.splitlines()[-1].partition("continue with: ")[2])
    assert command[:3] == ["python", "-m", "ring_jax.train"]
    if number == signal.SIGTERM:
        succeed(*command[3:], "--steps", last + 1)
        assert [step for step, _ in losses(tmp_path / "a run")] == list(range(1, last + 2))
        assert losses(tmp_path / "a run")[:8] == losses(finished[0])[: last + 1]


def test_ten_steps_in_a_row_that_are_not_finite(base, tmp_path):
    huge = ["--optimizer.learning_rate", "1e30", "--optimizer.warmup", 0]
    done = train(*base, "--steps", 30, "--output", tmp_path / "run", *huge)
    assert "10 steps in a row" in one_line(*done)
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, *range(1, 11)]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_truncated_checkpoint_is_named(base, copied):
    largest = max((path for path in (copied / "checkpoints" / "8").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    before = contents(copied)
    done = train(*base, "--steps", 9, "--output", copied, "--resume")
    line = one_line(*done)
    assert f"{copied}/checkpoints/8 is damaged" in line
    assert "cannot be read whole" in line
    assert contents(copied) == before
    shutil.rmtree(copied / "checkpoints" / "8")
    assert "from step 6" in succeed(*base, "--steps", 7, "--output", copied, "--resume").err


@pytest.mark.parametrize("file", ["meta/metadata", "tokenizer/metadata", "params/_METADATA", "params/manifest.ocdbt"])
def test_a_truncated_file_of_a_checkpoint_is_named(copied, file):
    os.truncate(copied / "checkpoints" / "8" / file, 50)
    with pytest.raises(ValueError, match="checkpoints/8 is damaged") as error:
        checkpoint.load(copied)
    assert file.partition("/")[0] in str(error.value).partition("damaged")[2]


def test_a_checkpoint_that_cannot_be_written(base, finished, copied):
    """No file may grow beyond a limit that all but the arrays keep: what a full disk is to a save."""
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (85_000, 85_000)); from ring_jax.train.__main__ import main"
    arguments = [*base, "--steps", 20, "--checkpoint.every", 3, "--output", copied, "--resume"]
    done = train_apart(*arguments, command=["-c", f"{program}; sys.exit(main())"])
    line = one_line(*done)
    assert f"{copied}/checkpoints/9 could not be written (File too large)" in line
    assert steps_saved(copied)[-1] == 8
    assert checkpoint.load(copied).config.num_layers == 2
    succeed(*base, "--steps", 9, "--output", copied, "--resume")
    assert losses(copied)[:8] == losses(finished[0])
    assert steps_saved(copied)[-1] == 9


def test_a_full_disk(base, finished, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    try:
        run = shutil.copytree(finished[0], disk / "run")
        for step in (4, 6):
            shutil.rmtree(run / "checkpoints" / str(step))
        (disk / "filling").write_bytes(bytes(shutil.disk_usage(disk).free - 400_000))
        done = train_apart(*base, "--steps", 30, "--checkpoint.every", 3, "--output", run, "--resume")
        assert "No space left on device" in one_line(*done)
        assert steps_saved(run) == [8]
        (disk / "filling").unlink()
        succeed(*base, "--steps", 9, "--output", run, "--resume")
        assert losses(run)[:8] == losses(finished[0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def mistake(capsys, *arguments):
    """The line that these arguments give, which never start a run."""
    done = train(*arguments)
    assert capsys.readouterr().err == ""
    return one_line(*done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nope"], "unknown model preset 'nope'; known presets: ring-mini-linear-2.0, ring-flash-linear-2.0, demo"),
        (["--data", "/no/such/file"], "'/no/such/file'"),
        (["--mesh", "1x3"], "expert=3 does not divide the 8 experts"),
        (["--mesh", "tensor=3"], "tensor=3 does not divide the 4 heads"),
        (["--mesh", "3x1"], "batch size 4 is not divisible by the 3"),
        (["--mesh", "eight"], "'eight'"),
        (["--seq-len", "100"], "100: expected a multiple of 128"),
        (["--seq-len", "2048"], "2048 exceeds the 1024 positions"),
        (["--tokenizer", "words"], "'words'"),
        (["--model.vocab_size", "200"], "257 tokens, more than the model's vocabulary of 200"),
        (["--precision", "fp9"], "'fp9'; known: bf16, fp8, fp32"),
        (["--checkpoint.every", "0"], "checkpoint.every must be at least 1, not 0"),
        (["--optimizer.accumulate", "3"], "accumulate 3 does not divide the batch size 4"),
        (["--steps", "many"], "'many'"),
        (["--stepz", "3"], "--stepz"),
    ],
)
def test_mistakes(base, copied, tmp_path, capsys, arguments, message):
    """One line that names the value; no new folder is left behind, and an old one is not lost."""
    assert message in mistake(capsys, *base, "--output", tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()
    before = contents(copied)
    mistake(capsys, *base, "--output", copied, "--overwrite", *arguments)
    assert contents(copied) == before


@pytest.mark.parametrize(("content", "message"), [(b"", "no document"), (b"caf\xe9 au lait", "not UTF-8")])
def test_data_that_is_none(base, tmp_path, capsys, content, message):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    line = mistake(capsys, *base, "--output", tmp_path / "new", "--data", path)
    assert message in line
    assert str(path) in line
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_not_touched(base, copied, tmp_path, capsys):
    before = contents(copied)
    line = mistake(capsys, *base, "--output", copied)
    assert str(copied) in line
    assert "--resume" in line
    assert "--overwrite" in line
    assert contents(copied) == before
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in mistake(capsys, *base, "--output", tmp_path / "file", "--overwrite")
    assert "--overwrite" in mistake(capsys, *base, "--output", copied, "--overwrite", "--resume")


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--model.hidden_size", "64"], "hidden_size 32 -> 64"), (["--model.vocab_size", "512"], "vocab_size 384 -> 512")],
)
def test_resume_with_another_model_is_refused(base, copied, capsys, change, message):
    before = contents(copied)
    line = mistake(capsys, *base, "--output", copied, "--resume", *change)
    assert message in line
    assert str(copied) in line
    assert contents(copied) == before


def test_a_mistake_is_one_line_of_the_whole_program(base, tmp_path):
    done = train_apart(*base, "--output", tmp_path / "new", "--data", tmp_path / "missing")
    assert done.err == f"{one_line(*done)}\n"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x4", "8x8"])
def test_a_run_on_a_mesh(base, tmp_path, mesh):
    """And its checkpoint goes on on one device."""
    folder, batch = tmp_path / "run", ["--batch-size", 64]
    done = succeed(*base, *batch, "--steps", 3, "--mesh", mesh, "--output", folder, train=train_apart)
    assert f"simulating {int(mesh[0]) * int(mesh[2])} devices" in done.err
    succeed(*base, *batch, "--steps", 5, "--output", folder, "--resume")
    succeed(*base, *batch, "--steps", 5, "--output", tmp_path / "alone")
    for (step, loss), (other_step, other_loss) in itertools.zip_longest(losses(folder), losses(tmp_path / "alone")):
        assert step == other_step
        assert loss == pytest.approx(other_loss, rel=1e-5)
    assert checkpoint.load(folder).config.num_layers == 2
