"""The compile gates: one cheap case of each kernel and chip through the real compilers, and what the gates make of a row."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.aot import __main__ as command
from pallas_kernels.aot import case as gates
from pallas_kernels.aot import gpu, tpu

CASE = gates.CompileCase("op", "shape", ("v5p",), lambda: None, (), bytes=1.0, flops=1.0)
KERNEL = {"kernel": "op", "registers": 200, "spills": 0, "instructions": {"wgmma.m64n128k16": 4}}
SIZES = {"argument": 100, "temp": 20, "alias": 8}
ROW = {"jax": "0.10.2", "kernels": [KERNEL], "estimate": 1.1, "floor": 1.0, "memory": 2.0**30, "sizes": SIZES}
WITHOUT_PRODUCTS = {"combine_groups", "cross_entropy_log_sum_exp"}
"""Kernels of a product's program that hold no matrix instruction."""
LOWER_BOUNDS = {"grouped_matmul_dw", "grouped_scaled_dw", "cross_entropy_d_logits"}
"""Kernels whose loops turn as often as experts have rows, or are merged by a compiler: their estimates count each once."""
needs_compilers = pytest.mark.skipif(not os.access(command.PYTHON, os.X_OK), reason=f"{command.PYTHON} is missing: make env-gates")


@pytest.fixture(scope="module")
def cases():
    return gates.collect(gates.op_modules())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Return the command as it ended, and its rows: one run for all targets."""
    written = tmp_path_factory.mktemp("quick") / "rows.json"
    targets = [part for target in gates.PLATFORMS for part in ("--target", target)]
    arguments = ["--quick", "--jobs", "1", *targets, "--json", str(written)]
    done = subprocess.run([sys.executable, "-m", "pallas_kernels.aot", *arguments], cwd=command.ROOT, capture_output=True, text=True)
    assert written.exists(), done.stdout + done.stderr
    return done, json.loads(written.read_text())


@needs_compilers
@pytest.mark.timeout(1800)
def test_the_command_succeeds_where_every_gate_is_passed(quick):
    done, rows = quick
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["target"] for row in rows} == set(gates.PLATFORMS)


@needs_compilers
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", gates.PLATFORMS)
def test_quick_cases_pass_their_gates(target, quick, cases):
    rows = [row for row in quick[1] if row["target"] == target]
    assert [(row["kernel"], row["shape"], row["failed"]) for row in rows if row["failed"]] == []
    cases = [case for case in cases if target in case.targets]
    products = {case.kernel for case in cases if case.flops}
    assert sorted(row["kernel"] for row in rows) == sorted({case.kernel for case in cases if not case.unfused})
    assert all(kernel["estimate"] > 0 for row in rows for kernel in row["kernels"])
    assert {kernel["kernel"] for row in rows for kernel in row["kernels"] if not kernel["known"]} <= LOWER_BOUNDS
    idle = {kernel["kernel"] for row in rows if row["kernel"] in products for kernel in row["kernels"] if not kernel["instructions"]}
    assert idle <= WITHOUT_PRODUCTS
    if target == "h200":
        assert all(32 <= kernel["programs"] * kernel["threads"] <= 2048 for row in rows for kernel in row["kernels"])
        sequences = {kernel["kernel"]: kernel["sequence"] for row in rows for kernel in row["kernels"]}
        decode, fold = sequences["lightning_decode"], sequences["lightning_fold"]
        assert decode == [["m64n64k16", "memory", 16], ["m64n64k16", "registers", 4]]  # Q K^T and Q S, then P V
        assert sequences["lightning_forward"] == decode + fold, "training and decode must go through the same matrix instructions"
        assert sequences["lightning_verify"] == decode


def rows_of(module, folder, status):
    """The rows of the cases of a module of this text; the command must end with this status."""
    (folder / "some_cases.py").write_text(module)
    arguments = ["--cases", "some_cases", "--json", str(folder / "rows.json")]
    environment = os.environ | {"PYTHONPATH": f"{command.ROOT}:{folder}"}
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.aot", *arguments], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads((folder / "rows.json").read_text())


BROKEN = """
import os
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from pallas_kernels.aot.case import CompileCase

def too_large(x):
    copy = lambda x_ref, y_ref: y_ref.__setitem__(..., x_ref[...])
    return pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="copy")(x)

def compile_cases():
    for name, program in {"too large": too_large, "crash": lambda x: os._exit(7), "fine": too_large}.items():
        x = jax.ShapeDtypeStruct((8, 128) if name == "fine" else (16384, 4096), jnp.float32)
        yield CompileCase("broken", name, ("v5p",), program, (x,), bytes=2.0 * x.size, flops=0.0)
"""


@needs_compilers
def test_errors_and_crashes_are_rows(tmp_path):
    too_large, crash, fine = rows_of(BROKEN, tmp_path, status=1)
    assert "vmem" in too_large["error"].lower()
    assert "status 7" in crash["error"]
    assert not fine["failed"]


SLICES = """
import functools
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.aot.case import CompileCase
from pallas_kernels.matmul import matmul

def program(implementation, devices):
    mesh = Mesh(np.array(devices), ("x",))
    product = lambda x, w: lax.psum(matmul(x, w, implementation=implementation), "x")
    shape = lambda *spec: jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    sharded = jax.shard_map(product, mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=P(), check_vma=False)
    return jax.jit(sharded), (shape(None, "x"), shape("x"))

def compile_cases():
    for target, devices in {"v5e": 8, "v5p": 16, "v6e": 32, "h200": 8}.items():
        made = functools.partial(program, "pallas_gpu" if target == "h200" else "pallas_tpu")
        yield CompileCase("sharded", f"{devices} chips", (target,), made, (), bytes=1.0, flops=1.0, devices=devices)
"""


@needs_compilers
def test_slices_of_many_chips(tmp_path):
    rows = {row["target"]: row for row in rows_of(SLICES, tmp_path, status=0)}
    for target, devices in {"v5e": 8, "v5p": 16, "v6e": 32, "h200": 8}.items():
        assert [kernel["kernel"] for kernel in rows[target]["kernels"]] == ["matmul_forward"]
        assert rows[target]["sizes"]["argument"] == 2 * 2 * 2048 * 2048 // devices, "a chip has its part of the operands"


def test_a_compiled_kernel_is_the_call_with_the_longest_name_that_fits():
    names = {"matmul_forward", "grouped_matmul_forward", "flash.dq"}
    compiled = {"matmul_forward.3": "matmul_forward", "jvp_matmul_forward__1": "matmul_forward", "vmap_flash_dq_": "flash.dq"}
    compiled |= {"grouped_matmul_forward": "grouped_matmul_forward", "jvp_grouped_matmul_forward.12": "grouped_matmul_forward"}
    assert {name: gates.called(name, names) for name in compiled} == compiled
    assert gates.called("matmul_forward_more", names) is None


def test_one_case_of_each_kernel_is_quick():
    named = lambda kernel, **how: CASE._replace(kernel=kernel, **how)
    cases = [named("a.b", bytes=2.0), named("a.b"), named("c"), named("a.d", targets=("v5e", "v5p")), named("e", unfused=lambda: None)]
    assert gates.indices(cases, "v5p") == [0, 1, 2, 3, 4]
    assert gates.indices(cases, "v5p", quick=True) == [1, 2, 3]
    assert gates.indices(cases, "v5p", kernel="a.", quick=True) == [1, 3]
    assert gates.indices(cases, "v5e") == [3]


@pytest.mark.parametrize(
    ("change", "case", "said"),
    [
        ({}, {"floor_ratio": 1.2, "instruction": "wgmma.*n128", "memory": 2.0**30}, None),
        ({"error": "XlaRuntimeError: no"}, {}, "XlaRuntimeError: no"),
        ({"kernels": []}, {}, "no kernel in the program"),
        ({"kernels": [KERNEL | {"spills": 8}]}, {}, "op spills 8 bytes"),
        ({}, {"instruction": "n256"}, "no n256 but wgmma.m64n128k16"),
        ({}, {"floor_ratio": 1.05}, "estimate is 1.10 of the floor, over 1.05"),
        ({"jax": "0.12.0"}, {"floor_ratio": 1.05}, "estimate is 1.10 of the floor, over 1.082"),
        ({"jax": "0.12.0"}, {"floor_ratio": 1.08}, None),
        ({}, {"memory": 2.0**29}, "takes 1024 MiB, over 512"),
        ({}, {"temporaries": 0.2}, None),
        ({}, {"temporaries": 0.1}, "has 0 MiB of temporaries, 0.200 of its arguments"),
        ({}, {"arguments": (jax.ShapeDtypeStruct((2,), jnp.float32),), "donate": (0,)}, None),
        ({}, {"arguments": (jax.ShapeDtypeStruct((3,), jnp.float32),), "donate": (0,)}, "copies 4 bytes of what it could write in place"),
        ({"moved": 9, "unfused": 12}, {"fewer_bytes": 0.7}, "moves 0.75 of what the compiler's own fusions move, over 0.70"),
    ],
)
def test_gates(change, case, said):
    assert gates.failures(CASE._replace(**case), ROW | change) == ([said] if said else [])


HLO = """HloModule m

%fused (p: bf16[8,128]) -> f32[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %c = f32[8,128]{1,0} convert(%p)
}

%halves (p: f32[8,128], q: f32[8,128]) -> f32[8,64] {
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[8,128]{1,0} parameter(1)
  %left = f32[8,64]{1,0} slice(%p), slice={[0:8], [0:64]}
  %right = f32[8,64]{1,0} slice(%q), slice={[0:8], [64:128]}
  %whole = f32[8,128]{1,0} negate(%q)
  ROOT %sum = f32[8,64]{1,0} add(%left, %right)
}

ENTRY %main (a: bf16[8,128], b: f32[8,128]) -> (f32[8,128], s32[8]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %kernel = f32[8,128]{1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call"
  %copy-start = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%kernel)
  %copy-done = f32[8,128]{1,0:S(1)} copy-done(%copy-start)
  %wide = f32[8,128]{1,0:S(1)} fusion(%a), kind=kLoop, calls=%fused
  %sorted = (f32[8,128]{1,0}, s32[8]{0}) fusion(%wide, %copy-done), kind=kLoop, calls=%other
  %half = f32[8,64]{1,0} fusion(%b, %b), kind=kLoop, calls=%halves
  %alone = f32[4,64]{1,0} slice(%half), slice={[0:4], [0:64]}
  %first = f32[8,128]{1,0} get-tuple-element(%sorted), index=0
  ROOT %out = (f32[8,128]{1,0}, s32[8]{0}) tuple(%first, %first)
}
"""


@pytest.mark.parametrize("kernel", ["tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"])
def test_bytes_of_a_compiled_program(kernel):
    """Those between operations and HBM: not a kernel's own, not what stays in VMEM, and of what is only sliced, the slices."""
    fetched, read, written = 4096 + 4, 2048, 4096 + 32
    halves, alone = 2048 + 4096 + 2048, 1024 + 1024  # the first operand is only sliced, the second is not
    assert gates.hlo_bytes(HLO.replace("tpu_custom_call", kernel)) == fetched + 4096 + read + written + halves + alone


class Compiled:
    """A compiled program."""

    def memory_analysis(self):
        return types.SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in ("argument", "output", "alias", "temp")})

    def as_text(self):
        return HLO


def test_what_products_move_does_not_count():
    chip, others = gates.Chip(1.0, 1.0, 1.0, 1), {"unfused": (7.0, Compiled()), "products": (30.0, Compiled())}
    row = gates.row(CASE, chip, Compiled(), [], [100.0, 50.0], others)
    assert (row["moved"], row["unfused"]) == (120, 7 + gates.hlo_bytes(HLO))
    assert "products" not in row
    assert "moved" not in gates.row(CASE, chip, Compiled(), [], [100.0], {})


def test_a_missing_environment_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.aot", "--python", "/nowhere"], cwd=command.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "/nowhere is missing: `make env-gates` makes it, --python or RING_JAX_GATES_PYTHON names another\n"


def looping(x_ref, y_ref):
    y_ref[...] = jax.lax.fori_loop(0, 5, lambda i, y: jax.lax.fori_loop(0, 3, lambda j, y: y + x_ref[...], y), x_ref[...])


def call_of(kernel, grid=(2, 3, 4), index=lambda i, j, k: (i, j)):
    block = pl.BlockSpec((8, 128), index)
    call = pl.pallas_call(kernel, grid=grid, in_specs=[block], out_specs=block, out_shape=jax.ShapeDtypeStruct((16, 384), jnp.float32))
    (equation,) = (e for e in compat.equations(jax.make_jaxpr(call)(jnp.ones((16, 384)))) if e.primitive.name == "pallas_call")
    return equation.params


def test_loops_count_as_often_as_they_turn():
    kernel = call_of(looping)["jaxpr"]
    assert gates.loop_weights(6, [(1, 4), (2, 3)], kernel) == ([1, 5, 15, 15, 5, 1], True)
    assert gates.loop_weights(6, [(1, 4)], kernel) == ([1] * 6, False)
    assert gates.loop_weights(6, [], kernel) == ([1] * 6, True)


@pytest.mark.parametrize(
    ("index", "times"),
    [(lambda i, j, k: (i, j), 6), (lambda i, j, k: (i, 0), 2), (lambda i, j, k: (0, 0), 1), (lambda i, j, k: (0, k // 2), 24)],
)
def test_blocks_move_when_their_index_changes(index, times):
    assert tpu.moved_bytes((2, 3, 4), call_of(looping, index=index)["grid_mapping"]) == 2 * times * 8 * 128 * 4


PTX = """
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];
$L__BB0_1:
    cp.async.cg.shared.global [ %r16 + 0 ], [ %rd13 + 0 ], 0x10, %r17;
    mov.b32 %r88, %r92;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 1;
    wgmma.wait_group.sync.aligned 0;
    @%p5 bra $L__BB0_1;
    st.global.b16 [ %rd1 + 0 ], %r1;
"""


def test_ptx_is_counted_with_its_loops():
    def kernel(x_ref, y_ref):
        y_ref[...] = jax.lax.fori_loop(0, 10, lambda i, y: y + x_ref[...], x_ref[...])

    counted = gpu.count(PTX, call_of(kernel)["jaxpr"])
    assert counted["instructions"] == {"wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16": 10}
    assert (counted["bytes"], counted["issued"], counted["stalls"]) == (160 + 2, 2 + 40, 640)
    assert (counted["known"], counted["overlapped"]) == (True, False)


def test_matrix_instructions_take_their_cycles():
    assert gpu.matrix_cycles("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", warps=8) == 256
    assert gpu.matrix_cycles("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", warps=4) == 64
    assert gpu.matrix_cycles("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", warps=4) == 8


@pytest.mark.parametrize(
    ("programs", "threads", "registers", "shared", "active"),
    [
        (10_000, 256, 128, 0, 2),  # 65536 registers
        (10_000, 256, 129, 0, 1),  # a warp's registers are a multiple of 256
        (10_000, 128, 32, 64 << 10, 3),  # 228 KiB, one more a program
        (10_000, 512, 32, 0, 4),  # 2048 threads
        (10_000, 32, 32, 0, 32),
        (200, 32, 32, 0, 2),  # on 132 SMs
        (100, 1024, 255, 0, 1),
    ],
)
def test_programs_that_an_sm_has_at_a_time(programs, threads, registers, shared, active):
    assert gpu.resident(programs, threads, registers, shared) == active
