"""The memory-bound layers between the products, each one read and one write: norms, gates, rotary embedding, routing."""

from pallas_kernels.fused_layers.api import gated_group_norm, qk_norm_rope, residual_rms_norm, route, swiglu

__all__ = ["gated_group_norm", "qk_norm_rope", "residual_rms_norm", "route", "swiglu"]
