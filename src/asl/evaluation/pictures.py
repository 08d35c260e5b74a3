"""What a person looks at: pictures of predictions, samples, curves, losses and frequencies.

matplotlib is imported only where something is drawn, and needs no display. Every file is replaced
whole or not at all.
"""

import io
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from asl.atomic import write_result
from asl.data.annotations import PRESENT, Annotations
from asl.evaluation.text import MAX_CLASSES_IN_FULL, percent, rank_correlation
from asl.images.decode import read_image
from asl.losses import AsymmetricLoss, PartialSelectiveLoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
PALE_BLUE, PALE_GREY, GREY = "#A6CBE3", "#ECEEF1", "#5F6670"
OF_RUNS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", BLACK)


def draw_predictions(
    predictions: Sequence[Mapping[str, Any]],
    folder: str | Path,
    read: Callable[[str], Tensor] = read_image,
) -> None:
    """Draw every prediction with `prediction_picture` into `folder`. `read` gives a file's pixels.

    About 0.4 s each.
    """
    files = picture_files([prediction["file"] for prediction in predictions], folder)
    for prediction, path in zip(tqdm(predictions, "pictures", leave=False), files, strict=True):
        image = read(prediction["file"]).permute(1, 2, 0).numpy()
        prediction_picture(image, prediction["labels"], path)


def picture_files(files: Sequence[str], folder: str | Path) -> list[Path]:
    """The pictures that are drawn of images in these files.

    They keep the layout of sub-folders and the whole name of the image ("a/1.jpg" becomes
    "a/1.jpg.png"), so no two of them meet.
    """
    images = [Path(file) for file in files]
    root = os.path.commonpath([image.parent for image in images])
    return [Path(folder, i.relative_to(root).with_name(f"{i.name}.png")) for i in images]


def prediction_picture(
    image: str | Path | npt.NDArray[np.uint8],
    labels: Sequence[Mapping[str, Any]],
    path: str | Path,
) -> None:
    """Draw the photograph, and beside it a bar for every label: strong if it was predicted.

    `image` is a file or RGB pixels (H, W, 3); `labels` are those of `predict`: "name",
    "score" and "threshold" in [0, 1] and "predicted". Names of more than 45 letters are cut. Bars
    and numbers are scores also where there is a "probability", for thresholds are: a note says so.
    """
    if not isinstance(image, np.ndarray):
        image = read_image(image).permute(1, 2, 0).numpy()
    # All in inches. The photograph fills its box in one direction; nothing is stretched.
    margin, pitch, bar, bars_width = 0.25, 0.41, 0.11, 3.7
    height, width = image.shape[:2]
    scale = min(5.6 / width, 4.2 / height)
    width, height = width * scale, height * scale
    bars_height = pitch * len(labels) + 0.15
    full_width = width + bars_width + 3 * margin
    full_height = max(height, bars_height) + 2 * margin

    with _figure(full_width, full_height, path) as figure:

        def place(left: float, width: float, height: float) -> "Axes":
            bottom = full_height - margin - height
            inches = (left / full_width, bottom / full_height)
            axes = figure.add_axes((*inches, width / full_width, height / full_height))
            axes.set_axis_off()
            return axes

        place(margin, width, height).imshow(image, aspect="auto")
        axes = place(width + 2 * margin, bars_width, bars_height)
        axes.set(xlim=(0, 1), ylim=(bars_height, 0))
        middles = [pitch * row + 0.26 for row in range(len(labels))]
        for label, y in zip(labels, middles, strict=True):
            name, predicted = label["name"], label["predicted"]
            name = name if len(name) <= 45 else name[:44] + "…"
            style: dict[str, Any] = {"color": BLACK if predicted else GREY, "parse_math": False}
            axes.text(0, y - 0.1, name, **style)
            axes.text(1, y - 0.1, percent(label["score"]), ha="right", **style)
            axes.barh(y, 1, bar, color=PALE_GREY)
            axes.barh(y, label["score"], bar, color=BLUE if predicted else PALE_BLUE)
        limits = [label["threshold"] for label in labels]
        ends = [y - 0.08 for y in middles], [y + 0.08 for y in middles]
        axes.vlines(limits, *ends, color=BLACK, linewidth=1)
        at, note = limits[0], f"threshold {limits[0]:g}"
        if len(set(limits)) > 1:
            at, note = 1, "lines: the threshold of each class"
        if "probability" in labels[0]:
            note = f"bars: scores, no probabilities; {note}"
        where = "left" if at < 0.2 else "right" if at > 0.8 else "center"
        axes.text(at, bars_height, note, ha=where, va="bottom", color=GREY, size=8)


def samples_picture(annotations: Annotations, path: str | Path) -> None:
    """Draw all images of `annotations` (a dozen or so), each with the names of its labels."""
    columns = min(4, len(annotations))
    rows = -(-len(annotations) // columns)
    with _figure(3 * columns, 2.9 * rows, path, layout="constrained") as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for index, axes in zip(range(len(annotations)), grid.flat, strict=False):
            axes.imshow(read_image(annotations.path(index)).permute(1, 2, 0).numpy())
            present = np.flatnonzero(annotations.labels(index) == PRESENT)
            names = ", ".join(annotations.classes[c] for c in present) or "(none)"
            axes.set_title(textwrap.fill(names, 34, max_lines=3), parse_math=False, size=9)


def pairs_picture(pairs: Sequence[tuple[str, str]], path: str | Path) -> None:
    """Draw pairs of image files (a dozen or so) side by side, with their names."""
    columns = min(2, len(pairs))
    rows = -(-len(pairs) // columns)
    with _figure(6 * columns, 2.6 * rows, path, layout="constrained") as figure:
        grid = figure.subplots(rows, 2 * columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        files = (file for pair in pairs for file in pair)
        for file, axes in zip(files, grid.flat, strict=False):
            axes.imshow(read_image(file).permute(1, 2, 0).numpy())
            axes.set_title(textwrap.shorten(Path(file).name, 34), parse_math=False, size=9)


def curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the rows of metrics.jsonl over the epochs, one panel below the other.

    What no row has gets no panel. A curve passes over the epochs that lack its figure.
    """
    rows = [{key: value for key, value in row.items() if value is not None} for row in history]
    panels = {
        "mAP (%)": {"mAP_ema": "EMA", "mAP_regular": "regular"},
        "loss per batch": {"loss": ""},
        "learning rate": {"lr": ""},
        "gap": {"gap": ""},
        "gamma_neg": {"gamma_neg": ""},
    }
    known = {key for row in rows for key in row}
    panels = {title: keys for title, keys in panels.items() if known & keys.keys()}
    heights = [1.5 if "mAP_ema" in keys else 1.0 for keys in panels.values()]
    with _figure(7, 0.5 + 1.6 * sum(heights), path, layout="constrained") as figure:
        grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
        for axes, (title, keys) in zip(grid[:, 0], panels.items(), strict=True):
            for key, color in zip(keys, (BLUE, ORANGE), strict=False):
                points = [(row["epoch"], row[key]) for row in rows if key in row]
                epochs, values = zip(*points, strict=True)
                marker = "o" if len(points) <= 40 else None
                best = f"{keys[key]}, best {max(values):.2f}"
                axes.plot(epochs, values, color=color, marker=marker, label=best)
            axes.set_ylabel(title)
            if len(keys) > 1:
                axes.legend(loc="lower right")
        last = grid[-1, 0]
        last.set_xlabel("epoch")
        last.set_xlim(0.5, max(row["epoch"] for row in rows) + 0.5)
        last.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.align_ylabels()


def curves_of_runs(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draw the rows of metrics.jsonl of several runs, by name, over each other.

    mAP (of the averaged weights in full, of the regular ones thin), loss and learning rate over the
    epochs. From the eighth run on lines are dashed, in the same colours. A run without an epoch is
    left out; one needs to have some.
    """
    histories = {name: rows for name, rows in histories.items() if rows}
    panels = {
        "mAP (%)": ("mAP_ema", "mAP_regular"),
        "loss per batch": ("loss",),
        "learning rate": ("lr",),
    }
    heights = [2, 1, 1]
    legend_height = 0.22 * -(-len(histories) // 2)
    with _figure(7, 0.8 + 1.6 * sum(heights) + legend_height, path, layout="constrained") as figure:
        grid = figure.subplots(len(panels), sharex=True, height_ratios=heights)
        for axes, (title, keys) in zip(grid, panels.items(), strict=True):
            for number, rows in enumerate(histories.values()):
                for key, width in zip(keys, (1.8, 0.7), strict=False):
                    _plot_run(axes, rows, key, number, width)
            axes.set_ylabel(title)
        grid[0].set_title("thick: EMA, thin: regular weights", loc="right", color=GREY, size=8)
        grid[-1].set_xlabel("epoch")
        grid[-1].set_xlim(0.5, max(rows[-1]["epoch"] for rows in histories.values()) + 0.5)
        grid[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        handles = grid[-1].get_lines()
        legend = figure.legend(
            handles, [*map(str, range(len(handles)))], loc="outside upper left", ncols=2
        )
        for text, name in zip(legend.get_texts(), histories, strict=True):
            text.set(text=name, parse_math=False)
        figure.align_ylabels()


def _plot_run(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, number: int, width: float
) -> None:
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    axes.plot(
        [epoch for epoch, _ in points],
        [value for _, value in points],
        color=OF_RUNS[number % len(OF_RUNS)],
        ls=("-", (0, (5, 1.5)), (0, (1, 1)))[number // len(OF_RUNS) % 3],
        lw=width,
        marker="o" if len(points) == 1 else None,  # of which a line would show nothing
        ms=2.5 * width,
    )


def loss_curves(path: str | Path) -> None:
    """Draw the losses of this project, and their gradients, over the score p = sigmoid(x).

    Like the loss and gradient figures of the ASL paper (section 2), with the parameters of the
    official recipes. The focusing weight is held constant in the gradients, as in the official
    training script. CSL has a curve of its own only where a cell is not annotated.
    """
    ce = AsymmetricLoss(0, 0, 0, reduction="none")
    focal = AsymmetricLoss(2, 2, 0, reduction="none")
    csl = PartialSelectiveLoss("negative", gamma_unann=4, reduction="none")
    asl = AsymmetricLoss(4, 0, 0.05, reduction="none")
    solid, dashed, dotted = "-", (0, (5, 2)), (0, (1, 1.2))
    # The thin line of cross-entropy stays visible where it lies on that of ASL.
    lines: list[tuple[str, nn.Module, Sequence[int], dict[str, Any]]] = [
        ("cross-entropy", ce, (0, 1), {"color": BLACK, "ls": solid, "lw": 1.2, "zorder": 3}),
        ("focal: γ = 2", focal, (0, 1), {"color": ORANGE, "ls": dashed, "lw": 2}),
        ("ASL: γ₋ = 4, γ₊ = 0, m = 0.05", asl, (0, 1), {"color": BLUE, "ls": solid, "lw": 3.2}),
        ("CSL, cell not annotated: γᵤ = 4", csl, (-1,), {"color": GREEN, "ls": dotted, "lw": 2}),
    ]
    note = {"color": BLUE, "va": "top"}
    p = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    with _figure(7.5, 5.7, path, layout="constrained") as figure:
        grid = figure.subplots(2, 2, sharex=True, sharey="row")
        for name, loss, targets, style in lines:
            for target in targets:
                logits = p.logit()[:, None].requires_grad_()
                losses = loss(logits, torch.full_like(logits, target))
                [gradient] = torch.autograd.grad(losses.sum(), logits)
                above, below = grid[:, 1 if target == 1 else 0]
                above.plot(p, losses.detach(), label=name, **style)
                below.plot(p, gradient.abs(), label=name, **style)
        grid[0, 0].set(title="a negative (y = 0)", ylabel="loss", ylim=(-0.1, 4))
        grid[0, 1].set(title="a positive (y = 1)")
        grid[1, 0].set(ylabel="gradient |∂L/∂x|", xlabel="score p = σ(x)")
        grid[1, 1].set(xlabel="score p = σ(x)", xlim=(-0.02, 1.02))
        for axes in grid[:, 0]:
            axes.axvspan(0, asl.clip, color=BLUE, alpha=0.15, linewidth=0)
        grid[1, 0].text(0.07, 0.93, "p ≤ m: easy negatives\nare free under ASL", **note)
        grid[0, 1].text(0.25, 2.6, "positives: ASL is\ncross-entropy", **note)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def frequency_picture(
    original: Annotations,
    partial: Mapping[str, Annotations],
    priors: Mapping[str, npt.ArrayLike],
    path: str | Path,
) -> None:
    """Draw the share of the images that each class is present in, the most frequent first.

    One panel for each `partial` version: the true share, what is left of it, and the prior (C,) of
    that name if there is one. Like the CSL paper's figure of class frequencies.
    """
    share = original.counts(PRESENT) / len(original)
    order = np.argsort(-share, kind="stable")
    left = {name: kept.counts(PRESENT) / len(kept) for name, kept in partial.items()}
    drawn = np.concatenate([share, *left.values()])
    lowest = drawn[drawn > 0].min(initial=1) / 2  # a class without images has no place on the scale
    named = len(order) <= MAX_CLASSES_IN_FULL
    width = max(9.0, 0.135 * len(order) * named)
    x = np.arange(len(order))
    with _figure(width, 2.3 * len(left) + 1.3 * named, path, layout="constrained") as figure:
        grid = figure.subplots(len(left), sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(grid[:, 0], left, strict=True):
            shown = [
                axes.bar(x, 100 * share[order], 1, color=PALE_BLUE, label="all labels"),
                *axes.plot(x, 100 * left[name][order], color=BLUE, label="labels that are left"),
            ]
            if name in priors:
                prior = np.asarray(priors[name])
                label = f"estimated prior (rank correlation {rank_correlation(share, prior):.2f})"
                dots = 15 if named else 1
                shown.append(axes.scatter(x, 100 * prior[order], dots, color=ORANGE, label=label))
            axes.set_title(name, loc="left")
            axes.set(yscale="log", ylabel="% of the images")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.tick_params(axis="x", length=0)
            axes.grid(visible=False, axis="x")
            axes.legend(handles=shown, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=3)
        axes.set(xlim=(-0.5, len(order) - 0.5), ylim=(100 * lowest, 100))
        if named:
            axes.set_xticks(x, [original.classes[c] for c in order], rotation=90, size=7)
        else:
            axes.set_xlabel("classes, the most frequent first")


def arms_picture(panels: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path) -> None:
    """Draw the mAP of several arms, a dot for each training and a line at their mean.

    One panel for each title, all with one scale; arms from top to bottom as they come.
    """
    names = list(dict.fromkeys(name for arms in panels.values() for name in arms))
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    width = 2.2 + 3.4 * columns
    rows = -(-len(panels) // columns)
    height = rows * (0.7 + 0.32 * len(names)) + 0.2
    with _figure(width, height, path, layout="constrained") as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, arms) in zip(grid.flat, panels.items(), strict=False):
            for name, figures in arms.items():
                y = names.index(name)
                axes.scatter(figures, [y] * len(figures), 22, color=BLUE, alpha=0.45, linewidths=0)
                axes.vlines(np.mean(figures), y - 0.32, y + 0.32, color=ORANGE)
            axes.set_title(title, loc="left")
            axes.set(xlabel="mAP (%)", ylim=(len(names) - 0.5, -0.5))
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(labelbottom=True)
            axes.grid(visible=False, axis="y")


def grid_picture(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    grid: Mapping[str, Sequence[Any]],
    path: str | Path,
) -> None:
    """Draw the mean mAP over a grid of one or two settings: a curve, or a map with its figures.

    The arms of a panel are those of the grid in the order of `itertools.product`, or, of a study
    that is not finished, some of the first; all panels have one scale.
    """
    (down, rows), *other = grid.items()
    across, columns = other[0] if other else ("", [""])
    shape = len(rows), len(columns)
    means = {title: np.full(shape, np.nan) for title in panels}
    for title, arms in panels.items():
        means[title].flat[: len(arms)] = [np.mean(figures) for figures in arms.values()]
    low, high = np.nanmin([*means.values()]), np.nanmax([*means.values()])
    size = (
        0.8 + (0.62 * shape[1] + 0.5 if other else 4.0) * len(panels),
        1.1 + 0.4 * max(6, shape[0]),
    )
    with _figure(*size, path, layout="constrained") as figure:
        grid_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, table) in zip(grid_axes, means.items(), strict=True):
            axes.set_title(title, loc="left")
            if not other:
                axes.plot(range(shape[0]), table[:, 0], color=BLUE, marker="o")
                axes.set_xticks(range(shape[0]), rows)
                axes.set(xlabel=down)
                continue
            axes.imshow(table, cmap="cividis", vmin=low, vmax=high, aspect="auto")
            for (row, column), value in np.ndenumerate(table):
                colour = "white" if value < (low + high) / 2 else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
            axes.set_xticks(range(shape[1]), columns)
            axes.set_yticks(range(shape[0]), rows)
            axes.set(xlabel=across)
            axes.grid(visible=False)
        grid_axes[0].set_ylabel(down if other else "mAP (%)")


@contextmanager
def _figure(
    width: float, height: float, path: str | Path, layout: Any = None
) -> Iterator["Figure"]:
    """A figure of so many inches, which becomes the PNG file `path` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure((width, height), layout=layout)
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format="png")
    write_result(path, content.getvalue())


_STYLE: Any = {
    "figure.dpi": 130,
    "savefig.dpi": "figure",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.formatter.limits": (-2, 5),
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "grid.color": PALE_GREY,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
