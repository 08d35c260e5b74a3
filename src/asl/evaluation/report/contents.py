"""What stands on a report, as a program reads it: `report.json`, and what the page is made from.

Whatever is not defined is None; numbers are plain Python numbers, ready for `json.dump`. Images are
named by their row in the split that was scored, classes by their column.
"""

from typing import NotRequired, TypedDict


class Interval(TypedDict):
    """A figure and its 95 % bootstrap interval over images."""

    value: float | None
    low: float | None
    high: float | None


class Headline(TypedDict):
    """A figure at the head of the page, in percent."""

    name: str
    figure: Interval
    explanation: str


class ProtocolFigure(TypedDict):
    """The mAP, in percent, of the same scores under one protocol."""

    name: str
    mAP: float | None
    explanation: str


class OperatingPoint(TypedDict):
    """Where a threshold puts a class; figures in percent."""

    rule: str  # "common", "f1", "precision:0.8"
    threshold: float | None
    precision: float | None
    recall: float | None
    f1: float | None


class Curve(TypedDict):
    """Precision over recall, both in [0, 1], at most 200 points."""

    recall: list[float]
    precision: list[float]


class Histogram(TypedDict):
    """How many cells of each label score between neighbouring edges."""

    edges: list[float]
    positives: list[int]
    negatives: list[int]


class Reliability(TypedDict):
    """Mean score and share of positives of the cells by score: equal if a model is calibrated."""

    score: list[float]
    frequency: list[float]
    cells: list[int]
    ece: float
    brier: float


class ClassFigures(TypedDict):
    """A row of the table of classes; AP in percent."""

    name: str
    AP: Interval
    positives: int
    negatives: int
    few: bool  # too few positives for its figures to mean much
    points: list[OperatingPoint]
    curve: Curve | None
    scores: Histogram


class Repair(TypedDict):
    """The mAP, in percent, if one kind of error were repaired."""

    kind: str
    mAP: float | None
    gain: float | None
    errors: int
    explanation: str


class Bin(TypedDict):
    """Figures, in percent, of a part of the objects or images."""

    name: str
    count: int
    AP: float | None
    recall: float | None


class Together(TypedDict):
    """Shares in [0, 1] of a pair of classes: rows given columns, of the classes with most of it."""

    title: str
    explanation: str
    classes: list[str]
    table: list[list[float | None]]


class Label(TypedDict):
    """A class of an image with its score in [0, 1]."""

    name: str
    score: float


class Outline(TypedDict):
    """An object on a photograph: polygons of x, y in [0, 1], of width and height."""

    name: str
    polygons: list[list[float]]


class Example(TypedDict):
    """A cell of the table of labels, shown with its photograph."""

    row: int
    file: str  # relative to the root of the data set
    name: str  # the class in question
    score: float
    annotated: bool | None  # whether the class is annotated as present; None: not annotated
    truth: list[str]
    predicted: list[Label]
    objects: list[Outline]
    quality: NotRequired[float]  # of a suspected label error: how well the label fits, in [0, 1]


class Gallery(TypedDict):
    """Examples of one kind."""

    key: str  # "false_alarms", "misses", "suspects"
    title: str
    explanation: str
    examples: list[Example]


class Twin(TypedDict):
    """Two photographs that are nearly the same; `bits` in which their perceptual hashes differ."""

    file: str
    other: str
    split: str
    other_split: str
    bits: int
    labels: list[str]
    other_labels: list[str]


class ClassDifference(TypedDict):
    """What a class gains against the other report, in points of AP."""

    name: str
    AP: float | None
    other: float | None
    difference: Interval


class Comparison(TypedDict):
    """This report against another of the same images."""

    other: str
    mAP: Interval  # the difference, in points
    classes: list[ClassDifference]


class Report(TypedDict):
    """All of it."""

    title: str
    protocol: str
    images: int
    about: dict[str, str]  # checkpoint, data, command, commit, versions, date, ...
    settings: dict[str, str]
    headline: list[Headline]
    protocols: list[ProtocolFigure]
    classes: list[ClassFigures]
    repairs: list[Repair]
    sizes: list[Bin]
    numbers_of_labels: list[Bin]
    together: list[Together]
    curve: Curve | None  # over all cells
    scores: Histogram
    reliability: Reliability | None
    galleries: list[Gallery]
    twins: list[Twin]
    comparison: Comparison | None
    notes: list[str]  # what could not be shown, and why
