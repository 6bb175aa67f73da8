"""Differences between the jax versions and platforms the project supports, in one place."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

__all__ = ["ClosedJaxpr", "Jaxpr", "Literal", "bind_equation", "dot_general", "dot_operand"]


def bind_equation(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of a jaxpr's equation for these inputs."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # jax before 0.10 kept functions apart
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def dot_operand(x: jax.Array) -> jax.Array:
    """Return x as an operand of a product with fp32 accumulation on this platform.

    XLA:CPU's own bf16 product differs between versions and shapes; products of bf16 values are exact in fp32, so there the operands
    are upcast. Everywhere else the matrix units take bf16 directly.
    """
    return x.astype(jnp.float32) if jax.default_backend() == "cpu" else x


def dot_general(a: jax.Array, b: jax.Array, contract: tuple, batch: tuple = ((), ())) -> jax.Array:
    """Return `lax.dot_general` of two arrays of one dtype, accumulated and returned in fp32."""
    return lax.dot_general(dot_operand(a), dot_operand(b), (contract, batch), preferred_element_type=jnp.float32)
