"""What the tests of bad input share: a folder in which everything is right, and ways to spoil it.

A row of their tables is a command, the exit code (2: command line or recipe, 1: what was read), a
part of the message, and perhaps what spoils the folder before. Each wing has the rows of its own.
"""

import io
import json
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
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


@pytest.fixture(scope="session")
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


@pytest.fixture
def refused(right, tmp_path):
    """Sees that a command ends with one message and this code, and leaves the folder as it was.

    refused(command, code, message, spoil=None). Of a training that had begun, the folder `begun`
    stays. With `alone` the script has a process of its own.
    """

    def check(command, code, message, spoil=None, *, begun=None, alone=False):
        root = tmp_path / "world"
        shutil.copytree(right, root)
        if spoil:
            spoil(root)
        before = files_of(root, begun)
        ended, err = (run if alone else run_here)(*arguments_of(command), cwd=root)
        assert message in one_message(err)
        assert ended == code
        assert files_of(root, begun) == before

    return check


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


def empty_folder(root):
    (root / "empty").mkdir()


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def draw(root, name):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "red").save(root / name)


def arguments_of(line):
    script, *words = shlex.split(line)
    usual = USUAL[script].items()
    return [script, *words, *(word for pair in usual if pair[0] not in words for word in pair)]


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


def files_of(root, leave_out):
    paths = (path for path in root.rglob("*") if leave_out not in path.relative_to(root).parts)
    return {path: path.stat().st_mtime_ns for path in paths}


def one_message(err):
    """The error that is on the screen in the end, in one line."""
    shown = [each.rpartition("\r")[2] for each in err.split("\n")]  # progress bars leave nothing
    lines = [text for text in shown if text.strip()]
    if "For full helptext" in err:  # tyro draws a box around what is wrong and what is near
        return " ".join(" ".join(text.strip("│|+ ") for text in lines[1:]).split())
    [message] = lines
    assert message.startswith("error: ")
    return message
