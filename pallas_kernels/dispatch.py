"""Choosing the implementation of an op: walks the op's table in the platform's order and logs the choice once."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels.compat import platform

logger = logging.getLogger("pallas_kernels")


@functools.cache
def _log_choice(op: str, name: str) -> None:
    logger.info("%s: %s", op, name)


_NATIVE = {"cpu": ("xla",), "gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla")}
"""What "auto" tries on a platform, in this order. An interpreted kernel and one that is not the platform's own are chosen by name only."""
_PALLAS = {"cpu": "pallas_tpu", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}
"""What "pallas" stands for; on a CPU it is interpreted."""


def call(op: str, table: Mapping[str, Callable[..., Any]], implementation: str, *args: Any, **kwargs: Any) -> Any:
    """Return the result of the named implementation, or with "auto" of the platform's first that takes the case.

    "pallas" is the platform's kernel. An op that has no kernels at all computes in plain JAX then. An implementation refuses a case by
    raising NotImplementedError with the reason. Raises ValueError for a name the table lacks.
    """
    if implementation != "auto":
        name = _PALLAS[platform()] if implementation == "pallas" else implementation
        if name in _PALLAS.values() and not any(other in table for other in _PALLAS.values()):
            name = "xla"
        if name not in table:
            raise ValueError(f"{op} has no implementation {name!r}; it has {', '.join(table)}")
        _log_choice(op, name)
        return table[name](*args, **kwargs)
    refusals = []
    for name in _NATIVE[platform()]:
        if name not in table:
            continue
        try:
            result = table[name](*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        _log_choice(op, name)
        return result
    raise NotImplementedError(f"no implementation of {op} takes this case ({'; '.join(refusals)})")
