"""Times the conversion of a large random checkpoint both ways beside a plain copy of its files, and tells the peak memory.

    python -m ring_jax.convert.bench [--folder DIR] [--layers 8] [--json FILE] [--verify]

The checkpoint has the width, experts and vocabulary of ring-mini-linear-2.0 and fewer layers. Before each run its input leaves the page
cache (as far as the kernel agrees), and each run ends with its output on disk.
"""

import argparse
import dataclasses
import filecmp
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from ring_jax.config import PRESETS, ModelConfig, to_hf
from ring_jax.convert.names import parameters
from ring_jax.convert.progress import Progress
from ring_jax.convert.to_hf import MAX_SHARD_SIZE, write_folder
from ring_jax.model import Ring

PRESET = "ring-mini-linear-2.0"


def write_random(folder: pathlib.Path, config: ModelConfig) -> None:
    """Write a random bf16 checkpoint of the config, a block at a time."""
    wanted = parameters(nnx.eval_shape(lambda: Ring(config, rngs=nnx.Rngs(0))))
    bf16 = np.dtype(ml_dtypes.bfloat16)
    names = [(name, p.is_balance) for p in wanted for part in p.slices for name in part.tensors]
    dtypes = {name: np.dtype(np.float32) if is_balance else bf16 for name, is_balance in names}
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(1 << 22, np.float32)).astype(bf16)

    def read(path: str, where: tuple[int | slice, ...]) -> np.ndarray:
        shape = [part.stop - part.start for part in where if isinstance(part, slice)]
        size = int(np.prod(shape))
        if len(shape) == 1:
            return np.zeros(shape, bf16) if path.endswith("bias") else np.ones(shape, bf16)
        return np.resize(np.roll(noise, int(rng.integers(len(noise)))), size).reshape(shape)

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**to_hf(config), "torch_dtype": "bfloat16"}, indent=2))
    total = sum(dtypes[name].itemsize * int(np.prod(part.stored_shape)) for p in wanted for part in p.slices for name in part.tensors)
    with Progress(total) as progress:
        write_folder(folder, wanted, dtypes, read, progress, max_shard_size=MAX_SHARD_SIZE)


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _forget(folder: pathlib.Path) -> None:
    """Write a folder's files out and ask the kernel to drop them from the page cache."""
    os.sync()
    for path in _files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(source: pathlib.Path, run: Callable[[], Any]) -> float:
    """Return the seconds of a run, until its output is on disk."""
    _forget(source)
    start = time.perf_counter()
    run()
    os.sync()
    return time.perf_counter() - start


def peak_memory(command: list[str]) -> float:
    """Run a command and return the peak resident memory of its process, GiB."""
    code = "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    done = subprocess.run([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return int(done.stdout.split()[-1]) / 2**20


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m ring_jax.convert.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", metavar="DIR", help="where there is room for four copies (default: the system's temporary folder)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--verify", action="store_true", help="also time the verification")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    args = parser.parse_args()
    config = dataclasses.replace(PRESETS[PRESET], num_layers=args.layers)
    convert = [sys.executable, "-m", "ring_jax.convert"]
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        hf, ours, back, copy = (pathlib.Path(name) / part for part in ("hf", "ours", "back", "copy"))
        write_random(hf, config)
        nbytes = sum(path.stat().st_size for path in _files(hf))

        def add(what: str, source: pathlib.Path, run: Callable[[], float | None]) -> None:
            memory: list[float | None] = []
            seconds = timed(source, lambda: memory.append(run()))
            row = {"what": what, "GB": nbytes / 1e9, "seconds": seconds, "MB/s": nbytes / 1e6 / seconds, "peak GiB": memory[0]}
            rows.append(row)
            print(json.dumps(row), flush=True)

        add("copy", hf, lambda: shutil.copytree(hf, copy) and None)
        shutil.rmtree(copy)
        add("from-hf", hf, lambda: peak_memory([*convert, "from-hf", str(hf), str(ours)]))
        add("to-hf", ours, lambda: peak_memory([*convert, "to-hf", str(ours), str(back)]))
        same = all(filecmp.cmp(path, back / path.name, shallow=False) for path in _files(hf))
        if args.verify:
            from_verify = "import pathlib, sys; from ring_jax.convert.verify import verify; "
            from_verify += (
                "sys.exit(not verify(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), lambda line: print(line, file=sys.stderr)))"
            )
            add("verify", hf, lambda: peak_memory([sys.executable, "-c", from_verify, str(hf), str(ours)]))
        shutil.rmtree(ours)
        shutil.rmtree(back)
        add("copy again", hf, lambda: shutil.copytree(hf, copy) and None)
    print(f"every file came back as it was: {same}")
    if args.json:
        machine = {"machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores", "python": platform.python_version()}
        pathlib.Path(args.json).write_text(json.dumps({**machine, "rows": rows, "same": same}, indent=1))


if __name__ == "__main__":
    main()
