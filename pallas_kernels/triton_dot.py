"""Two operations that Pallas' Triton lowering has no words for: a product that starts from an accumulator, and a fused multiply-add.

`dot(a, b, acc)` fixes which addition is folded into the matrix unit's accumulator; written as `acc + a @ b` that is the compiler's
choice. Its e4m3 products are FP8 `wgmma` on Hopper: Triton's default asks for more precise sums and takes fp16 `mma.sync` instead.
Outside of a Triton kernel, and in interpret mode, both are their plain equations.
"""

import jax
import jax.numpy as jnp
from jax import core, lax
from jax._src.pallas.triton.lowering import register_lowering  # Pallas has no public way to add a rule
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir.dialects import math
from jaxlib.triton import dialect

ANY_LENGTH = 1 << 30
"""How many e4m3 products the matrix unit may sum in its own accumulator (about 14 bits of mantissa): as many as the dot is deep."""


def _plain_dot(a: jax.Array, b: jax.Array, acc: jax.Array) -> jax.Array:
    """fp32 operands: the products of narrower types are exact in it, and XLA:CPU's own bf16 product differs between versions."""
    return acc + lax.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def _plain_fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return a * b + c


dot_p = Primitive("accumulating_dot")
dot_p.def_impl(jax.jit(_plain_dot))
dot_p.def_abstract_eval(lambda a, b, acc: core.ShapedArray(acc.shape, acc.dtype))
mlir.register_lowering(dot_p, mlir.lower_fun(_plain_dot, multiple_results=False))


@register_lowering(dot_p)
def _triton_dot(context, a, b, acc):
    del context
    return dialect.dot(a, b, acc, input_precision=dialect.InputPrecision.IEEE, max_num_imprecise_acc=ANY_LENGTH)


fma_p = Primitive("fused_multiply_add")
fma_p.def_impl(jax.jit(_plain_fma))
fma_p.def_abstract_eval(lambda a, b, c: core.ShapedArray(c.shape, c.dtype))
mlir.register_lowering(fma_p, mlir.lower_fun(_plain_fma, multiple_results=False))


@register_lowering(fma_p)
def _triton_fma(context, a, b, c):
    del context
    return math.fma(a, b, c)


def dot(a: jax.Array, b: jax.Array, acc: jax.Array | None = None) -> jax.Array:
    """Return acc + a @ b [M, N] in fp32, summed in this order; a [M, K] and b [K, N] have one dtype (fp32 operands are not rounded).

    Without an accumulator the sum starts from zero.
    """
    if a.dtype != b.dtype:
        raise ValueError(f"the operands have dtypes {a.dtype} and {b.dtype}; the matrix unit takes one")
    shape = (a.shape[0], b.shape[1])
    if a.shape[1] != b.shape[0] or (acc is not None and acc.shape != shape):
        raise ValueError(f"a {a.shape} times b {b.shape} does not fit an accumulator of {shape if acc is None else acc.shape}")
    acc = jnp.zeros(shape, jnp.float32) if acc is None else acc.astype(jnp.float32)
    return dot_p.bind(a, b, acc)


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return a * b + c, rounded once; a and b broadcast to c's shape."""
    return fma_p.bind(jnp.broadcast_to(a, c.shape), jnp.broadcast_to(b, c.shape), c)
