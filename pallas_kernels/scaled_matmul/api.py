"""FP8 products: the op on quantised operands, quantisation, and the differentiable product built on them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.scaled_matmul import pallas_gpu, pallas_tpu, xla
from pallas_kernels.scaled_matmul.quantized import (
    GROUP,
    Product,
    Quantized,
    QuantizedRows,
    as_bytes,
    as_values,
    blocks_of,
    check_gradient,
    columns_of,
    gradient_in_fp8,
    quantize_rows,
    quantize_weights,
    result_dtype,
)


def _jax_triton(*args, **kwargs):
    """The jax-triton kernel, if it can be imported: it is an extra, and refuses to without a CUDA plugin."""
    try:
        from pallas_kernels.scaled_matmul import jax_triton
    except (ImportError, ValueError) as error:
        raise NotImplementedError(f"jax-triton cannot be imported: {str(error).splitlines()[0]}") from error
    return jax_triton.scaled_matmul(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    """The Mosaic GPU kernel; its language takes a second to import."""
    from pallas_kernels.scaled_matmul import mosaic_gpu

    return mosaic_gpu.scaled_matmul(*args, **kwargs)


IMPLEMENTATIONS = {
    "xla": xla.scaled_matmul,
    "pallas_tpu": pallas_tpu.scaled_matmul,
    "pallas_gpu": pallas_gpu.scaled_matmul,
    "jax_triton": _jax_triton,
    "mosaic_gpu": _mosaic_gpu,
}


def scaled_matmul(
    a: Quantized, b: Quantized, *, out_dtype: DTypeLike = jnp.float32, aligned: bool = False, implementation: str = "auto"
) -> Float[Array, "M N"]:
    """Return the product [M, N] of a [M, K] and b [N, K], both contracted along their last axis, accumulated in fp32 and cast once.

    a has a scale for each row and 128 columns, b either that or one for each 128 x 128 block. The sums over 128 columns are the matrix
    unit's; they are scaled and added up in fp32. No size has to be a multiple of 128. With `aligned` a row of the result has the same
    bits whatever rows stand beside it; the kernels always promise that. Not differentiable: see `fp8_matmul`.
    """
    depth = a.values.shape[1]
    for x, name, layouts in ((a, "a", (1,)), (b, "b", (1, GROUP))):
        rows = x.values.shape[0]
        shapes = [(-(-depth // GROUP), -(-rows // height)) for height in layouts]
        if x.values.shape[1] != depth or x.scales.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} is {x.values.shape} with scales {x.scales.shape}; expected ({rows}, {depth}) with scales {wanted}")
    return dispatch.call("scaled_matmul", IMPLEMENTATIONS, implementation, a, b, out_dtype=out_dtype, aligned=aligned)


def fp8_matmul(
    x: Float[Array, "*rows K"] | QuantizedRows,
    w: Float[Array, "K N"] | Quantized,
    *,
    out_dtype: DTypeLike | None = None,
    power_of_two: bool = False,
    returns_fp8: bool = False,
    aligned: bool = False,
    implementation: str = "auto",
) -> Float[Array, "*rows N"] | Product:
    """Return x @ w [*rows, N] of operands quantised to FP8: x per row and 128 columns, w per 128 x 128 block (default dtype: that of x).

    Its gradients are FP8 products as well: dx = dy w^T with dy quantised per row and 128 columns of N and the forward's blocks of w,
    dw = x^T dy with both quantised along the rows. The forward keeps x in FP8 only; of w it keeps nothing but w, which lives anyway or
    is gathered again, and quantises it once more. Other arguments as in `scaled_matmul`, which also promises the rows' bits; gradients
    promise none. With `returns_fp8` the result is a `Product`, for a layer of `fused_layers` that emits dy in FP8, rows and columns; its
    scales are no powers of two.

    x may be in FP8 already, as layers of `fused_layers` emit it, with scales that are no powers of two; without a carrier there is no
    default for `out_dtype`, and no gradient: both raise ValueError. So may w be (`quantize_weights`), without a gradient then.
    """
    rows = quantize_rows(x, power_of_two=power_of_two)
    dtype = result_dtype(rows, out_dtype)
    operands = rows.flat.carrier, *lax.stop_gradient((rows.quantized, rows.columns and as_bytes(rows.columns))), w
    y: Any = _fp8_matmul(*operands, dtype, power_of_two, returns_fp8, aligned, implementation)
    shaped = lambda y: y.reshape(*rows.values.shape[:-1], y.shape[1])
    return y._replace(y=shaped(y.y)) if returns_fp8 else shaped(y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _fp8_matmul(x, rows, columns, w, out_dtype, power_of_two, returns_fp8, aligned, implementation):
    """The product of `rows` and w; x, their carrier, and their columns are there for the gradients."""
    del x, columns
    y = scaled_matmul(rows, blocks_of(w, power_of_two), out_dtype=out_dtype, aligned=aligned, implementation=implementation)
    return Product.of(y) if returns_fp8 else y


def _forward(x, rows, columns, w, *how):
    check_gradient(w)
    return _fp8_matmul(x, rows, columns, w, *how), (columns_of(x, columns, how[1]), w, jnp.zeros(0, x.dtype))


def _backward(out_dtype, power_of_two, returns_fp8, aligned, implementation, residuals, dy):
    columns, w, like = residuals
    dy_rows, dy_columns = gradient_in_fp8(dy, power_of_two)
    blocks = quantize_weights(w, transpose=False, power_of_two=power_of_two)
    dx = scaled_matmul(dy_rows, blocks, out_dtype=like.dtype, implementation=implementation)
    return dx, None, None, scaled_matmul(as_values(columns), dy_columns, out_dtype=w.dtype, implementation=implementation)


_fp8_matmul.defvjp(_forward, _backward)
