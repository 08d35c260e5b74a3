"""What can be said of a model: its architecture, its weights, where and how precisely it runs."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from asl.config import OptionalFloat, OptionalInt, Settings

Head = Literal["linear", "bottleneck", "ml_decoder"]
Weights = Literal["best", "ema", "regular"]


class ModelSettings(Settings):
    """Which model."""

    model_name: str = "tresnet_m"
    """any timm model; the papers': tresnet_m/l/xl/v2_l"""
    head: Head = "linear"
    """last layers: one linear, the official Open Images one (512 wide), or the ML-Decoder"""
    num_classes: Annotated[OptionalInt, Field(ge=1)] = None
    """an error if the data set or checkpoint has another number of classes"""


class NewModelSettings(ModelSettings):
    """A model to train: from random weights, from a file, or from timm's hub."""

    model_path: str = ""
    """file of weights: official, timm's or this project's, or zoo:NAME or hf-hub:OWNER/NAME"""
    pretrained: bool = False
    """start from timm's ImageNet weights, fetched from its hub"""
    drop_path: Annotated[OptionalFloat, Field(ge=0, le=0.99)] = None
    """chance that training skips a residual branch, in the last block; default: the model's own"""


class TrainedModelSettings(ModelSettings):
    """A model to use, or several whose scores are averaged."""

    model_path: tuple[str, ...] = ()
    """file of weights: official, timm's or this project's, or zoo:NAME or hf-hub:OWNER/NAME;
    several: the mean of their scores"""
    weights: Weights = "best"
    """which set of a checkpoint of train.py to use: averaged, regular, or the one that was
    better when the checkpoint was written"""

    @field_validator("model_path", mode="before")
    @classmethod
    def _one_or_several(cls, paths: Any) -> Any:
        if isinstance(paths, str):
            paths = (paths,)
        return tuple(path for path in paths if path != "") if isinstance(paths, tuple) else paths


class DeviceSettings(Settings):
    """Where a model computes, and in what precision."""

    device: str = ""
    """cuda, cuda:1, mps, cpu; default: the first that is there"""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """precision of the forward pass; auto: what is faster here"""
