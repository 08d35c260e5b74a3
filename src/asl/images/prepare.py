"""From a batch on the host to the model's input on the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from asl.errors import UsageError
from asl.images.augment import apply_batch
from asl.images.loader import Batch
from asl.images.settings import AugmentSettings

Statistics = tuple[float, ...]  # red, green, blue


def preparation(
    mean: Statistics,
    std: Statistics,
    device: torch.device,
    computed_in: torch.dtype | None = None,
) -> Callable[[Batch], Tensor]:
    """What makes (B, 3, S, S) images on the device of a batch: (x / 255 - mean) / std.

    It first does the augmentation that the batch still asks for. Features, which were made of such
    images before, are put on the device and are not changed. The images are what the model's
    first layer takes, made in one pass: channels last, the layout that convolutions are fastest in,
    and of the type `computed_in`, else float32. They are rounded to it once, at the end.
    """
    means, stds = (torch.tensor(each, device=device).view(3, 1, 1) for each in (mean, std))
    scale, shift = 1 / (255 * stds), -means / stds

    def prepare(batch: Batch) -> Tensor:
        images = batch.images.to(device, non_blocking=True)
        if images.is_floating_point():
            return images
        if batch.augmentation is not None:
            images = apply_batch(images, batch.augmentation)
        made = torch.empty_like(
            images, dtype=computed_in or torch.float32, memory_format=torch.channels_last
        )
        return torch.addcmul(shift, images, scale, out=made)

    return prepare


def augments_on_device(settings: AugmentSettings, device_type: str) -> bool:
    """Whether training images are augmented where the model is, and not in the workers.

    By default so on CUDA alone. Raises `UsageError` for RandAugment on a device without float64.
    """
    equalizes = settings.augment in ("recipe", "randaugment")
    if settings.augment_on == "device" and equalizes and device_type == "mps":
        raise UsageError(
            "augment_on is device, but AutoContrast needs float64, which Apple GPUs do not have: "
            "use --augment-on workers"
        )
    return settings.augment_on == "device" or (
        settings.augment_on == "auto" and device_type == "cuda"
    )
