"""How a forward is computed: aligned or fast, in which dtype, with which rematerialisation; and the one jit that keeps its promise."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.compat import compiler_options, dot_operand
from pallas_kernels.fused_layers import swiglu
from pallas_kernels.grouped_matmul import Groups, combine_groups, gather_weights, grouped_mlp
from pallas_kernels.grouped_scaled_matmul import fp8_gather_grouped_matmul, fp8_grouped_matmul
from pallas_kernels.matmul import itself, matmul
from pallas_kernels.scaled_matmul import Quantized, QuantizedRows, fp8_matmul, quantize_weights

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}
"""Precisions, and the dtype of weights and activations in each: FP8 is what products quantise their operands to."""
REMAT_POLICIES = ("none", "full", "mixers")


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model's equations are evaluated.

    aligned: a token's log-probability has the same bits in training, prefill and decode, whatever stands beside it.
    dtype: of weights and activations in products; the residual stream, states, statistics, router and logits are fp32.
    remat: what the gradient recomputes: "none", "full" (whole blocks) or "mixers" (all but the mixers' outputs).
    fp8: products with weights (not the router's, nor the head's) quantise both operands, in blocks, forward and backward.
    gradients: the forward may be differentiated; in FP8, layers in front of products then leave what the gradients of weights take, too,
        and weights are quantised on their way to products, which a model without gradients may hold in FP8 (`inference_weights`).
    unroll: layers that one turn of a loop over layers computes (what it keeps for the gradient is then not copied into a stack).
    kernels: how ops are computed: "auto" (the platform's best), "xla", "pallas" (on a CPU: interpreted), or an implementation's name.
    """

    aligned: bool = True
    dtype: str = "float32"
    fp8: bool = False
    gradients: bool = True
    remat: str = "none"
    unroll: int = 1
    kernels: str = "auto"

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"unknown remat policy {self.remat!r}; known: {', '.join(REMAT_POLICIES)}")

    @classmethod
    def of(cls, precision: str, **others: Any) -> "Numerics":
        """Return the numerics of a precision by its name in DTYPES."""
        return cls(dtype=DTYPES[precision], fp8=precision == "fp8", **others)

    @property
    def precision(self) -> str:
        """The name of the precision of products."""
        return next(name for name in DTYPES if DTYPES[name] == self.dtype and (name == "fp8") == self.fp8)

    @property
    def ops(self) -> dict[str, Any]:
        """Arguments that every op of `pallas_kernels` takes."""
        return {"aligned": self.aligned, "implementation": self.kernels}

    def emit(self, plain: bool = False) -> tuple[str, ...]:
        """Return how a layer in front of products with weights leaves its rows (see `fused_layers`), `plain` if others read them, too."""
        if not self.fp8:
            return ("plain",)
        return ("plain",) * plain + ("rows",) + ("columns",) * self.gradients

    def matmul(
        self,
        x: jax.Array | QuantizedRows,
        w: jax.Array | Quantized,
        epilogue: Callable = itself,
        rows: Sequence = (),
        weights: Sequence = (),
    ) -> Any:
        """Return `matmul` of rows x [*rows, D] and a weight w [D, F], and what follows it, in the precision of products."""
        if self.fp8:
            returns_fp8 = self.gradients and epilogue is not itself  # layers emit the gradients of what they read, too
            y = fp8_matmul(x, w, out_dtype=self.dtype, returns_fp8=returns_fp8, **self.ops)
            return epilogue(y, *rows, *weights, **self.ops)
        assert isinstance(x, jax.Array)
        assert isinstance(w, jax.Array)
        return matmul(x, w, epilogue, rows, weights, **self.ops)

    def grouped_mlp(
        self,
        x: jax.Array | QuantizedRows,
        w_in: jax.Array | Quantized,
        w_out: jax.Array | Quantized,
        groups: Groups,
        weights: jax.Array,
        row_tile: int,
    ) -> jax.Array:
        """Return `grouped_mlp` of tokens x [N, D], in the precision of products."""
        if self.fp8:
            num_slots, how = weights.shape[1], {"row_tile": row_tile, "out_dtype": self.dtype, "implementation": self.kernels}
            y = fp8_gather_grouped_matmul(x, w_in, groups, num_slots, returns_fp8=self.gradients, **how)
            hidden = swiglu(y, gather_weights(weights, groups), emit=self.emit(), **self.ops)
            out: Any = fp8_grouped_matmul(hidden, w_out, groups.tiles, **how)
            return combine_groups(out, groups, num_slots, implementation=self.kernels)
        assert isinstance(x, jax.Array)
        assert isinstance(w_in, jax.Array)
        assert isinstance(w_out, jax.Array)
        return grouped_mlp(x, w_in, w_out, groups, weights, row_tile=row_tile, **self.ops)


def name(x: Any, label: str) -> Any:
    """Return x, named for remat policies and for the alignment report, which compares named values of two programs.

    Of rows in FP8 the values are named, which all programs have: a difference of scales is seen in what follows.
    """
    return x._replace(values=checkpoint_name(x.values, label)) if isinstance(x, QuantizedRows) else checkpoint_name(x, label)


def jit(fun: Callable, numerics: Numerics, **kwargs: Any) -> Any:
    """Return `jax.jit(fun)` for a program's entry."""
    return jax.jit(fun, compiler_options=compiler_options(numerics.aligned) or None, **kwargs)


class Table(nnx.Variable):
    """A constant of the config (rotary tables, decays): made on the host, an input of every program, in no checkpoint."""


class BalanceBias(nnx.Variable):
    """The router's selection bias: moved by the loads, never by a gradient; checkpointed."""


def round_weight(weight: jax.Array, dtype: str) -> jax.Array:
    """Return a weight rounded to the dtype of products, in the storage that a product takes on this platform (see `dot_operand`)."""
    return dot_operand(weight.astype(dtype))


def round_weights(params: Any, dtype: str) -> Any:
    """Return the parameters as the forward reads them; those marked `keep_fp32` (routers) stay, and those in FP8. Idempotent."""

    def leaf(variable: nnx.Variable) -> nnx.Variable:
        if variable.get_metadata("keep_fp32", False) or isinstance(variable.get_value(), Quantized):
            return variable
        return variable.replace(round_weight(variable.get_value(), dtype))

    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


_quantize = jax.jit(quantize_weights)  # at once: by itself each step would leave an array of the weight's size


def inference_weights(params: Any, how: Numerics) -> Any:
    """Return the parameters as a model that is loaded holds them: rounded once, and quantised once where products take them in FP8.

    They are the very numbers that training's products quantise on the way. With `how.gradients` all stay in the dtype of products.
    """

    def leaf(variable: nnx.Variable) -> nnx.Variable:
        if not variable.get_metadata("fp8", False) or isinstance(variable.get_value(), Quantized):
            return variable
        return variable.replace(_quantize(variable.get_value()))

    params = round_weights(params, how.dtype)
    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, nnx.Variable)) if how.fp8 and not how.gradients else params


def num_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
