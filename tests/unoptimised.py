"""Compilation in a fraction of the time, for tests that compare values to a tolerance, or a program with itself.

Where the bits of two programs are compared, they are compiled as users compile them: it is the optimised programs that must agree.
Interpreted kernels are an exception where they agree in either way: what a CPU's compiler makes of them says nothing about their
chips. With RING_JAX_TEST_OPTIMISED=1 everything is compiled as users do (`make test-slow`).
"""

import os

import jax


def _is_known(option: str, value: int | bool) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


OPTIONS: dict[str, int | bool] = {}
if jax.default_backend() == "cpu" and not os.environ.get("RING_JAX_TEST_OPTIMISED"):
    _wanted = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # newer versions have no other emitters
    OPTIONS |= {option: value for option, value in _wanted.items() if _is_known(option, value)}


def xla_flags() -> str:
    """Return the XLA_FLAGS that give a process of its own the same options."""
    flags = (f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
    return " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
