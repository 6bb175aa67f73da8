"""Lightning attention: its implementations behind one signature."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import GRID, dispatch
from pallas_kernels.lightning_attention import pallas_gpu, pallas_tpu, xla

IMPLEMENTATIONS = {"xla": xla.lightning_attention, "pallas_tpu": pallas_tpu.lightning_attention, "pallas_gpu": pallas_gpu.lightning_attention}
STEP_IMPLEMENTATIONS = {"xla": xla.lightning_attention_step}
FOLD_IMPLEMENTATIONS = {"xla": xla.fold_full_chunks}


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
        chunk_size: C, a divisor of GRID. Chunks are counted from the first token given.
        aligned: the forward's bits then equal those of `lightning_attention_step` at every position.
    Differentiable in q, k, v and state. Raises ValueError if C does not divide GRID.
    """
    if GRID % chunk_size:
        raise ValueError(f"chunk_size {chunk_size} does not divide the grid of {GRID} positions")
    options = {"state": state, "reset": reset, "length": length, "chunk_size": chunk_size, "aligned": aligned}
    return dispatch.call("lightning_attention", IMPLEMENTATIONS, implementation, q, k, v, log_decay, **options)


def lightning_attention_step(
    q: Float[Array, "B H K"],
    state: Float[Array, "B H K V"],
    key_buffer: Float[Array, "B H C K"],
    value_buffer: Float[Array, "B H C V"],
    log_decay: Float[Array, " H"],
    index: Int[Array, " B"],
    *,
    aligned: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B H V"]:
    """Return one output row a slot: row `index` of the open chunk, whose k and v up to that row are in the buffers.

    `state` is the fp32 state at the chunk's start. Later buffer rows may hold anything finite: their weight is an exact zero.
    """
    arguments = (q, state, key_buffer, value_buffer, log_decay, index)
    return dispatch.call("lightning_attention_step", STEP_IMPLEMENTATIONS, implementation, *arguments, aligned=aligned)


def fold_full_chunks(
    state: Float[Array, "B H K V"],
    key_buffer: Float[Array, "B H C K"],
    value_buffer: Float[Array, "B H C V"],
    log_decay: Float[Array, " H"],
    index: Int[Array, " B"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B H K V"]:
    """Return the state with the buffers folded in for the slots whose row `index` is the last of a chunk (C - 1), others unchanged."""
    arguments = (state, key_buffer, value_buffer, log_decay, index)
    return dispatch.call("lightning_attention_fold", FOLD_IMPLEMENTATIONS, implementation, *arguments)
