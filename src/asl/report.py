"""Reports on scores, `python -m asl.report SCORES LABELS`, and pictures.

The pictures: `python -m asl.report {losses,frequencies,curves} ...`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asl.data.annotations import UNANNOTATED
from asl.data.partial import simulate
from asl.data.prior import read_prior
from asl.data.readers import READERS, default_split, read
from asl.errors import UsageError, reported
from asl.evaluation.pictures import curves_of_runs, frequency_picture, loss_curves
from asl.evaluation.provenance import provenance
from asl.evaluation.runs import read_histories
from asl.evaluation.settings import DEFAULT_THRESHOLD
from asl.evaluation.text import frequencies_text, runs_text

PICTURES = ("losses", "frequencies", "curves")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a report on scores and labels, or draw a picture of losses, labels or runs."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in PICTURES:
        picture(words)
    else:
        report(words)


def report(arguments: Sequence[str]) -> None:
    """Write a page on how good scores are, of whatever model."""
    parser = argparse.ArgumentParser(
        prog="python -m asl.report",
        description=report.__doc__,
        epilog=f"Pictures: python -m asl.report {{{','.join(PICTURES)}}} --help",
    )
    parser.add_argument("scores", help="N x C scores from 0 to 1: .npy, .csv or .parquet")
    parser.add_argument("labels", help="their labels: an array of 1, 0, -1, or a table of your own")
    parser.add_argument("--images", metavar="DIR", help="show the photographs of this folder")
    parser.add_argument("--output", default="report", help="folder; default: %(default)s")
    parser.add_argument(
        "--threshold", type=float, default=DEFAULT_THRESHOLD, help="default: %(default)s"
    )
    parser.add_argument("--compare", metavar="REPORT", help="another report on the same images")
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.threshold <= 1:
        raise UsageError(f"--threshold is {chosen.threshold}, but must be from 0 to 1")
    if chosen.images is not None and not Path(chosen.images).is_dir():
        raise UsageError(f"--images: {chosen.images} is not a folder")

    from asl.evaluation.report.build import build_report
    from asl.evaluation.report.compare import Resampled
    from asl.evaluation.report.page import check_folder
    from asl.evaluation.report.tables import read_scores

    check_folder(chosen.output)
    other = Resampled.read(chosen.compare) if chosen.compare else None
    scores, targets, classes, files = read_scores(Path(chosen.scores), Path(chosen.labels))
    page = build_report(
        scores,
        targets,
        classes,
        chosen.output,
        title=f"{chosen.scores} on {chosen.labels}",
        protocol="partial" if (targets == UNANNOTATED).any() else "full",
        thresholds={f"{chosen.threshold:g} for all": [chosen.threshold] * len(classes)},
        files=files,
        root=chosen.images,
        other=other,
        compared_with=chosen.compare or "",
        about={"scores": chosen.scores, "labels": chosen.labels, **provenance()},
        settings={"threshold": chosen.threshold, "images": chosen.images},
    )
    print(page)


def picture(arguments: Sequence[str]) -> None:
    """Draw pictures of losses, of labels and of runs."""
    parser = argparse.ArgumentParser(prog="python -m asl.report", description=picture.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    losses = commands.add_parser("losses", help="draw the losses and their gradients")
    losses.add_argument("--output", default="pics/losses.png", help="default: %(default)s")
    frequent = commands.add_parser(
        "frequencies", help="draw and print class frequencies: of all labels, partial ones, priors"
    )
    frequent.add_argument("data", help="folder of the data set")
    frequent.add_argument("--dataset", default="coco", help=f"{', '.join(READERS)}; default: coco")
    frequent.add_argument("--split", help="default: the one to train on")
    frequent.add_argument(
        "--simulate-partial",
        nargs="+",
        default=["fpc:1000", "rps:0.5"],
        metavar="SCHEME",
        help="fpc:N or rps:P; default: fpc:1000 rps:0.5",
    )
    frequent.add_argument(
        "--prior-path", nargs="+", default=[], metavar="CSV", help="for each scheme, its prior"
    )
    frequent.add_argument("--seed", type=int, default=0, help="of the simulation; default: 0")
    frequent.add_argument("--output", default="pics/frequencies.png", help="default: %(default)s")
    runs = commands.add_parser(
        "curves", help="draw the curves of several runs, and print their mAP"
    )
    runs.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    runs.add_argument("--output", default="curves.png", help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    if chosen.command == "losses":
        loss_curves(chosen.output)
    elif chosen.command == "curves":
        histories = read_histories(chosen.runs)
        print(runs_text(histories))
        curves_of_runs(histories, chosen.output)
    else:
        schemes, paths = chosen.simulate_partial, chosen.prior_path
        if len(paths) > len(schemes):
            raise UsageError(f"{len(paths)} priors for {len(schemes)} schemes: one for each")
        split = chosen.split or default_split(chosen.dataset, chosen.data, "train")
        original = read(chosen.dataset, chosen.data, split)
        partial = {scheme: simulate(original, scheme, chosen.seed) for scheme in schemes}
        priors = {
            scheme: read_prior(path, original.classes).numpy()
            for scheme, path in zip(schemes, paths, strict=False)
        }
        print(frequencies_text(original, partial, priors))
        frequency_picture(original, partial, priors, chosen.output)
    print(chosen.output)


if __name__ == "__main__":
    with reported():
        main()
