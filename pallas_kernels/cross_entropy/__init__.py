"""LM head and cross entropy over pieces of the vocabulary: never [B, T, vocab]."""

from pallas_kernels.cross_entropy.api import head_logits, token_logprobs

__all__ = ["head_logits", "token_logprobs"]
