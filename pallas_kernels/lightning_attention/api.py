"""Lightning attention: its implementations behind one signature."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import CHUNK_SIZES, dispatch
from pallas_kernels.lightning_attention import pallas_gpu, pallas_tpu, xla

_MODULES = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
IMPLEMENTATIONS = {name: module.lightning_attention for name, module in _MODULES.items()}
STEP_IMPLEMENTATIONS = {name: module.lightning_attention_step for name, module in _MODULES.items()}
VERIFY_IMPLEMENTATIONS = {name: module.lightning_attention_verify for name, module in _MODULES.items()}


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, " H"],
    *,
    state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B chunks"] | None = None,
    length: Int[Array, " B"] | None = None,
    chunk_size: int = 64,
    aligned: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Return the outputs and the fp32 state at the last chunk boundary that `length` has reached.

    Args:
        log_decay: g <= 0 per head; the state is multiplied by exp(g) at each token. It gets no gradient.
        state: fp32 state that enters the first chunk (default zero).
        reset: chunks that start from a zero state (the first chunk of a packed document).
        length: valid tokens a row (default T). Chunks that it does not fill are computed but not folded into the returned state.
        chunk_size: C, one of CHUNK_SIZES. Chunks are counted from the first token given.
        aligned: the forward's bits then equal those of `lightning_attention_step` at every position.
    Differentiable in q, k, v and state. Raises ValueError for another C.
    """
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size {chunk_size} is none of {', '.join(map(str, CHUNK_SIZES))}")
    options = {"state": state, "reset": reset, "length": length, "chunk_size": chunk_size, "aligned": aligned}
    return dispatch.call("lightning_attention", IMPLEMENTATIONS, implementation, q, k, v, log_decay, **options)


class Step(NamedTuple):
    """The output of a decode step, and the slot table after it."""

    out: Float[Array, "B H V"]
    state: Float[Array, "B H K V"]
    key_buffer: Float[Array, "B H C K"]
    value_buffer: Float[Array, "B H C V"]
    state_copy: Float[Array, "B H K V"] | None


def lightning_attention_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    state: Float[Array, "B H K V"],
    key_buffer: Float[Array, "B H C K"],
    value_buffer: Float[Array, "B H C V"],
    log_decay: Float[Array, " H"],
    index: Int[Array, " B"],
    *,
    state_copy: Float[Array, "B H K V"] | None = None,
    may_fold: bool = True,
    aligned: bool = False,
    implementation: str = "auto",
) -> Step:
    """Return one token's output in every slot, and the slots after it: its k and v in row `index` of the open chunk.

    Args:
        state: fp32 states at the start of the open chunks.
        key_buffer, value_buffer: the open chunks' k and v; rows from `index` on may hold anything finite whose products with q are:
            their weight is an exact zero.
        index: the row the token takes; C for a slot without one, which stays as it is (its output means nothing).
        state_copy: the states in the products' dtype, read instead of them (the products round them to it anyway).
        may_fold: whether a slot's chunk may become full, and is folded into its state then; a caller that knows better says False.
    """
    arguments = (q, k, v, state, key_buffer, value_buffer, log_decay, index)
    options = {"state_copy": state_copy, "may_fold": may_fold, "aligned": aligned}
    return Step(*dispatch.call("lightning_attention_step", STEP_IMPLEMENTATIONS, implementation, *arguments, **options))


def lightning_attention_verify(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B N H K"],
    v: Float[Array, "B N H V"],
    state: Float[Array, "B H K V"],
    key_buffer: Float[Array, "B H C K"],
    value_buffer: Float[Array, "B H C V"],
    log_decay: Float[Array, " H"],
    index: Int[Array, " B"],
    paths: Int[Array, "P D"],
    *,
    aligned: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B N H V"]:
    """Return the outputs of a tree of N draft tokens that follow each slot's tokens; the slots stay as they are.

    `paths` lists the tokens from the root to each leaf, -1 behind a leaf; every token is on one. A token's bits are those that it has in
    training after its path: a path's tokens stand in the rows they would take, `index` and on, and behind a full chunk in the next one.
    Raises ValueError for paths of more tokens than a chunk has.
    """
    if paths.shape[1] > key_buffer.shape[2]:
        raise ValueError(f"paths of {paths.shape[1]} tokens are longer than a chunk of {key_buffer.shape[2]}")
    num_nodes, taken = q.shape[1], jnp.maximum(paths, 0)
    along = [x[:, taken] for x in (q, k, v)]  # [B, P, D, H, size]
    arguments = (*along, state, key_buffer, value_buffer, log_decay, index)
    out = dispatch.call("lightning_attention_verify", VERIFY_IMPLEMENTATIONS, implementation, *arguments, aligned=aligned)
    first = jnp.argmax(paths.reshape(-1) == jnp.arange(num_nodes)[:, None], axis=1)  # any path that a token is on has its bits
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, first]
