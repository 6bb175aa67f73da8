"""`python -m pallas_kernels.aot`: compile every kernel for TPUs and GPUs that are not here, print what their compilers say, check it."""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from typing import Any

from pallas_kernels.aot import case as gates

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = os.environ.get("RING_JAX_GATES_PYTHON", str(ROOT / ".venv-gates/bin/python"))
TIMEOUT = 1800
"""Seconds after which a case is given up."""
_BUNDLES = "packed-bundles-post-ra|pre-delay"


def ptxas(python: str) -> pathlib.Path:
    """Return the ptxas of the environment's nvidia-cuda-nvcc, or else of the machine's CUDA toolkit."""
    found = sorted(pathlib.Path(python).absolute().parents[1].glob("lib/python*/site-packages/nvidia/cu*/bin/ptxas"))
    return found[-1] if found else pathlib.Path(shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas")


def environment(target: str, folder: str, python: str) -> dict[str, str]:
    """Return the environment of a worker: both compilers read their options once, when they are loaded."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if gates.PLATFORMS[target] == "gpu":
        compiler = ptxas(python)
        own = {"RING_JAX_PTXAS": str(compiler), "XLA_FLAGS": f"--xla_dump_to={folder}"}
        mosaic = {"MOSAIC_GPU_DUMP_TO": folder, "PATH": f"{compiler.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        return shared | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"} | own | mosaic
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*({_BUNDLES}).*"
    slice_of_nothing = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
    return shared | slice_of_nothing | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "LIBTPU_INIT_ARGS": flags}


class Worker:
    """A process that compiles cases for one target, started anew after a crash or a timeout."""

    def __init__(self, python: str, target: str, modules: list[str]):
        self.command = lambda folder: [python, "-m", f"pallas_kernels.aot.{gates.PLATFORMS[target]}", target, folder, *modules]
        self.environment = lambda folder: environment(target, folder, python)
        self.process: subprocess.Popen[str] | None = None

    def compile(self, index: int) -> dict[str, Any]:
        """Return the row of the case with this index."""
        if self.process is None:
            self.folder = tempfile.TemporaryDirectory(prefix="aot-")
            self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            dumps = os.path.join(self.folder.name, "dumps", "")
            os.mkdir(dumps)
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
            self.process = subprocess.Popen(self.command(dumps), env=self.environment(dumps), **pipes)
        process = self.process
        assert process.stdin
        assert process.stdout
        answer = ""
        try:
            print(index, file=process.stdin, flush=True)
            late = not select.select([process.stdout], [], [], TIMEOUT)[0]
            answer = "" if late else process.stdout.readline()
        except BrokenPipeError:
            late = False
        if answer:
            return json.loads(answer)
        self.log.seek(0)
        said = [line.strip() for line in self.log if line.strip()]
        self.close()
        what = f"no answer in {TIMEOUT} s" if late else f"the compiler ended with status {process.returncode}"
        return {"kernels": [], "seconds": float(TIMEOUT) if late else 0.0, "error": f"{what}: {' '.join(said[-2:])[:300]}"}

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.folder.cleanup()
            self.process = None


def lines(row: dict[str, Any]) -> list[str]:
    """Return a row as text: a line for each kernel (equal ones share it), under one for the program if it has several, and what failed."""
    title, text = f"{row['kernel']:<38}{row['shape']:<34}{row['target']:<6}", []
    several = len(row["kernels"]) > 1
    if several:
        ratio, size = row["estimate"] / row["floor"], row["memory"] / 2**20
        text.append(
            f"{title}program of {len(row['kernels'])} kernels, {size:.0f} MiB: est {row['estimate'] * 1e6:.2f} us, {ratio:.2f} of the floor"
        )
    calls = collections.Counter(json.dumps(k) for k in row["kernels"])
    for k, number in ((json.loads(kernel), number) for kernel, number in calls.items()):
        size = f"{k['memory'] / 2**10:>9.0f}"
        if "registers" in k:
            work = f"{k['registers']:>5}{k['spills']:>9}{k['issued']:>9}{'':>7}"
        else:
            work = f"{'':>5}{k['spills']:>9}{k['cycles']:>9}{k['empty']:>7.0%}"
        times = f"{k['moved'] / 1e6:>10.2f}{row['floor'] * 1e6:>10.2f}{k['estimate'] * 1e6:>10.2f}{'' if k['known'] else '+':<2}"
        bound = max(k["times"], key=k["times"].get)
        matrix = ", ".join(f"{found} {name}" for name, found in k["instructions"].items())
        called = f"{number} x {k['kernel']}" if number > 1 else k["kernel"]
        label = f"  {called:<76}" if several else title
        text.append(f"{label}{size}{work}{times}{k['estimate'] / row['floor']:>6.2f}  {bound:<8}{matrix}")
    if "unfused" in row:
        fused, unfused = row["moved"] / 1e6, row["unfused"] / 1e6
        text.append(
            f"  moves {fused:.1f} MB; without kernels, as the compiler fuses it, {unfused:.1f} MB: {unfused / fused:.2f} times as many"
        )
    if row["failed"]:
        text.append(f"{'' if text else title:<78} FAILS: {'; '.join(row['failed'])}")
    return text


_NUMBERS = f"{'KiB':>9}{'regs':>5}{'spills':>9}{'cycles':>9}{'empty':>7}{'MB':>10}{'floor us':>10}{'est us':>10}{'ratio':>8}"
HEADER = f"{'kernel':<38}{'shape':<34}{'chip':<6}{_NUMBERS}  bound   matrix instructions"


def main() -> int:
    """Run the gates and return 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description="Compile the kernels for chips that are not here.")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--kernel", default="", metavar="NAME", help="only kernels whose name starts so")
    parser.add_argument("--target", action="append", choices=tuple(gates.PLATFORMS), help="only this chip (repeatable)")
    parser.add_argument("--quick", action="store_true", help="one cheap case of each kernel and chip")
    parser.add_argument("--cases", action="append", metavar="MODULE", help="modules with compile_cases() (default: those of all kernels)")
    parser.add_argument("--python", default=PYTHON, help="the interpreter that has the compilers (make env-gates)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    options = parser.parse_args()
    if not os.access(options.python, os.X_OK):
        print(f"{options.python} is missing: `make env-gates` makes it, --python or RING_JAX_GATES_PYTHON names another", file=sys.stderr)
        return 2
    modules = options.cases or gates.op_modules()
    cases = gates.collect(modules)
    waiting = {target: gates.indices(cases, target, options.kernel, options.quick) for target in options.target or gates.PLATFORMS}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    working, lock = collections.Counter(), threading.Lock()

    def take(target: str) -> int | None:
        with lock:
            return waiting[target].pop(0) if waiting[target] else None

    def run(_: int) -> None:
        """Compile a target's cases until none is left, then help with another's: no process ends long before the others."""
        while True:
            with lock:
                left = [target for target in waiting if waiting[target]]
                if not left:
                    return
                target = min(left, key=lambda target: (working[target], -len(waiting[target])))
                working[target] += 1
            worker = Worker(options.python, target, modules)
            while (index := take(target)) is not None:
                case = cases[index]
                row = {"kernel": case.kernel, "shape": case.shape, "target": target} | worker.compile(index)
                row["failed"] = gates.failures(case, row)
                with lock:
                    found[target, index] = row
                    print("\n".join(lines(row)), flush=True)
            worker.close()
            with lock:
                working[target] -= 1

    print(HEADER, flush=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, range(options.jobs)))
    rows = [found[which] for which in sorted(found)]
    failed = sum(bool(row["failed"]) for row in rows)
    print(f"{len(rows)} rows in {sum(row['seconds'] for row in rows):.0f} s of compiling, {failed} failed")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
