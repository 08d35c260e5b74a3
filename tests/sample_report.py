"""A report whose figures are made up, for tests of what becomes of them."""

import numpy as np

EDGES = [i / 20 for i in range(21)]


def interval(value, width=2.0):
    return {"value": value, "low": value - width, "high": value + width}


def curve(points=200):
    recall = np.linspace(0, 1, points)
    return {"recall": recall.tolist(), "precision": (1 - 0.6 * recall**2).tolist()}


def histogram():
    return {"edges": EDGES, "positives": [*range(20)], "negatives": [*range(200, 0, -10)]}


def point(rule, threshold):
    return {"rule": rule, "threshold": threshold, "precision": 81.5, "recall": 62.25, "f1": 70.5}


def class_figures(number, name):
    return {
        "name": name,
        "AP": interval(20 + (number * 37) % 75),
        "positives": 3 + 10 * number,
        "negatives": 10_000 - 3 - 10 * number,
        "few": number == 0,
        "points": [point("common", 0.8), point("f1", 0.123 + number / 1e6)],
        "curve": curve() if number < 100 else None,
        "scores": histogram(),
    }


def example(row, file, name, score, annotated, truth, objects=()):
    return {
        "row": row,
        "file": file,
        "name": name,
        "score": score,
        "annotated": annotated,
        "truth": truth,
        "predicted": [{"name": name, "score": score}],
        "objects": [
            {"name": each, "polygons": [[0.1, 0.1, 0.6, 0.1, 0.6, 0.7]]} for each in objects
        ],
    }


def gallery(key, title, examples):
    return {"key": key, "title": title, "explanation": f"About {title}.", "examples": examples}


def sample_report(names, **parts):
    """A report on 10,000 images of these classes; `parts` take the place of what it has."""
    report = {
        "title": "A report",
        "protocol": "voc: difficult objects ignored (official)",
        "images": 10_000,
        "about": {"checkpoint": "runs/voc/best.pt", "command": "python validate.py --report out"},
        "settings": {"threshold": "0.8"},
        "headline": [
            {"name": "mAP", "figure": interval(78.5, 0.9), "explanation": "Mean of the classes."},
            {"name": "CF1", "figure": interval(70.25, 1), "explanation": "F1 by class."},
            {"name": "OF1", "figure": interval(75, 1), "explanation": "F1 of all cells."},
        ],
        "protocols": [
            {"name": "official", "mAP": 78.5, "explanation": "As the authors."},
            {"name": "interpolated", "mAP": 79.5, "explanation": "Eleven points."},
        ],
        "classes": [class_figures(number, name) for number, name in enumerate(names)],
        "repairs": [
            {"kind": kind, "mAP": 78.5 + gain, "gain": gain, "errors": 120, "explanation": "If."}
            for kind, gain in (("confusion", 6.5), ("false alarms", 3.25), ("misses", 9.75))
        ],
        "sizes": [{"name": "small", "count": 1200, "AP": 41.5, "recall": 30.25}],
        "numbers_of_labels": [{"name": "1", "count": 5000, "AP": 91.5, "recall": 80.25}],
        "together": [
            {
                "title": "Labels",
                "explanation": "Share of the images with a class that have the other.",
                "classes": list(names[:4]),
                "table": np.eye(len(names[:4])).tolist(),
            }
        ],
        "curve": curve(),
        "scores": histogram(),
        "reliability": {
            "score": [0.1, 0.5, 0.9],
            "frequency": [0.05, 0.4, 0.95],
            "cells": [9000, 500, 400],
            "ece": 0.0123,
            "brier": 0.0456,
        },
        "galleries": [],
        "twins": [],
        "comparison": None,
        "notes": [],
    }
    return {**report, **parts}
