import io
import os
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from project.data import images
from project.data.images import ImageError, read, require_short_decoding


def encoded(image, fmt="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def ramp(dtype, high):
    return np.tile(np.linspace(0, high, 64).astype(dtype), (64, 1))


def test_grey_image_has_three_equal_channels():
    pixels = read(encoded(Image.fromarray(ramp(np.uint8, 255))), 64)
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    assert (pixels == ramp(np.uint8, 255)[:, :, None]).all()


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_grey_image_is_resized_as_if_it_were_rgb(resize):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131), dtype=np.uint8))
    assert (read(encoded(image), 64, resize) == read(encoded(image.convert("RGB")), 64, resize)).all()


@pytest.mark.parametrize(
    ("dtype", "high", "fmt"),
    [
        (np.uint16, 65535, "PNG"),
        (np.uint16, 65535, "TIFF"),
        (np.float32, 1.0, "TIFF"),
        (np.float32, 255.0, "TIFF"),
        (np.int32, 65535, "TIFF"),
        (np.int32, 10**6, "TIFF"),
    ],
)
def test_deep_ramp_stays_a_ramp(dtype, high, fmt):
    pixels = read(encoded(Image.fromarray(ramp(dtype, high)), fmt), 64)[0, :, 0].astype(int)
    assert (np.diff(pixels) > 0).all()
    assert (pixels[0], pixels[-1]) == (0, 255)


def test_16_bit_brightness_is_scaled_by_type_not_by_content():
    assert 126 <= read(encoded(Image.fromarray(ramp(np.uint16, 65535 // 2))), 64).max() <= 128


def test_float_image_with_nan_and_negative_values_is_read():
    values = ramp(np.float32, 2.0) - 1
    values[0, 0] = np.nan
    pixels = read(encoded(Image.fromarray(values), "TIFF"), 64)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_laid_on_white(mode):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([255, 0, 0, 9, 9, 9])
        palette.paste(0, (0, 0, 4, 8))
        data = encoded(palette, "PNG", transparency=1)
    else:
        data = encoded(image.convert(mode))
    pixels = read(data, 8)
    assert (pixels[:, 6:] == 255).all()
    assert not (pixels[:, :2] == 255).all()
    assert (read(encoded(Image.new("L", (20, 20)), transparency=0), 64) == 255).all()


def test_cmyk_jpeg_becomes_rgb():
    pixels = read(encoded(Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK"), "JPEG"), 16)
    assert pixels[8, 8, 0] > 200
    assert pixels[8, 8, 1:].max() < 60


def test_bilevel_image_becomes_black_and_white():
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


def test_stretch_is_pillows_bilinear_resize():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR))
    assert (read(encoded(image), 24) == expected).all()


def test_crop_keeps_the_centre_and_pad_keeps_everything():
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    crop, pad = read(encoded(image), 30, "crop"), read(encoded(image), 30, "pad")
    assert (crop[15, 2:-2] == (0, 0, 255)).all()
    assert (pad[:9] == 0).all()
    assert (pad[15, 2] == (255, 0, 0)).all()
    assert (pad[15, 15] == (0, 0, 255)).all()


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_very_long_image_is_read_in_every_mode(resize):
    assert read(encoded(Image.new("RGB", (5000, 1), "red")), 32, resize).shape == (32, 32, 3)


def bomb(width, height):
    """A PNG whose header promises that many pixels, in a few bytes."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(99))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


BROKEN = {
    "empty": (b"", "not an image"),
    "html": (b"<html><body>404</body></html>", "not an image"),
    "truncated": (encoded(Image.effect_noise((200, 200), 90).convert("RGB"), "JPEG")[:3000], "truncated"),
    "truncated png": (encoded(Image.effect_noise((200, 200), 90), "PNG")[:3000], "truncated"),
    "bomb": (bomb(60000, 60000), "pixels"),
    "warned bomb": (bomb(10000, 10000), "pixels"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_unusable_bytes_raise_one_error_with_path_and_reason(kind, tmp_path):
    data, reason = BROKEN[kind]
    file = tmp_path / "bad.jpg"
    file.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        read(file, 32)
    assert caught.value.path == str(file)
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


def test_bomb_is_refused_by_its_header_without_decoding(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="pixels"):
        read(bomb(9500, 9500), 32)


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


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint16])
def test_deep_image_is_scaled_in_at_most_16_bytes_a_pixel(dtype):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 200, (301, 203)).astype(dtype))
    tracemalloc.start()
    images.to_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 301 * 203


def test_pipe_is_refused_instead_of_waited_for_and_a_missing_file_named(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for name, reason in (("x.png", "not a regular file"), ("none.png", "no such file")):
        with pytest.raises(ImageError, match=reason):
            read(tmp_path / name, 32)


def test_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "truncated", "a.jpg: truncated")


def test_only_known_endings_are_images():
    names = ("A.JPG", "x.y.webp", "notes.txt", "jpg")
    assert [images.is_image(name) for name in names] == [True, True, False, False]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changes the user, which only root may")
def test_image_without_permission_is_named(tmp_path):
    (tmp_path / "mine.png").write_bytes(encoded(Image.new("RGB", (9, 9))))
    (tmp_path / "mine.png").chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(ImageError, match="permission denied"):
            read(tmp_path / "mine.png", 8)
    finally:
        os.seteuid(0)
