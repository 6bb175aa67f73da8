"""Multi-token prediction: layers that predict one token further each, for training and speculative decoding (arXiv 2412.19437)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ring_jax import sharding
from ring_jax.block import Block, remat
from ring_jax.cache import Placement
from ring_jax.config import ModelConfig
from ring_jax.layers import RMSNorm, weight
from ring_jax.moe import RouterStats
from ring_jax.numerics import Numerics


class MultiTokenPrediction(nnx.Module):
    """x = W concat(norm(embedding of the next token), norm(hidden)), one softmax + MoE block, a final norm of its own."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, rngs: nnx.Rngs):
        self.numerics = numerics
        self.embedding_norm, self.hidden_norm = RMSNorm(config, numerics), RMSNorm(config, numerics)
        self.project = weight(rngs, (2 * config.hidden_size, config.hidden_size), (None, "embed"), config.init_scale)
        self.block = Block(config, numerics, "softmax", "moe", rngs=rngs)
        self.norm = RMSNorm(config, numerics)

    def __call__(
        self, hidden: Float[Array, "B T D"], next_embedding: Float[Array, "B T D"], place: Placement
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return the hidden states that predict the token after the next one, and what the router did.

        hidden: after the final norm of the model (or of the layer before); next_embedding: of the token that follows each position.
        """
        graph, state = nnx.split(self)

        def predict(state, hidden, next_embedding):
            layer = nnx.merge(graph, sharding.gather(state))
            both = jnp.concatenate([layer.embedding_norm(next_embedding)[1], layer.hidden_norm(hidden)[1]], axis=-1)
            x, _, stats = layer.block(self.numerics.matmul(both, layer.project.get_value()).astype(jnp.float32), place, None)
            assert stats is not None
            return layer.norm(x)[1], stats

        return remat(predict, self.numerics.remat)(state, hidden, next_embedding)
