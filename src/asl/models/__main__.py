"""What can be done with checkpoints: `python -m asl.models {soup,publish} ...`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from asl.errors import UsageError, reported
from asl.evaluation.provenance import provenance
from asl.models import checkpoint
from asl.models.soup import soup

app = tyro.extras.SubcommandApp()


@app.command(name="soup")
def write_soup(paths: Annotated[tuple[Path, ...], tyro.conf.Positional], output: Path) -> None:
    """Average the weights of checkpoints of one model: a model soup (arXiv 2203.05482).

    Args:
        paths: checkpoints that were fine-tuned from the same weights, for the same classes
        output: the checkpoint to write; validate.py and infer.py take it by its path alone
    """
    checkpoint.save(output, {**soup(paths), "provenance": provenance()})
    print(f"{output}: the mean of {len(paths)} checkpoints")


@app.command(name="publish")
def write_published(
    model_path: str,
    output: Path,
    data: str = "",
    tune_thresholds: str = "",
    calibrate: Literal["temperature", "platt", "isotonic"] | None = None,
    license: str = "other",
    terms: Path | None = None,
) -> None:
    """Write a folder that is ready to be uploaded: weights, what is measured of them, model card.

    Args:
        model_path: checkpoint of train.py; its better set of weights is written, in half precision
        output: folder to make
        data: folder of the data set to measure on; default: that of the training
        tune_thresholds: as in validate.py: f1, or precision:0.8
        calibrate: as in validate.py
        license: of the weights, as the hub abbreviates it
        terms: file with a sentence or two: what data the weights are made of, and its terms
    """
    from asl.evaluation.publish import publish  # which imports much that a soup needs not
    from asl.evaluation.text import evaluation_text

    try:
        text = "" if terms is None else " ".join(terms.read_text(encoding="utf-8").split())
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read {terms}: {error}") from None
    figures = publish(
        model_path,
        output,
        data=data,
        tune_thresholds=tune_thresholds,
        calibrate=calibrate,
        license=license,
        terms=text,
    )
    print(evaluation_text(figures))
    print(f"published in {output}: {', '.join(sorted(each.name for each in output.iterdir()))}")


if __name__ == "__main__":
    with reported():
        app.cli(prog="python -m asl.models", description=__doc__)
