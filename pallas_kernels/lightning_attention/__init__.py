"""Lightning attention: linear attention with a constant decay per head, chunked, with an exact chunk-buffered decode step."""

from pallas_kernels.lightning_attention.api import fold_full_chunks, lightning_attention, lightning_attention_step

__all__ = ["fold_full_chunks", "lightning_attention", "lightning_attention_step"]
