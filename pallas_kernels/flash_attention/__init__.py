"""Blockwise causal softmax attention: grouped queries, packed segments, pages of keys, one order of key blocks in every mode."""

from pallas_kernels.flash_attention.api import flash_attention, flash_attention_paged

__all__ = ["flash_attention", "flash_attention_paged"]
