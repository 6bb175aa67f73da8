"""FP8 products: e4m3 operands with a scale for each row and 128 columns or for each 128 x 128 block, and their gradients."""

from pallas_kernels.scaled_matmul.api import fp8_matmul, scaled_matmul
from pallas_kernels.scaled_matmul.quantized import Product, Quantized, QuantizedRows, quantize, quantize_rows, quantize_weights

__all__ = ["Product", "Quantized", "QuantizedRows", "fp8_matmul", "quantize", "quantize_rows", "quantize_weights", "scaled_matmul"]
