"""Grouped products of operands in FP8: each row times the matrix of its group."""

from pallas_kernels.grouped_scaled_matmul.api import fp8_gather_grouped_matmul, fp8_grouped_matmul, grouped_scaled_matmul

__all__ = ["fp8_gather_grouped_matmul", "fp8_grouped_matmul", "grouped_scaled_matmul"]
