"""A trained model as a file that gives its scores without this project: ONNX, or torch.export's.

What is written was loaded and compared with PyTorch before.
"""

import importlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import interpolate

from asl.atomic import check_result, write_result
from asl.data.splits import read_split, split_name
from asl.errors import DataError, UsageError
from asl.evaluation.average import MeanScores
from asl.evaluation.evaluate import protocol
from asl.evaluation.int8 import quantized
from asl.evaluation.judge import Judge
from asl.evaluation.provenance import provenance
from asl.evaluation.score import Scorer, progress
from asl.evaluation.settings import ExportConfig, trained_with
from asl.images.decode import find_images, read_image, squish
from asl.images.loader import Batch, Batches
from asl.images.prepare import preparation
from asl.metrics import mean_average_precision
from asl.models.settings import DeviceSettings
from asl.models.zoo import sha256

Preprocessing = Literal["none", "normalize", "resize"]
Run = Callable[[Tensor], Tensor]  # what a loaded file makes of its input: scores

OPSET = 20  # of ONNX
TOLERANCE = 1e-4  # of a score
# Where a runtime resizes: its resizing and torch's differ by one grey level in some of the pixels.
TOLERANCE_RESIZED = 1e-2
MOST_PICTURES = 16  # that scores are compared on
METADATA = "metadata.json"  # its name in a .pt2
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export(config: ExportConfig) -> list[dict[str, Any]]:
    """Write the model of a checkpoint, or the mean scores of several, to the file `output`.

    Its one input is `images`, its one output `scores` (N, C) in [0, 1], for any N; it computes in
    float32. With `int8` a second file beside it, NAME.int8.onnx, has weights and activations of
    eight bits.

    Returns for each file its "file" and "bytes"; for the first how far its scores are from
    PyTorch's at most, "difference", and "difference_resized" where it resizes (else None), on so
    many "pictures"; with `int8` for both their "mAP" on so many "images" of the "split".

    Raises `UsageError` and `DataError` for what is wrong with the input, and `DataError`, before
    anything is written, for scores that differ by more than 1e-4 (resized: 1e-2).
    """
    wanted, path = config.export, Path(config.export.output)
    to_onnx = path.suffix.lower() == ".onnx"
    if not wanted.output:
        raise UsageError("name the file to write: --output FILE.onnx or FILE.pt2")
    check_result(path)
    if to_onnx:
        check_packages()
    compute = DeviceSettings(device="cpu", amp="off")
    scorer = Scorer.load(config.model, config.images, compute, torch.device("cpu"))
    about = metadata(config, scorer)
    pictures = _pictures(wanted.pic_path, config.images.max_pixels)
    splits = [
        read_split(config.data, role, classes=scorer.classes)
        for role in (("train", "val") if wanted.int8 else ())
    ]
    content = exported(scorer, wanted.preprocessing, about, to_onnx)
    run = in_onnxruntime(content) if to_onnx else _in_torch(content)
    compared = _compare(run, scorer, wanted.preprocessing, pictures)
    write_result(path, content)
    files: list[dict[str, Any]] = [{"file": str(path), "bytes": len(content), **compared}]
    if splits:
        train, val = splits
        chosen = np.random.default_rng(0).permutation(len(train))[: wanted.calibration_images]
        feed = feeding(scorer, wanted.preprocessing)
        ranges = progress(Batches(train.subset(chosen), config.images), 0, "calibration")
        small = quantized(content, map(feed, ranges))
        write_result(path.with_suffix(".int8.onnx"), small)
        files.append({"file": str(path.with_suffix(".int8.onnx")), "bytes": len(small)})
        batches = Batches(val, config.images)
        of_data = {"images": len(val), "split": split_name(config.data, "val")}
        for file, each in zip(files, (content, small), strict=True):
            file |= {"mAP": _mean_ap(in_onnxruntime(each), batches, feed), **of_data}
    return files


def check_packages() -> None:
    """Raise `UsageError` where a package that ONNX needs is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(
                f"ONNX needs the package {name}: pip install -r requirements-export.txt; "
                "a file .pt2 needs none"
            ) from None


def metadata(config: ExportConfig, scorer: Scorer) -> dict[str, Any]:
    """What a program that uses the file wants to know, and where its numbers come from."""
    paths, wanted = config.model.model_path, config.export
    size = config.images.image_size
    takes = {
        "none": f"float32 (N, 3, {size}, {size}): RGB, (x / 255 - mean) / std",
        "normalize": f"uint8 (N, {size}, {size}, 3): RGB",
        "resize": "uint8 (N, height, width, 3): RGB of any size",
    }
    judge = Judge.load(paths, scorer, wanted.threshold, tta="")
    for note in judge.notes:
        print(note)
    activations = ["softmax" if _one_label(path) else "sigmoid" for path in paths]
    mean, std = scorer.normalized
    return {
        "classes": list(scorer.classes),
        "thresholds": [round(limit, 6) for limit in judge.thresholds.tolist()],
        "images": takes[wanted.preprocessing],
        "scores": f"{activations[0]}, one for each class",
        "image_size": size,
        "mean": list(mean),
        "std": list(std),
        "model": list(scorer.names),
        "checkpoint": list(paths),
        "checkpoint_sha256": [sha256(path) for path in paths],
        "weights": list(scorer.weights),
        **provenance(),
    }


def _one_label(path: str) -> bool:
    return trained_with(path).get("loss") == "asl_single"


class FromPixels(nn.Module):
    """`Scores` of images as decoders give them: (B, H, W, 3) uint8, normalised here.

    With a `size` they are first squished to it, which is `images.decode.squish`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scores: nn.Module, normalized: Any, size: int | None) -> None:
        super().__init__()
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in normalized)
        self.scores, self.size = scores, size
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to scores."""
        images = images.permute(0, 3, 1, 2)
        if self.size is not None:
            size = (self.size, self.size)
            images = interpolate(images, size=size, mode="bilinear", antialias=True)
        scores: Tensor = self.scores(images * self.scale + self.shift)
        return scores


def exported(
    scorer: Scorer, preprocessing: Preprocessing, about: Mapping[str, Any], to_onnx: bool
) -> bytes:
    """The file, ONNX or .pt2. Raises `UsageError` for a model that cannot be exported."""
    try:
        with torch.no_grad():
            program, axes = _program(scorer, preprocessing)
            return _as_onnx(program, axes, about) if to_onnx else _as_pt2(program, about)
    except Exception as error:  # code that branches on values or shapes fails in many ways
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{scorer.names[0]} cannot be exported: {reason}") from error


def _program(
    scorer: Scorer, preprocessing: Preprocessing
) -> tuple[ExportedProgram, dict[int, Any]]:
    """What torch.export makes of the model, and the axes of its input that have any length."""
    model: nn.Module = MeanScores(scorer.members) if scorer.members[1:] else scorer.members[0]
    # In channels last our layers of TResNet take a way of their own, which is an autograd function.
    model = model.to(memory_format=torch.contiguous_format)
    size, axes = scorer.images.image_size, {0: Dim("batch")}
    example = torch.zeros(2, 3, size, size)
    if preprocessing != "none":
        resized = preprocessing == "resize"
        model = FromPixels(model, scorer.normalized, size if resized else None)
        example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        if resized:
            # Of the size of the result it would be traced as what needs no resizing.
            example = torch.zeros(2, 2 * size, 3 * size, 3, dtype=torch.uint8)
            axes |= {1: Dim("height"), 2: Dim("width")}
    return torch.export.export(model.eval(), (example,), dynamic_shapes=(axes,)), axes


def _as_onnx(program: ExportedProgram, axes: Mapping[int, Any], about: Mapping[str, Any]) -> bytes:
    import onnx

    made: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=(axes,),
        verbose=False,
    )
    model = made.model_proto
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in about.items()
    }
    onnx.helper.set_model_props(model, texts)
    content: bytes = model.SerializeToString()
    return content


def _as_pt2(program: ExportedProgram, about: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    extra = {METADATA: json.dumps(about, ensure_ascii=False, indent=2)}
    torch.export.save(program, file, extra_files=extra)
    return file.getvalue()


def in_onnxruntime(content: bytes) -> Run:
    """What an ONNX file gives in onnxruntime, on the CPU, with the threads that torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])

    return run


def _in_torch(content: bytes) -> Run:
    run: Run = torch.export.load(io.BytesIO(content)).module()
    return run


def feeding(scorer: Scorer, preprocessing: Preprocessing) -> Callable[[Batch], Tensor]:
    """What makes the input of the exported model of a batch of squished images."""
    if preprocessing == "none":
        prepare = preparation(*scorer.normalized, scorer.device)
        return lambda batch: prepare(batch).contiguous()
    return lambda batch: batch.images.permute(0, 2, 3, 1).contiguous()


@torch.inference_mode()
def _compare(
    run: Run, scorer: Scorer, preprocessing: Preprocessing, pictures: Sequence[Tensor]
) -> dict[str, Any]:
    """How far the scores of (3, H, W) uint8 `pictures` are from PyTorch's, at most.

    Alone, by threes, and all in one batch; and where the file resizes, each in its own size.
    Raises `DataError` for scores that are not those of the model.
    """
    model, feed = MeanScores(scorer.members), feeding(scorer, preprocessing)
    prepare = preparation(*scorer.normalized, scorer.device)
    squished = torch.stack([squish(picture, scorer.images.image_size) for picture in pictures])
    expected = model(prepare(_unlabelled(squished)))

    difference = 0.0
    for length in {1, 3, len(pictures)}:
        rows = torch.arange(length) % len(pictures)
        scores = run(feed(_unlabelled(squished[rows])))
        difference = max(difference, _apart(scores, expected[rows], TOLERANCE))
    resized = None
    if preprocessing == "resize":
        own = [run(picture.permute(1, 2, 0)[None].contiguous()) for picture in pictures]
        resized = _apart(torch.cat(own), expected, TOLERANCE_RESIZED)
    return {
        "difference": difference,
        "difference_resized": resized,
        "pictures": len(pictures),
    }


def _apart(scores: Tensor, expected: Tensor, tolerance: float) -> float:
    difference = float((scores - expected).abs().max())
    if not difference <= tolerance:  # or is NaN
        raise DataError(
            f"the exported model gives other scores: {difference:.2g} away from PyTorch's, where "
            f"{tolerance:g} is allowed; nothing was written"
        )
    return difference


def _unlabelled(images: Tensor) -> Batch:
    return Batch(images, torch.empty(len(images), 0, dtype=torch.int8))


def _pictures(path: str, max_pixels: int) -> list[Tensor]:
    """Pictures to compare scores on, (3, H, W) uint8: some of those at `path`, or three drawn."""
    if path:
        root, names = find_images(path)
        every = max(1, len(names) // MOST_PICTURES)
        files = [root / os.fsdecode(name) for name in names[::every][:MOST_PICTURES]]
        return [read_image(file, max_pixels) for file in files]
    random = torch.Generator().manual_seed(0)
    return [_drawn(*size, random) for size in ((375, 500), (500, 375), (333, 500))]


def _drawn(height: int, width: int, random: torch.Generator) -> Tensor:
    """Colours that change at all scales, the coarse ones most, as those of photographs do."""
    layers = []
    for octave in range(1, 8):
        side = 2**octave
        spots = torch.rand(1, 3, side, side, generator=random) - 0.5
        layers.append(interpolate(spots, (height, width), mode="bilinear")[0] / octave)
    picture = torch.stack(layers).sum(dim=0)
    return (255 * (picture - picture.min()) / (picture.max() - picture.min())).byte()


def _mean_ap(run: Run, batches: Batches, feed: Callable[[Batch], Tensor]) -> float:
    """The mAP in percent of what a loaded file says of a data set."""
    of_batches = [
        run(feed(batch))[: len(batch.targets)] for batch in progress(batches, 0, "validation")
    ]
    dataset = batches.annotations
    scores = torch.cat(of_batches)
    return mean_average_precision(scores, dataset.dense(), protocol=protocol(dataset))
