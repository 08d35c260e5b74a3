"""The settings of a run: one flat `Config`, filled from a recipe and the command line.

What a field is set to is decided in this order, later wins: the default below (the official
training script's COCO recipe), the checkpoint that is evaluated, the recipe (`--config FILE`), the
command line. Everything is checked on the way: names, types, choices and ranges.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from asl.errors import DataError, UsageError


def _option(
    default: Any,
    text: str,
    *,
    group: str,
    scripts: str = "train",
    aliases: tuple[str, ...] = (),
    positional: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    return field(
        default=default,
        metadata={
            "text": text,
            "group": group,
            "scripts": scripts.split(),
            "aliases": aliases,
            "positional": positional,
            "above": above,
            "at_least": at_least,
            "at_most": at_most,
        },
    )


_data = partial(_option, group="data")
_model = partial(_option, group="model")
_loss = partial(_option, group="loss")
_optimisation = partial(_option, group="optimisation")
_evaluation = partial(_option, group="evaluation")
_run = partial(_option, group="run")

_EVERYWHERE = "train validate infer"


@dataclass(frozen=True)
class Config:
    """Every setting of train.py, validate.py and infer.py; `python train.py --help` explains each.

    Raises `UsageError` for a value that is out of range or settings that exclude each other.
    """

    data: str = _data("", "folder of the data set", scripts="train validate", positional=True)
    dataset: Literal["coco", "voc", "nus_wide", "openimages", "table", "shapes"] = _data(
        "coco", "its layout (DATASETS.md)", scripts="train validate"
    )
    train_split: str = _data(
        "", "split to train on; empty: the usual one of the data set", scripts="train validate"
    )
    val_split: str = _data(
        "",
        "split to validate on; empty: the usual one of the data set",
        scripts="train validate",
    )
    all_images: bool = _data(
        False, "coco: also the images without any annotation", scripts="train validate"
    )
    train_difficult: Literal["present", "absent", "ignore"] | None = _data(
        None, "voc: what objects marked difficult are in training; default: present"
    )
    val_difficult: Literal["present", "absent", "ignore"] | None = _data(
        None, "voc: what they are in validation; default: ignore", scripts="train validate"
    )
    machine_generated: float | None = _data(
        None,
        "openimages: train also on the machine's labels of at least this confidence",
        at_least=0,
        at_most=1,
    )
    class_list: str | None = _data(
        None,
        "openimages: file of the class ids; default: the trainable ones",
        scripts="train validate",
    )
    class_descriptions: str = _data(
        "", "openimages: CSV of class ids and names, to show names", scripts="validate infer"
    )
    val_share: float | None = _data(
        None,
        "table: share of the images to validate on, if it has no splits; default: 0.2",
        scripts="train validate",
        above=0,
        at_most=0.99,
    )
    split_seed: int | None = _data(
        None, "table: which images those are; default: 0", scripts="train validate", at_least=0
    )
    image_folder: str | None = _data(
        None,
        "folder of the images, from DATA; default: that of the layout",
        scripts="train validate",
    )
    simulate_partial: str | None = _data(
        None,
        "hide training labels: fpc:N keeps N positives and negatives per class, rps:P hides a cell "
        "with probability P",
    )
    partial_seed: int = _data(0, "which labels are hidden, whatever --seed is", at_least=0)
    missing_images: Literal["error", "skip"] = _data(
        "error",
        "listed images whose file is not there: stop, or leave them out",
        scripts="train validate",
    )
    image_size: int = _data(
        224,
        "side of the square that images are squished to",
        scripts=_EVERYWHERE,
        aliases=("--input-size",),
        at_least=8,
        at_most=4096,
    )
    max_pixels: int = _data(
        89_478_485,
        "refuse larger pictures before they are decoded, as they could fill the memory",
        scripts=_EVERYWHERE,
        at_least=1,
    )
    bad_images: Literal["error", "skip"] = _data(
        "error",
        "training images that cannot be read: stop, or take another in their place, up to 1 %",
    )
    cache_dir: str = _data("", "keep the squished images in this folder", scripts="train validate")
    augment: Literal["recipe", "flip", "none"] = _data(
        "recipe", "Cutout and RandAugment as in the paper, a horizontal flip, or nothing"
    )
    augment_on: Literal["auto", "workers", "device"] = _data(
        "auto", "where that is done; auto: on a GPU if there is one, else in the workers"
    )
    workers: int | None = _data(
        None,
        "processes that load images; 0: none; default: one per core, up to 16",
        scripts=_EVERYWHERE,
        aliases=("-j",),
        at_least=0,
    )

    model_name: str = _model(
        "tresnet_m", "any timm model; the papers': tresnet_m/l/xl/v2_l", scripts=_EVERYWHERE
    )
    model_path: str = _model(
        "", "file of weights: official, timm's or this project's", scripts=_EVERYWHERE
    )
    pretrained: bool = _model(False, "start from timm's ImageNet weights, fetched from its hub")
    head: Literal["linear", "bottleneck"] = _model(
        "linear",
        "last layers: one linear, or the official Open Images one (512 wide)",
        scripts=_EVERYWHERE,
    )
    num_classes: int | None = _model(
        None,
        "an error if the data set or checkpoint has another number of classes",
        scripts=_EVERYWHERE,
        at_least=1,
    )

    loss: Literal["asl", "focal", "bce"] = _loss("asl", "training loss")
    gamma_neg: float | None = _loss(
        None, "focusing of the negatives; default: 4 for asl, 2 for focal", at_least=0
    )
    gamma_pos: float | None = _loss(
        None, "focusing of the positives; default: 0 for asl, 2 for focal", at_least=0
    )
    clip: float | None = _loss(
        None, "probability margin m of asl; default: 0.05", at_least=0, at_most=0.99
    )

    adaptive_gamma: float | None = _loss(
        None,
        "gap of scores between positives and negatives towards which gamma_neg is moved",
        above=-1,
        at_most=0.99,
    )
    adaptive_step: float = _loss(0.005, "how fast adaptive_gamma moves it", above=0)
    unannotated: Literal["ignore", "negative", "selective"] = _loss(
        "ignore",
        "cells that are not annotated: no loss, that of a negative, or that of a negative but for "
        "classes and cells that are likely present (CSL)",
    )
    gamma_unann: float | None = _loss(
        None, "their focusing; default: that of the negatives", at_least=0
    )
    likelihood_topk: int = _loss(
        5, "selective: cells per image, on average, that count as likely present", at_least=0
    )
    prior_path: str = _loss(
        "",
        "selective: CSV of how frequent each class is (validate.py --estimate-prior), or the word "
        "estimate, to train a model that tells first",
    )
    prior_threshold: float = _loss(
        0.5, "selective: classes more frequent than this are likely present", at_least=0, at_most=1
    )

    optimizer: Literal["adam", "adamw"] = _optimisation(
        "adam", "adam adds the decay to the gradient (official), adamw decouples it"
    )
    lr: float = _optimisation(1e-4, "peak learning rate of the one-cycle schedule", above=0)
    weight_decay: float = _optimisation(1e-4, "of weights with more than one dimension", at_least=0)
    batch_size: int = _optimisation(
        128,
        "images per step, of all processes together",
        scripts=_EVERYWHERE,
        aliases=("-b",),
        at_least=1,
    )
    epochs: int = _optimisation(80, "length of the one-cycle schedule", at_least=1)
    stop_epoch: int = _optimisation(
        41, "stop after this many epochs, if the schedule is not over by then", at_least=1
    )
    pct_start: float = _optimisation(
        0.2, "share of the schedule in which the learning rate rises", above=0, at_most=0.99
    )
    ema_decay: float = _optimisation(
        0.9997, "decay per step of the averaged weights", at_least=0, at_most=0.999999
    )
    ema_warmup: bool = _optimisation(
        False, "let the decay grow from 0 over the first steps: for runs of few steps"
    )
    grad_clip: float | None = _optimisation(None, "largest norm of the gradient", above=0)
    sync_bn: bool = _optimisation(False, "batch statistics of all processes, on GPUs")

    weights: Literal["ema", "regular", "best"] = _evaluation(
        "ema", "which set of a checkpoint of train.py to use", scripts="validate infer"
    )
    val_every: int = _evaluation(1, "validate every N epochs, and after the last", at_least=1)
    threshold: float = _evaluation(
        0.8,
        "score above which a label counts as predicted",
        scripts=_EVERYWHERE,
        aliases=("--thre", "--th"),
        at_least=0,
        at_most=1,
    )
    top_k: int | None = _evaluation(
        None,
        "labels per image; default: 3 in the top-k figures, 10 in infer.py",
        scripts="validate infer",
        at_least=1,
    )
    pic_path: str = _evaluation("", "an image or a folder of images", scripts="infer")
    json: str = _evaluation("", "also write the result to this file", scripts="validate infer")
    estimate_prior: str = _evaluation(
        "",
        "write the mean score of each class over the training split to this CSV",
        scripts="validate",
    )
    draw: bool = _evaluation(True, "draw every image beside its labels", scripts="infer")
    dataset_type: Literal["MS-COCO", "NUS-WIDE", "PASCAL-VOC", "OpenImages"] | None = _evaluation(
        None, "of an official checkpoint: OpenImages has the bottleneck head", scripts="infer"
    )

    config: str = _run("", "recipe: a YAML file of these settings", scripts="train validate")
    output: str = _run(
        "",
        "folder of the run (default: runs/<recipe>, numbered if taken) or of infer.py's pictures "
        "(default: predictions)",
        scripts="train infer",
    )
    resume: str = _run(
        "",
        "go on from the last checkpoint of the run folder; --resume FILE: else from that file",
    )
    checkpoint_every: str = _run(
        "", "also write last.pt within an epoch: every N steps, or every Nmin minutes"
    )
    overwrite: bool = _run(False, "start anew in a folder that already holds a run")
    running_prior: bool = _run(
        False, "keep the mean score of each class during training, in prior.csv"
    )
    seed: int = _run(0, "of everything random", at_least=0, at_most=2**31 - 1)
    device: str = _run(
        "", "cuda, cuda:1, mps, cpu; default: the first that is there", scripts=_EVERYWHERE
    )
    amp: Literal["auto", "off", "bf16", "fp16"] = _run(
        "auto", "precision of the forward pass; auto: what is faster here", scripts=_EVERYWHERE
    )
    compile: bool = _run(False, "compile the model with torch.compile")
    deterministic: bool = _run(
        False, "only operations that give the same bits again, on GPUs at the cost of speed"
    )
    profile: bool = _run(False, "write a trace of a few steps to trace.json in the run folder")
    print_freq: int = _run(100, "steps between looks at the loss", at_least=1)
    tensorboard: bool = _run(False, "also log to TensorBoard in the run folder")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str) and "\0" in value:
                raise UsageError(f"{each.name} holds a null byte: {value!r}")
            _check_range(each.name, value, each.metadata)
        gamma_neg, gamma_pos, clip = self.asymmetry
        if self.loss == "focal" and (clip or gamma_neg != gamma_pos):
            raise UsageError("loss focal takes equal gamma_neg and gamma_pos and no clip")
        if self.loss == "bce" and (gamma_neg or gamma_pos or clip):
            raise UsageError("loss bce takes neither gamma_neg, gamma_pos nor clip")
        if self.prior_path and self.unannotated != "selective":
            raise UsageError("prior_path has a meaning for unannotated selective alone")
        if self.clip is not None and 0 < self.clip < 1e-6:
            raise UsageError(f"clip is {self.clip}: a margin below 1e-6 is lost in rounding, use 0")
        if self.pretrained and self.model_path:
            raise UsageError("model_path and pretrained both name weights to start from: drop one")
        if self.checkpoint_every and not re.fullmatch(
            r"[1-9][0-9]{0,8}(min)?", self.checkpoint_every
        ):
            raise UsageError(
                f"checkpoint_every is {self.checkpoint_every!r}: steps (500) or minutes (10min)"
            )

    @property
    def asymmetry(self) -> tuple[float, float, float]:
        """(gamma_neg, gamma_pos, clip), with what the loss usually has where nothing was given."""
        usual = _ASYMMETRY[self.loss]
        given = (self.gamma_neg, self.gamma_pos, self.clip)
        neg, pos, clip = (u if g is None else g for u, g in zip(usual, given, strict=True))
        return neg, pos, clip

    def to_yaml(self) -> str:
        """All fields as a recipe that gives this very `Config` again."""
        from omegaconf import OmegaConf

        neg, pos, clip = self.asymmetry
        return OmegaConf.to_yaml(asdict(replace(self, gamma_neg=neg, gamma_pos=pos, clip=clip)))


RESUME_LAST = "last"  # `resume` without a file
_BARE_RESUME = {("--resume", ""), ("--resume", "-")}  # at the end, or before the next option

# gamma_neg, gamma_pos, clip: the official training script's ASL; focal loss and cross-entropy are
# the same formula with equal gammas and without margin (ASL paper, section 2.2).
_ASYMMETRY = {"asl": (4.0, 0.0, 0.05), "focal": (2.0, 2.0, 0.0), "bce": (0.0, 0.0, 0.0)}

# What a checkpoint of train.py knows about how it is to be evaluated.
_FROM_CHECKPOINT = (
    "data",
    "dataset",
    "train_split",
    "val_split",
    *("all_images", "val_difficult", "class_list", "val_share", "split_seed", "image_folder"),
    "missing_images",
    "image_size",
    "model_name",
    "head",
)


def parse(
    script: str,
    description: str,
    argv: Sequence[str] | None = None,
    read_checkpoint: Callable[[str], Mapping[str, Any]] | None = None,
) -> Config:
    """The settings of one start of train.py, validate.py or infer.py.

    `argv` defaults to the command line. `read_checkpoint` maps the path of a checkpoint to its
    content; the settings that it was trained with then take the place of the defaults. Exits with 0
    after `--help` and with 2 on a wrong command line, saying what is near; raises `UsageError` for
    a wrong recipe and for values out of range.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = _from_command_line(script, description, argv, Config())
    base = Config()
    if read_checkpoint is not None and first.model_path:
        base = _as_trained(read_checkpoint(first.model_path).get("config") or {}, first.model_path)
    if first.config:
        base = replace(base, **{**read_recipe(first.config), "config": first.config})
    return _from_command_line(script, description, argv, base)


def _as_trained(settings: Any, path: str) -> Config:
    try:
        known = {name: settings[name] for name in _FROM_CHECKPOINT if name in settings}
        return replace(Config(), **_of_right_types(known, path))
    except (UsageError, TypeError) as error:
        raise DataError(f"{path}: its config cannot be used: {error}") from None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings that a YAML recipe gives, after a check of names, types and repetitions."""
    from omegaconf import DictConfig, OmegaConf

    try:
        recipe = OmegaConf.load(path)
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from None
    except Exception as error:  # tags such as !!int raise whatever Python raises for their values
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, DictConfig):
        raise UsageError(f"{path}: a recipe is a list of `setting: value` lines")
    names = [str(key).replace("-", "_") for key in recipe]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{path}: {name} stands there twice")
    plain = OmegaConf.to_container(recipe)
    assert isinstance(plain, dict)
    return _of_right_types(dict(zip(names, plain.values(), strict=True)), path)


def _of_right_types(settings: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings)))
        checked = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UsageError(f"{path}: {where}{str(error).splitlines()[0]}") from None
    assert isinstance(checked, dict)
    return {name: checked[name] for name in settings}


def _from_command_line(script: str, description: str, argv: Sequence[str], base: Config) -> Config:
    """`base` with what `argv` says in place of what it holds.

    tyro makes a command line of a dataclass and shows nested ones as groups, so the flat fields are
    nested by group for it and flattened again.
    """
    import tyro

    hints = get_type_hints(Config)
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    spellings: dict[str, str] = {}
    for each in fields(Config):
        if script not in each.metadata["scripts"]:
            continue
        aliases = each.metadata["aliases"]
        spellings |= dict.fromkeys([f"--{each.name}".replace("_", "-"), *aliases], each.name)
        hint: Any = hints[each.name]
        if each.metadata["positional"]:
            hint = Annotated[hint, tyro.conf.Positional]
        about = tyro.conf.arg(help=each.metadata["text"], aliases=aliases, metavar=_metavar(hint))
        option = (each.name, Annotated[hint, about], field(default=getattr(base, each.name)))
        groups.setdefault(each.metadata["group"], []).append(option)
    _refuse_doubled(argv, spellings)
    argv = _with_bare_resume(argv)
    nested = []
    for title, options in groups.items():
        group: Any = make_dataclass(title, options)
        named = Annotated[group, tyro.conf.arg(name=title, prefix_name=False)]
        nested.append((title, named, field(default_factory=group)))
    everything: Any = make_dataclass("Options", nested)
    parsed = tyro.cli(
        everything,
        prog=f"{script}.py",
        description=description,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    given = {name: value for group in vars(parsed).values() for name, value in vars(group).items()}
    return replace(base, **given)


def _metavar(hint: Any) -> str | None:
    # tyro would show an optional number as {None}|INT.
    return {int | None: "INT", float | None: "FLOAT", str | None: "STR"}.get(hint)


def _with_bare_resume(argv: Sequence[str]) -> list[str]:
    # `--resume` may stand alone, which tyro does not know of an option that takes a value.
    return [
        f"--resume={RESUME_LAST}" if (word, after[:1]) in _BARE_RESUME else word
        for word, after in zip(argv, [*argv[1:], ""], strict=False)
    ]


def _refuse_doubled(argv: Sequence[str], spellings: Mapping[str, str]) -> None:
    # The second of two would win in silence: in a shell script of many lines that is a wrong run.
    typed = [word.split("=")[0].replace("_", "-") for word in argv if word.startswith("-")]
    names = [spellings[word] for word in typed if word in spellings]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--{name.replace('_', '-')} is given twice")


def _check_range(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    above, at_least, at_most = limits["above"], limits["at_least"], limits["at_most"]
    if value is None or (above is None and at_least is None):
        return
    if value in (math.inf, -math.inf):
        raise UsageError(f"{name} is {value}, but must be finite")
    # Written so that NaN, which compares false with everything, is refused too.
    if above is not None and not value > above:
        raise UsageError(f"{name} is {value}, but must be above {above:g}")
    if at_least is not None and not value >= at_least:
        raise UsageError(f"{name} is {value}, but must be at least {at_least:g}")
    if at_most is not None and not value <= at_most:
        raise UsageError(f"{name} is {value}, but must be at most {at_most:g}")
