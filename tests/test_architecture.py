"""The house rules: imports point down, `import asl` is light, only the engine knows Config."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "asl"
FLOORS = {
    "losses": 0,
    "metrics": 0,
    "adaptive": 0,
    "config": 0,
    "errors": 0,
    "atomic": 0,
    "distributed": 0,
    "interrupts": 0,
    "data.annotations": 0,
    "data.*": 1,
    "models": 1,
    "prior": 1,
    "checkpoint": 1,
    "report": 1,
    "run": 2,
    "engine": 2,
}
MODULES = sorted(SOURCE.rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def floor_of(name):
    name = "data.*" if name.startswith("data") and name not in FLOORS else name
    return FLOORS[name]


def imported_by(path):
    """The modules of asl that a file imports anywhere, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "asl":
            base = node.module.removeprefix("asl").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if (SOURCE / f"{name.replace('.', '/')}.py").exists() else base


@pytest.mark.parametrize("path", [m for m in MODULES if name_of(m) != "__init__"], ids=name_of)
def test_imports_point_down(path):
    for name in imported_by(path):
        if name:
            assert floor_of(name) <= floor_of(name_of(path)), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", [m for m in MODULES if name_of(m) != "__init__"], ids=name_of)
def test_only_the_second_floor_takes_a_config(path):
    if floor_of(name_of(path)) < 2:
        assert "config" not in set(imported_by(path))


def test_losses_stand_alone():
    nodes = list(ast.walk(ast.parse((SOURCE / "losses.py").read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"torch", "typing", "__future__"}


def loaded_after(statement, *names):
    check = f"import sys; {statement}; print([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=SOURCE.parent
    )
    return ast.literal_eval(done.stdout)


def test_importing_the_losses_loads_torch_and_nothing_else_that_is_heavy():
    heavy = ("torchvision", "timm", "pycocotools", "numpy.testing", "matplotlib", "polars", "tyro")
    assert loaded_after("from asl import AsymmetricLoss", *heavy) == []


def test_parsing_the_command_line_needs_no_torch():
    assert loaded_after("from asl.config import parse; parse('train', '', [])", "torch") == []
