"""Choosing the implementation of an op: walks the op's table and logs the choice once."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("pallas_kernels")


@functools.cache
def _log_choice(op: str, name: str) -> None:
    logger.info("%s: %s", op, name)


def call(op: str, table: Mapping[str, Callable[..., Any]], implementation: str, *args: Any, **kwargs: Any) -> Any:
    """Return the result of the named implementation, or with "auto" of the first in the table that takes the case.

    An implementation refuses a case by raising NotImplementedError with the reason. Raises ValueError for a name the table lacks.
    """
    if implementation != "auto":
        if implementation not in table:
            raise ValueError(f"{op} has no implementation {implementation!r}; it has {', '.join(table)}")
        _log_choice(op, implementation)
        return table[implementation](*args, **kwargs)
    refusals = []
    for name, function in table.items():
        try:
            result = function(*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        _log_choice(op, name)
        return result
    raise NotImplementedError(f"no implementation of {op} takes this case ({'; '.join(refusals)})")
