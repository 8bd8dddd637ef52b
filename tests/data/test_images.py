"""images.py, and a folder with everything that goes wrong in real ones."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project import cli
from project.data.check import check_dataset
from project.data.images import ImageError, read, require_short_decoding
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


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_grey_image_is_resized_as_if_it_were_rgb_and_a_very_long_one_is_read(resize):
    image = noise((90, 131))
    pixels = read(encoded(image), 64, resize)
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    assert (pixels == read(encoded(image.convert("RGB")), 64, resize)).all()
    assert read(encoded(Image.new("RGB", (5000, 1), "red")), 32, resize).shape == (32, 32, 3)


@pytest.mark.parametrize(("kind", "high"), [("u2", 65535), ("f4", 1), ("f4", 255), ("i4", 65535), ("i4", 10**6)])
def test_deep_ramp_stays_a_ramp(kind, high):
    for fmt in ("PNG", "TIFF") if kind == "u2" else ("TIFF",):
        pixels = read(encoded(Image.fromarray(ramp(kind, high)), fmt), 64)[0, :, 0].astype(int)
        assert (np.diff(pixels) > 0).all()
        assert (pixels[0], pixels[-1]) == (0, 255)


def test_16_bits_are_scaled_by_type_not_by_content_and_floats_with_nan_and_negative_values_are_read():
    assert 126 <= read(encoded(Image.fromarray(ramp(np.uint16, 65535 // 2))), 64).max() <= 128
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
