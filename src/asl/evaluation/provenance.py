"""What a published number says of itself."""

import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import timm
import torch

from asl import __version__


def provenance() -> dict[str, str]:
    """The command that is running, the commit of this code, and the versions of the libraries."""
    started = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m PACKAGE`
    program = ["-m", started.name.removesuffix(".__main__")] if started else sys.argv[:1]
    return {
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "commit": commit(),
        "versions": f"asl {__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }


@cache
def commit() -> str:
    """The commit of this code when this was first asked; "unknown" outside of a clone."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
