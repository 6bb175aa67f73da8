"""What the commands share."""

import argparse
import typing

KERNELS = ("auto", "xla", "pallas")
"""How ops may be computed; see `numerics.Numerics`."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> typing.NoReturn:
        """Print the mistake and exit with status 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def show_kernels() -> None:
    """Print on stderr which implementation of each op a program is traced with, once."""
    import logging

    logger = logging.getLogger("pallas_kernels")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False  # absl's handler would say it again
    logger.setLevel(logging.INFO)
