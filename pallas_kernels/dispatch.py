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
"""The kernel that "pallas" tries first; on a CPU it is interpreted."""


def call(op: str, table: Mapping[str, Callable[..., Any]], implementation: str, *args: Any, **kwargs: Any) -> Any:
    """Return the result of the named implementation, or of the first that takes the case.

    "auto" tries the platform's own, "pallas" the kernel first wherever we are. An op that has no kernels at all computes in plain JAX. An
    implementation refuses a case by raising NotImplementedError with the reason. Raises ValueError for a name the table lacks.
    """
    if implementation == "auto":
        names = _NATIVE[platform()]
    elif implementation == "pallas":
        names = (_PALLAS[platform()], "xla")
    elif implementation in _PALLAS.values() and not any(kernel in table for kernel in _PALLAS.values()):
        names = ("xla",)
    elif implementation in table:
        names = (implementation,)
    else:
        raise ValueError(f"{op} has no implementation {implementation!r}; it has {', '.join(table)}")
    refusals = []
    for name in names:
        if name not in table:
            continue
        try:
            result = table[name](*args, **kwargs)
        except NotImplementedError as refusal:
            if len(names) == 1:
                raise
            refusals.append(f"{name}: {refusal}")
            continue
        _log_choice(op, f"{name} ({'; '.join(refusals)})" if refusals else name)
        return result
    raise NotImplementedError(f"no implementation of {op} takes this case ({'; '.join(refusals)})")
