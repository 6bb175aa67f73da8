"""The mesh: one step is the same on any of them, everything is really sharded, and only weights and experts' tokens are gathered.

The simulated devices must exist before jax starts, so all meshes run in one process of their own (this file, run as a program), which
writes what it found as JSON.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ring_jax import sharding
from ring_jax.config import preset

pytestmark = pytest.mark.usefixtures("all_unoptimised")

ROOT = pathlib.Path(__file__).resolve().parents[2]
MESHES = ("1x1", "1x2", "2x4", "8x8")
SAVED = "2x4"
"""The mesh whose state is saved, to be restored on one device."""
FP8 = "2x4"
"""The mesh that trains in FP8 beside one device."""
ROWS, SEQ_LEN = 64, 128


def make_mesh(text):
    return sharding.make_mesh(sharding.parse_mesh(text)) if text != "1x1" else None


def make_program(mesh, num_layers=2, period=2, **numerics):
    from ring_jax.numerics import Numerics
    from ring_jax.train.config import OptimizerConfig
    from ring_jax.train.step import make_program

    config = dataclasses.replace(preset("test"), num_layers=num_layers, period=period, hidden_size=64)
    # Without clipping, the first moments after the first step are a tenth of the gradient.
    optimizer = OptimizerConfig(warmup=0, clip=0.0, z_loss=0.01)
    return make_program(config, Numerics(aligned=False, **numerics), optimizer, steps=10, seed=0, mesh=mesh)


def make_batch(rows, seq_len=SEQ_LEN):
    from ring_jax.scoring import Batch

    rng = np.random.default_rng(0)
    lengths = rng.integers(2, seq_len + 1, rows)[:, None]
    inside = np.arange(seq_len) < lengths
    tokens = rng.integers(1, 96, (rows, seq_len)) * inside
    return Batch(*(x.astype(np.int32) for x in (tokens, np.where(inside, np.arange(seq_len), -1), inside)))


def collectives(text):
    """Each collective of an HLO text: its kind and the shapes of its results."""
    import re

    found = []
    for line in text.splitlines():
        if match := re.search(r" = (.+?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(", line):
            shapes = [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])]
            found.append((match[2], shapes))
    return found


def shards(state):
    """By path: shape, factor by which an array's shard is smaller, and the factor its logical axes ask for, on a mesh of any sizes."""
    import jax
    from flax import nnx

    found = {}
    for part, tree in (("params", state.params), ("mu", state.optimizer[1].mu), ("nu", state.optimizer[1].nu), ("balance", state.balance)):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        for path, variable in leaves:
            array = variable.get_value()
            name = f"{part}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
            axes = [axis for axis in variable.get_metadata("logical_axes") if axis]
            found[name] = (array.shape, array.size / array.addressable_shards[0].data.size, axes)
    return found


def stacked(jaxpr, found=None):
    """The shapes that loops over layers return a layer of, in a program and those inside it: what they keep for the gradient."""
    from jax.extend.core import jaxprs_in_params

    found = [] if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            shapes = [v.aval.shape for v in equation.outvars]
            found += [shape[1:] for shape in shapes if shape[:1] == (equation.params["length"],)]
        for inner in jaxprs_in_params(equation.params):
            stacked(inner, found)
    return found


def kept(text, **numerics):
    """The shapes that the layers of a step keep for its gradient, and those of a layer's matrices: of a model with groups and runs."""
    import jax
    from flax import nnx

    program = make_program(make_mesh(text), num_layers=6, period=3, **numerics)
    batch = jax.device_put(make_batch(48), program.batch_sharding)
    jaxpr = jax.make_jaxpr(program.step)(program.abstract, program.tables, batch)
    variables = jax.tree.leaves(program.abstract.params["segments"], is_leaf=lambda x: isinstance(x, nnx.Variable))
    shapes = [variable.get_metadata("full_shape") for variable in variables]
    return {"kept": stacked(jaxpr.jaxpr), "matrices": [shape for shape in shapes if len(shape) > 1]}


def main(folder):
    import jax

    jax.config.update("jax_num_cpu_devices", 64)
    from ring_jax import checkpoint

    folder, batch = pathlib.Path(folder), make_batch(ROWS)
    for text in MESHES:
        mesh = make_mesh(text)
        program = make_program(mesh)
        state = program.init()
        start = checkpoint.by_path(state.params)
        np.savez(folder / f"{text}-start.npz", **{name: np.asarray(x) for name, x in start.items()})
        placed = jax.device_put(batch, program.batch_sharding)
        compiled = program.step.lower(state, program.tables, placed).compile()
        hlo = compiled.as_text()
        state, metrics = compiled(state, program.tables, placed)
        grads = checkpoint.by_path(state.optimizer[1].mu)
        np.savez(folder / f"{text}-grads.npz", **{name: np.asarray(x) for name, x in grads.items()})
        found = {"metrics": [float(x) for x in metrics], "collectives": collectives(hlo), "shards": shards(state)}
        (folder / f"{text}.json").write_text(json.dumps(found))
        if text == SAVED:
            manager = checkpoint.Manager(folder)
            manager.save(1, params=state.params, balance=state.balance, optimizer=state.optimizer, meta={}, tokenizer=None)
            manager.wait()
            manager.close()
            after = checkpoint.by_path(state.params)
            np.savez(folder / "saved.npz", **{name: np.asarray(x) for name, x in after.items()})
    for text in ("1x1", FP8):
        program = make_program(make_mesh(text), fp8=True)
        state, metrics = program.step(program.init(), program.tables, jax.device_put(batch, program.batch_sharding))
        grads = checkpoint.by_path(state.optimizer[1].mu)
        np.savez(
            folder / f"{text}-fp8.npz", metrics=np.array([float(x) for x in metrics]), **{name: np.asarray(x) for name, x in grads.items()}
        )
    (folder / "kept.json").write_text(json.dumps({precision: kept("2x8", fp8=precision == "fp8") for precision in ("fp32", "fp8")}))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(folder, mesh):
    return json.loads((folder / f"{mesh}.json").read_text())


def compare(folder, kind, mesh, tolerance):
    one, other = np.load(folder / f"1x1-{kind}.npz"), np.load(folder / f"{mesh}-{kind}.npz")
    assert set(one.files) == set(other.files)
    for name in one.files:
        scale = np.abs(one[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=tolerance * scale, err_msg=name)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What placing a mesh reads of a TPU's device."""

    id: int
    coords: tuple[int, ...]
    platform = "tpu"
    device_kind = "TPU v5"
    core_on_chip = process_index = slice_index = 0


@pytest.mark.parametrize(("torus", "mesh"), [((4, 4, 4), "8x8"), ((2, 2, 4), "2x8"), ((8, 16), "16x8"), ((2, 2, 1), "1x4")])
def test_a_mesh_takes_every_chip_of_a_torus_once(torus, mesh):
    chips = [Chip(i, (*at, 0)[:3]) for i, at in enumerate(np.ndindex(torus))]
    placed = sharding.make_mesh(sharding.parse_mesh(mesh), chips)
    assert {axis: size for axis, size in placed.shape.items() if size > 1} == {
        axis: size for axis, size in sharding.parse_mesh(mesh).items() if size > 1
    }
    assert sorted(chip.id for chip in placed.devices.flat) == list(range(len(chips)))


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_loss_and_gradients_are_those_of_one_device(found, mesh):
    compare(found, "start", mesh, 0)
    np.testing.assert_allclose(read(found, mesh)["metrics"], read(found, "1x1")["metrics"], rtol=2e-6)
    compare(found, "grads", mesh, 2e-5)


def test_fp8_loss_and_gradients_are_those_of_one_device(found):
    """Experts' rows lie elsewhere on a mesh, and 128 of them share the scales of a weight's gradient: a tenth of FP8's own error."""
    one, other, fp32 = (np.load(found / name) for name in ("1x1-fp8.npz", f"{FP8}-fp8.npz", "1x1-grads.npz"))
    np.testing.assert_allclose(other["metrics"], one["metrics"], rtol=1e-3)
    for name in fp32.files:
        difference = lambda found, name=name: np.linalg.norm(found[name] - one[name]) / np.linalg.norm(one[name])
        assert difference(other) < 0.03, name
        assert difference(other) < 0.1 * difference(fp32), name


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_gathered_weights_are_not_kept_for_the_gradient(found, precision):
    result = json.loads((found / "kept.json").read_text())[precision]
    assert len(result["matrices"]) > 10
    size = lambda shape: sorted(n for n in shape if n > 1)
    assert any(3 * 128 in shape for shape in result["kept"])  # activations are
    for whole in result["matrices"]:
        whole = whole[-2:]  # of experts, which stay on their devices, one
        assert not [shape for shape in result["kept"] if size(shape) in (size(whole), size((2, *whole)))], whole


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_parameters_and_optimizer_state_are_sharded(found, mesh):
    fsdp, expert = (int(size) for size in mesh.split("x"))
    for name, (shape, factor, axes) in read(found, mesh)["shards"].items():
        # Experts lie on the expert axis and their width on fsdp; every other width is over both. All sizes here divide.
        wanted = fsdp * expert if "embed" in axes else 1
        assert factor == wanted, f"{name} {shape} of axes {axes}"
        assert axes or len(shape) <= 3, f"{name} is a matrix that nothing shards"
    assert any(axes == ["experts", "embed", "ffn"] for _, _, axes in read(found, mesh)["shards"].values())


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_only_weights_and_tokens_of_experts_are_gathered(found, mesh):
    fsdp, expert = (int(size) for size in mesh.split("x"))
    result = read(found, mesh)
    # What a gather may give: a whole parameter, one layer of a stack, or a device's experts with their whole width. XLA may drop ones.
    weights = set()
    for name, (shape, _, axes) in result["shards"].items():
        if name.startswith("params."):
            shape = [n // expert if axes[:1] == ["experts"] and n == 8 else n for n in shape]
            weights.add(tuple(n for n in shape if n > 1))
    gathered = [tuple(n for n in shape if n > 1) for kind, shapes in result["collectives"] for shape in shapes if kind == "all-gather"]
    assert len(gathered) >= len(weights) // 2  # the weights are gathered at all
    transposed = {tuple(sorted(shape)) for shape in weights}
    # Tokens go to the devices of their experts, with their experts' numbers and weights: once, not once for each expert.
    tokens = {(ROWS * SEQ_LEN // fsdp, size) for size in (64, 2)} if expert > 1 else set()
    assert tokens <= set(gathered)
    assert not [shape for shape in gathered if tuple(sorted(shape)) not in transposed and shape not in tokens]
    kinds = {kind for kind, _ in result["collectives"]}
    assert ("all-to-all" in kinds) == (expert > 1)
    assert "collective-permute" not in kinds


def test_one_device_has_no_collectives(found):
    assert read(found, "1x1")["collectives"] == []


def test_a_checkpoint_of_a_mesh_is_restored_on_one_device(found):
    """The saving process had 64 devices, this one has not."""
    import jax

    from ring_jax import checkpoint

    assert jax.device_count() < 8
    state = make_program(None).abstract
    manager = checkpoint.Manager(found, read_only=True)
    restored = manager.restore(1, {"params": state.params, "optimizer": state.optimizer})
    manager.close()
    saved = np.load(found / "saved.npz")
    for name, array in checkpoint.by_path(restored["params"]).items():
        np.testing.assert_array_equal(array, saved[name])


def test_parse_mesh():
    sizes = lambda **given: {axis: 1 for axis in sharding.AXES} | given
    assert sharding.parse_mesh("8x4") == sizes(fsdp=8, expert=4)
    assert sharding.parse_mesh("8") == sizes(fsdp=8)
    assert sharding.parse_mesh("data=2,expert=4") == sizes(data=2, expert=4)


@pytest.mark.parametrize(
    "text", ["", "8x", "x8", "0x8", "-1x8", "2x2x2", "8*8", "data", "data=", "data=0", "rows=2", "data=2,data=2", "1.5x2"]
)
def test_parse_mesh_mistakes(text):
    with pytest.raises(ValueError, match="FSDPxEXPERT.*not "):
        sharding.parse_mesh(text)


@pytest.mark.parametrize(
    ("text", "batch_size", "message"),
    [
        ("1x3", 64, "expert=3 does not divide the 8 experts"),
        ("tensor=3", 64, "tensor=3 does not divide the 4 heads"),
        ("tensor=4", 64, "tensor=4 does not divide the 2 heads"),
        ("tensor=2", 64, "tensor=2"),
        ("context=2", 64, "context=2"),
        ("3x1", 64, "64 is not divisible by the 3 shards"),
        ("data=2,fsdp=4,expert=8", 32, "32 is not divisible by the 64 shards"),
    ],
)
def test_a_mesh_that_does_not_fit(text, batch_size, message):
    with pytest.raises(ValueError, match=message):
        sharding.check_mesh(sharding.parse_mesh(text), preset("test"), batch_size)


if __name__ == "__main__":
    main(sys.argv[1])
