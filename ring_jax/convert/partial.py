"""A folder that is whole or absent: written under another name, continued by the same conversion after a stop, renamed at the end."""

import pathlib

MARK = ".conversion"


def open_partial(out: pathlib.Path, identity: str) -> pathlib.Path:
    """Return the folder to write in. Raises ValueError if `out` exists or another conversion has left its folder."""
    if out.exists():
        raise ValueError(f"output {out} exists: name another, or remove it")
    partial = out.with_name(out.name + ".partial")
    mark = partial / MARK
    left = partial.exists() and any(path.name != f"{MARK}.new" for path in partial.iterdir())
    if left and not (mark.is_file() and mark.read_text(encoding="utf-8") == identity):
        raise ValueError(f"{partial} is left from another conversion: remove it first")
    partial.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        (partial / f"{MARK}.new").write_text(identity, encoding="utf-8")
        (partial / f"{MARK}.new").rename(mark)
    return partial


def finish(partial: pathlib.Path, out: pathlib.Path) -> None:
    """Give the folder its name."""
    partial.rename(out)
    (out / MARK).unlink()
