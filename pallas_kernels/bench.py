"""`python -m pallas_kernels.bench`: the benchmarks of all ops, each in a process of its own, and their records in one file."""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from pallas_kernels.benchmark import options

OPS = [path.parent.name for path in sorted(pathlib.Path(__file__).parent.glob("*/bench.py"))]


def main() -> None:
    """Run the benchmarks; exit status 1 if one of them fails. The file is written after each: what was measured is never lost."""
    parser = options(argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__))
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be given again")
    arguments = parser.parse_args()
    joined: dict[str, Any] = {"ops": {}}
    failed = False
    for op in arguments.op or OPS:
        with tempfile.TemporaryDirectory() as folder:
            written = pathlib.Path(folder) / "records.json"
            command = [sys.executable, "-m", f"pallas_kernels.{op}.bench", "--json", str(written), "--case", arguments.case]
            failed |= subprocess.run([*command, *(["--quick"] if arguments.quick else [])], check=False).returncode != 0
            print(flush=True)
            if written.exists():
                records = json.loads(written.read_text(encoding="utf-8"))
                joined["machine"] = records.pop("machine")
                joined["ops"][records.pop("op")] = records
        if arguments.json:
            pathlib.Path(arguments.json).write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
