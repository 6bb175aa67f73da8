"""Starting over with huge pages: the same process, arguments and input; and not where the setting means nothing or is made already."""

import os
import subprocess
import sys

import pytest

from ring_jax import hugepages

SCRIPT = """
import os, sys
from ring_jax.hugepages import use_huge_pages
print("start", flush=True)
use_huge_pages()
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), sys.stdin.read())
"""


@pytest.mark.skipif(
    not hugepages.ENABLED.is_file() or "[madvise]" not in hugepages.ENABLED.read_text(), reason="the kernel grants no huge pages on request"
)
@pytest.mark.parametrize("setting", [None, "glibc.malloc.check=0"])
def test_starting_over(setting, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != hugepages.SETTING}
    if setting:
        environment[hugepages.SETTING] = setting
    command = [sys.executable, str(script), "two words", "--flag"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate("input")
    last = f"{process.pid} ['two words', '--flag'] {setting or 'glibc.malloc.hugetlb=1'} input"
    assert out.splitlines() == ["start"] * (1 if setting else 2) + [last]


@pytest.mark.parametrize("kernel", ["always [never]", "[always] madvise never", None])
def test_nothing_where_it_means_nothing(kernel, tmp_path, monkeypatch):
    monkeypatch.delenv(hugepages.SETTING, raising=False)
    monkeypatch.setattr(hugepages, "ENABLED", tmp_path / "enabled")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started over"))
    if kernel:
        hugepages.ENABLED.write_text(kernel)
    hugepages.use_huge_pages()
    assert hugepages.SETTING not in os.environ
