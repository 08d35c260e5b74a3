"""Write a checkpoint as ONNX, or as a program of torch.export: see `python export.py --help`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# Threads that wait for each other on a CPU give way to the workers that load images.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from asl.config import parse
from asl.errors import reported
from asl.evaluation.settings import ExportConfig, trained_with


def main() -> None:
    """Parse, export, say what was written and how near it is to PyTorch."""
    about = "Write a checkpoint as ONNX, or as a program of torch.export."
    config = parse(ExportConfig, "export", about, trained_with=trained_with)

    from asl.evaluation.export import export
    from asl.evaluation.text import export_text

    print(export_text(export(config)))


if __name__ == "__main__":
    with reported():
        main()
