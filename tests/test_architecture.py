"""The house rules: imports point down, settings and losses are light, losses.py stands alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "asl"
GROUND = {
    "losses",
    "losses_cpu",
    "robust_losses",
    "metrics",
    "config",
    "errors",
    "atomic",
    "distributed",
}
# A wing knows those of lower floors and nothing above. Scripts know all.
FLOORS = {"data": 1, "images": 2, "models": 2, "evaluation": 3, "training": 4, "studies": 5}
SCRIPTS = {"report", "data.__main__", "models.__main__"}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def name_of(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def floor_of(name):
    if name in SCRIPTS:
        return 6
    wing = name.partition(".")[0]
    return 0 if wing in GROUND else FLOORS[wing]


def imported_by(path):
    """The modules of asl that a file imports anywhere, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("asl.") for a in node.names if a.name[:4] == "asl.")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "asl":
            base = node.module.removeprefix("asl").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                at = SOURCE / name.replace(".", "/")
                found = at.with_suffix(".py").exists() or at.is_dir()
                if found or base:
                    yield name if found else base


every_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@every_module
def test_imports_point_down(path):
    own = name_of(path)
    for name in imported_by(path):
        same_wing = name.partition(".")[0] == own.partition(".")[0]
        lower = floor_of(name) < floor_of(own) or floor_of(name) == floor_of(own) == 0
        assert same_wing or lower, f"{own} imports {name}"


def test_every_wing_is_there():
    assert {name_of(path).partition(".")[0] for path in MODULES} - GROUND - SCRIPTS == {*FLOORS}


@every_module
def test_a_function_takes_the_settings_of_its_wing_and_not_a_whole_config(path):
    if (
        name_of(path) in ("evaluation.evaluate", "evaluation.predict", "evaluation.export")
        or floor_of(name_of(path)) > 3
    ):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and name_of(path) != "config":
            taken = {ast.unparse(a.annotation) for a in node.args.args if a.annotation}
            assert not {hint for hint in taken if hint.endswith("Config")}, node.name


def nesting(node, depth=0):
    deeper = isinstance(node, ast.For | ast.While | ast.If | ast.With | ast.Try)
    inner = [nesting(child, depth + deeper) for child in ast.iter_child_nodes(node)]
    return max([depth + deeper, *inner])


@every_module
def test_functions_fit_on_a_screen_and_files_on_ten(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            document = ast.get_docstring(node, clean=False)
            code = lines - (len(document.splitlines()) if document else 0)
            assert code <= 60, f"{node.name}: {code} lines"
            assert nesting(node) <= 5, f"{node.name} is nested {nesting(node)} levels deep"


def test_losses_stand_alone():
    nodes = list(ast.walk(ast.parse((SOURCE / "losses.py").read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    allowed = {"torch", "typing", "collections", "__future__", "losses_cpu"}
    assert {name.split(".")[0] for name in names} <= allowed


def loaded_after(statement, *names):
    check = f"import sys; {statement}; print([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=SOURCE.parent
    )
    return ast.literal_eval(done.stdout)


HEAVY = ("torchvision", "timm", "pycocotools", "matplotlib", "polars", "tyro", "pydantic", "PIL")


def test_importing_asl_loads_nothing_heavy():
    assert loaded_after("import asl", "torch", "numpy", *HEAVY) == []


def test_importing_the_losses_loads_torch_and_nothing_else_that_is_heavy():
    assert loaded_after("from asl import AsymmetricLoss", "numpy.testing", *HEAVY) == []
    assert loaded_after("from asl.robust_losses import SPLC", "numpy.testing", *HEAVY) == []


@pytest.mark.parametrize(
    "config",
    [
        "training.settings.TrainConfig",
        "evaluation.settings.InferConfig",
        "evaluation.settings.ExportConfig",
    ],
)
def test_parsing_the_command_line_needs_no_torch(config):
    module, _, name = config.rpartition(".")
    statement = f"from asl.config import parse; from asl.{module} import {name}"
    assert loaded_after(f"{statement}; parse({name}, 'x', '', [])", "torch", "numpy", "timm") == []


def test_the_public_interface_is_where_it_was_promised():
    statement = (
        "from asl import AsymmetricLoss, AsymmetricLossOptimized, ASLSingleLabel,"
        " PartialSelectiveLoss, asymmetric_loss;"
        "from asl.metrics import average_precision, mean_average_precision, f1_scores;"
        "from asl.models import create_model, load_weights"
    )
    assert loaded_after(statement, "asl.models.build") == ["asl.models.build"]
    statement = "from asl import Predictor"
    assert loaded_after(statement, "asl.models.build", "matplotlib") == ["asl.models.build"]
