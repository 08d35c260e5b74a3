"""How the CSL paper's comparison of losses on partial labels comes out on Pascal VOC 2007.

Four losses (those of configs/csl_coco_*.yaml) and a variant of CSL, times two ways to hide
labels, times three seeds, on VOC 2007 train -> val at 160 px. A seed draws the weights of the head,
the order of the images and which labels are hidden; all losses of one seed see the same labels.
The prior of CSL comes from the model of that seed that ignores what is not annotated.

    python studies/voc2007_partial.py VOCDEVKIT --model-path LITE0.safetensors

A run whose result is in results/voc2007_partial/ is not done again: what is missing is run, then
the tables are printed (`--tables`: of what is there, without a run).
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from asl.atomic import replacing
from asl.config import read_recipe
from asl.data.prior import read_prior
from asl.data.readers import read
from asl.evaluation.text import frequencies_text
from asl.models import checkpoint
from asl.training.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "voc2007_partial"
RUNS = Path("runs/voc2007_partial")
# FPC with 150 keeps a tenth of the cells of VOC 2007 train.
HIDING = {"fpc": "fpc:150", "rps": "rps:0.5"}
METHODS = ("ignore_ce", "negative_ce", "negative_asl", "csl")
# Does CSL's setting for COCO's 80 classes suit VOC's 20? 5 of 80 cells are 1.25 of 20.
VARIANTS = {"csl_topk1": ["--likelihood-topk", "1"]}
SEEDS = (0, 1, 2)


def run(data: str, weights: str, hiding: str, method: str, seed: int) -> dict[str, Any]:
    """Train one model, each step in a process of its own, and return its figures."""
    folder, about = RUNS / f"{hiding}_{method}_{seed}", ["--workers", "0", "--amp", "bf16"]
    prior = RUNS / f"{hiding}_ignore_ce_{seed}" / "prior.csv"
    recipe, more = ("csl", VARIANTS[method]) if method in VARIANTS else (method, [])
    path = ROOT / "configs" / f"csl_coco_{hiding}_{recipe}.yaml"
    published = TrainConfig.of(**read_recipe(path, TrainConfig)).loss
    gamma_neg, gamma_pos, clip = map(str, published.asymmetry)
    more = [*more, "--loss", published.loss, "--gamma-neg", gamma_neg, "--gamma-pos", gamma_pos,
            "--clip", clip, "--unannotated", published.unannotated]  # fmt: skip
    if published.gamma_unann is not None:
        more = [*more, "--gamma-unann", str(published.gamma_unann)]
    if recipe == "csl":
        more = [*more, "--prior-path", str(prior)]
    script("train.py", data, "--config", "configs/voc2007_lite0_160.yaml", "--model-path", weights,
           "--missing-images", "skip", "--epochs", "3", "--val-every", "3", "--lr", "1e-3",
           "--simulate-partial", HIDING[hiding], "--partial-seed", str(seed), "--seed", str(seed),
           "--output", str(folder), "--overwrite", *about, *more)  # fmt: skip
    trained = checkpoint.load(ROOT / folder / "best.pt")
    figures = {"hiding": HIDING[hiding], "method": method, "seed": seed}
    if recipe == "ignore_ce":
        script("validate.py", "--model-path", str(folder / "best.pt"), "--weights", "ema",
               "--estimate-prior", str(prior), *about)  # fmt: skip
        classes = list(trained["idx_to_class"].values())
        values = read_prior(ROOT / prior, classes).tolist()
        figures["prior"] = {name: round(x, 5) for name, x in zip(classes, values, strict=True)}
    return {**figures, **trained["history"][-1], **trained["provenance"]}


def script(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def tables(data: str, results: list[dict[str, Any]]) -> str:
    """mAP by method and way of hiding, and the estimated priors beside the true frequencies."""
    lines = [f"| loss | {' | '.join(HIDING.values())} |", "| --- | --- | --- |"]
    for method in (*METHODS, *VARIANTS):
        cells = []
        for hiding in HIDING.values():
            of = [r for r in results if (r["hiding"], r["method"]) == (hiding, method)]
            figures = [r["mAP_ema"] for r in of]
            spread = f" ± {stdev(figures):.2f}" if len(figures) > 1 else ""
            cells.append(f"{mean(figures):.2f}{spread} ({len(figures)})" if figures else "-")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    train = read("voc", data, "train")
    priors = {
        f"{r['hiding']} {r['seed']}": [r["prior"][name] for name in train.classes]
        for r in results
        if "prior" in r
    }
    return "\n".join([*lines, "", frequencies_text(train, {}, priors)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the VOCdevkit folder")
    parser.add_argument(
        "--model-path", default="LITE0.safetensors", help="ImageNet weights of the model"
    )
    parser.add_argument("--hiding", choices=HIDING, nargs="*", default=[*HIDING], help="only these")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    # The paper's four first, seed by seed: what is there of an unfinished study is balanced.
    kinds = chosen.hiding
    runs = [*product(SEEDS, METHODS, kinds), *product(SEEDS, VARIANTS, kinds)]
    results = []
    for seed, method, hiding in runs:
        path = RESULTS / f"{hiding}_{method}_{seed}.json"
        if not path.exists():
            if chosen.tables:
                continue
            figures = run(chosen.data, chosen.model_path, hiding, method, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(json.dumps(figures, indent=2).encode() + b"\n")
        results.append(json.loads(path.read_text()))
        print(path.name, round(results[-1]["mAP_ema"], 2), flush=True)
    print(tables(chosen.data, results))


if __name__ == "__main__":
    main()
