"""Parameters and floating-point operations of a model, from its config alone."""

from ring_jax.config import ModelConfig


def _mixer_params(config: ModelConfig, mixer: str) -> int:
    width, heads, size = config.hidden_size, config.num_heads, config.head_size
    if mixer == "linear":
        return 5 * width * heads * size + 2 * size + heads * size
    return (2 * heads + 2 * config.num_kv_heads) * size * width + 2 * size


def _ffn_params(config: ModelConfig, ffn: str, experts: int) -> int:
    width = config.hidden_size
    if ffn == "dense":
        return 3 * width * config.ffn_size
    shared = 3 * width * config.shared_expert_size if config.num_shared_experts else 0
    return width * config.num_experts + experts * 3 * width * config.expert_size + shared


def _layers_params(config: ModelConfig, experts: int) -> int:
    layers = range(config.num_layers)
    total = sum(
        _mixer_params(config, config.mixer(i)) + _ffn_params(config, config.ffn(i), experts) + 2 * config.hidden_size for i in layers
    )
    per_mtp = _mixer_params(config, "softmax") + _ffn_params(config, "moe", experts) + (5 + 2 * config.hidden_size) * config.hidden_size
    return total + config.num_mtp_layers * per_mtp + config.hidden_size


def num_params(config: ModelConfig) -> int:
    """Return all parameters (balancing biases are not parameters)."""
    tables = 1 if config.tie_embeddings else 2
    return _layers_params(config, config.num_experts) + tables * config.vocab_size * config.hidden_size


def num_active_params(config: ModelConfig) -> int:
    """Return the parameters a token meets, without embedding and head (the figure the releases publish)."""
    return _layers_params(config, config.num_active_experts)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the operations of forward and backward a token, without rematerialisation.

    6 times the active parameters and the head, plus 14 (C K + K^2) a head of a linear layer (chunked, arXiv 2510.19338) and 6 K T a
    head of a softmax layer (causal: half of the row of T tokens).
    """
    linear = sum(config.mixer(i) == "linear" for i in range(config.num_layers))
    softmax = config.num_layers - linear + config.num_mtp_layers
    size = config.head_size
    mixing = config.num_heads * (linear * 14 * size * (config.chunk_size + size) + softmax * 6 * size * seq_len)
    return 6.0 * (num_active_params(config) + config.vocab_size * config.hidden_size) + mixing


PEAKS = {"h200": 989e12, "h100": 989e12, "v4": 275e12, "v5p": 459e12, "v5 lite": 197e12, "v5e": 197e12, "v6": 918e12}
"""bf16 operations a second of accelerators, by a part of jax's device kind (the makers' figures, dense)."""


def matmul_ceiling(dtype: str) -> float | None:
    """Return the operations a second one device can do: the maker's figure, or on a CPU the best of a few products (half a second).

    None for an accelerator that is not listed. Simulated CPU devices share the host: each gets its part.
    """
    import time

    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    if device.platform != "cpu":
        return next((peak for name, peak in PEAKS.items() if name in device.device_kind.lower()), None)
    size = 1536
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / jax.device_count()
