"""What all tests share: one compilation cache, so that a program that several tests or processes need is compiled once."""

import os
import pathlib
import tempfile

_cache = pathlib.Path(os.environ.setdefault("RING_JAX_TEST_CACHE", tempfile.mkdtemp(prefix="ring-jax-test-")))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("XDG_CACHE_HOME", str(_cache / "data"))  # tokenised data, too, is made once
