"""What a conversion tells while it runs: bytes, speed and time left; a bar on a terminal, plain lines otherwise."""

import sys
import time
from types import TracebackType

LINE_SECONDS = 10.0
"""Between progress lines where stderr is no terminal."""


class Progress:
    """Counts bytes towards a total, and tells of it unless `quiet`."""

    def __init__(self, total: int, quiet: bool = False):
        self._quiet = quiet
        self._total, self._done, self._new = total, 0, 0
        self._start = self._said = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._say()

    def skip(self, nbytes: int) -> None:
        """Count bytes that an earlier run has written."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.initial += nbytes
            self._bar.update(nbytes)

    def add(self, nbytes: int) -> None:
        """Count bytes written."""
        self._done += nbytes
        self._new += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif time.monotonic() - self._said > LINE_SECONDS:
            self._say()

    def _say(self) -> None:
        if self._quiet:
            return
        self._said = time.monotonic()
        speed = self._new / max(self._said - self._start, 1e-9)
        left = f", {(self._total - self._done) / speed:,.0f} s left" if speed and self._done < self._total else ""
        unit, size = ("GB", 1e9) if self._total >= 1e9 else ("MB", 1e6)
        print(f"{self._done / size:.2f} of {self._total / size:.2f} {unit}, {speed / 1e6:,.0f} MB/s{left}", file=sys.stderr, flush=True)
