"""What an installation holds and needs: the runtime without torch, the wheel with everything it promises."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mt3_runtime

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "runtime" / "mt3_runtime"
ENGINES = ROOT / "engines"
FORBIDDEN = ("torch", "onnx", "onnxscript", "transformers", "scipy", "mt3_export")

# Packages of ours that runtime code may name in an import; the optional ones inside functions only.
BASE = {"numpy", "soundfile", "soxr", "pretty_midi", "mido", "tqdm"}
OPTIONAL = {"PIL", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

forbidden = set(sys.argv[1].split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise ImportError(f"{name} is out of bounds for the runtime")

sys.meta_path.insert(0, Refuse())
import mt3_runtime
for module in pkgutil.walk_packages(mt3_runtime.__path__, "mt3_runtime."):
    importlib.import_module(module.name)
    print(module.name)
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_every_runtime_module_imports_without_torch():
    done = run(IMPORT_EVERYTHING, ",".join(FORBIDDEN))
    assert done.returncode == 0, done.stderr
    files = {path for path in RUNTIME.rglob("*.py") if path.name not in {"__init__.py", "__main__.py"}}
    imported = set(done.stdout.split())
    assert {"mt3_runtime." + ".".join(path.relative_to(RUNTIME).with_suffix("").parts) for path in files} <= imported


def test_the_blocker_blocks():
    """The planted fault of the test above: with a package that the runtime needs, the same script fails."""
    done = run(IMPORT_EVERYTHING, "numpy")
    assert done.returncode != 0
    assert "numpy is out of bounds" in done.stderr


def test_importing_the_runtime_loads_nothing_heavy():
    done = run("import sys, mt3_runtime; print(*{name.partition('.')[0] for name in sys.modules})")
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {*FORBIDDEN, "onnxruntime", "tensorrt", "PIL"}


@pytest.mark.parametrize("path", sorted(RUNTIME.rglob("*.py")), ids=lambda path: path.stem)
def test_runtime_files_import_only_what_is_allowed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # For type checkers only: never run, so never needed.
    unseen = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for node in ast.walk(block)
    }
    for node in set(ast.walk(tree)) - unseen:
        for package in imported_packages(node):
            allowed = BASE | {"mt3_runtime"} | sys.stdlib_module_names
            assert package in (allowed if node in tree.body else allowed | OPTIONAL), f"{package}, line {node.lineno}"


def imported_packages(node):
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide where a name comes from"
        return [node.module.partition(".")[0]]
    return []


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_base_needs_neither_torch_nor_an_engine(project):
    names = {requirement.partition(">")[0].strip() for requirement in project["dependencies"]}
    assert names == BASE


def test_extras_are_there_and_keep_the_two_onnxruntimes_apart(project):
    extras = project["optional-dependencies"]
    assert {"cpu", "cuda", "tensorrt", "picture", "export", "dev"} <= set(extras)
    holds = {name: {text.partition(">")[0].strip() for text in extras[name]} for name in extras}
    assert "onnxruntime" in holds["cpu"]
    assert "onnxruntime-gpu" in holds["cuda"]
    assert not any({"onnxruntime", "onnxruntime-gpu"} <= names for names in holds.values())
    assert not holds["cpu"] & set(FORBIDDEN)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not (ENGINES / "demo" / "manifest.json").exists():
        pytest.skip("engines/demo has not been exported yet, so there is no complete wheel to look at")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_both_packages_and_nothing_else(wheel):
    names = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"mt3_runtime", "mt3_export", f"mt3_runtime-{mt3_runtime.__version__}.dist-info"}
    for folder in ("runtime", "export"):
        sources = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert sources
        assert sources | {f"mt3_{folder}/py.typed"} <= names
    assert not [name for name in names if "/test" in name or name.endswith(".pyc")]


@pytest.mark.parametrize("folder", ["demo", "demo_clip"])
def test_wheel_holds_what_the_demo_needs(wheel, folder):
    """Every file, byte for byte."""
    files = [path for path in (ENGINES / folder).iterdir() if path.is_file()]
    assert files
    for path in files:
        assert wheel.read(f"mt3_runtime/{folder}/{path.name}") == path.read_bytes()


def test_wheel_metadata(wheel, project):
    information = f"mt3_runtime-{mt3_runtime.__version__}.dist-info"
    metadata = wheel.read(f"{information}/METADATA").decode()
    assert f"\nVersion: {mt3_runtime.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert {f"{information}/licenses/LICENSE", f"{information}/licenses/NOTICE"} <= set(wheel.namelist())
    scripts = wheel.read(f"{information}/entry_points.txt").decode()
    for name, target in project["scripts"].items():
        assert f"{name} = {target}" in scripts


def test_wheel_runs_from_where_it_is_unpacked(wheel, tmp_path):
    """Commands start and the demo bundle is found next to the code, away from the sources."""
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import mt3_runtime; from mt3_runtime.bundle import demo_bundle_path, demo_clip_path, open_bundle\n"
        "from pathlib import Path\n"
        "open_bundle(demo_bundle_path())\n"
        "print(Path(mt3_runtime.__file__).parents[1], demo_bundle_path().parents[1], demo_clip_path().parents[1])"
    )
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path.resolve())] * 3
