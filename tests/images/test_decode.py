import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from asl.errors import DataError
from asl.images import decode
from asl.images.decode import MAX_SCANS, find_images, read_image, squish


@pytest.fixture(scope="module")
def photographs(voc_root):
    return sorted((voc_root / "VOC2007" / "JPEGImages").glob("*.jpg"))[::500]


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


def animation(picture, file_format, **options):
    frames = [picture.rotate(90), picture.rotate(180)]
    return encode(picture, file_format, save_all=True, append_images=frames, **options)


def ycck(picture):
    content = bytearray(encode(picture.convert("CMYK"), "JPEG"))
    content[content.index(b"Adobe") + 11] = 2  # the transform, which was 0: CMYK
    return bytes(content)


def rotated_by_exif(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture, "JPEG", exif=exif)


def segment(marker, content):
    return marker + struct.pack(">H", 2 + len(content)) + content


def with_comment(picture, content, **options):
    jpeg = encode(picture, "JPEG", **options)
    return jpeg[:2] + segment(b"\xff\xfe", content) + jpeg[2:]


MANY_SCANS = b"\xff\xda\0\x08\1\1\0\0\x3f\0?" * (MAX_SCANS + 1)  # or what looks like them

READABLE = {
    "JPEG": lambda p: encode(p, "JPEG"),
    "progressive JPEG": lambda p: encode(p, "JPEG", progressive=True),
    "greyscale JPEG": lambda p: encode(p.convert("L"), "JPEG"),
    "CMYK JPEG": lambda p: encode(p.convert("CMYK"), "JPEG"),
    "YCCK JPEG": ycck,
    "JPEG with EXIF rotation": rotated_by_exif,
    "several pictures in one JPEG": lambda p: encode(p, "MPO"),
    "JPEG with a film behind it": lambda p: encode(p, "JPEG") + b"\0\0\0\x18ftypmp42" + MANY_SCANS,
    "JPEG with scans in a comment": lambda p: with_comment(p, MANY_SCANS),
    "PNG": lambda p: encode(p, "PNG"),
    "PNG with alpha": lambda p: encode(p.convert("RGBA"), "PNG"),
    "greyscale PNG with alpha": lambda p: encode(p.convert("LA"), "PNG"),
    "black and white PNG": lambda p: encode(p.convert("1"), "PNG"),
    "palette": lambda p: encode(p.quantize(16), "PNG"),
    "WebP": lambda p: encode(p, "WEBP"),
    "TIFF": lambda p: encode(p, "TIFF"),
    "BMP": lambda p: encode(p, "BMP"),
    "GIF": lambda p: encode(p, "GIF"),
    "animated GIF": lambda p: animation(p, "GIF"),
    "animated PNG": lambda p: animation(p, "PNG"),
    "animated WebP": lambda p: animation(p, "WEBP", lossless=True),
    "several pages of TIFF": lambda p: animation(p, "TIFF", compression="tiff_lzw"),
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


def oriented(picture, file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture, file_format, exif=exif)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_a_photograph_on_request_as_pillow_does(file_format, orientation, picture):
    content = oriented(picture, file_format, orientation)
    with Image.open(io.BytesIO(content)) as opened:
        as_it_is, upright = tensor(opened), tensor(ImageOps.exif_transpose(opened))
    assert torch.equal(read_image(content), as_it_is)
    image = read_image(content, exif_rotate=True)
    assert torch.equal(image, upright)
    assert image.permute(1, 2, 0).is_contiguous()
    turned = orientation in range(5, 9)
    assert image.shape == ((3, 120, 90) if turned else (3, 90, 120))
    if file_format != "TIFF":  # Pillow turns those whenever it reads them
        assert torch.equal(as_it_is, upright) == (orientation not in range(2, 9))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, whoever opens such a file
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0text"])
def test_damaged_exif_leaves_a_photograph_as_it_is(exif, picture):
    content = encode(picture, "JPEG", exif=exif)
    assert torch.equal(read_image(content, exif_rotate=True), read_image(content))


@pytest.mark.parametrize("kind", READABLE)
def test_a_picture_in_memory_has_the_pixels_of_its_file(kind, picture, tmp_path):
    content = READABLE[kind](picture)
    (tmp_path / "a").write_bytes(content)
    from_file = read_image(tmp_path / "a")
    assert torch.equal(read_image(content), from_file)
    with Image.open(io.BytesIO(content)) as opened:
        assert torch.equal(read_image(opened), from_file)
        if opened.mode in ("RGB", "L"):
            array = np.asarray(opened)
            assert torch.equal(read_image(array), from_file)
            assert torch.equal(read_image(array[::-1]), from_file.flip(1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "the file is empty"),
        (b"some text", "not an image, or of an unknown format"),
        (np.zeros((3, 40, 30), np.uint8), r"not \(3, 40, 30\) uint8"),
        (np.zeros((40, 30, 3), np.float32), r"not \(40, 30, 3\) float32"),
        (np.zeros((40, 30), np.float32), "floating point"),
        (np.zeros((0, 30, 3), np.uint8), "30 x 0 pixels are no picture"),
        (np.zeros((40, 31, 3), np.uint8), "31 x 40 pixels are more than the limit of 1,200"),
        (Image.new("RGB", (31, 40)), "31 x 40 pixels are more than the limit of 1,200"),
        (17, "not int"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_picture_in_memory_is_an_error_that_says_so(source, message):
    with pytest.raises(DataError, match=message):
        read_image(source, max_pixels=1200)


def test_a_palette_with_alpha_keeps_its_colours(picture, tmp_path):
    (tmp_path / "a.png").write_bytes(palette_with_alpha(picture))
    assert torch.equal(read_image(tmp_path / "a.png"), tensor(picture.quantize(256)))


RAMP = torch.arange(256, dtype=torch.uint8)[:, None].expand(3, 256, 256)


@pytest.mark.parametrize(
    ("file_format", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")]
)
def test_16_bit_greyscale_keeps_its_upper_bits(file_format, mode, tmp_path):
    ramp = np.arange(256 * 256, dtype=">u2" if mode == "I;16B" else "<u2").reshape(256, 256)
    Image.frombytes(mode, ramp.shape, ramp.tobytes()).save(tmp_path / "a", file_format)
    assert torch.equal(read_image(tmp_path / "a"), RAMP)


def tiff(bits, sample_format, pixels):
    """A TIFF of 256 x 256 px and one uncompressed channel."""
    tags = {256: 256, 257: 256, 258: bits, 259: 1, 262: 1, 273: 200, 277: 1, 278: 256}
    tags |= {279: len(pixels), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries
    return head.ljust(200, b"\0") + pixels


def test_12_bit_greyscale_keeps_its_upper_bits(tmp_path):
    ramp = np.arange(0, 1 << 16, 16).repeat(16).reshape(-1, 2) >> 4  # two pixels in three bytes
    low, high = ramp[:, 0], ramp[:, 1]
    packed = np.stack((low >> 4, (low & 15) << 4 | high >> 8, high & 255), 1).astype(np.uint8)
    (tmp_path / "a").write_bytes(tiff(12, 1, packed.tobytes()))
    assert torch.equal(read_image(tmp_path / "a"), RAMP)


@pytest.mark.parametrize("kind", ["CMYK JPEG", "YCCK JPEG", "JPEG", "greyscale JPEG"])
def test_torchvision_decodes_all_jpegs_but_those_of_inks(kind, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "decode_jpeg", lambda content: torch.zeros(3, 90, 120))
    (tmp_path / "a").write_bytes(READABLE[kind](picture))
    expected = tensor(Image.open(tmp_path / "a")) if "CK" in kind or "CM" in kind else 0
    assert (read_image(tmp_path / "a") == expected).all()


def test_pillow_decodes_what_torchvision_cannot(picture, tmp_path, monkeypatch):
    def refuse(content):
        raise RuntimeError("unsupported")

    monkeypatch.setattr(decode, "decode_jpeg", refuse)
    picture.save(tmp_path / "a.jpg")
    assert torch.equal(read_image(tmp_path / "a.jpg"), tensor(Image.open(tmp_path / "a.jpg")))


def damaged(picture):
    content = bytearray(encode(picture, "PNG"))
    content[200:300] = bytes(100)
    return bytes(content)


def huge_bmp(picture):
    content = bytearray(encode(picture, "BMP"))
    content[18:26] = struct.pack("<ii", 30_000, 30_000)  # width and height
    return bytes(content)


def png(side, *chunks):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(side * (3 * side + 1))) if side < 100 else b""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


def png_with_gigantic(kind, start):
    return png(4, (kind, start + zlib.compress(bytes(20_000_000))))


def huge_webp(side):
    return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + 2 * (side - 1).to_bytes(3, "little")


def huge_gif(picture, place):
    content = bytearray(encode(picture, "GIF"))
    content[place : place + 4] = struct.pack("<HH", 65_000, 65_000)
    return bytes(content)


def tiff_with_huge_tile(picture):
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1}  # a deflated picture of 16 x 16
    tags |= {322: 30_000, 323: 30_000, 324: 200, 325: 200}  # in one tile, here
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(300)


def jpeg_of_many_scans(picture):
    content = encode(picture.convert("L"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * MAX_SCANS + content[-2:]


def with_many_scans(jpeg, before=b""):
    """Scans before the end of the image, not behind it."""
    return jpeg[:-2] + before + MANY_SCANS + jpeg[-2:]


UNREADABLE = {
    "float TIFF": (lambda p: tiff(32, 3, bytes(4 << 16)), r"mode F \(floating point\)"),
    "int32 TIFF": (lambda p: tiff(32, 2, bytes(4 << 16)), r"mode I \(32-bit integers\)"),
    "signed 16-bit TIFF": (lambda p: tiff(16, 2, bytes(2 << 16)), "mode I"),
    "empty": (lambda p: b"", "empty"),
    "text": (lambda p: b"not a picture\n" * 50, "not an image"),
    "archive": (lambda p: b"PK\x03\x04" + bytes(200), "not an image"),
    "HEIC": (lambda p: b"\0\0\0\x18ftypheic" + bytes(200), "not an image"),
    "SVG": (lambda p: b"<?xml version='1.0'?><svg/>", "not an image"),
    "PostScript": (lambda p: encode(p, "EPS"), "not an image"),
    "sound": (lambda p: b"RIFF\x20\0\0\0WAVEfmt " + bytes(50), "not a WEBP"),
    "header only": (lambda p: encode(p, "JPEG")[:30], "Truncated"),
    "half a PNG": (lambda p: encode(p, "PNG")[:9000], "truncated"),
    "half a WebP": (lambda p: encode(p, "WEBP")[:1000], "cannot be decoded"),
    "half a GIF": (lambda p: encode(p, "GIF")[:3000], "truncated"),
    "half a TIFF": (lambda p: encode(p, "TIFF")[:9000], "cannot be decoded"),
    "half a BMP": (lambda p: encode(p, "BMP")[:9000], "truncated"),
    "damaged PNG": (damaged, "data stream"),
    "huge BMP": (huge_bmp, "30000 x 30000 pixels are more than the limit of 89,478,485"),
    "huge PNG": (lambda p: png(30_000), "30000 x 30000 pixels"),
    "huge WebP": (lambda p: huge_webp(16_384), "more pixels than the limit of 89,478,485"),
    "huge screen of a GIF": (lambda p: huge_gif(p, 6), "65000 x 65000 pixels"),
    "huge tile of a TIFF": (tiff_with_huge_tile, "30000 x 30000 pixels"),
    "huge compressed text": (lambda p: png_with_gigantic(b"zTXt", b"a\0\0"), "too large"),
    "huge international text": (lambda p: png_with_gigantic(b"iTXt", b"a\0\1\0\0\0"), "too large"),
    "huge colour profile": (lambda p: png_with_gigantic(b"iCCP", b"a\0\0"), "too large"),
    "thousands of scans": (jpeg_of_many_scans, "more than 100 scans"),
    "scans behind an end in a comment": (
        lambda p: with_many_scans(with_comment(p, b"\xff\xd9")),
        "more than 100 scans",
    ),
    "scans behind an end in a comment between scans": (
        lambda p: with_many_scans(encode(p, "JPEG"), segment(b"\xff\xfe", b"\xff\xd9")),
        "more than 100 scans",
    ),
    "scans behind restarts": (
        lambda p: with_many_scans(encode(p, "JPEG"), b"\xff\xd0\xff\0\xff\xff\xff\x02\xff\xff"),
        "more than 100 scans",
    ),
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


def test_what_is_no_regular_file_says_so_at_once(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # opened plainly, it would wait for a writer
    for name, reason in {
        "missing.jpg": "No such file",
        "folder.jpg": "Is a directory",
        "loop.jpg": "symbolic links",
        "pipe.jpg": "not a regular file",
        "/dev/zero": "not a regular file",
        "a" * 300: "name too long",
    }.items():
        with pytest.raises(DataError, match=reason):
            read_image(tmp_path / name)


def test_a_file_of_a_terabyte_is_not_read(tmp_path):
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="1,099,511,627,776 bytes"):
        read_image(tmp_path / "hole.jpg")


def test_a_file_may_have_eight_bytes_a_pixel(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "a.bmp")
    monkeypatch.setattr(decode, "MAX_PIXELS", 0)
    assert (tmp_path / "a.bmp").stat().st_size > 3 * 120 * 90
    assert read_image(tmp_path / "a.bmp", max_pixels=120 * 90).shape == (3, 90, 120)


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


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_pixel_limit_alone_decides_whatever_pillows_is(
    picture, tmp_path, monkeypatch, file_format
):
    picture.save(tmp_path / "a", file_format)
    for pillows in (1000, 6000, None):  # the picture has 10,800, of which Pillow warns, then raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        assert read_image(tmp_path / "a").shape == (3, 90, 120)
        with pytest.raises(DataError, match="limit of 10,799"):
            read_image(tmp_path / "a", max_pixels=120 * 90 - 1)


def test_squish_differs_from_pillow_by_less_than_a_tenth_of_a_grey_level(photographs, same):
    ours, pillows = [], []
    for path in photographs:
        with Image.open(path) as photograph:
            small = photograph.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
            decoded = read_image(path)
            assert torch.equal(decoded, tensor(photograph))
        ours.append(squish(decoded, 224))
        pillows.append(tensor(small))
    part = "resize, in grey levels (mean)"
    same(part, torch.stack(ours), torch.stack(pillows), atol=0.1, average=True)


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_squish_fills_a_slot_of_a_batch_with_the_same_pixels(picture, layout):
    batch = torch.zeros(3, 3, 64, 64, dtype=torch.uint8).contiguous(memory_format=layout)
    for image in (tensor(picture), tensor(picture).contiguous(), tensor(picture.resize((64, 64)))):
        squish(image, 64, out=batch[1])
        assert torch.equal(batch[1], squish(image, 64))
        assert not batch[[0, 2]].any()


def test_a_name_too_long_to_look_for_says_so(tmp_path):
    with pytest.raises(DataError, match="too long"):
        find_images(tmp_path / ("a" * 300))


def test_images_are_found_by_their_extension_in_all_folders_in_order(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.webp", "c.txt", "b/d/x.tiff", "e.jpg/f.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root, names = find_images(tmp_path)
    assert root == tmp_path
    assert names.tolist() == [b"a.webp", b"b/1.png", b"b/2.JPG", b"b/d/x.tiff", b"e.jpg/f.gif"]


def test_a_file_that_is_named_itself_may_have_any_extension(tmp_path):
    (tmp_path / "picture").touch()
    root, names = find_images(tmp_path / "picture")
    assert (root, names.tolist()) == (tmp_path, [b"picture"])


def test_no_image_to_be_found_is_an_error(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"holds no image \(.*\.jpeg"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="nowhere is not there"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize(("size", "expected"), [(33, 1), (32, 2), (16, 4), (8, 8), (3, 8)])
def test_draft_decodes_jpegs_at_the_smallest_part_that_is_large_enough(size, expected):
    rows, columns = np.mgrid[:64, :80]
    smooth = np.stack([rows * 3, columns * 3, rows + columns], -1).astype(np.uint8)
    content = encode(Image.fromarray(smooth), "JPEG", quality=95)
    image = read_image(content, draft=size)
    assert image.shape == (3, 64 // expected, 80 // expected)
    exact, close = (squish(each, size).int() for each in (read_image(content), image))
    assert torch.equal(exact, close) == (expected == 1)
    assert (exact - close).abs().max() <= 4
    with pytest.raises(DataError, match="more than the limit"):
        read_image(content, max_pixels=64 * 80 - 1, draft=size)
    png = encode(Image.fromarray(smooth), "PNG")
    assert torch.equal(read_image(png, draft=size), read_image(png))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_draft_decodes_every_kind_of_jpeg_and_turns_it(mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (64, 48), (200, 100, 40)).convert(mode)
    content = encode(picture, "JPEG", quality=95, exif=exif)
    image = read_image(content, exif_rotate=True, draft=20)
    assert image.shape == (3, 32, 24)
    assert (image.int() - read_image(content, exif_rotate=True)[:, ::2, ::2]).abs().max() <= 2
