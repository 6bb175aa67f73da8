"""How the tests of the kernels run: programs compiled whole as at an entry of the project, and their float64 twins."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import unoptimised

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}

ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"))
"""Marks of what runs a GPU's kernels on a GPU; where there is none they are interpreted."""


_KERNEL_DTYPE = {"pallas_tpu": "fp32", "pallas_gpu": "bf16"}


def modes_and_dtypes(modes: Iterable[str], cases: Iterable | None = None, native_cases: Iterable | None = None) -> list:
    """Return the parameters (mode, dtype) of a test of bits, or (mode, dtype, case), with those of a GPU's kernel on a GPU.

    Interpreted kernels differ from plain JAX in their loads and stores, not in their roundings: one dtype each, the other one is slow.
    """
    each = lambda cases: [()] if cases is None else [(case,) for case in cases]
    slow = lambda mode, dtype: [pytest.mark.slow] if _KERNEL_DTYPE.get(mode, dtype) != dtype else []
    native = [(dtype, *case) for dtype in DTYPES for case in each(cases if native_cases is None else native_cases)]
    label = lambda how: "-".join(["native", *map(str, how)])
    return [
        *(pytest.param(mode, dtype, *case, marks=slow(mode, dtype)) for mode in modes for dtype in DTYPES for case in each(cases)),
        *(pytest.param("pallas_gpu", *how, marks=ON_GPU, id=label(how)) for how in native),
    ]


def with_native(modes: Iterable, cases: Iterable, released: Iterable) -> list:
    """Return the parameters (mode, case): all pairs, and on a GPU its kernel with these cases and those of the released models' sizes."""
    native = (pytest.param("pallas_gpu", case, marks=ON_GPU, id=f"native-{case}") for case in (*cases, *released))
    return [*itertools.product(modes, cases), *native]


def on_host(f: Callable) -> Callable:
    """Return the same function with numpy arrays as results: to look at a part of one, nothing must be compiled."""
    return lambda *args, **kwargs: jax.tree.map(np.asarray, f(*args, **kwargs))


def jit(f: Callable, options: Mapping[str, Any] = MappingProxyType({}), **how: Any) -> Callable:
    """Return f as an aligned program, with results on the host: intermediates are rounded where the tile says."""
    return on_host(jax.jit(f, compiler_options={"xla_allow_excess_precision": False, **options}, **how))


jit_for_values = functools.partial(jit, options=unoptimised.OPTIONS)
"""The same where only values are looked at, to a tolerance: it compiles in a fraction of the time."""


def jit_of(implementation: str) -> Callable:
    """Return the jit of tests of an implementation's bits (see tests/unoptimised.py).

    Lightning attention's take `jit`: how a CPU's compiler rounds exponentials depends on the loop they stand in, unoptimised.
    """
    return jit_for_values if "pallas" in implementation else jit


def with_gradients(f: Callable) -> Callable:
    """Return the function (inputs, cotangents) -> (f(*inputs), gradients of the inputs)."""

    def run(inputs, cotangents):
        out, pull_back = jax.vjp(f, *inputs)
        return out, pull_back(cotangents)

    return run


def in_float64(f: Callable, *args: Any) -> Any:
    """Return f of the arguments, all floating-point arrays as float64, as numpy arrays. `f` is compiled once if it is the same object."""
    double = lambda x: np.asarray(x).astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)
    with jax.enable_x64(True):
        return _compiled(f)(*jax.tree.map(double, args))


_compiled = functools.cache(jit_for_values)


def random_like(tree: Any, seed: int = 1) -> Any:
    """Return standard normal numpy arrays of the shapes and dtypes of a tree of arrays or shape structs."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), tree)
