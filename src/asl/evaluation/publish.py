"""A folder that can be uploaded: a model's weights, what was measured with them, and its card."""

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from timm.models import save_for_hf
from torch import Tensor

from asl.atomic import new_folder, write_result
from asl.config import of_checkpoint
from asl.errors import DataError, UsageError
from asl.evaluation.evaluate import evaluate
from asl.evaluation.judge import ENTRIES, THRESHOLDS
from asl.evaluation.published import MEASURED, measured
from asl.evaluation.settings import ValidateConfig, trained_with
from asl.evaluation.text import write_json
from asl.models import checkpoint
from asl.models.settings import TrainedModelSettings
from asl.models.weights import trained_model
from asl.models.zoo import HUB_FILE, sha256

CARD, FIGURES = "README.md", "figures.json"
# Settings of a training that name files of the machine that it ran on.
_PLACES = (
    *("data", "image_folder", "class_list", "model_path", "prior_path", "cache_dir"),
    *("output", "config", "resume", "reference", "wandb"),
)
_OF_THE_DATA = ("data", "image_folder", "class_list")  # those of them that it is measured with


def publish(
    model_path: str | Path,
    output: str | Path,
    *,
    data: str = "",
    tune_thresholds: str = "",
    calibrate: str | None = None,
    license: str = "other",
    terms: str = "",
) -> dict[str, Any]:
    """Write the best weights of a checkpoint into a new folder, with what is measured of them.

    `model.safetensors` has the weights in half precision (vectors, such as BatchNorm's, in single),
    and in its header the names of the classes, the settings, thresholds, calibration, `license` and
    `terms`, and the mAP that these very weights have, computed in single precision, on the
    validation split of `data` (by default that of the training). `tune_thresholds` and `calibrate`
    do what they do in validate.py. `README.md` is the model card, with what a hub reads on top, and
    `figures.json` what `evaluate` returns. Of a model with a linear head `config.json` tells timm,
    which loads the folder as "local-dir:FOLDER", or from a hub, how to build it. Names of folders
    on this machine are in none of them.

    Returns the figures. Raises `UsageError` and `DataError`, and leaves nothing behind, for what is
    wrong with the input, and for weights that half precision cannot hold.
    """
    content = checkpoint.load(model_path)
    if not content.get("config"):
        raise DataError(f"{model_path} does not know its model and data: train.py did not write it")
    with new_folder(output) as folder:
        file = folder / HUB_FILE
        checkpoint.save(file, _published(content, model_path, license, terms))
        known = of_checkpoint(ValidateConfig, str(file), trained_with)
        trained = trained_with(model_path)
        known |= {name: trained.get(name) for name in _OF_THE_DATA}
        if not (data or known["data"]):
            raise UsageError(f"{model_path} does not know where its data is: name it with --data")
        config = ValidateConfig.of(
            **{**known, "data": data or known["data"]},
            model_path=str(file),
            tune_thresholds=tune_thresholds,
            calibrate=calibrate,
            amp="off",  # half precision differs from device to device
        )
        figures = evaluate(config) | {"checkpoint": HUB_FILE}
        figures["command"] = _without_folders(figures["command"])
        checkpoint.amend(file, {MEASURED: measured(figures)}, checkpoint.version(file))
        write_json(figures, folder / FIGURES)
        if config.model.head == "linear":
            _write_for_timm(config.model, config.images.image_size, file)
        write_result(folder / CARD, _card(file, figures, Path(output).name).encode())
    return figures


def _published(
    content: Mapping[str, Any], path: str | Path, license: str, terms: str
) -> dict[str, Any]:
    """What goes into the file, but for what is measured."""
    made = {name: content[name] for name in ("num_classes", "idx_to_class")}
    if trained := content.get("provenance"):
        made["provenance"] = {**trained, "command": _without_folders(trained["command"])}
    config = {name: value for name, value in content["config"].items() if name not in _PLACES}
    for name in ENTRIES:  # chosen by these weights, which are the only ones now
        stored = content.get(name)
        if isinstance(stored, Mapping) and stored.get("weights") in (content.get("best"), "only"):
            made[name] = {**stored, "weights": "only"}
    weights = {name: _halved(name, x, path) for name, x in content["model"].items()}
    return {**made, "model": weights, "config": config, "license": license, "terms": terms}


def _without_folders(command: str) -> str:
    """A command without the folders of the machine that it ran on: `--data=/a/b` says b."""
    parts = (word.rpartition("=") for word in shlex.split(command))
    return shlex.join(
        option + equals + (Path(value).name if Path(value).is_absolute() else value)
        for option, equals, value in parts
    )


def _halved(name: str, tensor: Tensor, path: str | Path) -> Tensor:
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        raise DataError(f"{path}: {name} holds values that half precision cannot")
    return half


def _write_for_timm(settings: TrainedModelSettings, image_size: int, file: Path) -> None:
    model, classes, _ = trained_model(settings, image_size)
    own = file.read_bytes()
    shown = {"input_size": (3, image_size, image_size), "crop_pct": 1.0, "crop_mode": "squash"}
    save_for_hf(
        model,
        str(file.parent),
        {"label_names": list(classes)},
        safe_serialization=True,
        data_config={**shown, "interpolation": "bilinear"},
    )
    write_result(file, own)  # in the place of timm's, in full precision and without the rest


def _card(file: Path, figures: Mapping[str, Any], name: str) -> str:
    """The model card, with what a hub reads on top."""
    content = checkpoint.load(file)
    limits, weights = content.get(THRESHOLDS), content["model"].values()
    millions = sum(tensor.numel() for tensor in weights) / 1e6
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template("card.md.j2").render(
        front=_front(content["license"], figures, name),
        name=name,
        config=content["config"],
        figures=figures,
        size=f"{millions:.1f} million numbers, {file.stat().st_size / 1e6:.1f} MB",
        results=_results(figures),
        limits=None if limits is None else limits["values"].tolist(),
        license=content["license"],
        terms=textwrap.fill(content["terms"], 120),
        origins=_origins(content, figures, file),
    )


def _front(license: str, figures: Mapping[str, Any], name: str) -> str:
    result = EvalResult(
        task_type="image-classification",
        dataset_type=figures["dataset"],
        dataset_name=f"{figures['dataset']} {figures['split']}",
        metric_type="mAP",
        metric_value=round(figures["mAP"], 2),
    )
    about = ModelCardData(
        license=license,
        library_name="timm",
        tags=["image-classification", "multi-label", "asymmetric-loss"],
        metrics=["mAP"],
        model_name=name,
        eval_results=[result],
    )
    return str(about.to_yaml())


def _results(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of the figures; of what was tuned here those of images that did not tune."""
    names = ("macro_F1", "CF1", "OF1")
    yield "mAP", f"{figures['mAP']:.2f}"
    judged = {"the stored thresholds": figures["at_threshold"]}
    if "tuning" in figures:
        at = figures["tuning"]["at"]
        others = "thresholds of each class, on images that did not choose them"
        judged = {f"{figures['threshold']:g}": at["threshold"], others: at["per_class"]}
    elif "tuned_on" not in figures:
        judged = {f"{figures['threshold']:g}": figures["at_threshold"]}
    for above, f1 in judged.items():
        values = ", ".join("-" if f1[x] is None else f"{f1[x]:.2f}" for x in names)
        yield f"mean F1, CF1, OF1 above {above}", values
    if "calibration" in figures:
        found = figures["calibration"]
        for what in ("scores", found.get("chosen") or found["stored"]["method"]):
            yield f"expected calibration error: {what}", f"{found['ECE'][what]:.4f}"


def _origins(
    content: Mapping[str, Any], figures: Mapping[str, Any], file: Path
) -> Iterator[tuple[str, str]]:
    yield f"SHA-256 of {file.name}", sha256(file)
    for what, origin in (("trained", content.get("provenance")), ("measured", figures)):
        if origin is not None:
            yield what, origin["command"]
            yield "at commit", f"{origin['commit']} ({origin['versions']})"
