"""Ring-linear hybrid models in JAX: one forward pass for training and inference."""

import pathlib

# In a checkout, `train` and `infer` lie beside this package and are imported as ring_jax.train and ring_jax.infer.
_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
