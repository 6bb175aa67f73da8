"""Named shapes of the grouped product, shared by the tests and the benchmark."""

from typing import NamedTuple


class Case(NamedTuple):
    """One problem: tokens, slots a token, width, expert width, experts, and how the load falls on them."""

    N: int
    A: int
    D: int
    F: int
    E: int
    routing: str = "uniform"  # or "skewed" (half of the rows to one expert), "one" (all to one), "empty" (half of the experts)


TEST_CASES = {
    "one_row": Case(1, 1, 16, 24, 4),
    "uniform": Case(100, 2, 16, 24, 8),
    "skewed": Case(77, 3, 16, 24, 8, "skewed"),
    "one_expert": Case(65, 1, 16, 24, 8, "one"),
    "empty_experts": Case(64, 2, 16, 24, 16, "empty"),
    "more_experts_than_rows": Case(3, 2, 16, 24, 64),
}

BENCH_CASES = {f"N{num}": Case(num, 4, 512, 256, 32) for num in (1, 16, 64, 1024, 4096)} | {
    "N4096_skewed": Case(4096, 4, 512, 256, 32, "skewed"),
    "N4096_one": Case(4096, 4, 512, 256, 32, "one"),
}
