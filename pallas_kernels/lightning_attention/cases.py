"""Named shapes of Lightning attention, shared by the tests and the benchmark."""

from typing import NamedTuple


class Case(NamedTuple):
    """One problem: batch, tokens, heads, head sizes, chunk, and what of the interface it uses."""

    B: int
    T: int
    H: int
    K: int
    V: int
    C: int = 64
    state: bool = False
    segments: bool = False
    decay: float = 1.0  # multiplies the family's slopes


TEST_CASES = {
    "one_token": Case(2, 1, 2, 16, 16),
    "odd_length": Case(1, 77, 3, 16, 16),
    "exact_chunks": Case(2, 128, 2, 16, 16),
    "long_odd": Case(1, 333, 2, 32, 32),
    "value_size_differs": Case(2, 70, 2, 16, 48),
    "initial_state": Case(2, 150, 2, 16, 16, state=True),
    "segments": Case(2, 384, 2, 16, 16, segments=True),
    "chunk_128": Case(1, 300, 2, 16, 16, C=128, state=True),
    "strong_decay": Case(1, 300, 2, 16, 16, C=128, decay=20.0),
    "no_decay": Case(1, 200, 2, 16, 16, decay=0.0, state=True),
}

BENCH_CASES = {f"T{length}": Case(1, length, 4, 128, 128) for length in (512, 1024, 4096, 16384)}
