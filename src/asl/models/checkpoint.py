"""Checkpoints: one format, one writer that leaves no half files, one reader that runs no code.

A checkpoint is the official format and more: `{"model": weights, "num_classes": C, "idx_to_class":
{0: name, ...}}`. Files of a training run also hold two sets of weights, "ema" (averaged) and
"regular", and under "best" the name of the set that scored higher. "model" is that set, and shares
its tensors, so a file holds every tensor once. validate.py may add "thresholds" and "calibration"
(see `evaluation.judge`).

A file whose name ends in .safetensors has the tensors of "model" as every program reads them, and
the other entries as JSON in its header, under "asl".
"""

import argparse
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from asl.atomic import replacing
from asl.errors import DataError, UsageError
from asl.models.zoo import is_name, local_file


class _DType:
    """Stands in for `numpy.dtype`, which crashes on a wrong size in a file: it checks none."""

    def __init__(self, code: str, *_: object) -> None:
        self.name = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name = f"{state[1]}{self.name}"  # the byte order, "<" for most


def _scalar(dtype: _DType, data: bytes) -> Any:
    """A NumPy scalar as the plain Python value."""
    if not re.fullmatch(r"[<>|]?([biuf][1248]|U[0-9]{1,4})", dtype.name):
        raise ValueError(f"a NumPy scalar of type {dtype.name!r}")
    return np.frombuffer(data, dtype.name, count=1)[0].item()


# What training scripts put beside tensors and plain values: their command line and NumPy numbers.
# Reading these sets fields and calls nothing else.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    _DType,
    (_DType, "numpy.dtype"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
]
# DistributedDataParallel and torch.compile put these before the names of a model's tensors.
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
# Names of the same entries in files of timm's training script and of many others.
_ENTRIES = {"state_dict": "model", "state_dict_ema": "ema", "model_ema": "ema"}
_SAFETENSORS = ".safetensors"
_HEADER = "asl"  # what the header of such a file calls the other entries
_SETS = ("model", "ema", "regular", "best")
# Tensors among those: thresholds, and the numbers of a calibration.
_TYPES = {str(kind): kind for kind in (torch.float64, torch.float32, torch.int64)}


def save(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write `checkpoint` to `path`: whole and on the disk when this returns, or not at all.

    With a "best" entry ("ema" or "regular"), "model" becomes that very set. A file that is already
    at `path` is replaced in one step at the end. A failure leaves it as it was. A path that ends in
    .safetensors gets a file of that format, with "model" as its one set of weights.

    Raises `DataError` where the file cannot be written (full disk, folder gone, no permission), and
    TypeError for content that `load` would refuse: anything but tensors and plain Python values.
    """
    if "best" in checkpoint:
        checkpoint = {**checkpoint, "model": checkpoint[checkpoint["best"]]}
    _write(path, checkpoint)


def _write(path: str | Path, content: Mapping[str, Any]) -> None:
    try:
        with replacing(path) as file:
            if Path(path).suffix == _SAFETENSORS:
                file.write(_as_safetensors(content))
                return
            torch.save(dict(content), file)
            with torch.serialization.safe_globals(_HARMLESS):
                refused = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
            if refused:
                raise TypeError(f"a checkpoint holds tensors and plain values only, not {refused}")
    except (OSError, RuntimeError) as error:
        # torch closes its archive after an error, fails again, and raises this second failure
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise DataError(f"{path}: the checkpoint cannot be written: {_reason(cause)}") from error


def _as_safetensors(content: Mapping[str, Any]) -> bytes:
    def plain(value: Any) -> dict[str, Any]:
        if isinstance(value, Tensor) and str(value.dtype) in _TYPES:
            return {"dtype": str(value.dtype), "values": value.tolist()}
        raise TypeError(f"a checkpoint holds tensors and plain values only, not {type(value)}")

    others = {name: value for name, value in content.items() if name not in _SETS}
    # Tensors are copied: the format wants each in the usual layout, and in memory of its own.
    tensors = {name: x.contiguous().clone() for name, x in content["model"].items()}
    header = {"format": "pt", _HEADER: json.dumps(others, default=plain)}
    return safetensors_bytes(tensors, header)


def _from_safetensors(path: Path) -> dict[str, Any]:
    def tensors(value: dict[str, Any]) -> Any:
        if value.keys() != {"dtype", "values"}:
            return value
        return torch.tensor(value["values"], dtype=_TYPES[value["dtype"]])

    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(_HEADER)
    if header is None:  # of another program
        return load_file(path)
    return {**json.loads(header, object_hook=tensors), "model": load_file(path)}


def version(path: str | Path) -> tuple[int, ...]:
    """Which content a file has, for `amend`: it changes when the file is written or replaced.

    Raises `UsageError` where that file cannot be amended: it is one of the zoo or the hub, has no
    entries beside its weights, or its folder cannot be written to. Raises what `load` does.
    """
    if is_name(path):
        raise UsageError(f"{path} stays as it was published: copy the file, and change the copy")
    path = Path(path).resolve()
    content = _read(path)
    if not isinstance(content, Mapping) or not any(
        isinstance(content.get(name), Mapping) for name in ("model", "state_dict")
    ):
        raise UsageError(
            f"{path} holds weights alone, as .safetensors files of others do: only a checkpoint of "
            "this project or an official one has room for more"
        )
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} is to be changed, but {path.parent} cannot be written to")
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def amend(path: str | Path, entries: Mapping[str, Any], since: tuple[int, ...]) -> None:
    """Put entries into a checkpoint, over those of the same names; the others stay as they are.

    The file is replaced whole, at the end, or not at all; of a link the file that it leads to.
    `since` is its `version` that the entries were made from. Raises `DataError` if it is another by
    now, as a training writes it, and where it cannot be written.
    """
    path = Path(path).resolve()
    if version(path) != since:
        raise DataError(f"{path} was replaced while it was measured: measure it again")
    _write(path, {**_read(path), **entries})


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project, of the official code or of timm, and run no code from it.

    Returns its entries, of which three are always there: "model" (tensors by name, on the CPU,
    without the prefixes of wrappers), "num_classes" (or None) and "idx_to_class" (class names by
    number, in that order, or None). A bare state dict comes back as "model". `path` may be a name
    that `zoo.local_file` knows.
    A file with averaged weights also has "ema", "regular", and "best" ("ema" or "regular"), and
    "model" is the best set. Files of timm's training do not say which set is best. It is "ema"
    then: timm ranks its checkpoints by the averaged weights, and its own loader prefers them.
    Tensors are mapped from the file where that is possible: reading costs milliseconds, until
    they are used.

    Raises `DataError`, naming the file, if it is missing, damaged, not a checkpoint, or if reading
    it would run code, and `UsageError` for a name that is none.
    """
    path = local_file(path)
    content = _read(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}, not the weights of a model")
    checkpoint = {_ENTRIES.get(str(name), str(name)): value for name, value in content.items()}
    if not isinstance(checkpoint.get("model"), Mapping):
        checkpoint = {"model": content}
    if checkpoint.get("ema") is not None:
        if checkpoint.get("regular") is None:
            checkpoint["regular"] = checkpoint["model"]
        if checkpoint.get("best") not in ("ema", "regular"):
            checkpoint["best"] = "ema"
        checkpoint["model"] = checkpoint[checkpoint["best"]]
    for weights in ("model", "ema", "regular"):
        if checkpoint.get(weights) is not None:
            checkpoint[weights] = _tensors(checkpoint[weights], path)
    try:
        names = _class_names(checkpoint.get("idx_to_class"))
        count = checkpoint.get("num_classes") or (len(names) if names else None)
        return {**checkpoint, "num_classes": count and int(count), "idx_to_class": names}
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{path}: num_classes or idx_to_class is not usable: {error}") from error


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error
    is_zip, is_safetensors, is_pickle = start[:2] == b"PK", start[8:9] == b"{", start[:1] == b"\x80"
    if not (is_zip or is_safetensors or is_pickle):
        what = f"it begins with {start.decode(errors='replace')!r}" if start else "it is empty"
        raise DataError(f"{path}: not a checkpoint: {what}; was a download cut off or refused?")
    try:
        if is_safetensors:
            return _from_safetensors(path)
        packed, unpacked = path.stat().st_size, _unpacked_size(path) if is_zip else 0
        if unpacked <= packed:
            with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a damaged file is an error below
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = f"would run code ({code[1]})" if code else "is damaged or would run code"
        raise DataError(f"{path}: refused: {why} when read; save a state_dict instead") from error
    except Exception as error:  # reading a damaged file fails in countless ways
        raise DataError(f"{path}: damaged or not a checkpoint: {_reason(error)}") from error
    # torch does not compress tensors. A file that grows when read was made to fill the memory.
    raise DataError(f"{path}: refused: its {packed:,} bytes would unpack to {unpacked:,}")


def _unpacked_size(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _tensors(weights: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping):
        raise DataError(f"{path}: holds a {type(weights).__name__} where weights should be")
    tensors = {
        _WRAPPERS.sub("", str(name)): value
        for name, value in weights.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise DataError(f"{path}: not a checkpoint: there are no weights in it")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            raise DataError(f"{path}: {name} is sparse, nested or without values: no plain tensor")
    return tensors


def _class_names(names: Any) -> dict[int, str] | None:
    if names is None:
        return None
    if not isinstance(names, Mapping | list | tuple):
        raise TypeError(f"{type(names).__name__} in place of names by number")
    numbered = names.items() if isinstance(names, Mapping) else enumerate(names)
    by_number = dict(sorted((int(number), name) for number, name in numbered))
    for number, name in by_number.items():
        if not isinstance(name, str):
            raise TypeError(f"name {number} is a {type(name).__name__}")
    return by_number


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).splitlines()[0]
