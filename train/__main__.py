"""The training command: python -m ring_jax.train."""

import shlex
import signal
import sys

from ring_jax.command_line import show_kernels
from ring_jax.hugepages import use_huge_pages
from ring_jax.train.config import parse_args, run_folder


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 with one line on stderr for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config, model, vocab_given = parse_args(arguments)
        from ring_jax.train import loop

        show_kernels()
        ended = loop.train(config, model, vocab_given)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    folder = run_folder(config)
    if ended.signal is not None:
        resume = shlex.join([a for a in arguments if a not in ("--resume", "--overwrite")] + ["--resume"])
        print(
            f"{signal.Signals(ended.signal).name}: saved step {ended.step}; continue with: python -m ring_jax.train {resume}",
            file=sys.stderr,
        )
        return 0
    print(
        f"done: {folder} (loss.png shows the curve). Next: python -m ring_jax.infer --checkpoint {folder} --prompt 'def '", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main())
