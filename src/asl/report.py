"""Pictures of losses, labels and runs: `python -m asl.report {losses,frequencies,curves} ...`."""

import argparse
from collections.abc import Sequence

from asl.data.partial import simulate
from asl.data.prior import read_prior
from asl.data.readers import READERS, default_split, read
from asl.errors import UsageError, reported
from asl.evaluation.pictures import curves_of_runs, frequency_picture, loss_curves
from asl.evaluation.runs import read_histories
from asl.evaluation.text import frequencies_text, runs_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw pictures of losses, of labels and of runs."""
    parser = argparse.ArgumentParser(prog="python -m asl.report", description=main.__doc__)
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
