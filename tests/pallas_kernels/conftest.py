"""On a GPU a kernel may refuse what it takes interpreted: that is no failure."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except NotImplementedError as refusal:
        if item.get_closest_marker("gpu"):
            pytest.skip(f"refused: {refusal}")
        raise
