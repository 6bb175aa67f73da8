"""Named shapes of flash attention, shared by the tests and the benchmark."""

from typing import NamedTuple


class Case(NamedTuple):
    """One problem: batch, query tokens, query heads, key heads, head size; segments packs documents at multiples of GRID."""

    B: int
    T: int
    H: int
    G: int
    K: int
    segments: bool = False


TEST_CASES = {
    "one_token": Case(2, 1, 2, 2, 16),
    "odd_length": Case(2, 77, 4, 2, 16),
    "odd_blocks": Case(1, 333, 4, 1, 16),
    "heads_not_power_of_two": Case(2, 130, 6, 3, 8),
    "segments": Case(2, 384, 4, 2, 16, segments=True),
}

BENCH_CASES = {f"T{length}": Case(1, length, 4, 1, 128) for length in (512, 1024, 4096)}
