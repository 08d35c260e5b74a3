"""The zoo's files are what their card says, and names stand for files: of the zoo, of a hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from asl.errors import DataError, UsageError
from asl.models import checkpoint, create_model, load_weights, zoo
from asl.models.zoo import ZOO, is_name, local_file, sha256

REPOSITORY = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in ZOO.glob("*.safetensors"))
every_model = pytest.mark.parametrize("name", NAMES)
WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


def test_every_file_of_the_zoo_has_a_sum_a_card_and_a_line_in_its_list():
    sums = [line.split()[1] for line in (ZOO / "SHA256SUMS").read_text().splitlines()]
    assert sums == [f"{name}.safetensors" for name in NAMES]
    assert sorted(path.stem for path in ZOO.glob("*.md") if path.stem != "README") == NAMES
    listed = re.findall(r"^\| \[zoo:(\w+)\]\(\1\.md\)", (ZOO / "README.md").read_text(), re.M)
    assert listed == NAMES != []


@every_model
def test_a_model_of_the_zoo_is_small_and_in_half_precision_and_says_what_it_is(name, monkeypatch):
    monkeypatch.chdir("/")
    content = checkpoint.load(f"zoo:{name}")
    assert {x.dtype for x in content["model"].values() if x.ndim > 1} == {torch.float16}
    assert local_file(f"zoo:{name}").stat().st_size < 10e6
    assert len(content["idx_to_class"]) == content["num_classes"]
    assert len(content["thresholds"]["values"]) == content["num_classes"]
    assert content["license"]
    assert len(content["terms"]) > 50
    with safe_open(local_file(f"zoo:{name}"), "pt") as file:
        assert not re.search(r'"/\w+/', file.metadata()["asl"])  # no path of the machine it is from


@every_model
def test_its_card_and_its_line_have_the_figures_of_the_file(name):
    measured = checkpoint.load(f"zoo:{name}")["measured"]
    card = (ZOO / f"{name}.md").read_text()
    assert f"| mAP | {measured['mAP']:.2f} |" in card
    assert sha256(f"zoo:{name}") in card
    assert f"| {measured['mAP']:.2f} |" in (ZOO / "README.md").read_text()


@every_model
def test_a_model_of_the_zoo_is_one_to_start_a_training_from(name):
    content = checkpoint.load(f"zoo:{name}")
    model = create_model(content["config"]["model_name"], 3, content["config"]["head"])
    loaded = load_weights(model, f"zoo:{name}")
    assert loaded.fresh == ("classifier.weight", "classifier.bias")
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    own = model.state_dict()
    first = next(iter(content["model"]))
    assert torch.equal(own[first], content["model"][first].float())


def test_names_are_told_from_paths():
    assert is_name("zoo:a")
    assert is_name("hf-hub:a/b")
    assert not is_name("zoo/a.safetensors")
    assert not is_name(Path("a:b"))
    assert local_file("runs/a.pt") == Path("runs/a.pt")


@pytest.fixture
def small_zoo(tmp_path, monkeypatch):
    """A zoo of one file, `cats`."""
    (tmp_path / "zoo").mkdir()
    checkpoint.save(tmp_path / "zoo/cats.safetensors", {"model": WEIGHTS})
    digest = sha256(tmp_path / "zoo/cats.safetensors")
    (tmp_path / "zoo/SHA256SUMS").write_text(f"{digest}  cats.safetensors\n")
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo")
    return tmp_path / "zoo"


def test_a_name_that_the_zoo_lacks_is_an_error_with_those_it_has(small_zoo):
    assert torch.equal(checkpoint.load("zoo:cats")["model"]["fc.bias"], torch.ones(2))
    with pytest.raises(UsageError, match="there is no zoo:dogs; the zoo has: cats"):
        checkpoint.load("zoo:dogs")


def test_a_file_of_the_zoo_that_is_another_than_published_is_refused(small_zoo):
    path = small_zoo / "cats.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=rf"not the file that was published.* {sha256(path)}"):
        checkpoint.load("zoo:cats")
    path.unlink()
    with pytest.raises(DataError, match=r"cats\.safetensors: cannot be read: No such file"):
        checkpoint.load("zoo:cats")


def test_an_installation_without_the_zoo_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "site-packages/zoo")
    with pytest.raises(UsageError, match="clone the repository, or give the path"):
        checkpoint.load("zoo:cats")


@pytest.mark.parametrize("name", ["zoo:cats", "hf-hub:someone/cats"])
def test_a_published_file_is_not_amended(name, small_zoo):
    with pytest.raises(UsageError, match=f"{name} stays as it was published: copy the file"):
        checkpoint.version(name)


@pytest.fixture
def fetched(tmp_path):
    """The cache of huggingface_hub after a file of someone/cats was fetched; returns its folder."""
    repository = tmp_path / "hub/models--someone--cats"
    for revision, value in (("main", 1.0), ("v2", 2.0)):
        commit = f"{value:040.0f}"
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        weights = {**WEIGHTS, "fc.bias": torch.full((2,), value)}
        names = {0: "cat", 1: "dog"}
        content = {"model": weights, "num_classes": 2, "idx_to_class": names}
        checkpoint.save(snapshot / "model.safetensors", content)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return tmp_path / "hub"


def test_a_name_of_the_hub_is_what_its_own_library_has_fetched(fetched):
    code = (
        "import json; from asl.models import checkpoint\n"
        "for name in ('hf-hub:someone/cats', 'hf-hub:someone/cats@v2', 'hf-hub:someone/dogs'):\n"
        "    content = checkpoint.load(name)\n"
        "    print(json.dumps([content['model']['fc.bias'].tolist(), content['idx_to_class']]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={
            **os.environ,
            **{"HF_HUB_CACHE": str(fetched), "HF_HUB_OFFLINE": "1"},
            "PYTHONPATH": str(REPOSITORY / "src"),
        },
        capture_output=True,
        text=True,
    )
    names = {"0": "cat", "1": "dog"}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [[1.0, 1.0], names],
        [[2.0, 2.0], names],
    ]
    expected = "hf-hub:someone/dogs: the hub cannot be reached, and the file was not fetched before"
    assert done.stderr.splitlines()[-1].endswith(expected)


@pytest.mark.parametrize("name", ["hf-hub:cats", "hf-hub:a/b/c", "hf-hub:"])
def test_a_name_that_the_hub_cannot_have_is_an_error(name):
    with pytest.raises(UsageError, match="must be hf-hub:OWNER/NAME"):
        checkpoint.load(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EntryNotFoundError("404 Client Error."), "there is no model.safetensors in that"),
        (OSError("503 Server Error\nlater"), "cannot be fetched: 503 Server Error$"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(error, message, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(DataError, match=f"hf-hub:someone/birds: {message}"):
        checkpoint.load("hf-hub:someone/birds")
