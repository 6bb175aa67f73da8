"""Differences between the jax versions and platforms the project supports, in one place."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal
from jax.typing import DTypeLike

__all__ = ["Literal", "bind_equation", "dot_cast", "dot_general", "dot_operand", "open_jaxpr", "pin", "scan_counts"]


def bind_equation(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of a jaxpr's equation for these inputs."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # jax before 0.10 kept functions apart
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return the jaxpr and the constants of a closed jaxpr, or of an equation's parameter that may be open (jax 0.12 has one type)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many of a scan equation's inputs are constants and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax >= 0.12
    return len(consts), len(carry)


def dot_operand(x: jax.Array) -> jax.Array:
    """Return x as an operand of a product with fp32 accumulation on this platform.

    XLA:CPU's own bf16 product differs between versions and shapes; products of bf16 values are exact in fp32, so there the operands
    are upcast. Everywhere else the matrix units take bf16 directly.
    """
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else x


def dot_cast(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return fp32 intermediate values as an operand of a product whose inputs are of this dtype.

    They are rounded to it, as the matrix units want them; not on a CPU, where products are in fp32 and rounding is work for nothing.
    """
    return x if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else x.astype(dtype)


def dot_general(a: jax.Array, b: jax.Array, contract: tuple, batch: tuple = ((), ())) -> jax.Array:
    """Return `lax.dot_general` of two arrays of one dtype, accumulated and returned in fp32."""
    return lax.dot_general(dot_operand(a), dot_operand(b), (contract, batch), preferred_element_type=jnp.float32)


def pin(tree: Any, aligned: bool = True) -> Any:
    """Return the arrays, which no fusion then crosses, if aligned.

    XLA:CPU has several emitters of fused loops, and they do not contract a multiply and an add alike: which one gets an expression
    depends on what stands around it (a dynamic-update-slice, a slice). Between two pins an expression is compiled the same everywhere.
    """
    return lax.optimization_barrier(tree) if aligned else tree
