"""Data sets and priors that are wrong: one line that names the place, nothing left behind."""

import json
import math

import polars as pl
import pytest
from bad_input import COCO, HUMAN, JSON, PICTURE, add, cut, edit, empty_folder, gone, put

VOC, VOC_LIST = "train voc --dataset voc", "voc/ImageSets/Main/cat_trainval.txt"
NUS, NUS_LABELS = "train nus --dataset nus_wide", "nus/TrainTestLabels/Labels_cat_Train.txt"
ZOO, ZOO_CSV = "train zoo --dataset nus_wide", "zoo/nus_wid_data.csv"
OPEN, CLASSES = "train openimages --dataset openimages", "openimages/oidv6-classes-trainable.txt"
TABLE = "train table.csv --dataset table"
PARQUET = "train table.parquet --dataset table"
SELECTIVE = "train coco --simulate-partial rps:0.1 --unannotated selective --prior-path"
PRIOR = f"{SELECTIVE} prior.csv"


def coco(**parts):
    return put(JSON, json.dumps({**COCO, **parts}))


def parquet(**columns):
    return lambda root: pl.DataFrame(columns).write_parquet(root / "table.parquet")


OPTIONS = {
    "share without a table": ("train coco --val-share 0.5", 2, "no option 'val_share'"),
    "all of a table to validate": (
        f"{TABLE} --val-share 1",
        2,
        "val_share is 1",
    ),
    "confidence above one": (
        f"{OPEN} --machine-generated 3",
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
    "unknown split": ("train coco --train-split trian", 2, "choose from train2014, val2014"),
    "difficult without VOC": ("train coco --train-difficult ignore", 2, "difficult"),
    "no data": ("train", 2, "name the folder of the data set"),
}

LAYOUTS = {
    "data that is not there": ("train none", 1, "is not there"),
    "data that is a file": ("train prior.csv", 1, "prior.csv is not a folder"),
    "empty folder": ("train empty", 1, "holds nothing", empty_folder),
    "COCO read as VOC": ("train coco --dataset voc", 1, "ImageSets"),
    "VOC read as COCO": ("train voc", 1, "instances_train2014.json is not there"),
    "COCO read as NUS-WIDE": ("train coco --dataset nus_wide", 1, "is not there"),
    "COCO read as Open Images": ("train coco --dataset openimages", 1, "is not there"),
    "COCO read as a table": ("train coco --dataset table", 1, "is not there"),
    "COCO read as the shapes": ("train coco --dataset shapes", 1, "another data set"),
    "shapes below a file": ("train prior.csv/x --dataset shapes", 1, "prior.csv"),
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
        "there is no 2.5",
        edit(JSON, '"image_id": 2', '"image_id": 2.5'),
    ),
    "NaN for the images": ("train coco", 1, "$.images", coco(images=math.nan)),
    "image in both splits": (
        "train coco --image-folder train2014",
        1,
        "2 of 2 validation images are training images too",
    ),
    "category twice": ("train coco", 1, "'cat' is also", edit(JSON, "dog", "cat")),
    "VOC mark": (VOC, 1, "line 1", put(VOC_LIST, "1 2\n2 1\n")),
    "VOC files that disagree": (VOC, 1, "different images", put(VOC_LIST, "1 1\n")),
    "VOC image twice": (VOC, 1, "twice", put(VOC_LIST, "1 1\n1 1\n")),
    "VOC file that is empty": (VOC, 1, "is empty", put(VOC_LIST)),
    "VOC file of blank lines": (VOC, 1, "is empty", put(VOC_LIST, "\n\n")),
    "VOC file that is missing": (VOC, 1, "cat_trainval.txt", gone(VOC_LIST)),
    "VOC that is not UTF-8": (VOC, 1, "not UTF-8", put(VOC_LIST, b"\xff 1\n")),
    "VOC image outside of the folder": (
        VOC,
        1,
        "not a path inside",
        lambda root: [
            edit(f"voc/ImageSets/Main/{c}_trainval.txt", "2 ", "../../x ")(root)
            for c in ("cat", "dog")
        ],
    ),
    "NUS-WIDE labels that are no list": (
        ZOO,
        1,
        "row 2, column label",
        edit(ZOO_CSV, "['cat']", "cat"),
    ),
    "NUS-WIDE labels that are code": (
        ZOO,
        1,
        "is not a list of names",
        edit(ZOO_CSV, "['cat']", "__import__('os').mkdir('was_run')"),
    ),
    "NUS-WIDE labels that nest": (
        ZOO,
        1,
        "is not a list of names",
        edit(ZOO_CSV, "['cat']", "[" * 5000),
    ),
    "NUS-WIDE without a column": (
        ZOO,
        1,
        "no column split_name",
        edit(ZOO_CSV, "split_name", "fold"),
    ),
    "NUS-WIDE mark": (
        NUS,
        1,
        "line 2: '2'",
        put(NUS_LABELS, "1\n2\n"),
    ),
    "NUS-WIDE file of another length": (
        NUS,
        1,
        "1 lines for 2 images",
        put(NUS_LABELS, "1\n"),
    ),
    "Open Images confidence": (OPEN, 1, "row 2", edit(HUMAN, "/m/1,1", "/m/1,0.5")),
    "Open Images id": (OPEN, 1, "row 2", edit(HUMAN, f"{1:016x}", "a.jpg")),
    "Open Images column": (OPEN, 1, "Confidence", edit(HUMAN, "Confidence", "Trust")),
    "Open Images that is empty": (OPEN, 1, "empty", put(HUMAN)),
    "Open Images without a known class": (
        OPEN,
        1,
        "no label of the classes",
        put(CLASSES, "/m/9\n"),
    ),
    "class list that is not there": (
        f"{OPEN} --class-list none.txt",
        1,
        "none.txt is not there",
    ),
    "class list with a class twice": (
        OPEN,
        1,
        "twice",
        put(CLASSES, "/m/1\n/m/1\n"),
    ),
    "class list that is empty": (
        OPEN,
        1,
        "lists no class",
        put(CLASSES),
    ),
    "table without labels": (TABLE, 1, "no class", put("table.csv", "path,split\n1.png,train\n")),
    "table without paths": (TABLE, 1, "no column path", edit("table.csv", "path", "p")),
    "table with a path twice": (
        TABLE,
        1,
        "already at",
        edit("table.csv", "2.png,dog,val", "1.png,dog,train"),
    ),
    "table with an image in both splits": (
        TABLE,
        1,
        "1 of 1 validation images are training images too",
        put("table.csv", f"path,labels,split\n{PICTURE},cat,train\n{PICTURE},cat,val\n"),
    ),
    "table with names in a column label": (
        TABLE,
        1,
        "call it labels",
        put("table.csv", "path,label\n1.png,cat\n"),
    ),
    "table with a bad cell": (
        TABLE,
        1,
        "row 2, column cat: '2'",
        put("table.csv", "path,cat\n1.png,2\n"),
    ),
    "table with soft labels for a loss that takes none": (
        f"{TABLE} --loss hill",
        2,
        "loss hill takes no soft labels: choose asl, focal, bce",
        put("table.csv", f"path,cat,split\n{PICTURE},0.5,train\n{PICTURE},1,val\n"),
    ),
    "table with soft labels to hide some of": (
        f"{TABLE} --simulate-partial rps:0.5",
        2,
        "'rps:0.5' is for labels of 1 and 0, and these are soft",
        put("table.csv", f"path,cat,split\n{PICTURE},0.5,train\n{PICTURE},1,val\n"),
    ),
    "table with a column twice": (
        TABLE,
        1,
        "there twice",
        put("table.csv", "path,cat,cat\n1.png,1,1\n"),
    ),
    "table with a cell too many": (
        TABLE,
        1,
        "row 3 has 4 cells",
        put("table.csv", "path,cat\n1.png,1\n2.png,1,1,1\n"),
    ),
    "table with an open quote": (TABLE, 1, "table.csv", put("table.csv", 'path,cat\n"1.png,1\n')),
    "table that is empty": (TABLE, 1, "table.csv", put("table.csv")),
    "table of a header": (TABLE, 1, "no rows", put("table.csv", "path,labels\n")),
    "table that is not UTF-8": (TABLE, 1, "UTF-8", put("table.csv", b"path,labels\n\xff.png,a\n")),
    "table without the split": (
        f"{TABLE} --train-split fold1",
        2,
        "choose from train, val",
    ),
    "table that is no Parquet": (
        PARQUET,
        1,
        "cannot be read",
        put("table.parquet", "path"),
    ),
    "Parquet with lists for paths": (
        PARQUET,
        1,
        "column path is of type List",
        parquet(path=[[1], [2]], cat=[0, 1]),
    ),
    "Parquet with lists for marks": (
        PARQUET,
        1,
        "column cat is of type List",
        parquet(path=["1.png"], cat=[[1]]),
    ),
}

PRIORS = {
    "prior that is not there": (f"{SELECTIVE} none.csv", 1, "none.csv is not there"),
    "prior that is a folder": (f"{SELECTIVE} coco", 1, "coco"),
    "prior that is empty": (PRIOR, 1, "header", put("prior.csv")),
    "prior with another header": (
        PRIOR,
        1,
        "header",
        edit("prior.csv", "Classes", "Class"),
    ),
    "prior with a class twice": (
        PRIOR,
        1,
        "already in row 2",
        edit("prior.csv", "dog", "cat"),
    ),
    "prior with an unknown class": (
        PRIOR,
        1,
        "'cow' is not a class",
        add("prior.csv", "cow,0.1\n"),
    ),
    "prior without a class": (
        PRIOR,
        1,
        "no match: dog",
        edit("prior.csv", "dog,0.1\n", ""),
    ),
    "prior that is no number": (
        PRIOR,
        1,
        "row 3, dog: 'often'",
        edit("prior.csv", "0.1", "often"),
    ),
    "prior above one": (
        PRIOR,
        1,
        "row 3, dog: '10'",
        edit("prior.csv", "0.1", "10"),
    ),
    "prior that is nan": (PRIOR, 1, "'nan'", edit("prior.csv", "0.1", "nan")),
    "prior with a cell too many": (
        PRIOR,
        1,
        "row 3 has 3 cells",
        edit("prior.csv", "0.1", "0.1,2"),
    ),
    "prior that is not UTF-8": (PRIOR, 1, "UTF-8", put("prior.csv", b"\xff")),
    "prior with a null byte": (
        PRIOR,
        1,
        "prior.csv",
        edit("prior.csv", "dog", "d\0g"),
    ),
    "prior with a cell without end": (
        PRIOR,
        1,
        "prior.csv",
        edit("prior.csv", "dog", "d" * 200_000),
    ),
}
CASES = {**OPTIONS, **LAYOUTS, **PRIORS}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_leaves_nothing(name, refused):
    refused(*CASES[name])


def test_a_process_of_its_own_ends_the_same_way(refused):
    refused(*CASES["JSON that is cut off"], alone=True)
