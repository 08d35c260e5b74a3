"""What can be done with checkpoints: `python -m asl.models soup A B --output FILE`."""

from pathlib import Path
from typing import Annotated

import tyro

from asl.errors import reported
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


if __name__ == "__main__":
    with reported():
        app.cli(prog="python -m asl.models", description=__doc__)
