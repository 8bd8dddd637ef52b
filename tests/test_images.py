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
from project.data.images import ImageError, read


def encoded(image, fmt="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def ramp(dtype, high):
    return np.tile(np.linspace(0, high, 64).astype(dtype), (64, 1))


def test_grey_picture_has_three_equal_channels():
    pixels = read(encoded(Image.fromarray(ramp(np.uint8, 255))), 64)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == ramp(np.uint8, 255)[:, :, None]).all()


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_grey_picture_is_resized_as_if_it_were_rgb(resize):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131), dtype=np.uint8))
    assert (read(encoded(image), 64, resize) == read(encoded(image.convert("RGB")), 64, resize)).all()


def test_grey_picture_with_a_transparent_level_is_laid_on_white():
    image = Image.fromarray(np.zeros((20, 20), dtype=np.uint8))
    assert (read(encoded(image, transparency=0), 64) == 255).all()


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_ramp_stays_a_ramp(fmt):
    pixels = read(encoded(Image.fromarray(ramp(np.uint16, 65535)), fmt), 64)[0, :, 0].astype(int)
    assert (np.diff(pixels) > 0).all()
    assert (pixels[0], pixels[-1]) == (0, 255)


def test_16_bit_brightness_is_scaled_by_type_not_by_content():
    dark = read(encoded(Image.fromarray(ramp(np.uint16, 65535 // 2))), 64)
    assert 126 <= dark.max() <= 128


@pytest.mark.parametrize(
    ("dtype", "high"), [(np.float32, 1.0), (np.float32, 255.0), (np.int32, 65535), (np.int32, 10**6)]
)
def test_float_and_32_bit_ramps_stay_ramps(dtype, high):
    pixels = read(encoded(Image.fromarray(ramp(dtype, high)), "TIFF"), 64)[0, :, 0].astype(int)
    assert (np.diff(pixels) > 0).all()
    assert (pixels[0], pixels[-1]) == (0, 255)


def test_float_picture_with_nan_and_negative_values_is_read():
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


def test_cmyk_jpeg_becomes_rgb():
    pixels = read(encoded(Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK"), "JPEG"), 16)
    assert pixels[8, 8, 0] > 200
    assert pixels[8, 8, 1:].max() < 60


def test_bilevel_picture_becomes_black_and_white():
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
def test_very_long_picture_is_read_in_every_mode(resize):
    assert read(encoded(Image.new("RGB", (5000, 1), "red")), 32, resize).shape == (32, 32, 3)


def bomb(width, height):
    """A PNG whose header promises that many pixels, in a few bytes."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(99))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


BROKEN = {
    "empty": (b"", "not a picture"),
    "html": (b"<html><body>404</body></html>", "not a picture"),
    "truncated": (encoded(Image.effect_noise((200, 200), 90).convert("RGB"), "JPEG")[:3000], "truncated"),
    "truncated png": (encoded(Image.effect_noise((200, 200), 90), "PNG")[:3000], "truncated"),
    "bomb": (bomb(60000, 60000), "pixels"),
    "warned bomb": (bomb(10000, 10000), "pixels"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
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


def test_small_picture_that_keeps_its_decoder_busy_is_refused(tmp_path):
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "JPEG", progressive=True)
    whole = stream.getvalue()
    assert read(whole, 8, "stretch").shape == (8, 8, 3)
    last = whole.rindex(b"\xff\xda")
    head = whole[last : last + 2 + int.from_bytes(whole[last + 2 : last + 4], "big")]
    (tmp_path / "scans.jpg").write_bytes(whole[:-2] + 200 * head + whole[-2:])
    with pytest.raises(ImageError, match="scans, more than the 100 allowed"):
        read(tmp_path / "scans.jpg", 8, "stretch")
    with pytest.raises(ImageError, match="101 comments, more than the 100 allowed"):
        read(b"P2 1 1 255\n" + 101 * b"#\n" + b"7", 8, "stretch")
    assert read(b"P2 1 1 255\n" + 100 * b"#\n" + b"7", 8, "stretch").max() == 7
    assert read(b"P6 7 7 255\n" + 147 * b"#", 8, "stretch").max() == ord("#")  # no text: these are its pixels


@pytest.mark.parametrize("mode", ["F", "I", "I;16", "LA"])
def test_conversion_goes_strip_by_strip_and_gives_the_same(mode, monkeypatch):
    random = np.random.default_rng(1)
    kinds = {"F": np.float32, "I": np.int32, "I;16": np.uint16, "LA": np.uint8}
    values = random.integers(0, 200, (301, 203, 2) if mode == "LA" else (301, 203)).astype(kinds[mode])
    image = Image.fromarray(values * np.float32(1.3) if mode == "F" else values)
    assert image.mode == mode
    at_once = np.asarray(images.to_rgb(image.copy()))
    monkeypatch.setattr(images, "STRIP", 1000)
    tracemalloc.start()
    made = images.to_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (np.asarray(made) == at_once).all()
    assert peak < 100_000  # at once it would be 24 bytes for each of the 61,103 pixels


def test_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read(tmp_path / "x.png", 32)


def test_missing_file_says_so(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read(tmp_path / "none.png", 32)


def test_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "truncated", "a.jpg: truncated")


def test_only_known_endings_are_pictures():
    assert images.is_picture("A.JPG")
    assert images.is_picture("x.y.webp")
    assert not images.is_picture("notes.txt")
    assert not images.is_picture("jpg")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changes the user, which only root may")
def test_picture_without_permission_is_named(tmp_path):
    (tmp_path / "mine.png").write_bytes(encoded(Image.new("RGB", (9, 9))))
    (tmp_path / "mine.png").chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(ImageError, match="permission denied"):
            read(tmp_path / "mine.png", 8)
    finally:
        os.seteuid(0)
