"""How a forward is computed: aligned or fast, in which dtype, with which rematerialisation; and the one jit that keeps its promise."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.compat import compiler_options, dot_operand
from pallas_kernels.matmul import row_tiled

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
REMAT_POLICIES = ("none", "full", "mixers")


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model's equations are evaluated.

    aligned: a token's log-probability has the same bits in training, prefill and decode, whatever stands beside it.
    dtype: of weights and activations in products; the residual stream, states, statistics, router and logits are fp32.
    remat: what the gradient recomputes: "none", "full" (whole blocks) or "mixers" (all but the mixers' outputs).
    unroll: layers that one turn of a loop over layers computes (what it keeps for the gradient is then not copied into a stack).
    kernels: how ops are computed: "auto" (the platform's best), "xla", "pallas" (on a CPU: interpreted), or an implementation's name.
    """

    aligned: bool = True
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    kernels: str = "auto"

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"unknown remat policy {self.remat!r}; known: {', '.join(REMAT_POLICIES)}")

    @property
    def ops(self) -> dict[str, Any]:
        """Arguments that every op of `pallas_kernels` takes."""
        return {"aligned": self.aligned, "implementation": self.kernels}

    def by_rows(self, f: Callable, *rows: jax.Array, weights: Sequence[jax.Array] = ()) -> Any:
        """Return f(*rows, *weights) for rows [B, T, ...] that f treats one by one; aligned, in tiles of rows, so they stay so."""
        if not self.aligned:
            return f(*rows, *weights)
        lead = rows[0].shape[:2]
        out = row_tiled(f, [x.reshape(lead[0] * lead[1], *x.shape[2:]) for x in rows], weights)
        return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), out)


def name(x: jax.Array, label: str) -> jax.Array:
    """Return x, named for remat policies and for the alignment report, which compares named values of two programs."""
    return checkpoint_name(x, label)


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
    """Return the parameters as the forward reads them; those marked `keep_fp32` (routers) stay. Idempotent."""

    def leaf(variable: nnx.Variable) -> nnx.Variable:
        if variable.get_metadata("keep_fp32", False):
            return variable
        return variable.replace(round_weight(variable.get_value(), dtype))

    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def num_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
