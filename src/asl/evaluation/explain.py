"""Where in an image a model sees a label: Grad-CAM, and the attention of an ML-Decoder.

Grad-CAM is a dozen lines on what timm's models share (`forward_features`, `forward_head`). The
package of that name would bring OpenCV, scikit-learn and SciPy, and still has to be told the layer
and how tokens make a map, model by model.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from asl.errors import UsageError
from asl.evaluation.average import Renormalized
from asl.evaluation.pictures import picture_files
from asl.evaluation.predictor import Predictor
from asl.evaluation.score import Scorer
from asl.evaluation.settings import Explanation
from asl.evaluation.sheets import explanation_sheet
from asl.images.decode import squish
from asl.images.loader import Batch
from asl.images.prepare import preparation
from asl.models.ml_decoder import MLDecoder

TILE = 400  # pixels: the longer side of the pictures under their maps, side by side


def heat_maps(
    scorer: Scorer, image: Tensor, classes: Sequence[int], how: Explanation
) -> npt.NDArray[np.float32]:
    """Where in an image (3, H, W) uint8 the model sees these K classes: (K, S, S) in [0, 1].

    A map is as large as the image that the model sees, but only as fine as its last map of
    features. Its highest value is 1, if anything speaks for the class. Of several checkpoints it is
    the mean; views (`tta`) play no part.

    Raises `UsageError` for a model that gives no map.
    """
    pixels = squish(image, scorer.sizes[0])[None]
    prepared = preparation(*scorer.normalized, scorer.device)(Batch(pixels, torch.empty(1, 0)))
    total = torch.zeros(len(classes), *pixels.shape[2:])
    for member, name in zip(scorer.members, scorer.names, strict=True):
        model, given = _model_of(member, prepared)
        try:
            maps = (grad_cam if how == "gradcam" else attention)(model, given, classes)
        except _NoMap as error:
            raise UsageError(f"{name} cannot be explained by {how}: {error}") from None
        fine = interpolate(maps[None], size=pixels.shape[2:], mode="bilinear")[0]
        total += fine.cpu()
    highest: Tensor = total.amax((1, 2), keepdim=True)
    return (total / highest.clamp_min(1e-12)).numpy()


def usual_explanation(scorer: Scorer) -> Explanation:
    """The attention of models that have an ML-Decoder, else Grad-CAM."""
    parts = (member.modules() for member in scorer.members)
    decoders = [any(isinstance(part, MLDecoder) for part in each) for each in parts]
    return "attention" if all(decoders) else "gradcam"


def check_explanation(scorer: Scorer, how: Explanation) -> None:
    """Raise `UsageError` for a model that gives no such map."""
    heat_maps(scorer, torch.zeros(3, scorer.sizes[0], scorer.sizes[0], dtype=torch.uint8), [0], how)


def draw_explanations(
    predictions: Sequence[Any], folder: str | Path, predictor: Predictor, how: Explanation
) -> None:
    """Draw for every image where the model sees what it predicts, else its highest label.

    The pictures lie beside those of `draw_predictions`, and end in ".explained.png".
    """
    files = picture_files([prediction["file"] for prediction in predictions], folder)
    place = {name: number for number, name in enumerate(predictor.classes)}
    bar = tqdm(zip(predictions, files, strict=True), "explanations", len(files), leave=False)
    for prediction, path in bar:
        labels = [label for label in prediction["labels"] if label["predicted"]]
        labels = labels or prediction["labels"][:1]
        image = predictor.read(prediction["file"])
        classes = [place[label["name"]] for label in labels]
        maps = heat_maps(predictor.scorer, image, classes, how)
        overlays = [overlay(image, heat, TILE) for heat in maps]
        explanation_sheet(overlays, labels, path.with_suffix(".explained.png"))


def overlay(image: Tensor, heat: npt.NDArray[np.float32], largest: int) -> npt.NDArray[np.uint8]:
    """The image (3, H, W) uint8 under a map (S, S) in [0, 1]: (h, w, 3) uint8.

    It is as large as the image, or less: the longer side has at most `largest` pixels. Where the
    map is 0 the image is pale, where it is 1 it shines through red.
    """
    from matplotlib import colormaps

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((largest, largest))
    layer = Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(layer).clip(0, 1)[..., None]
    photo = np.asarray(picture, np.float32) / 255
    grey = photo.mean(axis=2, keepdims=True)
    ground = strength * photo + (1 - strength) * (0.25 + 0.5 * grey)
    colours = colormaps["YlOrRd"](strength[..., 0])[..., :3]
    shown = ground + 0.55 * strength**0.7 * (colours - ground)
    pixels: npt.NDArray[np.uint8] = (255 * shown).round().astype(np.uint8)
    return pixels


def grad_cam(model: nn.Module, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Grad-CAM (arXiv 1610.02391, equations 1 and 2) of one image (1, 3, S, S): (K, h, w).

    The map is a model's last one. Transformers have tokens in its place, and those that go into
    their last block: behind it the class token alone counts. Values are in [0, 1].
    """
    features, logits = _features_and_logits(model, images)
    seen, maps = _as_map(features.detach(), model), []
    for c in classes:
        [gradient] = torch.autograd.grad(logits[0, c], features, retain_graph=True)
        weights = _as_map(gradient, model).mean(dim=(1, 2), keepdim=True)
        maps.append((weights * seen).sum(dim=0).relu())
    return torch.stack([each / each.max().clamp_min(1e-12) for each in maps]).float()


@torch.no_grad()
def attention(model: nn.Module, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Where the query of each class looks in one image (1, 3, S, S): (K, h, w) in [0, 1].

    It is `MLDecoder.attention`, from its lowest value to its highest. Classes that share a query,
    as in models of more than 100 classes, share a map.
    """
    decoder = next((part for part in model.modules() if isinstance(part, MLDecoder)), None)
    if decoder is None:
        raise _NoMap("its head is not ml_decoder")
    seen = list[Tensor]()
    hook = decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        model(images)
    finally:
        hook.remove()
    features, weights = seen[0], decoder.attention(seen[0])[0, list(classes)]
    if features.ndim == 4:
        shape = features.shape[1:3] if decoder.channels_last else features.shape[2:]
        maps = weights.view(-1, *shape)
    else:
        maps = _square(weights, model)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(1e-12)).float()


class _NoMap(Exception):
    """Why a model gives no map."""


def _model_of(member: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """timm's model behind the scores of a `Scorer`, and the images as it takes them."""
    model: Any = member.get_submodule("model")
    if isinstance(model, Renormalized):
        return model.get_submodule("model"), model.renormalized(images)
    return model, images


def _features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The features to explain, which have gradients, and the logits (1, C) that come of them."""
    timm_model: Any = model
    with torch.no_grad():
        features = timm_model.forward_features(images)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise _NoMap("it has no last map of features")
    # A copy goes in, as a layer may change what it is given; the gradient is that of the original.
    if features.ndim == 4:
        features.requires_grad_()
        return features, timm_model.forward_head(features.clone())
    if not hasattr(model, "blocks"):
        raise _NoMap("it has tokens, and not in blocks")
    tapped = list[Tensor]()

    def tap(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tapped.append(given[0].detach().requires_grad_())
        return (tapped[0].clone(), *given[1:])

    hook = timm_model.blocks[-1].register_forward_pre_hook(tap)
    try:
        logits: Tensor = model(images)
    finally:
        hook.remove()
    return tapped[0], logits


def _as_map(features: Tensor, model: nn.Module) -> Tensor:
    """A map (F, h, w) of one image's (1, F, h, w), (1, h, w, F) or tokens (1, N, F)."""
    timm_model: Any = model
    if features.ndim == 3:
        made = _square(features[0].T, model)
    else:
        channels_last = features.shape[1] != timm_model.num_features == features.shape[3]
        made = features[0].movedim(-1, 0) if channels_last else features[0]
    if made[0].numel() == 1:
        raise _NoMap("its last map is of one pixel: the images are too small")
    return made


def _square(tokens: Tensor, model: nn.Module) -> Tensor:
    """A map (F, h, w) of tokens (F, N), the first of which may stand for the class."""
    patches = tokens[:, getattr(model, "num_prefix_tokens", 0) :]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise _NoMap(f"its {patches.shape[1]} tokens make no square")
    return patches.reshape(-1, side, side)
