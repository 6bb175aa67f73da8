"""What the commands share."""

import argparse
import typing


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> typing.NoReturn:
        """Print the mistake and exit with status 2."""
        self.exit(2, f"error: {message} (see --help)\n")
