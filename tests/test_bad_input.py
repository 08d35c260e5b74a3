"""More than a hundred kinds of bad input: one line that says what is wrong, nothing left behind.

A row of the tables says what is wrong, the command, the exit code (2: command line or recipe, 1:
what was read), a part of the message, and what spoils a folder in which everything is right.
"""

import io
import json
import pickle
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import polars as pl
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
RECIPE = """\
model_name: test_resnet
image_size: 32
batch_size: 2
epochs: 1
workers: 0
device: cpu
amp: "off"
augment: none
output: new
"""
# What every command gets, but for the options that it gives itself.
TRAINED = {"--model-path": "model.pt", "--workers": "0", "--device": "cpu", "--amp": "off"}
USUAL = {
    "train": {"--config": "recipe.yaml"},
    "validate": TRAINED,
    "infer": {**TRAINED, "--pic-path": "coco/train2014/1.png", "--output": "pictures"},
}
COCO = {
    "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
    "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 2, "category_id": 9}],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
}
JSON, PICTURE = "coco/annotations/instances_train2014.json", "coco/train2014/1.png"
HUMAN = "openimages/train-annotations-human-imagelabels.csv"
FIRST = "conv1.0.weight"  # of test_resnet
VOC = "voc/ImageSets/Main/cat_trainval.txt"


def run(script, *arguments, cwd):
    """A script in a process of its own: exit code and standard error."""
    command = [sys.executable, "-W", "error", REPOSITORY / f"{script}.py", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, timeout=100)
    return done.returncode, done.stderr.decode()  # as text, the returns of bars became new lines


def run_here(script, *arguments, cwd):
    """The same in this process, which has long imported what a new one would take seconds for."""
    code, err = 0, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, chdir(cwd):
        patch.setattr(sys, "argv", [f"{script}.py", *arguments])
        patch.setattr(sys, "path", [*sys.path])
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(err):
                runpy.run_path(str(REPOSITORY / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
    return code, err.getvalue()


def arguments_of(line):
    script, *words = shlex.split(line)
    usual = USUAL[script].items()
    return [script, *words, *(word for pair in usual if pair[0] not in words for word in pair)]


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def draw(root, name):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "red").save(root / name)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A folder with a tiny data set of every layout, a recipe, a prior, and a run of one epoch."""
    root = tmp_path_factory.mktemp("right")
    for split in ("train2014", "val2014"):
        write(root, f"coco/annotations/instances_{split}.json", json.dumps(COCO))
        draw(root, f"coco/{split}/1.png")
        draw(root, f"coco/{split}/2.png")
    for name, marks in {"cat": (1, -1), "dog": (-1, 1)}.items():
        for split in ("trainval", "test"):
            lines = "".join(f"{i} {mark}\n" for i, mark in enumerate(marks, 1))
            write(root, f"voc/ImageSets/Main/{name}_{split}.txt", lines)
        write(root, f"nus/TrainTestLabels/Labels_{name}_Train.txt", "1\n0\n")
    write(root, "nus/ImageList/TrainImagelist.txt", "a\\1.jpg\na\\2.jpg\n")
    zoo = "filepath,label,split_name\n1.jpg,['cat'],train\n2.jpg,['dog'],val\n"
    write(root, "zoo/nus_wid_data.csv", zoo)
    write(root, HUMAN, f"ImageID,LabelName,Confidence\n{1:016x},/m/1,1\n{2:016x},/m/2,0\n")
    write(root, "openimages/oidv6-classes-trainable.txt", "/m/1\n/m/2\n")
    write(root, "table.csv", "path,labels,split\n1.png,cat,train\n2.png,dog,val\n")
    write(root, "prior.csv", "Classes,avg_pred\ncat,0.5\ndog,0.1\n")
    write(root, "recipe.yaml", RECIPE)
    code, err = run_here(*arguments_of("train coco --output run"), cwd=root)
    assert code == 0, err
    shutil.copy(root / "run/best.pt", root / "model.pt")
    return root


def put(name, content=""):
    return lambda root: write(root, name, content)


def add(name, text):
    return lambda root: write(root, name, (root / name).read_text() + text)


def edit(name, old, new):
    def spoil(root):
        text = (root / name).read_text()
        assert old in text
        write(root, name, text.replace(old, new))

    return spoil


def cut(name, keep):
    return lambda root: write(root, name, (root / name).read_bytes()[:keep])


def gone(name):
    return lambda root: (root / name).unlink()


def coco(**parts):
    return put(JSON, json.dumps({**COCO, **parts}))


def content(**parts):
    """The checkpoint with other entries; those that are None go."""

    def spoil(root):
        whole = {**torch.load(root / "model.pt", weights_only=True), **parts}
        kept = {name: value for name, value in whole.items() if value is not None}
        torch.save(kept, root / "model.pt")

    return spoil


def weights(change):
    """The checkpoint after `change` of its weights, alone."""

    def spoil(root):
        whole = torch.load(root / "model.pt", weights_only=True)
        change(whole["model"])
        names = ("model", "idx_to_class", "num_classes", "config")
        torch.save({name: whole[name] for name in names}, root / "model.pt")

    return spoil


def fill(state, value):
    state[FIRST][0] = value


def cast(kind):
    return lambda state: state.update({name: x.to(kind) for name, x in state.items()})


def bomb(root):
    with zipfile.ZipFile(root / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))


class RunsCode:
    def __reduce__(self):
        return Path.mkdir, (Path("was_run"),)


def png_of(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


COMMAND_LINE = {
    "unknown option": ("train coco --frobnicate", 2, "--frobnicate"),
    "near miss": ("train coco --gama-neg 3", 2, "Perhaps you meant"),
    "near miss of validate": ("validate coco --model-pth x", 2, "Perhaps you meant"),
    "option of another script": ("infer --epochs 3", 2, "--epochs"),
    "option twice": ("train coco --lr 1e-3 --lr 1e-4", 2, "--lr is given twice"),
    "option twice under two names": ("infer --th 0.5 --threshold 0.5", 2, "given twice"),
    "no value": ("train coco --lr", 2, "--lr"),
    "two folders": ("train coco voc", 2, "voc"),
    "text for a number": ("train coco --lr fast", 2, "fast"),
    "fraction for a count": ("train coco --batch-size 1.5", 2, "1.5"),
    "unknown choice": ("train coco --dataset coc", 2, "coc"),
    "value behind a switch": ("train coco --no-pretrained=3", 2, "options: 3"),
    "nan": ("train coco --lr nan", 2, "lr is nan"),
    "infinity": ("train coco --lr inf", 2, "lr is inf"),
    "infinite focusing": ("train coco --gamma-neg inf", 2, "gamma_neg is inf"),
    "infinite decay": ("train coco --weight-decay inf", 2, "weight_decay is inf"),
    "negative": ("train coco --batch-size -4", 2, "batch_size is -4"),
    "no epochs": ("train coco --epochs 0", 2, "epochs is 0"),
    "no stop": ("train coco --stop-epoch 0", 2, "stop_epoch is 0"),
    "huge image size": ("train coco --image-size 100000", 2, "at most 4096"),
    "huge seed": ("train coco --seed 99999999999", 2, "at most"),
    "all of the schedule rises": ("train coco --pct-start 1", 2, "pct_start is 1"),
    "decay of one": ("train coco --ema-decay 1", 2, "ema_decay is 1"),
    "threshold above one": ("infer --threshold 1.5", 2, "threshold is 1.5"),
    "no labels wanted": ("infer --top-k 0", 2, "top_k is 0"),
    "clip too small to count": ("train coco --clip 1e-9", 2, "clip"),
    "clip of one": ("train coco --clip 1", 2, "clip is 1"),
    "a checkpoint every zero steps": (
        "train coco --checkpoint-every 0",
        2,
        "checkpoint_every is '0'",
    ),
    "a checkpoint every so often": ("train coco --checkpoint-every 5s", 2, "checkpoint_every is"),
    "a checkpoint never": (f"train coco --checkpoint-every {'9' * 5000}", 2, "checkpoint_every"),
    "no pixels": ("infer --max-pixels 0", 2, "max_pixels is 0"),
    "cache below a file": ("train coco --cache-dir prior.csv/cache", 2, "prior.csv"),
    "negative workers": ("validate coco --workers -1", 2, "workers is -1"),
    "gap out of range": ("train coco --adaptive-gamma 2", 2, "adaptive_gamma is 2"),
    "gap step of zero": ("train coco --adaptive-step 0", 2, "adaptive_step is 0"),
    "cross-entropy with focusing": ("train coco --loss bce --gamma-neg 2", 2, "bce takes neither"),
    "focal loss with a margin": ("train coco --loss focal --clip 0.1", 2, "no clip"),
    "prior without selective": ("train coco --prior-path prior.csv", 2, "prior_path has a meaning"),
    "two sources of weights": (
        "train coco --pretrained --model-path model.pt",
        2,
        "model_path and pretrained",
    ),
    "share without a table": ("train coco --val-share 0.5", 2, "no option 'val_share'"),
    "all of a table to validate": (
        "train table.csv --dataset table --val-share 1",
        2,
        "val_share is 1",
    ),
    "confidence above one": (
        "train openimages --dataset openimages --machine-generated 3",
        2,
        "machine_generated is 3",
    ),
    "unknown simulation": ("train coco --simulate-partial half", 2, "no simulation 'half'"),
    "simulation without a number": ("train coco --simulate-partial rps", 2, "as in rps:0.5"),
    "simulation with a wrong number": ("train coco --simulate-partial rps:nan", 2, "rps:0.5"),
    "simulation that keeps none": ("train coco --simulate-partial fpc:0", 2, "as in fpc:1000"),
    "simulation of a number without end": (
        f"train coco --simulate-partial fpc:{'9' * 5000}",
        2,
        "as in fpc:1000",
    ),
    "unknown model": ("train coco --model-name tresnet_n", 2, "did you mean tresnet"),
    "unknown weights of a model": ("train coco --model-name resnet50.none", 2, "no weights"),
    "images too small for the model": (
        "train coco --model-name test_convnext --image-size 8",
        2,
        "test_convnext",
    ),
    "size that patches do not fill": ("train coco --model-name test_vit --image-size 33", 2, "33"),
    "size that windows do not fill": ("train coco --model-name test_maxvit --image-size 8", 2, "8"),
    "device that is not there": ("train coco --device cuda:9", 2, "device 'cuda:9'"),
    "no device": ("validate coco --device gpu", 2, "device 'gpu'"),
    "device without memory": ("infer --device meta", 2, "device 'meta'"),
    "other number of classes": ("train coco --num-classes 3", 2, "num_classes is 3"),
    "other number than the checkpoint": ("infer --num-classes 3", 2, "num_classes is 3"),
    "no data": ("train", 2, "name the folder of the data set"),
    "no checkpoint": ("infer --model-path ''", 2, "--model-path"),
    "no picture": ("infer --pic-path ''", 2, "--pic-path"),
    "output is a file": ("train coco --output prior.csv", 1, "cannot write into prior.csv"),
    "output below a file": ("train coco --output prior.csv/run", 1, "Not a directory"),
    "output cannot be written": ("train coco --output /proc/run", 1, "cannot write into /proc"),
    "output of too long a name": (f"train coco --output {'a' * 300}", 1, "too long"),
    "output holds a run": ("train coco --output run", 2, "holds a run"),
    "nothing to resume": ("train coco --resume", 2, "no run to resume in new"),
    "pictures below a file": ("infer --output prior.csv/pictures", 2, "prior.csv"),
    "json below a file": ("validate coco --json prior.csv/x.json", 2, "prior.csv"),
    "json is a folder": ("infer --no-draw --json coco", 2, "coco"),
    "prior below a file": ("validate coco --estimate-prior prior.csv/x.csv", 2, "prior.csv"),
    "unknown split": ("train coco --train-split trian", 2, "choose from train2014, val2014"),
    "difficult without VOC": ("train coco --train-difficult ignore", 2, "difficult"),
}

RECIPES = {
    "recipe that is not there": ("train coco --config none.yaml", 2, "none.yaml", None),
    "recipe that is a folder": ("train coco --config coco", 2, "recipe coco", None),
    "empty recipe": ("train", 2, "DATA", put("recipe.yaml")),
    "recipe with a tab": ("train coco", 2, "is not YAML", add("recipe.yaml", "\tlr: 1\n")),
    "recipe with a key twice": (
        "train coco",
        2,
        "lr",
        add("recipe.yaml", "lr: 1.0e-4\nlr: 1.0e-3\n"),
    ),
    "key in two spellings": (
        "train coco",
        2,
        "image_size stands there twice",
        add("recipe.yaml", "image-size: 64\n"),
    ),
    "recipe with an unknown key": (
        "train coco",
        2,
        "learning_rate",
        add("recipe.yaml", "learning_rate: 1\n"),
    ),
    "recipe with a wrong type": ("train coco", 2, "lr", add("recipe.yaml", "lr: fast\n")),
    "recipe with a wrong choice": ("train coco", 2, "loss", add("recipe.yaml", "loss: l2\n")),
    "recipe with a list for a value": ("train coco", 2, "lr", add("recipe.yaml", "lr: [1, 2]\n")),
    "recipe with a map for a value": ("train coco", 2, "lr", add("recipe.yaml", "lr: {a: 1}\n")),
    "recipe with nothing for a value": ("train coco", 2, "lr", add("recipe.yaml", "lr:\n")),
    "recipe out of range": ("train coco", 2, "lr is -1", add("recipe.yaml", "lr: -1.0\n")),
    "recipe that is a list": ("train coco", 2, "list of", put("recipe.yaml", "- lr\n")),
    "recipe that is a text": ("train coco", 2, "recipe", put("recipe.yaml", "hello\n")),
    "recipe that is a number": ("train coco", 2, "recipe", put("recipe.yaml", "3\n")),
    "binary recipe": ("train coco", 2, "recipe.yaml", put("recipe.yaml", bytes(range(256)))),
    "recipe that is not UTF-8": ("train coco", 2, "not YAML", put("recipe.yaml", b"lr: \xff\n")),
    "recipe that looks up the environment": (
        "train coco",
        2,
        "recipe.yaml",
        add("recipe.yaml", "data: ${oc.env:NO_SUCH_VARIABLE}\n"),
    ),
    "recipe that refers to nothing": (
        "train coco",
        2,
        "recipe.yaml",
        add("recipe.yaml", "data: ${folder}\n"),
    ),
    "recipe that would run code": (
        "train coco",
        2,
        "not YAML",
        add("recipe.yaml", "data: !!python/object/apply:os.mkdir [was_run]\n"),
    ),
    "recipe that refers to itself": (
        "train coco",
        2,
        "recipe.yaml",
        put("recipe.yaml", "&a {lr: *a}\n"),
    ),
    "recipe that names a folder with a null byte": (
        "train coco",
        2,
        "output",
        edit("recipe.yaml", "output: new", 'output: "a\\0b"'),
    ),
}

LAYOUTS = {
    "data that is not there": ("train none", 1, "is not there", None),
    "data that is a file": ("train prior.csv", 1, "prior.csv is not a folder", None),
    "empty folder": ("train empty", 1, "holds nothing", lambda root: (root / "empty").mkdir()),
    "COCO read as VOC": ("train coco --dataset voc", 1, "ImageSets", None),
    "VOC read as COCO": ("train voc", 1, "instances_train2014.json is not there", None),
    "COCO read as NUS-WIDE": ("train coco --dataset nus_wide", 1, "is not there", None),
    "COCO read as Open Images": ("train coco --dataset openimages", 1, "is not there", None),
    "COCO read as a table": ("train coco --dataset table", 1, "is not there", None),
    "COCO read as the shapes": ("train coco --dataset shapes", 1, "another data set", None),
    "shapes below a file": ("train prior.csv/x --dataset shapes", 1, "prior.csv", None),
    "JSON that is missing": ("train coco", 2, "train one: val2014", gone(JSON)),
    "JSON that is cut off": ("train coco", 1, "truncated", cut(JSON, 99)),
    "JSON that is empty": ("train coco", 1, "is empty", put(JSON)),
    "JSON that is HTML": (
        "validate coco --val-split train2014",
        1,
        "malformed",
        put(JSON, "<html>"),
    ),
    "JSON that is a list": ("train coco", 1, "Expected `object`", put(JSON, "[]")),
    "JSON without an end": ("train coco", 1, "not a JSON", put(JSON, '{"info":' + "[" * 100_000)),
    "images that are no list": ("train coco", 1, "$.images", coco(images=3)),
    "no images": ("train coco", 1, "images is empty", coco(images=[])),
    "no annotations": ("train coco", 1, "annotations is empty", coco(annotations=[])),
    "no categories": ("train coco", 1, "categories is empty", coco(categories=[])),
    "image without a name": ("train coco", 1, "file_name", coco(images=[{"id": 1}, {"id": 2}])),
    "image outside of the folder": (
        "train coco",
        1,
        "not a path inside",
        edit(JSON, "1.png", "../../x.png"),
    ),
    "name with half a character": (
        "train coco",
        1,
        "surrogate",
        edit(JSON, "1.png", "\\ud800.png"),
    ),
    "image twice": (
        "train coco",
        1,
        "images[2].id",
        coco(images=[*COCO["images"], COCO["images"][0]]),
    ),
    "unknown category": (
        "train coco",
        1,
        "there is no 8",
        edit(JSON, '"category_id": 9', '"category_id": 8'),
    ),
    "unknown image": (
        "train coco",
        1,
        "there is no 3",
        edit(JSON, '"image_id": 2', '"image_id": 3'),
    ),
    "fraction for an id": (
        "train coco",
        1,
        "$.annotations",
        edit(JSON, '"image_id": 2', '"image_id": 2.5'),
    ),
    "category twice": ("train coco", 1, "'cat' is also", edit(JSON, "dog", "cat")),
    "VOC mark": ("train voc --dataset voc", 1, "line 1", put(VOC, "1 2\n2 1\n")),
    "VOC files that disagree": (
        "train voc --dataset voc",
        1,
        "different images",
        put(VOC, "1 1\n"),
    ),
    "VOC image twice": ("train voc --dataset voc", 1, "twice", put(VOC, "1 1\n1 1\n")),
    "VOC file that is empty": ("train voc --dataset voc", 1, "is empty", put(VOC)),
    "VOC file that is missing": ("train voc --dataset voc", 1, "cat_trainval.txt", gone(VOC)),
    "VOC that is not UTF-8": ("train voc --dataset voc", 1, "not UTF-8", put(VOC, b"\xff 1\n")),
    "VOC image outside of the folder": (
        "train voc --dataset voc",
        1,
        "not a path inside",
        lambda root: [
            edit(f"voc/ImageSets/Main/{c}_trainval.txt", "2 ", "../../x ")(root)
            for c in ("cat", "dog")
        ],
    ),
    "NUS-WIDE labels that are no list": (
        "train zoo --dataset nus_wide",
        1,
        "row 2, column label",
        edit("zoo/nus_wid_data.csv", "['cat']", "cat"),
    ),
    "NUS-WIDE labels that are code": (
        "train zoo --dataset nus_wide",
        1,
        "is not a list of names",
        edit("zoo/nus_wid_data.csv", "['cat']", "__import__('os').mkdir('was_run')"),
    ),
    "NUS-WIDE labels that nest": (
        "train zoo --dataset nus_wide",
        1,
        "is not a list of names",
        edit("zoo/nus_wid_data.csv", "['cat']", "[" * 5000),
    ),
    "NUS-WIDE without a column": (
        "train zoo --dataset nus_wide",
        1,
        "no column split_name",
        edit("zoo/nus_wid_data.csv", "split_name", "fold"),
    ),
    "NUS-WIDE mark": (
        "train nus --dataset nus_wide",
        1,
        "line 2: '2'",
        put("nus/TrainTestLabels/Labels_cat_Train.txt", "1\n2\n"),
    ),
    "NUS-WIDE file of another length": (
        "train nus --dataset nus_wide",
        1,
        "1 lines for 2 images",
        put("nus/TrainTestLabels/Labels_cat_Train.txt", "1\n"),
    ),
    "Open Images confidence": (
        "train openimages --dataset openimages",
        1,
        "row 2",
        edit(HUMAN, "/m/1,1", "/m/1,0.5"),
    ),
    "Open Images id": (
        "train openimages --dataset openimages",
        1,
        "row 2",
        edit(HUMAN, f"{1:016x}", "a.jpg"),
    ),
    "Open Images column": (
        "train openimages --dataset openimages",
        1,
        "Confidence",
        edit(HUMAN, "Confidence", "Trust"),
    ),
    "Open Images that is empty": ("train openimages --dataset openimages", 1, "empty", put(HUMAN)),
    "Open Images without a known class": (
        "train openimages --dataset openimages",
        1,
        "no label of the classes",
        put("openimages/oidv6-classes-trainable.txt", "/m/9\n"),
    ),
    "class list that is not there": (
        "train openimages --dataset openimages --class-list none.txt",
        1,
        "none.txt is not there",
        None,
    ),
    "class list with a class twice": (
        "train openimages --dataset openimages",
        1,
        "twice",
        put("openimages/oidv6-classes-trainable.txt", "/m/1\n/m/1\n"),
    ),
    "class list that is empty": (
        "train openimages --dataset openimages",
        1,
        "lists no class",
        put("openimages/oidv6-classes-trainable.txt"),
    ),
    "table without labels": (
        "train table.csv --dataset table",
        1,
        "no class",
        put("table.csv", "path,split\n1.png,train\n"),
    ),
    "table without paths": (
        "train table.csv --dataset table",
        1,
        "no column path",
        edit("table.csv", "path", "p"),
    ),
    "table with a path twice": (
        "train table.csv --dataset table",
        1,
        "already at",
        edit("table.csv", "2.png,dog,val", "1.png,dog,train"),
    ),
    "table with a bad cell": (
        "train table.csv --dataset table",
        1,
        "row 2, column cat: '2'",
        put("table.csv", "path,cat\n1.png,2\n"),
    ),
    "table with a column twice": (
        "train table.csv --dataset table",
        1,
        "there twice",
        put("table.csv", "path,cat,cat\n1.png,1,1\n"),
    ),
    "table with a cell too many": (
        "train table.csv --dataset table",
        1,
        "row 3 has 4 cells",
        put("table.csv", "path,cat\n1.png,1\n2.png,1,1,1\n"),
    ),
    "table with an open quote": (
        "train table.csv --dataset table",
        1,
        "table.csv",
        put("table.csv", 'path,cat\n"1.png,1\n'),
    ),
    "table that is empty": ("train table.csv --dataset table", 1, "table.csv", put("table.csv")),
    "table of a header": (
        "train table.csv --dataset table",
        1,
        "no rows",
        put("table.csv", "path,labels\n"),
    ),
    "table that is not UTF-8": (
        "train table.csv --dataset table",
        1,
        "UTF-8",
        put("table.csv", b"path,labels\n\xff.png,a\n"),
    ),
    "table without the split": (
        "train table.csv --dataset table --train-split fold1",
        2,
        "choose from train, val",
        None,
    ),
    "table that is no Parquet": (
        "train table.parquet --dataset table",
        1,
        "cannot be read",
        put("table.parquet", "path"),
    ),
    "Parquet with lists for paths": (
        "train table.parquet --dataset table",
        1,
        "column path is of type List",
        lambda root: pl.DataFrame({"path": [[1], [2]], "cat": [0, 1]}).write_parquet(
            root / "table.parquet"
        ),
    ),
    "Parquet with lists for marks": (
        "train table.parquet --dataset table",
        1,
        "column cat is of type List",
        lambda root: pl.DataFrame({"path": ["1.png"], "cat": [[1]]}).write_parquet(
            root / "table.parquet"
        ),
    ),
}

IMAGES = {
    "missing image": ("train coco", 1, "1 of 2 images are missing", gone(PICTURE)),
    "no image at all": (
        "train coco --image-folder empty --missing-images skip",
        1,
        "right folder",
        None,
    ),
    "missing image of validation": ("validate coco", 1, "missing", gone("coco/val2014/2.png")),
    "empty image": ("train coco", 1, "the file is empty", put(PICTURE)),
    "image that is text": ("train coco", 1, "not an image", put(PICTURE, "no picture")),
    "image that is cut off": ("train coco", 1, "1.png", cut(PICTURE, 60)),
    "image that is a folder": (
        "train coco",
        1,
        "1.png",
        lambda root: (gone(PICTURE)(root), (root / PICTURE).mkdir()),
    ),
    "image that is a bomb": ("train coco", 1, "pixels", put(PICTURE, png_of(30_000, 30_000))),
    "text to label": ("infer", 1, "not an image", put(PICTURE, "no picture")),
    "bomb to label": ("infer", 1, "pixels", put(PICTURE, png_of(30_000, 30_000))),
    "cut image to validate": ("validate coco", 1, "2.png", cut("coco/val2014/2.png", 60)),
    "nothing to label": ("infer --pic-path none.png", 1, "none.png is not there", None),
    "empty folder to label": (
        "infer --pic-path empty",
        1,
        "no image",
        lambda root: (root / "empty").mkdir(),
    ),
    "folder without images to label": ("infer --pic-path voc/ImageSets", 1, "holds no image", None),
}

CHECKPOINTS = {
    "checkpoint that is not there": ("infer --model-path none.pt", 1, "No such file", None),
    "checkpoint that is a folder": ("validate coco --model-path coco", 1, "directory", None),
    "checkpoint that is empty": ("infer", 1, "it is empty", put("model.pt")),
    "checkpoint that is HTML": (
        "infer",
        1,
        "download",
        put("model.pt", "<!DOCTYPE html><title>403"),
    ),
    "checkpoint that is cut off": ("validate coco", 1, "damaged", cut("model.pt", 9999)),
    "checkpoint that is text": (
        "train coco --model-path model.pt",
        1,
        "not a checkpoint",
        put("model.pt", "hello"),
    ),
    "checkpoint that is a picture": (
        "infer --model-path coco/train2014/1.png",
        1,
        "not a checkpoint",
        None,
    ),
    "checkpoint with code": ("infer", 1, "would run code", content(extra=RunsCode())),
    "pickle with code": ("infer", 1, "would run code", put("model.pt", pickle.dumps(RunsCode()))),
    "checkpoint that is a bomb": ("infer", 1, "would unpack to 50,000,000", bomb),
    "checkpoint of a list": (
        "infer",
        1,
        "holds a list",
        lambda root: torch.save([1], root / "model.pt"),
    ),
    "checkpoint without weights": (
        "infer",
        1,
        "no weights",
        lambda root: torch.save({"model": {}}, root / "model.pt"),
    ),
    "other architecture": (
        "validate coco --model-name test_efficientnet",
        1,
        "another model",
        None,
    ),
    "other architecture to start from": (
        "train coco --model-path model.pt --model-name test_vit",
        1,
        "another model",
        None,
    ),
    "other head": ("infer --head bottleneck", 1, "--head", None),
    "other head by data set": ("infer --dataset-type OpenImages", 1, "--head", None),
    "missing keys": ("infer", 1, "tensors", weights(lambda state: state.pop(FIRST))),
    "wrong shapes": (
        "infer",
        1,
        FIRST,
        weights(lambda state: state.update({FIRST: torch.zeros(3, 3)})),
    ),
    "nan weights": ("infer", 1, "not finite", weights(lambda state: fill(state, torch.nan))),
    "infinite weights": (
        "train coco --model-path model.pt",
        1,
        "not finite",
        weights(lambda state: fill(state, torch.inf)),
    ),
    "whole numbers for weights": ("infer", 1, "int8", weights(cast(torch.int8))),
    "complex weights": ("validate coco", 1, "complex", weights(cast(torch.complex64))),
    "sparse weights": (
        "infer",
        1,
        FIRST,
        weights(lambda state: state.update({FIRST: state[FIRST].to_sparse()})),
    ),
    "weights without values": (
        "infer",
        1,
        FIRST,
        weights(lambda state: state.update({FIRST: state[FIRST].to("meta")})),
    ),
    "no class names": ("infer", 1, "does not name its classes", content(idx_to_class=None)),
    "class names of another number": (
        "infer",
        1,
        "classes",
        content(idx_to_class={0: "cat"}, num_classes=None),
    ),
    "class names that are no list": ("infer", 1, "idx_to_class", content(idx_to_class=3)),
    "class names without numbers": (
        "infer",
        1,
        "idx_to_class",
        content(idx_to_class={"cat": 0, "dog": 1}),
    ),
    "class names that are numbered beyond": (
        "infer",
        1,
        "idx_to_class",
        content(idx_to_class={0: "cat", float("inf"): "dog"}),
    ),
    "settings of a wrong type": ("infer", 1, "image_size", content(config={"image_size": "large"})),
    "settings out of range": ("infer", 1, "image_size", content(config={"image_size": -3})),
    "settings that are no settings": ("infer", 1, "config", content(config=3)),
    "other classes than the data": (
        "validate zoo --dataset nus_wide --val-split train",
        1,
        "match",
        content(idx_to_class={0: "cat", 1: "cow"}),
    ),
    "one class of the data is missing": (
        "validate voc --dataset voc",
        1,
        "no match: dog",
        lambda root: [
            (root / f"voc/ImageSets/Main/dog_{split}.txt").unlink()
            for split in ("test", "trainval")
        ],
    ),
    "weights of a set that is no set": ("infer", 1, "holds a int", content(ema=3)),
    "descriptions that are not there": ("infer --class-descriptions none.csv", 1, "none.csv", None),
    "descriptions of three columns": ("infer --class-descriptions table.csv", 1, "row 1", None),
}

RESUMED = {
    "resume from a file that is not there": ("train coco --resume none.pt", 1, "none.pt", None),
    "resume from a file of weights": ("train coco --resume model.pt", 2, "holds weights", None),
    "resume without a checkpoint": (
        "train coco --output run --resume",
        1,
        "last.pt",
        cut("run/last.pt", 0),
    ),
    "resume of a cut checkpoint": (
        "train coco --output run --resume",
        1,
        "damaged",
        cut("run/last.pt", 5000),
    ),
    "resume with other settings": (
        "train coco --output run --resume --lr 0.5",
        2,
        "other settings (lr",
        None,
    ),
    "resume of mere weights": (
        "train coco --output run --resume",
        2,
        "holds weights and no run",
        lambda root: shutil.copy(root / "model.pt", root / "run/last.pt"),
    ),
    "resume of another model": (
        "train coco --output run --resume",
        1,
        "last.pt",
        lambda root: resumed_from(root, regular={"w": torch.zeros(1)}),
    ),
    "resume of another state": (
        "train coco --output run --resume",
        1,
        "last.pt",
        lambda root: resumed_from(root, training={}),
    ),
}

SELECTIVE = "train coco --simulate-partial rps:0.1 --unannotated selective --prior-path"
PRIORS = {
    "prior that is not there": (f"{SELECTIVE} none.csv", 1, "none.csv is not there", None),
    "prior that is a folder": (f"{SELECTIVE} coco", 1, "coco", None),
    "prior that is empty": (f"{SELECTIVE} prior.csv", 1, "header", put("prior.csv")),
    "prior with another header": (
        f"{SELECTIVE} prior.csv",
        1,
        "header",
        edit("prior.csv", "Classes", "Class"),
    ),
    "prior with a class twice": (
        f"{SELECTIVE} prior.csv",
        1,
        "already in row 2",
        edit("prior.csv", "dog", "cat"),
    ),
    "prior with an unknown class": (
        f"{SELECTIVE} prior.csv",
        1,
        "'cow' is not a class",
        add("prior.csv", "cow,0.1\n"),
    ),
    "prior without a class": (
        f"{SELECTIVE} prior.csv",
        1,
        "no match: dog",
        edit("prior.csv", "dog,0.1\n", ""),
    ),
    "prior that is no number": (
        f"{SELECTIVE} prior.csv",
        1,
        "row 3, dog: 'often'",
        edit("prior.csv", "0.1", "often"),
    ),
    "prior above one": (
        f"{SELECTIVE} prior.csv",
        1,
        "row 3, dog: '10'",
        edit("prior.csv", "0.1", "10"),
    ),
    "prior that is nan": (f"{SELECTIVE} prior.csv", 1, "'nan'", edit("prior.csv", "0.1", "nan")),
    "prior with a cell too many": (
        f"{SELECTIVE} prior.csv",
        1,
        "row 3 has 3 cells",
        edit("prior.csv", "0.1", "0.1,2"),
    ),
    "prior that is not UTF-8": (f"{SELECTIVE} prior.csv", 1, "UTF-8", put("prior.csv", b"\xff")),
    "prior with a null byte": (
        f"{SELECTIVE} prior.csv",
        1,
        "prior.csv",
        edit("prior.csv", "dog", "d\0g"),
    ),
    "prior with a cell without end": (
        f"{SELECTIVE} prior.csv",
        1,
        "prior.csv",
        edit("prior.csv", "dog", "d" * 200_000),
    ),
}


def resumed_from(root, **parts):
    whole = torch.load(root / "run/last.pt", weights_only=True)
    torch.save({**whole, **parts}, root / "run/last.pt")


CASES = {
    **{name: (*case, None) for name, case in COMMAND_LINE.items()},
    **RECIPES, **LAYOUTS, **IMAGES, **CHECKPOINTS, **RESUMED, **PRIORS,
}  # fmt: skip


def files_of(root, leave_out=()):
    paths = (path for path in root.rglob("*") if not {*path.relative_to(root).parts} & {*leave_out})
    return {path: path.stat().st_mtime_ns for path in paths}


def one_message(err):
    """The error that is on the screen in the end, in one line."""
    shown = [each.rpartition("\r")[2] for each in err.split("\n")]  # progress bars leave nothing
    [first, *more] = [text for text in shown if text.strip()]
    if "For full helptext" in err:  # tyro draws a box around what is wrong and what is near
        return " ".join(" ".join(text.strip("│|+ ") for text in more).split())
    assert not more
    assert first.startswith("error: ")
    return first


def spoiled(name, right, root):
    shutil.copytree(right, root)
    spoil = CASES[name][3]
    if spoil:
        spoil(root)
    # Training opens an image when its turn comes: by then the run has a folder.
    return {"new"} if name in IMAGES else ()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_leaves_nothing(name, right, tmp_path):
    line, expected, message, _ = CASES[name]
    root = tmp_path / "world"
    begun = spoiled(name, right, root)
    before = files_of(root)
    code, err = run_here(*arguments_of(line), cwd=root)
    assert message in one_message(err)
    assert code == expected
    assert files_of(root, begun) == before


@pytest.mark.parametrize(
    "name",
    [
        "near miss",
        "recipe with a tab",
        "JSON that is cut off",
        "image that is cut off",
        "checkpoint with code",
        "missing image of validation",
    ],
)
def test_a_process_of_its_own_ends_the_same_way(name, right, tmp_path):
    line, expected, message, _ = CASES[name]
    root = tmp_path / "world"
    begun = spoiled(name, right, root)
    before = files_of(root)
    workers = () if "near" in name else ("--workers", "1")  # so that errors come from another one
    words = [word for word in arguments_of(line) if word not in ("--workers", "0")]
    code, err = run(*words, *workers, cwd=root)
    assert message in one_message(err)
    assert code == expected
    assert files_of(root, begun) == before
