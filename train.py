"""Train a multi-label classifier: see `python train.py --help`.

Without any argument it trains the demo (configs/demo.yaml) on the built-in data set.
"""

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# Threads that wait for each other on a CPU give way to the workers that load images.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from asl.config import parse
from asl.errors import reported
from asl.training.settings import TrainConfig

DEMO = Path(__file__).resolve().parent / "configs" / "demo.yaml"


def main() -> None:
    """Parse, train, say where everything is; or with --dry-run only what it would take."""
    argv = sys.argv[1:] or ["--config", str(DEMO)]
    config = parse(TrainConfig, "train", "Train a multi-label classifier.", argv)

    # torch takes seconds to import: not for `--help`
    if config.run.dry_run:
        from asl.training.dry_run import dry_run

        print(dry_run(config))
        return
    from asl.data.fetch import is_address
    from asl.training.fit import fit

    folder = fit(config)
    # Which validate.py does not take from a checkpoint.
    data = f" {shlex.quote(config.data.data)}" if is_address(config.data.data) else ""
    print(f"curves:      {folder / 'curves.png'}")
    print(f"checkpoint:  {folder / 'best.pt'}")
    print(f"validate it: python validate.py{data} --model-path {folder / 'best.pt'}")


if __name__ == "__main__":
    with reported():
        main()
