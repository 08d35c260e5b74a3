"""Command lines and recipes that are wrong: one line that says so, nothing left behind."""

import pytest
from bad_input import add, edit, put

OPTIONS = {
    "unknown option": ("train coco --frobnicate", 2, "--frobnicate"),
    "near miss": ("train coco --gama-neg 3", 2, "Perhaps you meant"),
    "near miss of validate": ("validate coco --model-pth x", 2, "Perhaps you meant"),
    "option of another script": ("infer --epochs 3", 2, "--epochs"),
    "option of training alone": ("infer --cache-dir x", 2, "--cache-dir"),
    "setting of recipes alone": ("validate coco --machine-generated 0.5", 2, "--machine"),
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
}

RECIPES = {
    "recipe that is not there": ("train coco --config none.yaml", 2, "none.yaml"),
    "recipe that is a folder": ("train coco --config coco", 2, "cannot read coco"),
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
        "train",
        1,
        "${oc.env:HOME}/annotations",
        add("recipe.yaml", "data: ${oc.env:HOME}\n"),
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
CASES = {**OPTIONS, **RECIPES}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_leaves_nothing(name, refused):
    refused(*CASES[name])


@pytest.mark.parametrize("name", ["near miss", "recipe with a tab"])
def test_a_process_of_its_own_ends_the_same_way(name, refused):
    refused(*CASES[name], alone=True)
