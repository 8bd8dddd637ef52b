"""images.py, and a folder with everything that goes wrong in real ones."""

import errno
import io
import itertools
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
import pillow_heif
import pytest
from packaging.version import Version
from PIL import Image
from torchvision.transforms import v2

from project import cli
from project.data.check import check_dataset, inspect_image
from project.data.images import ImageError, is_image, parse_resize, read, require_short_decoding
from project.errors import UserError
from project.inference import predictions
from tests.conftest import SMALL


def encoded(image, fmt="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def noise(shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def ramp(dtype, high):
    return np.tile(np.linspace(0, high, 64).astype(dtype), (64, 1))


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad", "stretch:nearest", "crop:bicubic:0.875", "pad:lanczos"])
def test_grey_image_is_resized_as_if_it_were_rgb_and_a_very_long_one_is_read(resize):
    image = noise((90, 131))
    pixels = read(encoded(image), 64, resize)
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    assert (pixels == read(encoded(image.convert("RGB")), 64, resize)).all()
    assert read(encoded(Image.new("RGB", (5000, 1), "red")), 32, resize).shape == (32, 32, 3)


def with_tag(content, tag, before, after):
    """A TIFF with another value of a tag."""
    head = struct.pack("<HHI", tag, 3, 1)
    assert head + bytes([before, 0]) in content
    return content.replace(head + bytes([before, 0]), head + bytes([after, 0]))


@pytest.mark.parametrize(
    ("kind", "high"), [("u1", 255), ("u2", 65535), ("f4", 1), ("f4", 255), ("i4", 65535), ("i4", 10**6)]
)
def test_deep_ramp_stays_a_ramp_which_falls_where_0_means_white(kind, high):
    image = Image.fromarray(ramp(kind, high))
    files = {encoded(image, fmt): 1 for fmt in (("PNG", "TIFF") if kind == "u2" else ("TIFF",))}
    if kind != "i4":  # which Pillow does not read so
        files[with_tag(encoded(image, "TIFF"), 262, 1, 0)] = -1  # PhotometricInterpretation: WhiteIsZero
    for content, direction in files.items():
        pixels = read(content, 64)[0, ::direction, 0].astype(int)
        assert (np.diff(pixels) > 0).all()
        assert (pixels[0], pixels[-1]) == (0, 255)


def test_16_bits_are_divided_by_257_whatever_the_content_and_floats_with_nan_and_negative_values_are_read():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    pixels = read(encoded(Image.fromarray(values)), 256)[:, :, 0]
    assert (pixels == np.round(values / 257)).all()
    assert (read(encoded(Image.fromarray(values[:128])), 256)[::2, :, 0] <= 128).all()
    values = ramp(np.float32, 2.0) - 1
    values[0, 0] = np.nan
    pixels = read(encoded(Image.fromarray(values), "TIFF"), 64)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_laid_on_white(mode):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    pixels = read(encoded(image.quantize() if mode == "P" else image.convert(mode)), 8)
    assert (pixels[:, 6:] == 255).all()
    assert not (pixels[:, :2] == 255).all()
    assert (read(encoded(Image.new("L", (20, 20)), transparency=0), 64) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "grey", "palette"])
def test_an_alpha_channel_that_is_0_everywhere_says_nothing(kind):
    image = noise((20, 30, 3))
    clear = image.convert("RGBA")
    clear.putalpha(0)
    if kind == "grey":
        content, image = encoded(clear.convert("LA")), image.convert("L")
    elif kind == "palette":
        image = image.quantize(16)
        content = encoded(image, transparency=bytes(16))
    elif kind == "BMP":  # with a header of version 4, which has a mask for alpha
        rows = np.asarray(clear)[::-1, :, [2, 1, 0, 3]].tobytes()
        head = struct.pack("<IiiHHI20x4I", 108, 30, 20, 1, 32, 3, 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
        content = b"BM" + struct.pack("<IHHI", 122 + len(rows), 0, 0, 122) + head + rows
        assert Image.open(io.BytesIO(content)).mode == "RGBA"
    else:
        content = encoded(clear, kind)
    assert (read(content, 16) == read(encoded(image.convert("RGB")), 16)).all()


HOLES = [[-9999], [-32768], [-3.4028235e38], [1e20], [-9999, 1e38], [9999], [np.nan, -9999], [np.inf]]


@pytest.mark.parametrize(
    ("kind", "high", "holes"),
    [*(("f4", 1, holes) for holes in HOLES), ("f4", 100, [9999]), ("i4", 100, [-9999])],
)
@pytest.mark.parametrize("rows", [1, 40])
def test_no_data_values_do_not_take_the_contrast_from_the_others(kind, high, holes, rows):
    values = ramp(kind, high)
    expected = read(encoded(Image.fromarray(values), "TIFF"), 64)
    values[:rows, : len(holes)] = holes
    pixels = read(encoded(Image.fromarray(values), "TIFF"), 64)
    assert (pixels[:, len(holes) :] == expected[:, len(holes) :]).all()
    assert set(np.unique(pixels[:rows, : len(holes)])) <= {0, 255}


def test_damaged_metadata_prints_no_warning_of_pillows_own(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"  # announces five tags, and ends
    content = encoded(Image.new("RGB", (8, 8)), "JPEG")
    (tmp_path / "a.jpg").write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:])
    program = "from project.data.images import read; print(read('a.jpg', 8).shape)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(8, 8, 3)\n", "")


def test_unsigned_32_bits_above_half_of_their_range_are_not_read_as_negative():
    content = encoded(Image.fromarray(ramp("f8", 2**32 - 1).astype("u4").view("i4")), "TIFF")
    pixels = read(with_tag(content, 339, 2, 1), 64)[0, :, 0].astype(int)  # SampleFormat: unsigned
    assert pixels == pytest.approx(np.linspace(0, 255, 64), abs=1)


def test_declared_no_data_is_obeyed_and_what_has_two_values_keeps_both():
    for kind in ("f4", "i4"):
        values = ramp(kind, 100)
        values[0, 0] = 70
        assert read(encoded(Image.fromarray(values), "TIFF", tiffinfo={42113: "70"}), 64)[0, 0, 0] == 0
    mask = np.where(ramp(np.float32, 1) > 0.5, 1, -1).astype(np.float32)
    assert set(np.unique(read(encoded(Image.fromarray(mask), "TIFF"), 64))) == {0, 255}
    flat = np.full((64, 64), 128, np.int32)
    flat[0, 0] = -9999
    assert (read(encoded(Image.fromarray(flat), "TIFF"), 64)[1:] == 128).all()


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("f4", [0, 0.5, 1.5], [0, 0, 2]),  # above 1: the range of 0 to 255
        ("f4", [0, 0.5, 1], [0, 128, 255]),
        ("f4", [0, 1, 1], [0, 1, 1]),  # whole numbers, as in a mask of classes
        ("i4", [0, 100, 9999], [0, 0, 39]),  # above 255 without a fraction: 16 bits
        ("i4", [-155, 100, 100], [0, 255, 255]),
        ("i4", [-156, 100, 100], [0, 100, 100]),  # a difference above 255 is one to no-data
        ("f4", [0.5, 0.5, 255.5], [0, 0, 1]),
        ("f4", [0.5, 0.5, 256], [128, 128, 255]),
        ("f4", [200.5, 250.5, 500.5], [200, 250, 255]),  # further from the next value than all others are apart
        ("f4", [200.5, 250.5, 300.5], [1, 1, 1]),
        ("f4", [-60.5, 10.5, 60.5], [0, 10, 60]),
        ("f4", [-39.5, 0.5, 60.5], [0, 102, 255]),
    ],
)
def test_the_range_of_deep_greys_follows_from_their_values_alone(kind, values, expected):
    image = Image.fromarray(np.tile(np.array(values, kind), (3, 1)))
    assert read(encoded(image, "TIFF"), 3)[1, :, 0].tolist() == expected


def test_premultiplied_grey_and_alpha_of_a_tiff_is_read_as_such():
    image = Image.new("LA", (8, 8), (100, 128))
    premultiplied = with_tag(encoded(image, "TIFF"), 338, 2, 1)  # ExtraSamples: associated alpha
    if Version(PIL.__version__) < Version("13"):  # it opens none
        with pytest.raises(ImageError, match="unknown format"):
            read(premultiplied, 8)
    else:
        assert Image.open(io.BytesIO(premultiplied)).mode == "La"
        assert abs(int(read(premultiplied, 8)[0, 0, 0]) - (100 + 127)) <= 1
    assert abs(int(read(encoded(image, "TIFF"), 8)[0, 0, 0]) - (50 + 127)) <= 1


def test_cmyk_jpeg_becomes_rgb_and_a_bilevel_image_black_and_white():
    pixels = read(encoded(Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK"), "JPEG"), 16)
    assert pixels[8, 8, 0] > 200
    assert pixels[8, 8, 1:].max() < 60
    pixels = read(encoded(Image.fromarray(ramp(np.uint8, 255)).point(lambda v: 255 * (v > 99), "1")), 64)
    assert set(np.unique(pixels)) == {0, 255}


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned right: white half on top
    pixels = read(encoded(image, "JPEG", exif=exif, quality=95), 32)
    assert pixels[:12].mean() > 240
    assert pixels[20:].mean() < 15


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation_is_taken(fmt):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pixels = read(encoded(frames[0], fmt, save_all=True, append_images=frames[1:]), 8)
    assert pixels[4, 4, 0] > 200 > pixels[4, 4, 2]


def test_stretch_is_pillows_bilinear_resize_crop_keeps_the_centre_and_pad_everything():
    image = noise((37, 53, 3))
    assert (read(encoded(image), 24) == np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR))).all()
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    crop, pad = read(encoded(image), 30, "crop"), read(encoded(image), 30, "pad")
    assert (crop[15, 2:-2] == (0, 0, 255)).all()
    assert (pad[:9] == 0).all()
    assert (pad[15, [2, 15]] == [(255, 0, 0), (0, 0, 255)]).all()


def test_another_interpolation_is_pillows_and_a_share_is_of_the_short_side():
    image = noise((37, 53, 3))
    for name in ("nearest", "bilinear", "bicubic", "lanczos"):
        resampling = Image.Resampling[name.upper()]
        expected = {
            f"stretch:{name}": image.resize((24, 24), resampling),
            f"crop:{name}": image.resize((24, 24), resampling, (8, 0, 45, 37)),
            f"crop:{name}:.5": image.resize((24, 24), resampling, (17.25, 9.25, 35.75, 27.75)),
            f"pad:{name}": Image.new("RGB", (24, 24)),
        }
        expected[f"pad:{name}"].paste(image.resize((24, 17), resampling), (0, 3))
        for resize, square in expected.items():
            assert (read(encoded(image), 24, resize) == np.asarray(square)).all(), resize
    for name, resize in itertools.product(("stretch", "crop", "pad"), ("{}:bilinear", "{}")):
        assert parse_resize(resize.format(name)) == (name, Image.Resampling.BILINEAR, 1)
    assert (read(encoded(image), 24, "crop:bicubic:1") == read(encoded(image), 24, "crop:bicubic")).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("side", "share"), [(256, "0.875"), (232, "0.9655"), (224, "1")])
def test_crop_is_that_of_torchvisions_transforms(interpolation, side, share):
    """Where the long side or the margins are not whole pixels, theirs rounds them: off by up to half a pixel."""
    theirs = v2.Compose([v2.Resize(side, v2.InterpolationMode(interpolation)), v2.CenterCrop(224)])
    for width, height, most in ((480, 320, 0.05), (500, 375, 2), (375, 500, 2)):
        image = noise((9, 12, 3)).resize((width, height), Image.Resampling.BICUBIC)
        ours = read(encoded(image), 224, f"crop:{interpolation}:{share}").astype(float)
        assert np.abs(ours - np.asarray(theirs(image))).mean() < most
        assert np.abs(ours - read(encoded(image), 224, f"stretch:{interpolation}")).mean() > 40


@pytest.mark.parametrize(
    "resize",
    ["", "squash", "crop:", "crop:cubic", "crop:BICUBIC", "stretch:bicubic:0.9", "pad:bicubic:1", "crop:0.9"]
    + [
        f"crop:bicubic:{share}"
        for share in ("0", "0.0", "1.15", "-0.5", "nan", "1e-1", "0.9:0.9", " 0.9", "0.9\n", "\u0660.\u0669")
    ],
)
def test_unknown_resize_is_refused(resize):
    with pytest.raises(UserError, match=rf"^There is no resize {re.escape(resize)}; give stretch, pad:nearest or crop"):
        parse_resize(resize)


def chunk(kind, data, damage=0):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


BIG = zlib.compress(bytes(2_000_000))
TURN = Image.Exif()
TURN[0x0112] = 6
TURNED = TURN.tobytes()[6:]
ODD_CHUNKS = {
    "large text": chunk(b"zTXt", b"k\0\0" + BIG),
    "large international text": chunk(b"iTXt", b"k\0\1\0\0\0" + BIG),
    "large profile": chunk(b"iCCP", b"k\0\0" + BIG),
    "unknown compression": chunk(b"iCCP", b"k\0\7" + BIG),
    "no EXIF": chunk(b"eXIf", b"no EXIF at all"),
    "half an EXIF": chunk(b"eXIf", TURNED[:20]),
    "raw profile": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nno hex"),
    "wrong sum of text": chunk(b"tEXt", b"k\0text", damage=1),
    "wrong sum of transparency": chunk(b"tRNS", bytes(6), damage=1),
    "short transparency": chunk(b"tRNS", bytes(2)),
    "short resolution": chunk(b"pHYs", bytes(2)),
    "broken animation": chunk(b"acTL", bytes([0, 0, 0, 2, 0, 0, 0, 0])) + chunk(b"fcTL", bytes(3)),
}


@pytest.mark.parametrize("odd", ODD_CHUNKS.values(), ids=ODD_CHUNKS)
def test_png_with_metadata_that_cannot_be_read_is_read_without(odd, tmp_path):
    plain = encoded(noise((20, 30, 3)))
    for at in (33, plain.index(b"IEND") - 4):  # before the pixels and after them
        (tmp_path / "odd.png").write_bytes(plain[:at] + odd + plain[at:])
        assert (read(tmp_path / "odd.png", 16) == read(plain, 16)).all()
        assert inspect_image(str(tmp_path / "odd.png"))[1] == ""
    turned = plain[:33] + chunk(b"eXIf", TURNED) + ODD_CHUNKS["large text"] + plain[33:]  # what can be read is used
    assert (read(turned, 16) == read(plain[:33] + chunk(b"eXIf", TURNED) + plain[33:], 16)).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_png_keeps_its_transparency_where_other_metadata_cannot_be_read(mode):
    image = Image.new(mode, (8, 8), 1 if mode == "P" else "red" if mode == "RGB" else 9)
    plain = encoded(image, transparency={"RGB": (255, 0, 0), "L": 9, "P": bytes(2)}[mode])
    at = plain.index(b"tRNS") - 4
    odd = plain[:at] + ODD_CHUNKS["large text"] + plain[at:]
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(odd)).load()
    assert (read(odd, 8) == read(plain, 8)).all()
    assert (read(odd, 8) == (0 if mode == "P" else 255)).all()


ODD_SEGMENTS = [segment(0xE1, b"Exif\0\0no EXIF"), segment(0xE0, b"JFIF\0"), segment(0xEE, b"Adobe")]
ODD_SEGMENTS += [
    segment(0xE2, b"ICC_PROFILE\0"),
    segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    segment(0xE2, b"MPF\0II"),
]


@pytest.mark.parametrize("odd", ODD_SEGMENTS)
def test_jpeg_with_metadata_that_cannot_be_read_is_read_without(odd):
    plain, exif = encoded(noise((20, 30, 3)), "JPEG"), segment(0xE1, b"Exif\0\0" + TURNED)
    assert (read(plain[:2] + odd + plain[2:], 16) == read(plain, 16)).all()
    if b"Exif" not in odd:
        assert (read(plain[:2] + exif + odd + plain[2:], 16) == read(plain[:2] + exif + plain[2:], 16)).all()


@pytest.mark.filterwarnings("ignore")  # as Pillow's warning does not end a fit
@pytest.mark.parametrize(
    ("depth", "compression"), [*itertools.product(("u1", "f4"), (None, "tiff_lzw")), (">u2", None)]
)
def test_tiff_with_tags_that_cannot_be_read_is_read_without(depth, compression):
    image = noise((20, 30, 3)) if depth == "u1" else Image.fromarray(ramp(depth, 60000 if depth == ">u2" else 1))
    tags = {270: "a long description", 274: 1, 305: "a long name", 42113: "-9999", 700: b"<xmp>", 33432: "somebody"}
    plain = encoded(image, "TIFF", compression=compression, tiffinfo=tags)
    order = "big" if depth == ">u2" else "little"
    assert plain.startswith(b"MM" if order == "big" else b"II")
    table = int.from_bytes(plain[4:8], order)
    entries = range(table + 2, table + 2 + 12 * int.from_bytes(plain[table : table + 2], order), 12)
    text, ratio, large = (2).to_bytes(2, order), (5).to_bytes(2, order), (2**31 - 1).to_bytes(4, order)
    damaged = 0
    for at in entries:
        if int.from_bytes(plain[at : at + 2], order) in tags.keys() - {274}:
            for place, odd in ((2, text), (2, ratio), (4, large), (8, large)):
                content = plain[: at + place] + odd + plain[at + place + len(odd) :]
                assert (read(content, 16) == read(plain, 16)).all()
                damaged += 1
    assert damaged == 20
    with pytest.raises(ImageError):  # what the pixels need
        read(plain[: entries[0] + 2] + bytes(2) + plain[entries[0] + 4 :], 16)


def test_heif_is_read_by_pillows_plug_in_and_otherwise_the_extra_is_named(monkeypatch, tmp_path):
    image = noise((6, 9, 3)).resize((90, 60))
    pillow_heif.from_pillow(image).save(tmp_path / "phone.jpg", quality=95)
    monkeypatch.setattr(Image, "OPEN", {name: entry for name, entry in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIF.*pip install -e \.\[heif\]"):
        read(tmp_path / "phone.jpg", 16)

    monkeypatch.undo()
    assert np.abs(read(tmp_path / "phone.jpg", 64).astype(int) - read(encoded(image), 64)).mean() < 4
    assert is_image("IMG_0001.HEIC")


pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as images.py has it
PNG, JPEG = (encoded(noise((60, 60, 3)), fmt) for fmt in ("PNG", "JPEG"))
BAD = {  # content and reason of files that cannot be read
    "truncated.jpg": (JPEG[:900], "truncated"),
    "truncated.png": (PNG[:900], "truncated"),
    "nothing.jpg": (b"", "not an image"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "random.png": (np.random.default_rng(1).bytes(5000), "not an image"),
    "checksum.png": (PNG[:2000] + bytes([PNG[2000] ^ 255]) + PNG[2001:], ""),  # the checksum of its block is wrong
    "bomb.ppm": (b"P6 60000 60000 255\n", "more than the 89,478,485"),  # refused by its header: it has no pixels
    "large.ppm": (b"P6 10000 9000 255\n", "10000x9000 pixels, more than the 89,478,485"),
}


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_unusable_bytes_raise_one_error_with_path_and_reason(content, reason, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read(tmp_path / "bad.jpg", 32)
    again = pickle.loads(pickle.dumps(caught.value))  # on the way from a worker
    assert (again.path, str(again)) == (str(tmp_path / "bad.jpg"), f"{again.path}: {again.reason}")
    assert reason in again.reason
    assert "\n" not in again.reason


def test_untrusted_bytes_that_keep_a_decoder_busy_are_refused():
    progressive = encoded(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)
    require_short_decoding(progressive)
    last = progressive.rindex(b"\xff\xda")
    scan = progressive[last : last + 2 + int.from_bytes(progressive[last + 2 : last + 4], "big")]
    with pytest.raises(ImageError, match="scans, more than the 100 allowed"):
        require_short_decoding(progressive[:-2] + 200 * scan + progressive[-2:])
    with pytest.raises(ImageError, match="101 comments, more than the 100 allowed"):
        require_short_decoding(b"P2 1 1 255\n" + 101 * b"#\n" + b"7")
    require_short_decoding(b"P2 1 1 255\n" + 100 * b"#\n" + b"7")
    require_short_decoding(b"P6 7 7 255\n" + 147 * b"#")  # no text: these are its pixels


GOOD = {
    "grey": (Image.new("L", (30, 40), 90), "PNG"),
    "grey and alpha": (Image.new("LA", (30, 40), (90, 100)), "PNG"),
    "palette": (Image.new("P", (30, 40), 3), "GIF"),
    "rgba": (Image.new("RGBA", (30, 40), (9, 9, 9, 9)), "WEBP"),
    "cmyk": (Image.new("CMYK", (30, 40), (9, 90, 9, 9)), "JPEG"),
    "bilevel": (Image.new("1", (30, 40)), "PNG"),
    "16 bit": (Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
    "float": (Image.fromarray(np.random.default_rng(0).random((30, 40), dtype=np.float32)), "TIFF"),
    "one pixel": (Image.new("RGB", (1, 1)), "BMP"),
    "thin": (Image.new("RGB", (1, 3000)), "PPM"),
}


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_it_trains_each_verb_names_each_bad_file_once_with_its_reason_and_the_others_get_a_label(
    photos, workers, capfd
):
    odd_names = ("name with spaces.jpg", "ünïcødé 图.png", "-dash.png", "new\nline.png")
    bad = BAD | dict.fromkeys(odd_names, (b"x", "not an image"))
    for name, (content, _) in bad.items():
        (photos / "red" / name).write_bytes(content)
    for name, (image, fmt) in GOOD.items():
        image.save(photos / "blue" / f"{name}.{fmt.lower()}", fmt)
    (photos / "green" / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(photos / "green" / "pipe.png")
    (photos / "green" / ".hidden.jpg").write_bytes(b"x")
    (photos / ".ipynb_checkpoints").mkdir()
    reasons = {f"red/{name}": reason for name, (_, reason) in bad.items()}
    reasons |= {"green/dangling.jpg": "no such file or directory", "green/pipe.png": "not a regular file"}
    fit = ["fit", "--data.root", "photos", *SMALL, "--data.batch_size", "4", "--trainer.max_epochs", "2"]
    assert cli.main([*fit, "--data.workers", workers]) == 0
    assert cli.main(["test", "--data.workers", workers]) == 0
    out = capfd.readouterr().out
    for path, reason in reasons.items():
        _, *after = out.split(f"unreadable: photos/{path}: ")
        assert len(after) == 1, path
        assert reason in after[0].splitlines()[0]
    assert "blue" not in "".join(line for line in out.splitlines() if "unreadable" in line)
    (unreadable,) = [finding for finding in check_dataset(photos).findings if finding.kind == "unreadable"]
    assert {entry[0].split(": ")[0] for entry in unreadable.paths} == set(reasons)

    assert cli.main(["predict", "runs/photos/version_0", "photos", "--out", "labels.csv"]) == 0
    rows = {row.path.removeprefix("photos/"): row for row in predictions.read(Path("labels.csv"))}
    assert len(rows) == 120 + len(reasons) + len(GOOD)
    for path, row in rows.items():
        assert bool(row.error) == (path in reasons) == (not row.label)
        assert reasons.get(path, "") in row.error


def test_limit_of_open_files_is_no_fault_of_an_image(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    monkeypatch.setattr(Path, "open", refuse)
    for reader in (lambda path: read(path, 8), inspect_image):
        with pytest.raises(OSError, match="Too many open files"):
            reader(str(tmp_path / "good.png"))
