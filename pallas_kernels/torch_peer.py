"""Peers written in torch: their arguments are moved once, to the kind of device that jax has, and their results back once.

Importing this file needs torch, which is not a dependency (extra `bench`).
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from pallas_kernels.compat import platform

_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def _device() -> str:
    if platform() == "cpu":
        return "cpu"
    if platform() == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise NotImplementedError("torch has no device here of the kind that jax has")


def tensors(tree: Any) -> Any:
    """Return a tree's arrays as torch tensors with the same bits, on torch's device."""

    def tensor(x):
        x = np.ascontiguousarray(x)
        bits = torch.from_numpy(x.view(_INTEGERS[x.dtype.itemsize]).copy())
        return bits.to(_device()).view(getattr(torch, x.dtype.name))

    return jax.tree.map(tensor, tree)


def arrays(tree: Any) -> Any:
    """Return a tree's torch tensors as jax arrays with the same bits."""

    def array(x):
        bits = x.detach().contiguous().cpu().view(getattr(torch, _INTEGERS[x.element_size()])).numpy()
        return jnp.asarray(bits.view(jnp.dtype(str(x.dtype).removeprefix("torch."))))

    return jax.tree.map(array, tree)


def caller(f: Callable, copies: int, arguments: tuple, positions: Sequence[int], cotangent: jax.Array | None) -> Callable[[int], Any]:
    """Return the i-th call of f: its result on one of the copies of the arguments, and with a cotangent also their gradients."""
    one = tensors(arguments)
    sets = [one, *(jax.tree.map(torch.clone, one) for _ in range(copies - 1))]
    if cotangent is None:

        def forward(i):
            with torch.no_grad():
                return f(*sets[i % copies])

        return forward
    leads = {}
    for each, p in itertools.product(sets, positions):
        each[p].requires_grad_()

    def both(i):
        out = f(*sets[i % copies])
        if out.dtype not in leads:
            leads[out.dtype] = tensors(cotangent).to(out.dtype)
        return out.detach(), torch.autograd.grad(out, [sets[i % copies][p] for p in positions], leads[out.dtype])

    return both


def clock(call: Callable[[int], Any]) -> Callable[[int], float]:
    """Return the function that makes so many calls and returns the seconds of one: by the GPU's own events where there is one."""
    turns = itertools.count()

    def on_cpu(calls):
        start = time.perf_counter()
        for _ in range(calls):
            call(next(turns))
        return (time.perf_counter() - start) / calls

    def on_gpu(calls):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call(next(turns))
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    return on_cpu if _device() == "cpu" else on_gpu
