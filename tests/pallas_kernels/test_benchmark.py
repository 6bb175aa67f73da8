"""The benchmarks' command, the records it writes, and what it says of peers that are not there."""

import importlib
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import benchmark, compat
from pallas_kernels.bench import OPS
from pallas_kernels.benchmark import InPlace, Problem, Target, compare, measure
from pallas_kernels.flash_attention import bench as flash
from pallas_kernels.flash_attention.cases import CacheCase, Case, cache_inputs, inputs
from pallas_kernels.fused_layers import bench as fused
from pallas_kernels.fused_layers.cases import residual_rms_norm
from pallas_kernels.lightning_attention import bench as lightning
from pallas_kernels.lightning_attention.cases import DecodeCase, decode_inputs


def double(x):
    return 2 * x


def missing(x):
    import a_library_that_is_not_there  # pyright: ignore  # noqa: F401


def refusing(x):
    raise NotImplementedError("this chip cannot\nfor many reasons")


def wrong(x):
    raise TypeError("a mistake of ours")


def problem(**others):
    return Problem(
        case="tiny",
        tokens=8,
        inputs=lambda: (jnp.linspace(-1, 1, 8),),
        differentiable=(0,),
        truth=double,
        flops=(8, 8),
        bytes=(64, 64),
        **{"implementations": {"ours": lambda x: 2.5 * x, "peer: exact": double}} | others,
    )


def run(one, dtype="fp32"):
    left_out = []
    records = list(measure(one, dtype, 0.0, left_out))
    compare(records, one, (1e9, 1e9))
    return {(r["implementation"], r["pass"]): r for r in records}, left_out


def test_errors_passes_and_comparisons():
    targets = {"forward": (Target(1e9, "peer: exact"), Target(1e-9, "floor", "no time"), Target(1, "peer: absent"))}
    records, left_out = run(problem(peer="peer: exact", targets=targets), "bf16")
    assert not left_out
    assert len(records) == 4
    for direction in ("forward", "both"):
        ours, peer = records["ours", direction], records["peer: exact", direction]
        assert ours["error"] == pytest.approx(0.25)
        assert (peer["error"], peer["rounding_floors"], peer["x_peer"], peer["targets"]) == (0, 0, 1, [])
        assert ours["x_peer"] == pytest.approx(peer["seconds"] / ours["seconds"])
        assert ours["flops"] == (8 if direction == "forward" else 16)
    found = [(t["target"], t["met"]) for t in records["ours", "forward"]["targets"]]
    assert found == [("1e+09x exact", True), ("no time", False), ("1x absent", None)]
    assert records["ours", "both"]["targets"] == []


def test_what_does_not_run_is_left_out_with_the_reason(capsys):
    ours = {"ours": double, "refusing": refusing, "wrong": wrong}
    records, left_out = run(problem(implementations=ours, torch={"peer: missing": missing})._replace(differentiable=()))
    assert set(records) == {("ours", "forward")}
    assert [(x["implementation"], x["failed"]) for x in left_out] == [("refusing", False), ("wrong", True), ("peer: missing", False)]
    said = capsys.readouterr().out
    assert "tiny, forward: without refusing: NotImplementedError: this chip cannot\n" in said
    assert "tiny, forward: without wrong: TypeError: a mistake of ours\n" in said
    assert "tiny, forward: without peer: missing: ModuleNotFoundError: No module named " in said


def test_an_implementation_in_place_gets_its_own_results_back():
    seen = InPlace(lambda x, total: (x + total, total + 1), (1,))
    one = problem(implementations={"ours": seen, "peer: exact": lambda x, total: x + total})
    one = one._replace(inputs=lambda: (jnp.ones(8), jnp.zeros(8)), truth=lambda x, total: x + total, differentiable=())
    records, _ = run(one)
    assert records["ours", "forward"]["error"] == records["peer: exact", "forward"]["error"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_the_decode_benchmark_compares_like_with_like(slots):
    """Our step, on the state at the chunk's start and the buffers, and the recurrent one, on the state of now."""
    one = lightning.decode("tiny", DecodeCase(slots, 2, size=16, C=64), jnp.float32)
    records, left_out = run(one)
    assert not [x for x in left_out if not x["implementation"].startswith("peer")]
    assert {name for name, _ in records} == {"xla", "xla aligned", lightning.STEP}
    assert all(r["error"] < 1e-5 for r in records.values())
    index = decode_inputs(DecodeCase(64, 2, size=16), jnp.float32)[7]
    assert sorted(np.asarray(index)) == list(range(64))


def peers(*names):
    return {f"peer: {name}" for name in names}


EQUATIONS = peers("its equations, by XLA")
ATTENTION, EXPERTS = peers("cudnn", "in-tree", "jax.nn"), peers("lax.ragged_dot", "torch._grouped_mm")
GPU_PEERS = {
    "cross_entropy": {
        "mini 8192": peers("log_softmax(h @ w)", "torch cross_entropy(h @ w)"),
        "logits, mini 64": peers("h @ w, logsumexp"),
    },
    "flash_attention": {
        "(8192, 16, 128)": ATTENTION,
        "(32768, 16, 128)": ATTENTION - peers("jax.nn"),
        "decode 64 on 8192, 16": ATTENTION,
    },
    "fused_layers": {
        f"{model} {layer}{fp8}": EQUATIONS
        for model in ("mini", "flash")
        for layer in ("residual_rms_norm", "gated_group_norm", "swiglu", "swiglu expert")
        for fp8 in ("", " fp8 rows", " fp8 rows+columns")
    }
    | {"mini qk_norm_rope": EQUATIONS, "mini route": EQUATIONS},
    "grouped_matmul": {f"mini gate_up 8192{routing}": EXPERTS for routing in ("", " skewed", " one")}
    | {f"{case} experts": EXPERTS for case in ("mini gate_up 8192 skewed", "mini gate_up 64", "flash gate_up 8192")}
    | {"mini gate_up 8192 all": peers("lax.ragged_dot"), "mini gate_up 64": EXPERTS},
    "grouped_scaled_matmul": {f"mini gate_up 8192{routing}": peers("grouped_matmul") for routing in ("", " skewed", " one")},
    "lightning_attention": {
        "(1, 16384, 64, 128)": peers("fla chunk_simple_gla"),
        "decode 64x64": peers("fla fused_recurrent", "fp32 recurrent step"),
    },
    "matmul": {"square": peers("x @ w", "torch x @ w")},
    "scaled_matmul": {
        "square quantised": peers("x @ w", "torch x @ w", "torch._scaled_mm blocks", "torch._scaled_mm rows"),
        "square": peers("x @ w", "torch x @ w"),
    },
}
"""Cases of a GPU's benchmarks and who is timed beside us."""


def on_a_gpu(op, dtype=jnp.bfloat16):
    """The problems' tables alone: nothing is run."""
    with compat.compiling_for("h200"):
        return {p.case: p for p in importlib.import_module(f"pallas_kernels.{op}.bench").problems(dtype, False)}


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_adds_its_kernels_and_peers(op):
    problems = on_a_gpu(op)
    names = {case: {*p.implementations, *p.torch} for case, p in problems.items()}
    assert {case: {x for x in names[case] if x.startswith("peer")} for case in GPU_PEERS[op]} == GPU_PEERS[op]
    for case, p in problems.items():
        assert any(name.startswith("pallas_gpu") for name in p.implementations)
        assert p.peer in names[case]
        assert {t.of for targets in p.targets.values() for t in targets} <= {*names[case], "floor", "second"}


def test_a_gpus_targets():
    problems = on_a_gpu("lightning_attention")
    prefill, decode, lone = (problems[name] for name in ("(1, 16384, 64, 128)", "decode 64x64", "decode 1x16"))
    assert [t.ratio for t in prefill.targets["forward"]] == [0.5, 1.5]
    assert [decode.targets["forward"][0].ratio, lone.targets["forward"][0].ratio] == [0.5, 1.0]


def test_a_gpus_routers_are_fp32():
    routers = on_a_gpu("matmul", jnp.float32)
    assert set(routers) == {"mini router 8192", "flash router 8192"}
    assert routers["mini router 8192"].bytes[0] == 4 * (8192 * 2048 + 2048 * 256 + 8192 * 256)


def test_jaxs_own_attention_kernels_are_called_as_they_want():
    *rows, start, stop = inputs(Case(1, 256, 4, 2, 16), jnp.float32)

    def gradients(attend):
        return jax.vjp(lambda *rows: attend(*rows, start, stop), *rows)[1](rows[0])

    theirs, truth = (jax.jit(gradients, static_argnums=0)(f) for f in (lambda *x: flash.in_tree(*x, interpret=True), flash.truth))
    for d, expected in zip(theirs, truth, strict=True):
        np.testing.assert_allclose(d, expected, atol=1e-5)
    cached = cache_inputs(CacheCase(2, 1, 256, 4, 2, 16), jnp.float32)
    np.testing.assert_allclose(flash.in_tree_decode(*cached, interpret=True), flash.truth(*cached), atol=1e-5)


@pytest.mark.parametrize("emit", [("rows",), ("rows", "columns")])
def test_the_benchmark_of_fp8_layers_shows_what_fp8_costs(emit):
    records, left_out = run(fused.in_fp8("norm", residual_rms_norm(40, 256), emit, jnp.float32))
    assert not left_out
    assert set(records) == {(name, "forward") for name in ("xla", "xla aligned", fused.PEER)}
    assert all(1e-3 < r["error"] < 2**-4 for r in records.values())


def test_a_gpus_kernel_time_is_the_sum_over_its_streams(monkeypatch):
    event = types.SimpleNamespace(duration_ns=1000.0)
    lines = [types.SimpleNamespace(name=name, events=[event] * 3) for name in ("Stream #7(Compute)", "XLA Ops")]
    planes = [types.SimpleNamespace(name=name, lines=lines) for name in ("/device:GPU:0", "/host:CPU")]
    trace = types.SimpleNamespace(from_file=lambda path: types.SimpleNamespace(planes=planes))
    monkeypatch.setattr(benchmark.jax.profiler, "ProfileData", trace)
    assert benchmark.kernel_seconds(benchmark.clock(lambda i: jnp.ones(1)), 3) == pytest.approx(1e-6)


def test_the_command_joins_the_records_of_the_ops(tmp_path):
    written = tmp_path / "records.json"
    command = [sys.executable, "-m", "pallas_kernels.bench", "--quick", "--op", "matmul", "--case", "N16", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "x peer" in done.stdout
    joined = json.loads(written.read_text())
    assert joined["machine"]["backend"] == "cpu"
    (op,) = joined["ops"].values()
    assert set(op) == {"ceilings", "records", "left_out"}
    names = {r["implementation"] for r in op["records"]}
    assert names >= {"xla", "xla aligned", "peer: x @ w"}
    assert names | {x["implementation"] for x in op["left_out"]} == {"xla", "xla aligned", "peer: x @ w", "peer: torch x @ w"}
    assert all(f"without {x['implementation']}: {x['reason']}" in done.stdout for x in op["left_out"])
    fields = ("case", "dtype", "pass", "seconds", "kernel_seconds", "runs", "error", "flops", "bytes", "of_ceiling", "x_peer", "targets")
    assert all(field in r for field in fields for r in op["records"])
