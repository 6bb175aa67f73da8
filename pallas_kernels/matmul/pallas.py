"""What the Pallas implementations share: the product's gradients, which are products too, and what follows it."""

from collections.abc import Callable

import jax

from pallas_kernels.compat import dot_operand


def matmul(kernel: Callable, x, w, epilogue, rows, weights, *, aligned, out_dtype):
    """See `api.matmul`; rows are aligned in any case.

    `kernel(a, b, axes, dtype, aligned)` is the product of two matrices over one axis of each, accumulated in fp32.
    """
    del aligned
    x, w = dot_operand(x), dot_operand(w)  # on a CPU weights are held as products take them
    if x.dtype != w.dtype or x.dtype not in ("bfloat16", "float32"):
        raise NotImplementedError(f"the operands are {x.dtype} and {w.dtype}, not both bfloat16 or float32")

    @jax.custom_vjp
    def product(x, w):
        return kernel(x, w, (1, 0), out_dtype, True)

    def forward(x, w):
        return product(x, w), (x, w)

    def backward(residuals, dy):
        x, w = residuals
        dy = dy.astype(x.dtype)
        return kernel(dy, w, (1, 1), x.dtype, False), kernel(x, dy, (0, 0), w.dtype, False)

    product.defvjp(forward, backward)
    return epilogue(product(x, w), *rows, *weights)
