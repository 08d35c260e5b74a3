"""How near this project is to the originals: tests that compare the two also note the difference.

    python -m pytest -m parity --long -n 0 --parity=docs/parity.md

runs them and writes their table into that page. The answers of the originals are files of
tests/golden, or Pillow's, which the originals call.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

STEPS = "training step on photographs, float64"
# Each part: the original, and what stands here in its place.
PARTS = {
    "loss ASL": ("`AsymmetricLoss`", "`asl.AsymmetricLoss`"),
    "loss ASL, optimized": ("`AsymmetricLossOptimized`", "`asl.AsymmetricLossOptimized`"),
    "loss ASL, one label": ("`ASLSingleLabel`", "`asl.ASLSingleLabel`"),
    "loss CSL, its modes and priors": ("`PartialSelectiveLoss`", "`asl.PartialSelectiveLoss`"),
    "gradients of these losses": ("autograd of the same", "the backward passes of losses.py"),
    "losses Hill and SPLC, and gradients": ("`Hill`, `SPLC`", "`asl.robust_losses`"),
    "mAP": ("`mAP` of helper_functions.py", "`asl.metrics.mean_average_precision`"),
    "mAP of partial labels": ("CSL's evaluation", 'the same, `protocol="partial"`'),
    "validate.py's figures": ("P_C, R_C, F_C, P_O, R_O, F_O of validate.py", "`metrics.f1_scores`"),
    "training step: losses": ("20 steps of train.py, a small network", "`training.step.Training`"),
    "schedule": ("`OneCycleLR` in train.py", "the same steps"),
    "weights after them, with decay groups": ("`add_weight_decay`, Adam", "the same steps"),
    "EMA": ("`ModelEma`", "`Training.ema`, timm's `ModelEmaV3`"),
    STEPS: ("30 steps of train.py, TResNet-M", "`Training`"),
    "their schedule": ("`OneCycleLR` in train.py", "`Training`"),
    "logits after them, regular and EMA": ("the model and its `ModelEma`", "`Training`"),
    "TResNet M, L, XL, v2-L bottleneck": ("TResNet with InplaceABN", "timm's, converted files"),
    "head ML-Decoder": ("`MLDecoder`", "`asl.models.ml_decoder.MLDecoder`"),
    "TResNet with ML-Decoder": ("`add_ml_decoder_head`", "`--head ml_decoder`"),
    "resize, in grey levels (mean)": ("Pillow's `Resize((s, s))`", "`images.decode.squish`"),
    "Cutout, in grey levels": ("`CutoutPIL`: Pillow's rectangle", "`images.augment`"),
    "RandAugment, in grey levels": ("`randaugment`: Pillow's operations", "`images.augment`"),
    "RandAugment, sheared, in grey levels": ("Pillow's shear", "`images.augment`"),
}
START, END = "<!-- parity: written by the tests -->", "<!-- end -->"


class Comparison(NamedTuple):
    """What a test found of a part."""

    part: str
    test: str
    expected: torch.Tensor  # (V,) float64, and so is what was found
    found: torch.Tensor
    difference: float


NOTED = pytest.StashKey[list[Comparison]]()


def pytest_addoption(parser):
    parser.addoption("--parity", metavar="FILE", help="write the table of parity into this page")


def pytest_configure(config):
    config.stash[NOTED] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if "same" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.parity)


@pytest.fixture
def same(request):
    """Asserts that what was found is what the original answers, and notes the difference."""

    def check(part, found, expected, *, rtol=0.0, atol=0.0, average=False):
        found, expected = (
            torch.as_tensor(each).detach().cpu().double().flatten() for each in (found, expected)
        )
        difference = (found - expected).abs()
        if average:
            assert difference.mean() <= atol
        else:
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
        largest = difference.mean() if average else difference.max()
        test = f"{Path(request.node.path).name}: {request.function.__name__}"
        assert part in PARTS, part
        noted = Comparison(part, test, expected, found, largest.item())
        request.config.stash[NOTED].append(noted)

    return check


def pytest_sessionfinish(session):
    page = session.config.getoption("--parity")
    if not page:
        return
    noted = session.config.stash[NOTED]
    missing = PARTS.keys() - {each.part for each in noted}
    if missing or session.testsfailed:
        raise pytest.UsageError(f"{page} is left as it is: nothing on {', '.join(missing)}")
    text = Path(page).read_text()
    inner = re.compile(f"{re.escape(START)}.*{re.escape(END)}", re.DOTALL)
    Path(page).write_text(inner.sub(lambda _: f"{START}\n{table(noted)}\n{END}", text))
    longest = max((each for each in noted if each.part == STEPS), key=lambda each: len(each.found))
    draw_steps(longest, Path(page).parents[1] / "pics" / "parity_photos.png")


def table(noted):
    """A row for each part: its first answers, and the largest of all differences."""
    lines = [
        "| part | the original | here | it answers | here | values | largest difference | test |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for part, (original, here) in PARTS.items():
        own = [each for each in noted if each.part == part]
        tests = ", ".join(sorted({f"`{each.test}`" for each in own}))
        answers = " | ".join(f"{each[0]:.8g}" for each in (own[0].expected, own[0].found))
        values, largest = sum(len(each.found) for each in own), max(each.difference for each in own)
        difference = f"{largest:.1e}" if largest else "0"
        lines.append(
            f"| {part} | {original} | {here} | {answers} | {values:,} | {difference} | {tests} |"
        )
    return "\n".join(lines)


def draw_steps(comparison, path):
    """The losses of the official script as a line, and those of this project as dots on it."""
    from matplotlib.figure import Figure

    figure = Figure((7, 2.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(comparison.found) + 1)
    axes.plot(steps, comparison.expected, color="#D55E00", label="official script")
    axes.scatter(steps, comparison.found, 16, color="#0072B2", zorder=3, label="this project")
    axes.set(xlabel="step", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
