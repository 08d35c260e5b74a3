"""Scores of images by models that have not seen their labels: linear heads, fold by fold."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from asl.data.annotations import Annotations
from asl.errors import UsageError
from asl.evaluation.report.arrays import Labels
from asl.evaluation.score import score_data_set
from asl.images.loader import Batches
from asl.images.settings import ImageSettings
from asl.metrics import Floats
from asl.models.build import normalization, place
from asl.models.heads import without_head
from asl.models.inference import for_inference
from asl.models.settings import DeviceSettings, TrainedModelSettings
from asl.models.weights import trained_model

# Of the squared weights, beside the mean loss of an image; docs/report.md says how it was chosen.
DECAY = 0.03
STEPS = 100  # of L-BFGS, at most


def features_of(
    annotations: Annotations,
    model: TrainedModelSettings,
    images: ImageSettings,
    compute: DeviceSettings,
    device: torch.device,
) -> Tensor | None:
    """What the backbone of a checkpoint makes of these images: (N, F) on rank 0, None on others.

    Of several checkpoints it is that of the first. Raises `UsageError` and `DataError` for one that
    cannot be loaded, or whose head is given more than a vector.
    """
    whole, _, _ = trained_model(model, images.image_size)
    backbone = without_head(whole, images.image_size)
    normalized = normalization(backbone)
    batches = Batches(annotations, images, device=device)
    member = for_inference(place(backbone, device))
    [table] = score_data_set([member], batches, normalized, device, compute.amp, "features")
    return table


def out_of_fold(features: Tensor, targets: Labels, folds: int, seed: int = 0) -> Floats:
    """Scores (N, C) of every image by linear heads that were fitted to the other folds.

    Each class has a logistic regression on the (N, F) features, which are brought to mean 0 and
    variance 1 over the images it is fitted to; cells that are -1 play no part. The result depends
    on the arguments alone. Raises `UsageError` for more folds than images, or fewer than two.
    """
    if not 2 <= folds <= len(features):
        raise UsageError(f"folds is {folds}; of {len(features):,} images there can be 2 or more")
    fold = np.random.default_rng(seed).permutation(len(features)) % folds
    scores = np.empty(targets.shape, dtype=np.float32)
    for number in tqdm(range(folds), "folds", leave=False):
        held_out = torch.from_numpy(fold == number)
        fitted, label = features[~held_out].float(), torch.from_numpy(targets[fold != number])
        mean, deviation = fitted.mean(0), fitted.std(0).clamp(min=1e-6)
        weight, bias = _logistic_regressions((fitted - mean) / deviation, label)
        logits = (features[held_out].float() - mean) / deviation @ weight + bias
        scores[fold == number] = logits.sigmoid().numpy()
    return scores


def _logistic_regressions(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (F, C) and biases (C,) of least loss, all classes at once: it is convex."""
    known, present = (targets != -1).float(), (targets == 1).float()
    share = (present.sum(0) + 1) / (known.sum(0) + 2)
    bias = share.logit().requires_grad_()
    weight = torch.zeros(features.shape[1], targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            features @ weight + bias, present, known, reduction="sum"
        )
        value = losses / len(features) + DECAY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
