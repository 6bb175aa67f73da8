"""AdamW with warmup, by optax: decay that spares norms and biases, clipping by the global norm."""

from typing import Any

import jax
import optax
from flax import nnx

from ring_jax.train.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warmup, then constant, cosine or linear to the last of `steps`."""
    rate, rest = config.learning_rate, max(steps - config.warmup, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(rate, rate * config.final_fraction, rest),
    }[config.schedule]
    if not config.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(rate / config.warmup, rate, max(config.warmup - 1, 1)), after], [config.warmup])


def decays(params: Any) -> Any:
    """Return which parameters decay: matrices, not norms or biases. The shape that counts is that of one layer, not of a stack."""
    leaf = lambda variable: variable.replace(len(variable.get_metadata("full_shape")) > 1)
    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimiser of a run of `steps` steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )
