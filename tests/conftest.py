"""What all tests share: signatures checked against the arrays they get, and one compilation cache for all tests and processes."""

import contextlib
import gc
import os
import pathlib
import tempfile

import pytest
from jaxtyping import install_import_hook

gc.set_threshold(200_000, 50, 100)  # traced and compiled programs are millions of objects: looking through them took a tenth of the time

_root = pathlib.Path(__file__).parent.parent
# ring_jax.config checks its own values, and the tests give it bad ones.
_checked = [f"ring_jax.{path.stem}" for path in (_root / "ring_jax").glob("*.py") if path.stem not in ("__init__", "config")]
_checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"  # the tower: an int is a float
install_import_hook(["pallas_kernels", "ring_jax.train", "ring_jax.infer", *_checked], _checker)


_cache = pathlib.Path(os.environ.setdefault("RING_JAX_TEST_CACHE", tempfile.mkdtemp(prefix="ring-jax-test-")))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Workers enough for the cores: compiling in parallel in each only adds work. It changes no program.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")
os.environ.setdefault("XDG_CACHE_HOME", str(_cache / "data"))  # tokenised data, too, is made once


_MOST_MAPS = 15_000


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Forget compiled programs between modules: each maps regions of memory, and past 65,530 (Linux's default) a process crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def _unoptimised():
    from ring_jax import numerics
    from tests import unoptimised

    with pytest.MonkeyPatch.context() as patch:
        options = numerics.compiler_options
        patch.setattr(numerics, "compiler_options", lambda aligned: options(aligned) | unoptimised.OPTIONS)
        patch.setenv("XLA_FLAGS", unoptimised.xla_flags())
        yield


@pytest.fixture
def unoptimised():
    """The test's programs, in this process and others, are compiled as tests/unoptimised.py says."""
    with _unoptimised():
        yield


@pytest.fixture(scope="module")
def all_unoptimised():
    """Those of all of a module's tests and fixtures."""
    with _unoptimised():
        yield
