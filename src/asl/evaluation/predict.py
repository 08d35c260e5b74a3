"""The labels of photographs in files."""

from asl.data.annotations import Annotations
from asl.distributed import pick_device, process_group
from asl.errors import UsageError
from asl.evaluation.explain import check_explanation
from asl.evaluation.predictor import Predictor
from asl.evaluation.results import Predictions, check_names, check_results
from asl.evaluation.settings import InferConfig, PredictorConfig
from asl.images.decode import find_images


def predict(config: InferConfig) -> Predictions | None:
    """Label the image `pic_path`, or all images in that folder and below.

    The predictions are a sequence, of a dictionary for every image: its "file" and its "labels",
    which are the `top_k` (10) with the highest scores, from high to low, each with "name" and what
    `Judge.label` says. Of several processes rank 0 returns them, and the others None.

    Raises `UsageError` and `DataError` for what is wrong with the input, and for results that could
    not be written, before the images are looked at.
    """
    wanted = config.evaluation
    if not wanted.pic_path:
        raise UsageError("name an image or a folder of images: --pic-path")
    check_results(wanted)
    with process_group(pick_device(config.run.device)):
        predictor = load_predictor(config)
        files = find_images(wanted.pic_path)
        images = Annotations.unlabelled(*files, predictor.scorer.classes)
        check_names(images, predictor.classes, wanted)
        if wanted.explain:
            check_explanation(predictor.scorer, wanted.explain)
        scores = predictor.scorer.scores(images, "images")
    return None if scores is None else Predictions(images, scores, predictor)


def load_predictor(config: InferConfig) -> Predictor:
    """The model of infer.py. Raises `UsageError` and `DataError` as `Predictor` does."""
    settings = {name: config.flat()[name] for name in PredictorConfig.names()}
    if config.evaluation.dataset_type == "OpenImages" and config.model.head == "linear":
        settings["head"] = "bottleneck"
    return Predictor(**settings)
