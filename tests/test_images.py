import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asl.data.images import read_image, squish
from asl.errors import DataError

VOC_ROOT = Path(
    os.environ.get(
        "ASL_VOC_ROOT", Path(__file__).resolve().parents[2] / "shared" / "data" / "VOCdevkit"
    )
)


@pytest.fixture(scope="module")
def photographs():
    files = sorted((VOC_ROOT.parent / "photos").glob("*.jpg"))
    if not files:
        pytest.skip("no photographs beside ASL_VOC_ROOT")
    return files[::8]


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(256, size=(9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC)


def tensor(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def encode(picture, file_format, **options):
    content = io.BytesIO()
    picture.save(content, file_format, **options)
    return content.getvalue()


def palette_with_alpha(picture):
    return encode(picture.quantize(256), "PNG", transparency=bytes(range(256)))


def animation(picture):
    frames = [picture.rotate(90), picture.rotate(180)]
    return encode(picture, "GIF", save_all=True, append_images=frames)


def rotated_by_exif(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture, "JPEG", exif=exif)


READABLE = {
    "JPEG": lambda p: encode(p, "JPEG"),
    "progressive JPEG": lambda p: encode(p, "JPEG", progressive=True),
    "greyscale JPEG": lambda p: encode(p.convert("L"), "JPEG"),
    "CMYK JPEG": lambda p: encode(p.convert("CMYK"), "JPEG"),
    "JPEG with EXIF rotation": rotated_by_exif,
    "several pictures in one JPEG": lambda p: encode(p, "MPO"),
    "PNG": lambda p: encode(p, "PNG"),
    "PNG with alpha": lambda p: encode(p.convert("RGBA"), "PNG"),
    "greyscale PNG with alpha": lambda p: encode(p.convert("LA"), "PNG"),
    "black and white PNG": lambda p: encode(p.convert("1"), "PNG"),
    "palette": lambda p: encode(p.quantize(16), "PNG"),
    "WebP": lambda p: encode(p, "WEBP"),
    "TIFF": lambda p: encode(p, "TIFF"),
    "BMP": lambda p: encode(p, "BMP"),
    "GIF": lambda p: encode(p, "GIF"),
    "animation": animation,
    "one pixel": lambda p: encode(p.resize((1, 1)), "JPEG"),
}


@pytest.mark.parametrize("kind", READABLE)
def test_every_kind_of_image_reads_as_pillow_converts_it_whatever_its_name(kind, picture, tmp_path):
    content = READABLE[kind](picture)
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with Image.open(io.BytesIO(content)) as reference:
        expected = tensor(reference)
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert torch.equal(image, expected)


def test_a_palette_with_alpha_keeps_its_colours(picture, tmp_path):
    (tmp_path / "a.png").write_bytes(palette_with_alpha(picture))
    assert torch.equal(read_image(tmp_path / "a.png"), tensor(picture.quantize(256)))


def test_16_bit_greyscale_keeps_its_upper_bits(tmp_path):
    ramp = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    expected = torch.arange(256, dtype=torch.uint8)[:, None].expand(3, 256, 256)
    assert torch.equal(read_image(tmp_path / "a.png"), expected)


def damaged(picture):
    content = bytearray(encode(picture, "PNG"))
    content[200:300] = bytes(100)
    return bytes(content)


def bomb(picture):
    content = bytearray(encode(picture, "BMP"))
    content[18:26] = struct.pack("<ii", 30_000, 30_000)  # width and height
    return bytes(content)


UNREADABLE = {
    "empty": (lambda p: b"", "empty"),
    "text": (lambda p: b"not a picture\n" * 50, "not an image"),
    "archive": (lambda p: b"PK\x03\x04" + bytes(200), "not an image"),
    "header only": (lambda p: encode(p, "JPEG")[:30], "Truncated"),
    "half a PNG": (lambda p: encode(p, "PNG")[:9000], "truncated"),
    "half a WebP": (lambda p: encode(p, "WEBP")[:1000], "cannot be decoded"),
    "half a GIF": (lambda p: encode(p, "GIF")[:3000], "truncated"),
    "damaged PNG": (damaged, "data stream"),
    "bomb": (bomb, "900000000 pixels"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_file_is_a_data_error_of_one_line_with_path_and_reason(
    kind, picture, tmp_path
):
    content, reason = UNREADABLE[kind]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content(picture))
    with pytest.raises(DataError, match=reason) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_an_error(picture, tmp_path, kept, progressive):
    content = encode(picture, "JPEG", progressive=progressive)
    (tmp_path / "a.jpg").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match="truncated"):
        read_image(tmp_path / "a.jpg")


def test_missing_files_and_directories_say_so(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(DataError, match="Is a directory"):
        read_image(tmp_path / "folder.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(picture, tmp_path):
    picture.save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_the_pixel_limit_holds_before_anything_is_decoded(picture, tmp_path, file_format):
    content = encode(picture, file_format)
    (tmp_path / "a").write_bytes(content[:-100])  # decoding would complain of this
    with pytest.raises(DataError, match=r"120 x 90 pixels .* limit of 10,799"):
        read_image(tmp_path / "a", max_pixels=120 * 90 - 1)
    (tmp_path / "b").write_bytes(content)
    assert read_image(tmp_path / "b", max_pixels=120 * 90).shape == (3, 90, 120)


def test_squish_differs_from_pillow_by_less_than_a_tenth_of_a_grey_level(photographs):
    differences = []
    for path in photographs:
        with Image.open(path) as photograph:
            small = photograph.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
            decoded = read_image(path)
            assert torch.equal(decoded, tensor(photograph))
        difference = squish(decoded, 224).int() - tensor(small).int()
        differences.append(difference.abs().float().mean())
    assert torch.stack(differences).mean() < 0.1


@pytest.mark.parametrize(("height", "width"), [(90, 120), (30, 200), (1, 1), (64, 63)])
def test_squish_fills_the_square_without_a_crop(height, width):
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    result = squish(image, 64)
    assert result.is_contiguous()
    assert torch.equal(result, torch.full((3, 64, 64), 200, dtype=torch.uint8))


def test_squish_leaves_an_image_of_the_right_size_alone(picture):
    image = tensor(picture.resize((64, 64)))
    assert torch.equal(squish(image, 64), image)
    assert squish(image, 64).is_contiguous()
