"""The Triton kernel of the scaled product, as far as a machine without a GPU can run it: interpreted, and compiled for an H200.

Both need what the everyday environment lacks: Triton and torch (extra `bench`); gates with jax-triton (extras `gates` and `cuda`).
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from pallas_kernels.aot import __main__ as command

pytestmark = pytest.mark.slow

INTERPRETED = """
import sys, types
import jax.numpy as jnp, numpy as np, torch
from triton.tools.tensor_descriptor import TensorDescriptor
sys.modules["jax_triton"] = types.ModuleType("jax_triton")  # what calls the kernel: it wants a GPU
from pallas_kernels.scaled_matmul import quantize, reference
from pallas_kernels.scaled_matmul.cases import Case, inputs
from pallas_kernels.scaled_matmul.jax_triton import _kernel
from pallas_kernels.torch_peer import tensors

M, K, N = case = Case(1152, 256, 384)
tiles = lambda x: TensorDescriptor.from_tensor(tensors(x), [128, 128])
for of_blocks in (True, False):
    x, w = inputs(case, jnp.float32)
    a, b = quantize(x), quantize(w, block=of_blocks, transpose=True)
    sizes = {"M": M, "N": N, "num_groups": K // 128, "of_blocks": of_blocks, "depth": 128, "rows": 128, "columns": 128, "band": 2}
    out, expected = torch.full((M, N), torch.nan), reference.scaled_matmul(a, b)
    _kernel[M // 128 * (N // 128),](tiles(a.values), tensors(a.scales), tiles(b.values), tensors(b.scales), out, **sizes)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
"""

COMPILED = """
import functools, json, os, pathlib, sys
from pallas_kernels.aot import gpu
from pallas_kernels.scaled_matmul.cases import compile_cases

found = {}
for case in compile_cases():
    if case.kernel in ("scaled_matmul.forward", "scaled_matmul.weight_gradient") and case.shape.startswith("mini expert"):
        program = functools.partial(case.program, implementation="jax_triton")
        gpu._compiled(case, program, "h200", sys.argv[1])
        for path in pathlib.Path(os.environ["JAX_TRITON_DUMP_DIR"]).rglob("*.ptx"):
            found[case.kernel] = [path.read_text(), *gpu.resources(path).values()]
            path.unlink()
print(json.dumps(found))
"""


def run(python, script, *arguments, **environment):
    path = os.pathsep.join(filter(None, (str(command.ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment
    done = subprocess.run([python, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    if refusal := re.search("NotImplementedError: (jax-triton.*)", done.stderr):
        pytest.skip(refusal[1])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("torch", "triton"))), reason="needs torch and Triton")
def test_the_interpreted_kernel_is_the_product():
    run(sys.executable, INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.skipif(
    not [*pathlib.Path(command.PYTHON).parents[1].glob("lib/python*/site-packages/jax_triton")], reason="no jax-triton in the gates' Python"
)
def test_it_compiles_for_a_gpu_that_is_not_here(tmp_path):
    dumps = os.path.join(tmp_path, "dumps", "")
    os.mkdir(dumps)
    environment = command.environment("h200", dumps, command.PYTHON) | {"JAX_TRITON_DUMP_DIR": str(tmp_path / "kernels")}
    found = json.loads(run(command.PYTHON, COMPILED, dumps, **environment))
    assert set(found) == {"scaled_matmul.forward", "scaled_matmul.weight_gradient"}
    for ptx, report in found.values():
        assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in ptx
        assert "cp.async.bulk.tensor.2d" in ptx
        assert not report["spills"]
