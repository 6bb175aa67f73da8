"""Hugging Face checkpoints in and out: the table of names, streamed conversion, verification. The command is `ring_jax.convert`."""
