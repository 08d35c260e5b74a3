"""The labels of photographs."""

from typing import Any

from asl.data.annotations import Annotations
from asl.distributed import pick_device, process_group
from asl.errors import UsageError
from asl.evaluation.evaluate import display_names
from asl.evaluation.judge import Judge
from asl.evaluation.score import Scorer
from asl.evaluation.settings import InferConfig
from asl.images.decode import find_images


def predict(config: InferConfig) -> list[dict[str, Any]]:
    """Label the image `pic_path`, or all images in that folder and below.

    Returns, for every image, its "file" and its "labels": the `top_k` (10) with the highest scores,
    from high to low, each with "name" and what `Judge.label` says. Prints `Judge.lines`.
    Of several processes rank 0 returns them, and the others nothing.

    Raises `UsageError` and `DataError` for what is wrong with the input.
    """
    wanted, model = config.evaluation, config.model
    if not wanted.pic_path:
        raise UsageError("name an image or a folder of images: --pic-path")
    if wanted.dataset_type == "OpenImages" and model.head == "linear":
        model = model.replace(head="bottleneck")
    with process_group(pick_device(config.run.device)) as device:
        scorer = Scorer.load(model, config.images, config.run, device, wanted.flip, wanted.scales)
        judge = Judge.load(model.model_path, scorer, wanted.threshold, wanted.tta)
        names = display_names(wanted.class_descriptions, scorer.classes)
        images = Annotations.unlabelled(*find_images(wanted.pic_path), scorer.classes)
        scores = scorer.scores(images, "images")
    if scores is None:
        return []
    print(*judge.lines(), sep="\n")
    top_scores, top_classes = scores.topk(min(wanted.top_k or 10, len(names)))
    return [
        {
            "file": images.path(row),
            "labels": [
                {"name": names[c], **judge.label(c, s)}
                for s, c in zip(top_scores[row].tolist(), top_classes[row].tolist(), strict=True)
            ],
        }
        for row in range(len(images))
    ]
