"""Losses compared by linear heads on the features of a frozen backbone: many seeds in minutes.

    python studies/frozen_features.py VOCDEVKIT --model-path LITE0.safetensors

Pascal VOC 2007, train and val, by the recipe configs/voc2007_lite0_160_features.yaml. The features
are computed once. The learning rate of each loss is the best of a grid: four fifths of train are
trained on, the rest decides. Then a head is trained on all of train for every seed, and measured on
val by its averaged weights after the last epoch. The seeds, and so the heads at the start and the
order of the images, are the same for all losses.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch

from asl.atomic import write_result
from asl.config import read_recipe
from asl.data.annotations import Annotations
from asl.evaluation.provenance import provenance
from asl.images.features import FeatureBatches
from asl.metrics import mean_average_precision
from asl.models.heads import take_features
from asl.training.features import features_once
from asl.training.fit import new_training, read_splits
from asl.training.settings import TrainConfig

LOSSES = ("bce", "focal", "asl", "twoway", "zlpr", "hill", "splc", "db")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RECIPE = Path(__file__).parents[1] / "configs" / "voc2007_lite0_160_features.yaml"
OF_ASL = ("gamma_neg", "gamma_pos", "clip")
CPU = torch.device("cpu")

Part = tuple[Annotations, torch.Tensor]  # images and their features


def trained(config: TrainConfig, train: Part, val: Part) -> float:
    """The mAP on `val` of the averaged weights of a head that was trained on `train`."""
    batches = FeatureBatches(
        *train, config.images.batch_size, shuffle=True, seed=config.step.seed, device=CPU
    )
    training = new_training(config, train[0], len(batches), CPU, resumed=True)
    averaged = training.ema.module
    for model in (training.model, averaged):
        take_features(model)
    for _ in range(config.step.epochs):
        for batch in batches.epoch(training.epoch):
            training.step(batch.images, batch.targets)
        training.end_epoch()
    with torch.inference_mode():
        scores = averaged.eval()(val[1]).sigmoid()
    return mean_average_precision(scores, val[0].dense())


def chosen_rate(config: TrainConfig, train: Part) -> float:
    """The learning rate that is best on a fifth of `train`, learned on the rest."""
    order = np.random.default_rng(0).permutation(len(train[0]))
    cut = len(order) // 5
    held_out, learned = (
        (train[0].subset(rows), train[1][rows]) for rows in (order[:cut], order[cut:])
    )
    return max(RATES, key=lambda rate: trained(config.with_settings(lr=rate), learned, held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the VOCdevkit folder")
    parser.add_argument("--model-path", required=True, help="weights of EfficientNet-Lite0")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", default="results/voc2007_frozen_features.json")
    chosen = parser.parse_args()

    started = time.perf_counter()
    base = TrainConfig.of(**read_recipe(RECIPE, TrainConfig)).with_settings(
        data=chosen.data, model_path=chosen.model_path, missing_images="skip", device="cpu"
    )
    train_set, val_set = read_splits(base, CPU)
    training = new_training(base, train_set, 1, CPU, resumed=False)
    tables = features_once(base, training, train_set, val_set, iter)
    train, val = ((each.annotations, each.features) for each in tables)
    computed = time.perf_counter() - started
    rows = []
    print("| loss | learning rate | mAP, mean | standard deviation | seconds |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for loss in LOSSES:
        begun = time.perf_counter()
        plain = dict.fromkeys(OF_ASL) if loss != "asl" else {}
        config = base.with_settings(**{"loss": loss, **plain})
        rate = chosen_rate(config, train)
        runs = (config.with_settings(lr=rate, seed=seed) for seed in range(chosen.seeds))
        figures = [trained(each, train, val) for each in runs]
        seconds = time.perf_counter() - begun
        row = {"loss": loss, "lr": rate, "mAP": figures, "seconds": round(seconds, 1)}
        rows.append(row)
        print(
            f"| {loss} | {rate:g} | {statistics.mean(figures):.2f} "
            f"| {statistics.stdev(figures):.2f} | {seconds:.0f} |",
            flush=True,
        )
    total = time.perf_counter() - started
    print(
        f"\nfeatures {computed:.0f} s, all {total:.0f} s, torch threads {torch.get_num_threads()}"
    )
    report = {"seeds": chosen.seeds, "seconds": round(total, 1), **provenance(), "losses": rows}
    write_result(chosen.json, json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
