"""The packages: who imports whom, how fast the commands answer, and that they run from a wheel and from a checkout."""

import ast
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("pallas_kernels", "ring_jax", "ring_jax.infer", "ring_jax.train")
"""Each may import itself and those before it."""
FOLDERS = {"pallas_kernels": "pallas_kernels", "ring_jax": "ring_jax", "ring_jax.infer": "infer", "ring_jax.train": "train"}
COMMANDS = ("ring_jax.train", "ring_jax.infer")


def modules() -> list[tuple[str, pathlib.Path]]:
    return [(package, path) for package, folder in FOLDERS.items() for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: pathlib.Path) -> set[str]:
    """Return the modules a file imports, wherever in it; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def package_of(module: str) -> str | None:
    """Return the package of ours that a module belongs to."""
    return next((p for p in reversed(PACKAGES) if module == p or module.startswith(p + ".")), None)


@pytest.mark.parametrize(("package", "path"), [pytest.param(*m, id=str(m[1].relative_to(ROOT))) for m in modules()])
def test_imports_run_one_way(package, path):
    for module in imports(path):
        owner = package_of(module)
        allowed = PACKAGES.index(package) >= PACKAGES.index(owner) if owner else True
        assert allowed, f"{package} imports {module}"
        assert module.split(".")[0] not in ("train", "infer", "tests"), f"{module}: a second import makes a second module"
        assert not module.startswith(("ring_jax.tests", "ring_jax.pallas_kernels"))


def test_import_direction_is_seen(tmp_path):
    """The test above can fail."""
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from ring_jax import infer\n    import train.loop\n")
    assert {package_of(m) for m in imports(file)} == {"ring_jax", "ring_jax.infer", None}
    assert "train.loop" in imports(file)


def run(*arguments: str, cwd: pathlib.Path, path: pathlib.Path | None = None, site: bool = True) -> subprocess.CompletedProcess:
    """Run the interpreter in a folder, with `path` importable; without `site`, the environment's own editable install is not."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    if not site:  # the dependencies stay importable, the editable finder that site would start does not
        packages = [p for p in sys.path if pathlib.Path(p).name in ("site-packages", "dist-packages")]
        environment["PYTHONPATH"] = os.pathsep.join([str(p) for p in (path, *packages) if p is not None])
        arguments = ("-S", *arguments)
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("module", ["ring_jax.config", "ring_jax.train.config", "ring_jax.infer.__main__", "ring_jax.train.__main__"])
def test_arguments_are_read_without_jax(module):
    done = run("-c", f"import sys, {module}; print(sorted({{'jax', 'flax', 'orbax', 'grain'}} & set(sys.modules)))", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [*COMMANDS, "ring_jax.infer score", "ring_jax.infer align"])
def test_help_is_quick(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("-m", *command.split(), "--help", cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert f"python -m {command}" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "--help answers within a second of CPU time"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> pathlib.Path:
    """Return a folder with files that a careless import would find."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("train", "infer"):
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong file')\n")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Return a wheel of the checkout, built in a copy of it, since a build leaves files behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.endswith(".py")}
    expected = {str(pathlib.Path(package.replace(".", "/")) / path.relative_to(ROOT / FOLDERS[package])) for package, path in modules()}
    assert names == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_wheel_runs_anywhere(wheel, tmp_path, elsewhere, command):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    origin = run("-c", f"import {command} as module; print(module.__file__)", cwd=elsewhere, path=tmp_path, site=False)
    assert origin.stdout.startswith(str(tmp_path)), origin.stdout + origin.stderr
    done = run("-m", command, "--help", cwd=elsewhere, path=tmp_path, site=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m {command}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_wheel_has_what_the_programs_import(wheel, tmp_path, elsewhere, command):
    """--help imports little: the rest is there too."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    last = {"ring_jax.train": "loop", "ring_jax.infer": "align"}[command]
    done = run("-c", f"import {command}.{last}", cwd=elsewhere, path=tmp_path, site=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_checkout_runs(command, elsewhere):
    """Uninstalled, from its own folder and from another one; and as the environment has it installed."""
    for options in ({"cwd": ROOT, "path": ROOT, "site": False}, {"cwd": elsewhere, "path": ROOT, "site": False}, {"cwd": elsewhere}):
        done = run("-m", command, "--help", **options)
        assert done.returncode == 0, done.stderr
