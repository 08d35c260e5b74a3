"""What validate.py, infer.py and export.py can be told."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro
from pydantic import Field, model_validator

from asl.config import Config, OptionalFloat, OptionalInt, Settings
from asl.data.settings import DataSettings, LabelSettings
from asl.errors import UsageError
from asl.images.settings import ImageSettings
from asl.models.settings import DeviceSettings, TrainedModelSettings

Threshold = Annotated[float, tyro.conf.arg(aliases=("--thre", "--th"))]
# What a checkpoint knows of the model that its weights are for.
OF_THE_MODEL = ("model_name", "head", "image_size")
_NUMBER = r"[0-9]{1,3}(\.[0-9]{1,3})?"
_VIEWS = rf"|flip|(flip\+)?scales:{_NUMBER}(,{_NUMBER})*"


def trained_with(path: str) -> Mapping[str, Any]:
    """The settings that a checkpoint was trained with, by name; none in a file of others.

    Raises `DataError` for a file that is no checkpoint.
    """
    from asl.models import checkpoint  # and with it torch, which `--help` can do without

    return checkpoint.load(path).get("config") or {}


class FigureSettings(Settings):
    """How the labels of an epoch or a checkpoint are judged."""

    threshold: Annotated[Threshold, Field(ge=0, le=1)] = 0.8
    """score above which a label counts as predicted"""


class ResultSettings(FigureSettings):
    """What becomes of scores."""

    top_k: Annotated[OptionalInt, Field(ge=1)] = None
    """labels per image; default: 3 in the top-k figures, 10 in infer.py"""
    tta: str = ""
    """average the scores of several views of an image: flip, scales:0.8,1,1.25 (times image_size,
    to the next multiple of 32), or flip+scales:0.8,1,1.25"""
    class_descriptions: str = ""
    """openimages: CSV of class ids and names, to show names"""
    json_file: Annotated[str, tyro.conf.arg(aliases=("--json",))] = ""
    """also write the result to this file"""

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


class MeasureSettings(ResultSettings):
    """What a checkpoint is measured for."""

    estimate_prior: str = ""
    """write the mean score of each class over the training split to this CSV"""
    config: str = ""
    """recipe: a YAML file of settings"""


class PictureSettings(ResultSettings):
    """What is labelled, and how that is shown."""

    pic_path: str = ""
    """an image or a folder of images"""
    draw: bool = True
    """draw every image beside its labels"""
    output: str = ""
    """folder of the pictures; default: predictions"""
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


class InferConfig(Config):
    """All settings of infer.py."""

    from_checkpoint: ClassVar[Sequence[str]] = OF_THE_MODEL

    images: ImageSettings = _Uncached()
    model: TrainedModelSettings = TrainedModelSettings()
    evaluation: PictureSettings = PictureSettings()
    run: DeviceSettings = DeviceSettings()


class ExportConfig(Config):
    """All settings of export.py. The data set is needed for int8 alone."""

    from_checkpoint: ClassVar[Sequence[str]] = ValidateConfig.from_checkpoint

    data: DataSettings = DataSettings()
    images: ImageSettings = _Uncached()
    model: TrainedModelSettings = TrainedModelSettings()
    export: ExportSettings = ExportSettings()
