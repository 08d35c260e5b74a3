"""What can be said of images on their way from files to batches."""

from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, model_validator

from asl.config import Settings
from asl.errors import UsageError

MAX_PIXELS = 89_478_485  # Pillow's: above it a picture may be a decompression bomb

Policy = Literal["recipe", "cutout", "randaugment", "flip", "none"]
BadImages = Literal["error", "skip"]


class ImageSettings(Settings):
    """How images are read and made batches of."""

    image_size: Annotated[int, tyro.conf.arg(aliases=("--input-size",)), Field(ge=8, le=4096)] = 224
    """side of the square that images are squished to"""
    batch_size: Annotated[int, tyro.conf.arg(aliases=("-b",)), Field(ge=1)] = 128
    """images per step, of all processes together"""
    workers: Annotated[int | None, tyro.conf.arg(aliases=("-j",), metavar="INT"), Field(ge=0)] = (
        None
    )
    """processes that load images; 0: none; default: one per core, up to 16"""
    cache_dir: str = ""
    """keep the squished images in this folder"""
    cache_format: Annotated[str, Field(pattern=r"^(raw|jpeg:([1-9][0-9]?|100))$")] = "raw"
    """how they are kept there: raw, the same pixels, or jpeg:QUALITY such as jpeg:95, an eighth"""
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """refuse larger pictures before they are decoded, as they could fill the memory"""
    draft_decode: bool = False
    """decode JPEGs at a half, a quarter or an eighth where they are that many times image_size:
    faster for large photographs, and not quite the same pixels"""
    exif_rotate: bool = False
    """turn photographs as their EXIF says, most of all those of telephones; the papers did not"""

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache_format != "raw" and not self.cache_dir:
            raise UsageError(f"cache_format is {self.cache_format}, but there is no cache_dir")
        return self


class AugmentSettings(Settings):
    """What happens to training images, and to those of them that cannot be read."""

    augment: Policy = "recipe"
    """Cutout and RandAugment as in the paper, one of the two, a horizontal flip, or nothing"""
    shuffle: Annotated[str, Field(pattern=r"^(full|blocks:[1-9][0-9]{0,8})$")] = "full"
    """the order of an epoch: any, or for a cache that is larger than the memory blocks:N, blocks
    of 64 neighbours in any order, and then N images at a time in any order"""
    augment_on: Literal["auto", "workers", "device"] = "auto"
    """where that is done; auto: on a CUDA GPU if there is one, else in the workers"""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """mix images and labels in pairs: alpha of the beta distribution of their shares; 0: do not"""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """the same with a rectangle of the other image; with both, each batch draws one of them"""
    mixup_prob: Annotated[float, Field(ge=0, le=1)] = 1.0
    """share of the batches that are mixed"""
    bad_images: BadImages = "error"
    """training images that cannot be read: stop, or take another in their place, up to 1 %"""

    @property
    def shuffle_window(self) -> int:
        """The N of blocks:N; 0 where the order is full."""
        return int(self.shuffle.partition(":")[2] or 0)
