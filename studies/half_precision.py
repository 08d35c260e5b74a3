"""What half precision costs a checkpoint in mAP, with heads in float32 and without.

python studies/half_precision.py VOCDEVKIT --model-path runs/voc2007_lite0_160/best.pt
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from torch import Tensor

from asl.data.splits import read_split
from asl.distributed import pick_device
from asl.evaluation.average import Scores
from asl.evaluation.evaluate import protocol
from asl.evaluation.score import Scorer
from asl.evaluation.settings import ValidateConfig, trained_with
from asl.metrics import mean_average_precision
from asl.models.build import place
from asl.models.inference import fold_batchnorm
from asl.models.weights import trained_model


def ties(scores: Tensor) -> float:
    """The share of images, as the mean over classes, whose score another image has too."""
    alone = [(column.unique(return_counts=True)[1] == 1).sum().item() for column in scores.T]
    return 1 - sum(alone) / scores.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the folder of the data set")
    parser.add_argument("--model-path", required=True, help="a checkpoint of train.py")
    parser.add_argument("--device", default="")
    parser.add_argument("--amp", choices=("bf16", "fp16"), default="bf16")
    chosen = parser.parse_args()

    trained = trained_with(chosen.model_path)
    config = ValidateConfig.of(
        **{name: trained[name] for name in ValidateConfig.from_checkpoint},
        **{"batch_size": 64, "model_path": chosen.model_path, "amp": "off"},
    ).with_settings(data=chosen.data, missing_images="skip")
    device = pick_device(chosen.device)
    full = Scorer.load(config.model, config.images, config.run, device)
    rounding, *_ = trained_model(config.model, config.images.image_size)
    rounding = fold_batchnorm(place(rounding, device))
    dataset = read_split(config.data, "val", classes=full.classes)
    print("| backbone | head | mAP | difference | scores that another image has too |")
    print("| --- | --- | ---: | ---: | ---: |")
    expected = None
    for backbone, head in (("off", "off"), (chosen.amp, "off"), (chosen.amp, chosen.amp)):
        members = (Scores(rounding),) if head != "off" else full.members
        scorer = replace(full, amp=backbone, members=members)
        scores = scorer.scores(dataset, "validation")
        figure = mean_average_precision(scores, dataset.dense(), protocol=protocol(dataset))
        expected = figure if expected is None else expected
        names = [{"off": "float32"}.get(name, name) for name in (backbone, head)]
        print(
            f"| {names[0]} | {names[1]} | {figure:.3f} | {figure - expected:+.3f} "
            f"| {ties(scores):.1%} |"
        )


if __name__ == "__main__":
    main()
