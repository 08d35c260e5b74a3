"""A fuzzer for all that is read from files: annotations, class lists, priors, recipes, checkpoints.

python tests/fuzz.py [coco recipe ...] --minutes 10 [--seed 0] [--failures fuzz-failures]

Files are made from a grammar or from a right file, then perhaps damaged byte by byte. Reading them
may raise `UsageError` and `DataError`, of one line each. All else is a failure: another exception,
annotations that are not consistent, a write, a new process, a connection, or more than a minute.
The files of every failure, made as small as possible, are kept. `test_fuzz.py` runs a short round.
"""

import argparse
import faulthandler
import io
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from asl.config import read_recipe, write_recipe
from asl.data.annotations import Annotations
from asl.data.classes import read_descriptions
from asl.data.prior import read_prior
from asl.data.readers import read
from asl.errors import DataError, UsageError
from asl.images.decode import read_image
from asl.models import checkpoint
from asl.training.settings import TrainConfig

Files = dict[str, bytes]
SECONDS_PER_CASE = 60


# --- files -------------------------------------------------------------------------------------

names = st.one_of(
    st.sampled_from(["cat", "dog", "a.jpg", "b.jpg", "/m/1", "0" * 16, "f" * 16, "", "..", "/"]),
    st.text(max_size=8),
)
numbers = st.one_of(
    st.sampled_from(["0", "1", "-1", "0.5", "nan", "inf", "1e999", "-0", "٣", "1_0", "9" * 5000]),
    st.integers().map(str),
    st.floats().map(str),
)
cells = st.one_of(names, numbers, st.sampled_from(["cat|dog", "['cat']", "train", "val", "|"]))
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), names, st.sampled_from([1, 2, 2**63])
)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
# What has a meaning in one of the formats, or has broken a reader of files before.
TOKENS = [
    *(b"\0", b"\n", b"\r", b"\t", b'"', b"'", b",", b"|", b"\\", b"[", b"]", b"{", b"}", b":"),
    *(b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\\ud800", b"../", b"/", b"~"),
    *(b"null", b"true", b"NaN", b"1e999", b"-1", b"9" * 400, b"${oc.env:HOME}", b"${", b"!!python"),
    *(b"[" * 3000, b"{" * 3000, b"('a'," * 200, b"&a ", b"*a", b"<<: *a", b"- ", b"? ", b"---\n"),
]


@st.composite
def damaged(draw: Any, right: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of `right`, two times in three after a few cuts, copies, insertions and changes."""
    data = bytearray(draw(right))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 5, 20]))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from([1, 2, 8, 64, 10**9])))
        match draw(st.sampled_from(["change", "insert", "delete", "copy"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                data[at:at] = draw(st.sampled_from(TOKENS))
            case "delete":
                del data[at:end]
            case "copy":
                data[at:at] = data[at:end][:100_000]
    return bytes(data)


def lines(cell: st.SearchStrategy[str], separator: str, *first: str) -> st.SearchStrategy[bytes]:
    """Rows of cells in UTF-8 below the lines `first`."""
    width = first[0].count(separator) + 1 if first else 2
    row = st.one_of(
        st.lists(cell, min_size=width, max_size=width), st.lists(cell, max_size=width + 2)
    )
    text = st.lists(row.map(separator.join), max_size=5).map(lambda rows: [*first, *rows])
    return text.map(lambda rows: "".join(f"{row}\n" for row in rows).encode(errors="surrogatepass"))


def either(right: str, made: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A right file or a made one, damaged or not."""
    return damaged(st.one_of(st.just(right.encode()), made))


def files(**parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[Files]:
    return st.fixed_dictionaries(parts)


def json_files() -> st.SearchStrategy[bytes]:
    ids = st.one_of(st.sampled_from([1, 2, "1"]), plain)
    image = {"file_name": names, "coco_url": names, "neg_category_ids": st.lists(ids)}
    parts = {
        "images": st.fixed_dictionaries({"id": ids}, optional=image),
        "annotations": st.fixed_dictionaries({"image_id": ids, "category_id": ids}),
        "categories": st.fixed_dictionaries({"id": ids, "name": names}),
    }
    whole = st.fixed_dictionaries(
        {name: st.one_of(st.lists(part, max_size=4), values) for name, part in parts.items()}
    )
    return st.one_of(whole, whole, values).map(lambda value: json.dumps(value).encode())


COCO = json.dumps(
    {
        "images": [{"id": i, "file_name": f"{i}.jpg", "neg_category_ids": [1]} for i in (1, 2)],
        "annotations": [{"image_id": i, "category_id": 3 - i} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
)


@st.composite
def parquet_files(draw: Any) -> bytes:
    kinds = [
        st.integers(-2, 2),
        st.floats(),
        st.booleans(),
        names.filter(lambda name: name.isascii()),
        st.binary(max_size=3),
        st.lists(names.filter(lambda name: name.isascii()), max_size=2),
        st.lists(st.integers(0, 1), max_size=2),
        st.dates(),
        st.datetimes(),
        st.decimals(0, 1, places=2),
        st.fixed_dictionaries({"a": st.integers(0, 1)}),
    ]
    height = draw(st.integers(0, 3))
    columns = draw(
        st.lists(st.sampled_from(["path", "labels", "split", "cat", "dog"]), unique=True)
    )
    frame = pl.DataFrame(
        {
            name: draw(
                st.lists(st.none() | draw(st.sampled_from(kinds)), min_size=height, max_size=height)
            )
            for name in columns
        }
    )
    if draw(st.booleans()):
        frame = frame.with_columns(pl.col(pl.String).cast(pl.Categorical))
    file = io.BytesIO()
    frame.write_parquet(file)
    return file.getvalue()


WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


@st.composite
def contents(draw: Any) -> Any:
    """What `torch.save` may be given: often nearly a checkpoint."""
    tensors = st.sampled_from(
        [
            *WEIGHTS.values(),
            torch.ones(2, dtype=torch.int8),
            torch.ones(2, dtype=torch.bfloat16),
            torch.ones(2, dtype=torch.complex64),
            torch.eye(2).to_sparse(),
            torch.zeros(2, device="meta"),
            torch.zeros(1).expand(10**12),
            torch.nn.Parameter(torch.ones(2)),
            torch.zeros(0),
        ]
    )
    odd = st.one_of(
        values,
        tensors,
        st.just(argparse.Namespace(lr=1)),
        st.sampled_from([np.float64(1), np.int64(2), np.str_("a"), b"x", (1, (2,)), 1j, {1}]),
    )
    state = st.dictionaries(names | st.integers(), tensors | odd, max_size=3)
    entries = {
        "model": st.just(WEIGHTS) | state | odd,
        "ema": st.just(WEIGHTS) | state | odd,
        "regular": state | odd,
        "state_dict": state | odd,
        "num_classes": st.just(2) | odd,
        "idx_to_class": st.one_of(
            st.just({0: "cat", 1: "dog"}),
            st.lists(names),
            st.dictionaries(st.integers(0, 3) | plain, names | odd, max_size=3),
            odd,
        ),
        "config": st.dictionaries(st.sampled_from(["image_size", "data"]), odd) | odd,
    }
    return draw(st.one_of(st.fixed_dictionaries({}, optional=entries), state, odd))


def torch_bytes(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def headers() -> st.SearchStrategy[dict[str, str] | None]:
    """Of a safetensors file: none, or what this project writes there, or nearly."""
    kinds = st.sampled_from(["torch.float64", "torch.int64", "torch.qint8"]) | values
    tensors = st.fixed_dictionaries({"dtype": kinds, "values": st.lists(st.floats()) | values})
    odd = tensors | values
    entries = st.fixed_dictionaries(
        {},
        optional={
            "num_classes": st.just(2) | odd,
            "idx_to_class": st.just({"0": "cat", "1": "dog"}) | odd,
            "thresholds": odd,
            "ema": odd,
        },
    )
    return st.none() | (entries | odd).map(lambda value: {"asl": json.dumps(value)})


@st.composite
def zipped_pickles(draw: Any) -> bytes:
    """A whole archive around a damaged pickle: bytes that get past the checks of the archive."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes(draw(contents())))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for name in entries:
        if name.endswith("data.pkl") or draw(st.integers(0, 9)) == 0:
            entries[name] = draw(damaged(st.just(entries[name])))
    file = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


GLOBALS = [
    *("os system", "builtins eval", "builtins bytearray", "builtins getattr", "torch load"),
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"),
    *("torch._utils _rebuild_parameter", "numpy dtype", "numpy._core.multiarray scalar"),
    *("argparse Namespace", "_codecs encode", "torch Size", "torch._tensor _rebuild_from_type_v2"),
]


@st.composite
def pickles(draw: Any) -> bytes:
    """Pickles of arbitrary operations, from the opcodes that a stack machine can be upset with."""
    pushed = st.one_of(
        plain.map(lambda value: pickle.dumps(value, 2)[2:-1]),
        st.sampled_from(GLOBALS).map(lambda name: b"c%s\n" % name.replace(" ", "\n").encode()),
        st.sampled_from([b"(", b")", b"}", b"]", b"\x8f"]),
    )
    operations = st.sampled_from([*b"tRbasueld0012Q\x81\x85\x86\x87\x90\x94"]).map(
        lambda code: bytes([code])
    )
    stream = b"".join(draw(st.lists(pushed | operations, max_size=20)))
    start = draw(st.sampled_from([b"\x80\x02", b"\x80\x04", torch_bytes(WEIGHTS, False)[:40]]))
    return start + stream + b"."


def pictures() -> st.SearchStrategy[bytes]:
    def encode(form: str, mode: str, width: int) -> bytes:
        file = io.BytesIO()
        try:
            Image.new(mode, (width, 3)).save(file, form)
        except (OSError, ValueError):  # a format that has no such mode
            Image.new("RGB", (width, 3)).save(file, form)
        return file.getvalue()

    return st.builds(
        encode,
        st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]),
        st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"]),
        st.integers(1, 5),
    )


def recipes() -> st.SearchStrategy[bytes]:
    known = st.sampled_from([*TrainConfig.names(), "image-size", "lrr"])
    value = st.one_of(
        values.map(json.dumps),
        st.sampled_from(
            [
                "asl",
                "bce",
                "coco",
                "table",
                "1e-3",
                "0.5",
                "yes",
                "~",
                "''",
                "???",
                "${lr}",
                "${a:b}",
                "!!int",
            ]
        ),
        st.text(max_size=6),
    )
    line = st.builds("{}: {}\n".format, known, value)
    return st.lists(line, max_size=5).map(lambda all: "".join(all).encode(errors="surrogatepass"))


# --- targets -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Files, and what reads them."""

    files: st.SearchStrategy[Files]
    read: Callable[[Path], object]


def annotated(dataset: str, split: str = "train", **options: Any) -> Callable[[Path], None]:
    """Read a split and see that what comes back is consistent."""

    def check(root: Path) -> None:
        found = read(dataset, root, split, **options)
        assert isinstance(found, Annotations)
        table = found.dense()
        assert table.shape == (len(found), found.num_classes)
        assert {*np.unique(table)} <= {-1, 0, 1}
        assert len({*found.classes}) == found.num_classes > 0
        assert len(found) > 0
        for index in range(len(found)):
            assert Path(os.path.normpath(found.path(index))).is_relative_to(found.root)
            assert (found.labels(index) == table[index]).all()

    return check


def settle(recipe: Path) -> None:
    """Read a recipe, and write and read it again."""
    config = TrainConfig.of(**read_recipe(recipe, TrainConfig))
    watch.on = False  # what follows writes: the config.yaml of a run must say the same again
    recipe.write_bytes(write_recipe(config).encode())
    assert TrainConfig.of(**read_recipe(recipe, TrainConfig)) == config


def use(path: Path) -> None:
    """Load a checkpoint and touch what the scripts would."""
    loaded = checkpoint.load(path)
    for tensor in loaded["model"].values():
        if tensor.numel() < 1000:
            tensor.clone()
    names = loaded["idx_to_class"]
    assert names is None or all(isinstance(name, str) for name in names.values())


marks = st.sampled_from(["1", "0", "-1", " 1", "2", ""])
HUMAN = "ImageID,Source,LabelName,Confidence"
OPEN = f"{HUMAN}\n{'0' * 15}1,verification,/m/1,1\n{'0' * 15}2,verification,/m/2,0\n"
TABLES = (
    "path,labels\na.jpg,cat|dog\nb.jpg,\n",
    "path,cat,dog,split\na.jpg,1,0,train\nb,,-1,val\n",
)
TARGETS = {
    "coco": Target(
        files(**{"annotations/instances_train.json": either(COCO, json_files())}),
        annotated("coco"),
    ),
    "coco_all_images": Target(
        files(**{"annotations/instances_train.json": either(COCO, json_files())}),
        annotated("coco", all_images=True),
    ),
    "voc": Target(
        files(
            **{
                f"ImageSets/Main/{name}_train.txt": either("a 1\nb -1\n", lines(names | marks, " "))
                for name in ("cat", "dog")
            }
        ),
        annotated("voc", difficult="ignore"),
    ),
    "nus_wide": Target(
        files(
            **{
                "ImageList/TrainImagelist.txt": either("c\\a.jpg\nc\\b.jpg\n", lines(names, "\\")),
                "TrainTestLabels/Labels_cat_Train.txt": either("1\n0\n", lines(marks, "")),
                "TrainTestLabels/Labels_dog_Train.txt": st.just(b"1\n0\n"),
            }
        ),
        annotated("nus_wide"),
    ),
    "nus_wide_zoo": Target(
        files(
            **{
                "nus_wid_data.csv": either(
                    "filepath,label,split_name\na.jpg,\"['cat', 'dog']\",train\nb.jpg,[],val\n",
                    lines(cells, ",", "filepath,label,split_name"),
                )
            }
        ),
        annotated("nus_wide"),
    ),
    "openimages": Target(
        files(
            **{
                "train-annotations-human-imagelabels.csv": either(OPEN, lines(cells, ",", HUMAN)),
                "train-annotations-machine-imagelabels.csv": either(OPEN, lines(cells, ",", HUMAN)),
                "oidv6-classes-trainable.txt": either("/m/1\n/m/2\n", lines(names, "")),
            }
        ),
        annotated("openimages", machine_generated=0.5),
    ),
    "table": Target(
        files(
            **{
                "labels.csv": damaged(
                    st.one_of(
                        st.sampled_from([text.encode() for text in TABLES]),
                        lines(cells, ",", "path,labels"),
                        lines(cells, ",", "path,cat,dog,split"),
                    )
                )
            }
        ),
        annotated("table"),
    ),
    "table_several": Target(
        files(
            **{
                "train.csv": either(TABLES[0], lines(cells, ",", "path,cat")),
                "val.csv": either(TABLES[1], lines(cells, ",", "file,dog,cat")),
            }
        ),
        annotated("table", "val"),
    ),
    "table_parquet": Target(
        files(**{"labels.parquet": damaged(parquet_files())}), annotated("table")
    ),
    "descriptions": Target(
        files(classes=either("/m/1,Cat\n/m/2,Dog\n", lines(cells, ","))),
        lambda root: read_descriptions(root / "classes"),
    ),
    "prior": Target(
        files(
            prior=either(
                "Classes,avg_pred\ncat,0.5\ndog,1\n", lines(cells, ",", "Classes,avg_pred")
            )
        ),
        lambda root: read_prior(root / "prior", ("cat", "dog")),
    ),
    "recipe": Target(
        files(recipe=either("model_name: resnet50\nlr: 1.0e-3\nclip: null\n", recipes())),
        lambda root: settle(root / "recipe"),
    ),
    "checkpoint": Target(
        files(weights=damaged(contents().map(torch_bytes))), lambda root: use(root / "weights")
    ),
    "checkpoint_pickle": Target(
        files(weights=zipped_pickles()), lambda root: use(root / "weights")
    ),
    "checkpoint_legacy": Target(
        files(weights=damaged(contents().map(lambda content: torch_bytes(content, False)))),
        lambda root: use(root / "weights"),
    ),
    "checkpoint_opcodes": Target(files(weights=pickles()), lambda root: use(root / "weights")),
    "checkpoint_safetensors": Target(
        files(weights=damaged(headers().map(lambda text: safetensors_bytes(WEIGHTS, text)))),
        lambda root: use(root / "weights"),
    ),
    "image": Target(files(image=damaged(pictures())), lambda root: read_image(root / "image")),
}


# --- the run -----------------------------------------------------------------------------------


class Hang(BaseException):
    """A case that takes longer than it may; not an Exception, so that no reader answers it."""


class Watch:
    """While it is on, notes every write, new process and connection of this process."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)  # which stays as long as the process

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event in FORBIDDEN or (event == "open" and _writes(arguments[2]))):
            self.seen.append(f"{event} {arguments}")


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


FORBIDDEN = {
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod"),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect"),
}
watch = Watch()


def run_case(target: Target, case: Files, root: Path) -> None:
    """Write the files of one case, read them, and raise where the answer is not a right one."""
    shutil.rmtree(root, ignore_errors=True)
    for name, content in case.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    watch.seen.clear()
    watch.on = True
    signal.alarm(SECONDS_PER_CASE)
    try:
        target.read(root)
    except (UsageError, DataError) as error:
        if "\n" in str(error):
            raise ValueError(f"more than one line: {error}") from error
    finally:
        signal.alarm(0)
        watch.on = False
    assert not watch.seen, watch.seen


def fuzz(target: Target, root: Path, examples: int, number: int) -> int:
    """Run some cases, the same for the same `number`; raises the smallest failure among them.

    Returns how many were run. The files of a failure are left in `root`.
    """
    count = 0

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(target.files)
    def every(case: Files) -> None:
        nonlocal count
        count += 1
        run_case(target, case, root)

    previous = signal.signal(signal.SIGALRM, _hang)
    try:
        every()
    finally:
        signal.signal(signal.SIGALRM, previous)
    return count


def _hang(*_: object) -> None:
    raise Hang(f"more than {SECONDS_PER_CASE} s")


def where(error: BaseException) -> str:
    """What tells one failure from another: the exception, and the line of ours it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}asl{os.sep}" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def main() -> None:
    """Go round the targets until the time is over; exits with 1 if there was a failure."""
    options = argparse.ArgumentParser(description="Fuzz what is read from files.")
    options.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    options.add_argument("--minutes", type=float, default=10, help="in all (10)")
    options.add_argument("--seed", type=int, default=0, help="of the first round (0)")
    options.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    chosen = options.parse_args()
    targets = {name: TARGETS[name] for name in chosen.targets or TARGETS}
    faulthandler.enable()
    logging.disable()
    warnings.simplefilter("ignore")
    # A file that asks for more memory than this gets a MemoryError, and the machine lives on.
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    cases, failures = Counter[str](), dict[str, set[str]]()
    end, number = time.monotonic() + 60 * chosen.minutes, chosen.seed
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            for name, target in targets.items():
                root = Path(folder, "case")
                try:
                    cases[name] += fuzz(target, root, EXAMPLES, number)
                except (KeyboardInterrupt, InvalidArgument):
                    raise
                except BaseException as error:  # a panic of Polars is no Exception
                    kind = where(error)
                    if kind not in failures.setdefault(name, set()):
                        failures[name].add(kind)
                        example = chosen.failures / f"{name}-{len(failures[name])}-seed-{number}"
                        shutil.copytree(root, example / "case", dirs_exist_ok=True)
                        (example / "traceback.txt").write_text(traceback.format_exc())
                        print(f"{name}: {kind}: {str(error)[:300]!r}\n  in {example}", flush=True)
            number += 1
            if number % 10 == 0:
                print(report(cases, failures), flush=True)
    print(report(cases, failures))
    sys.exit(bool(failures))


EXAMPLES = 100  # of a target, before the next one has its turn


def report(cases: Mapping[str, int], failures: Mapping[str, set[str]]) -> str:
    """A line per target: cases and failures."""
    rows = [f"{name:<28}{cases[name]:>9,} {len(failures.get(name, ())):>3}" for name in cases]
    total = sum(len(kinds) for kinds in failures.values())
    return "\n".join([*rows, f"{'cases, failures':<28}{sum(cases.values()):>9,} {total:>3}"])


if __name__ == "__main__":
    main()
