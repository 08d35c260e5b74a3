"""Photographs cut to the square in their middle, for the study of squishing against cropping.

    python studies/centre_crops.py VOCDEVKIT

Writes VOC2007/CentreCrops beside JPEGImages, for every photograph of trainval that is there.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from PIL import Image
from tqdm import tqdm

from asl.data.readers import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the VOCdevkit folder")
    images = read("voc", parser.parse_args().data, "trainval")
    for number in tqdm(range(len(images)), "centre crops"):
        path = Path(images.path(number))
        if not path.exists():
            continue
        with Image.open(path) as picture:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            crop = picture.crop((left, top, left + side, top + side))
        folder = path.parent.with_name("CentreCrops")
        folder.mkdir(exist_ok=True)
        crop.save(folder / path.name, quality=95)


if __name__ == "__main__":
    main()
