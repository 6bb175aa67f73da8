"""Random checkpoints of any config."""

import numpy as np

from ring_jax.config import ModelConfig

Tensors = dict[str, np.ndarray]


def random_tensors(config: ModelConfig, seed: int = 0, scale: float = 0.25) -> Tensors:
    """Return a random checkpoint of this config, fp32, with every norm and bias away from its initial value."""
    rng = np.random.default_rng(seed)
    width, heads, kv, size = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_size
    tensors: Tensors = {}

    def add(name: str, *shape: int, about: float = 0.0) -> None:
        tensors[name] = (about + scale * rng.standard_normal(shape)).astype(np.float32)

    def swiglu(p: str, ffn: int) -> None:
        add(p + "gate_proj.weight", ffn, width)
        add(p + "up_proj.weight", ffn, width)
        add(p + "down_proj.weight", width, ffn)

    add("model.word_embeddings.weight", config.vocab_size, width)
    add("model.norm.weight", width, about=1)
    if not config.tie_embeddings:
        add("lm_head.weight", config.vocab_size, width)
    for layer in range(config.num_layers + config.num_mtp_layers):
        p, further = f"model.layers.{layer}.", layer >= config.num_layers
        linear = not further and config.mixer(layer) == "linear"
        add(p + "input_layernorm.weight", width, about=1)
        add(p + "post_attention_layernorm.weight", width, about=1)
        add(p + "attention.query_key_value.weight", (3 * heads if linear else heads + 2 * kv) * size, width)
        add(p + "attention.query_layernorm.weight", size, about=1)
        add(p + "attention.key_layernorm.weight", size, about=1)
        add(p + "attention.dense.weight", width, heads * size)
        if linear:
            add(p + "attention.g_proj.weight", heads * size, width)
            add(p + "attention.g_norm.weight", heads * size, about=1)
        if further:
            for name in ("enorm", "hnorm", "final_layernorm"):
                add(f"{p}{name}.weight", width, about=1)
            add(p + "eh_proj.weight", width, 2 * width)
        if layer < config.num_dense_layers:
            swiglu(p + "mlp.", config.ffn_size)
            continue
        add(p + "mlp.gate.weight", config.num_experts, width)
        add(p + "mlp.gate.expert_bias", config.num_experts)
        for e in range(config.num_experts):
            swiglu(f"{p}mlp.experts.{e}.", config.expert_size)
        if config.num_shared_experts:
            swiglu(p + "mlp.shared_experts.", config.shared_expert_size)
    return tensors
