"""logprob[n] = (h_n W)[target_n] - logsumexp(h_n W), in fp32."""

import jax
import jax.numpy as jnp


def token_logprobs(hidden: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of each target [N] and the log-sum-exp [N] for hidden [N, D] and the head w [D, vocab]."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("nd,dv->nv", hidden.astype(dtype), w.astype(dtype), precision="highest")
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - total, total
