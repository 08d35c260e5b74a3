"""Model soups: one model whose weights are the mean of those of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asl.errors import DataError, UsageError
from asl.models import checkpoint

_SETS = ("model", "ema", "regular")
_ABOUT = ("num_classes", "idx_to_class", "config")  # what stays as in the first file


def soup(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The mean of checkpoints of one model for the same classes, as a checkpoint.

    Model soups (arXiv 2203.05482), the uniform one. They are for models that were fine-tuned from
    the same weights; of others the mean is of no use. Every set of weights that all files have is
    averaged: averaged (EMA), regular, and the best. "best" stays where all agree, and is "ema"
    where not. Means are made in float64, tensor by tensor. What does not hold fractions
    (BatchNorm's counters) is the first's, as are the settings, and "parents" names the files.

    BatchNorm's running statistics are averaged too. They are not those that the averaged weights
    would measure, so that the mAP on validation images decides whether a soup is any good.

    Raises `UsageError` for fewer than two files and `DataError` that names the first class, setting
    or tensor that does not fit.
    """
    if len(paths) < 2:
        raise UsageError("a soup is made of two checkpoints or more")
    parents = [checkpoint.load(path) for path in paths]
    first = parents[0]
    for path, parent in zip(paths[1:], parents[1:], strict=True):
        _check_same(first, parent, f"{path} does not fit to {paths[0]}")
    sets = [name for name in _SETS if all(each.get(name) is not None for each in parents)]
    made: dict[str, Any] = {name: _mean([each[name] for each in parents]) for name in sets}
    if "ema" in sets:
        bests = {each["best"] for each in parents}
        made["best"] = bests.pop() if len(bests) == 1 else "ema"
    about = {name: first[name] for name in _ABOUT if first.get(name) is not None}
    return {**made, **about, "parents": [str(path) for path in paths]}


def _check_same(first: Mapping[str, Any], other: Mapping[str, Any], misfit: str) -> None:
    here, there = (each["idx_to_class"] or {} for each in (first, other))
    for number in sorted(here.keys() | there.keys()):
        ours, theirs = (each.get(number, "missing") for each in (here, there))
        if ours != theirs:
            raise DataError(f"{misfit}: class {number} is {theirs} there, {ours} here")
    own, others = first.get("config"), other.get("config")
    if isinstance(own, Mapping) and isinstance(others, Mapping):
        for name in ("model_name", "head"):
            if own.get(name) != others.get(name):
                raise DataError(
                    f"{misfit}: {name} is {others.get(name)} there, {own.get(name)} here"
                )
    for which in _SETS:
        if first.get(which) is not None and other.get(which) is not None:
            _check_tensors(first[which], other[which], misfit)


def _check_tensors(first: Mapping[str, Tensor], other: Mapping[str, Tensor], misfit: str) -> None:
    for name in [*first, *(name for name in other if name not in first)]:
        shapes = [tuple(each[name].shape) if name in each else "missing" for each in (other, first)]
        if shapes[0] != shapes[1]:
            raise DataError(f"{misfit}: {name} is {shapes[0]} there, {shapes[1]} here")


def _mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    made = {}
    for name, first in states[0].items():
        made[name] = first
        if first.is_floating_point():
            tensors = torch.stack([state[name].double() for state in states])
            made[name] = tensors.mean(dim=0).to(first.dtype)
    return made
