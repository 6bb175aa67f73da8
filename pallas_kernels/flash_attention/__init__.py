"""Blockwise causal softmax attention: grouped queries, packed segments, one order of key blocks in every mode."""

from pallas_kernels.flash_attention.api import flash_attention

__all__ = ["flash_attention"]
