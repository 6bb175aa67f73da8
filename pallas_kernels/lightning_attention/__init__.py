"""Lightning attention: linear attention with a constant decay per head, chunked, with an exact chunk-buffered decode step."""

from pallas_kernels.lightning_attention.api import Step, lightning_attention, lightning_attention_step, lightning_attention_verify

__all__ = ["Step", "lightning_attention", "lightning_attention_step", "lightning_attention_verify"]
