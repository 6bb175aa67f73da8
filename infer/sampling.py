"""Choosing the next token: greedy, temperature, top-k, top-p, reproducible by seed whatever the batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top-k must be at least 0, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1, not {self.top_p}")


def sample(logits: Float[Array, "B vocab"], positions: Int[Array, " B"], seed: UInt32[Array, ""], sampling: Sampling) -> Int[Array, " B"]:
    """Return one token a row for the given positions.

    The noise of a row depends on the seed and the row's position alone: a prompt gives the same text in any slot of any batch.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = truncate(logits / sampling.temperature, sampling)
    key = jax.random.key(seed)
    noise = jax.vmap(lambda p: jax.random.gumbel(jax.random.fold_in(key, p), logits.shape[-1:]))(positions)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def truncate(logits: Float[Array, "B vocab"], sampling: Sampling) -> Float[Array, "B vocab"]:
    """Return the logits with those outside the top k, and outside the smallest set of probability top_p, at -inf.

    Ties with the last token that is in stay in; at least one token does.
    """
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        inside = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p  # mass before the token
        least = jnp.where(inside, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits
