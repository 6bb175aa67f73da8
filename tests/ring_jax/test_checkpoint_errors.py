"""What is said when a save fails: one line about the first error, nothing about those behind it."""

import logging

import pytest

from ring_jax import checkpoint


@pytest.mark.parametrize(
    ("error", "is_said"),
    [
        (OSError(28, "No space left on device"), False),  # another of the save's files has found the disk full already
        (RuntimeError("Event loop is closed"), False),
        (ValueError("something else"), True),
    ],
)
def test_late_errors_of_a_save_are_not_logged(caplog, error, is_said):
    assert checkpoint.reason(error)
    with caplog.at_level(logging.ERROR):
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert bool(caplog.records) == is_said
