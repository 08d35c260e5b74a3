"""What validate.py, infer.py and export.py can be told."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro
from pydantic import Field, model_validator

from asl.config import Config, OptionalFloat, OptionalInt, Settings
from asl.data.settings import DataSettings, LabelSettings
from asl.errors import UsageError
from asl.images.settings import ImageSettings
from asl.models.settings import DeviceSettings, TrainedModelSettings

Explanation = Literal["gradcam", "attention"]
_THRESHOLD = ("--thre", "--th")  # the official scripts' names of it
DEFAULT_THRESHOLD = 0.8
DEFAULT_MODEL = "zoo:voc2007_lite0"  # of infer.py
# What a checkpoint knows of the model that its weights are for, and of the images that it saw.
OF_THE_MODEL = ("model_name", "head", "image_size", "exif_rotate", "draft_decode")
_NUMBER = r"[0-9]{1,3}(\.[0-9]{1,3})?"
_VIEWS = rf"|flip|(flip\+)?scales:{_NUMBER}(,{_NUMBER})*"


def trained_with(path: str | Path) -> Mapping[str, Any]:
    """The settings that a checkpoint was trained with, by name; none in a file of others.

    Where its data is an address, that is left out: what is fetched, the user alone says.

    Raises `DataError` for a file that is no checkpoint.
    """
    from asl.data.fetch import is_address
    from asl.models import checkpoint  # and with it torch, which `--help` can do without

    trained = checkpoint.load(path).get("config") or {}
    if isinstance(trained, Mapping) and is_address(trained.get("data", "")):
        trained = {name: value for name, value in trained.items() if name != "data"}
    return trained


class FigureSettings(Settings):
    """How the labels of an epoch are judged."""

    threshold: Annotated[float, Field(ge=0, le=1), tyro.conf.arg(aliases=_THRESHOLD)] = (
        DEFAULT_THRESHOLD
    )
    """score above which a label counts as predicted"""


class ScoringSettings(Settings):
    """How images are scored, and what of it is shown."""

    threshold: Annotated[
        float | None, Field(ge=0, le=1), tyro.conf.arg(metavar="FLOAT", aliases=_THRESHOLD)
    ] = None
    """score above which a label counts as predicted; default: what validate.py
    --tune-thresholds stored in the checkpoint, or 0.8"""
    top_k: Annotated[OptionalInt, Field(ge=1)] = None
    """labels per image; default: 3 in the top-k figures, 10 in infer.py"""
    tta: str = ""
    """average the scores of several views of an image: flip, scales:0.8,1,1.25 (times image_size,
    to the next multiple of 32), or flip+scales:0.8,1,1.25"""
    class_descriptions: str = ""
    """openimages: CSV of class ids and names, to show names"""

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        if not re.fullmatch(_VIEWS, self.tta) or 0 in self.scales:
            raise UsageError(
                f"tta is {self.tta!r}, but must be flip, scales:0.8,1,1.25 or both: "
                "flip+scales:0.8,1,1.25"
            )
        return self

    @property
    def flip(self) -> bool:
        """Whether `tta` asks for the mirrored image too."""
        return self.tta.startswith("flip")

    @property
    def scales(self) -> tuple[float, ...]:
        """The sizes that `tta` asks for, as factors of the image size."""
        return tuple(map(float, (self.tta.partition("scales:")[2] or "1").split(",")))


class ResultSettings(ScoringSettings):
    """What becomes of scores."""

    json_file: Annotated[str, tyro.conf.arg(aliases=("--json",))] = ""
    """also write the result to this file"""


class MeasureSettings(ResultSettings):
    """What a checkpoint is measured for."""

    estimate_prior: str = ""
    """write the mean score of each class over the training split to this CSV"""
    tune_thresholds: Annotated[str, tyro.conf.arg(metavar="RULE")] = ""
    """choose a threshold for each class and store them in the checkpoint: f1 (the best F1) or
    precision:0.8 (the highest recall of at least that precision)"""
    calibrate: Literal["temperature", "platt", "isotonic"] | None = None
    """fit a map from scores to probabilities for each class and store it in the checkpoint"""
    report: str = ""
    """write a page on these figures, with photographs, into this folder: index.html"""
    compare: str = ""
    """show the differences to another report on the same images: its folder or report.json"""
    report_folds: Annotated[OptionalInt, Field(ge=2)] = None
    """suspect labels in the report by linear heads on the features of the model, each fitted to all
    but one of so many parts of these images and asked about that one; default: by the model"""
    config: str = ""
    """recipe: a YAML file of settings"""

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        rule = self.tune_thresholds
        if not re.fullmatch(r"|f1|precision:(0\.[0-9]{1,6}|1(\.0)?)", rule) or _is_zero(rule):
            raise UsageError(
                f"tune_thresholds is {rule!r}, but must be f1 or a precision above 0, up to 1: "
                "precision:0.8"
            )
        for name in ("compare", "report_folds"):
            if getattr(self, name) and not self.report:
                raise UsageError(f"{name} is for a report: give --report DIR too")
        return self


def _is_zero(rule: str) -> bool:
    return rule.startswith("precision:") and float(rule.removeprefix("precision:")) == 0


class PictureSettings(ResultSettings):
    """What is labelled, and how that is shown."""

    pic_path: str = ""
    """an image or a folder of images"""
    jsonl: str = ""
    """the same, a line per image: for folders of any size"""
    csv: str = ""
    """also write path and labels to this CSV, to be corrected and trained on: --dataset table"""
    parquet: str = ""
    """also write all scores to this Parquet file, a column per class"""
    contact_sheet: str = ""
    """also draw small pictures over their labels, 48 on a page: FILE.jpg, FILE-2.jpg, ..."""
    draw: bool = True
    """draw every image beside its labels"""
    explain: Explanation | None = None
    """also draw where the model sees each label: by Grad-CAM, or an ML-Decoder's attention"""
    output: str = ""
    """folder of the pictures; default: predictions"""
    serve: bool = False
    """label pictures on a page in the browser, in place of files, until Ctrl-C"""
    host: str = "127.0.0.1"
    """address of that page; 0.0.0.0 shows it to everyone who can reach this machine"""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """port of that page; 0: one that is free"""
    dataset_type: Literal["MS-COCO", "NUS-WIDE", "PASCAL-VOC", "OpenImages"] | None = None
    """of an official checkpoint: OpenImages has the bottleneck head"""


class ExportSettings(Settings):
    """What file a model becomes."""

    output: str = ""
    """the file: .onnx, or .pt2 for torch.export"""
    preprocessing: Literal["none", "normalize", "resize"] = "none"
    """what the graph does itself. none: it takes images as validate.py normalises them; normalize:
    uint8 of its size, height x width x RGB; resize: uint8 of any size"""
    threshold: Annotated[OptionalFloat, Field(ge=0, le=1)] = None
    """score above which a label counts as predicted, noted in the file for every class; default:
    the checkpoint's own thresholds, else 0.8"""
    pic_path: str = ""
    """an image or a folder of images: compare scores on up to 16 of them; default: drawn ones"""
    int8: bool = False
    """also write NAME.int8.onnx, a quarter of the size, and measure both on the validation split"""
    calibration_images: Annotated[int, Field(ge=1)] = 200
    """images of the training split that the ranges of int8 are taken from"""

    @model_validator(mode="after")
    def _check_output(self) -> Self:
        if self.output and not self.output.lower().endswith((".onnx", ".pt2")):
            raise UsageError(f"output is {self.output!r}, but must end in .onnx or .pt2")
        if self.int8 and not self.output.lower().endswith(".onnx"):
            raise UsageError("int8 is quantised by onnxruntime: name a file .onnx as output")
        return self


class ValidateConfig(Config):
    """All settings of validate.py."""

    from_checkpoint: ClassVar[Sequence[str]] = (
        *OF_THE_MODEL,
        *(name for name in DataSettings.model_fields),
    )

    data: DataSettings = DataSettings()
    # From a recipe alone: they say which images the prior is estimated on.
    labels: tyro.conf.Fixed[LabelSettings] = LabelSettings()
    images: ImageSettings = ImageSettings()
    model: TrainedModelSettings = TrainedModelSettings()
    evaluation: MeasureSettings = MeasureSettings()
    run: DeviceSettings = DeviceSettings()


class _Uncached(ImageSettings):
    cache_dir: tyro.conf.Fixed[str] = ""
    cache_format: tyro.conf.Fixed[str] = "raw"


class PredictorConfig(Config):
    """All settings of a `Predictor`."""

    from_checkpoint: ClassVar[Sequence[str]] = OF_THE_MODEL

    images: ImageSettings = _Uncached()
    model: TrainedModelSettings = TrainedModelSettings()
    evaluation: ScoringSettings = ScoringSettings()
    run: DeviceSettings = DeviceSettings()


class _OfZoo(TrainedModelSettings):
    model_path: tuple[str, ...] = (DEFAULT_MODEL,)
    """file of weights: official, timm's or this project's, or zoo:NAME or hf-hub:OWNER/NAME;
    several: the mean of their scores; default: a small model of the 20 classes of Pascal VOC"""


class InferConfig(PredictorConfig):
    """All settings of infer.py."""

    model: TrainedModelSettings = _OfZoo()
    evaluation: PictureSettings = PictureSettings()


class ExportConfig(Config):
    """All settings of export.py. The data set is needed for int8 alone."""

    from_checkpoint: ClassVar[Sequence[str]] = ValidateConfig.from_checkpoint

    data: DataSettings = DataSettings()
    images: ImageSettings = _Uncached()
    model: TrainedModelSettings = TrainedModelSettings()
    export: ExportSettings = ExportSettings()
