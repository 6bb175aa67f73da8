"""Named shapes of the LM head with cross entropy, shared by the tests and the benchmark."""

from typing import NamedTuple


class Case(NamedTuple):
    """One problem: rows, width and vocabulary."""

    N: int
    D: int
    vocab: int


TEST_CASES = {
    "one_row": Case(1, 16, 33),
    "odd_rows": Case(77, 16, 100),
    "several_tiles": Case(600, 16, 256),
    "pieces_with_overlap": Case(70, 8, 20001),
}

BENCH_CASES = {"demo": Case(4096, 256, 4096), "wide": Case(1024, 512, 8192)}
