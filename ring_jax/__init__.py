"""Ring-linear hybrid models in JAX: one forward pass for training and inference."""

import pathlib

# In a checkout, `train` and `infer` lie beside this package and are imported as ring_jax.train and ring_jax.infer.
_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))


def __getattr__(name: str):
    """`ring_jax.load`, found when asked for: importing the package alone starts no jax."""
    if name == "load":
        from ring_jax.checkpoint import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
