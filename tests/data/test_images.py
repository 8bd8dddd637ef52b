import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from project.data.images import ImageError, read, require_short_decoding


def encoded(image, fmt="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def ramp(dtype, high):
    return np.tile(np.linspace(0, high, 64).astype(dtype), (64, 1))


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_grey_image_is_resized_as_if_it_were_rgb_and_a_very_long_one_is_read(resize):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131), dtype=np.uint8))
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
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    assert (read(encoded(noise), 24) == np.asarray(noise.resize((24, 24), Image.Resampling.BILINEAR))).all()
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    crop, pad = read(encoded(image), 30, "crop"), read(encoded(image), 30, "pad")
    assert (crop[15, 2:-2] == (0, 0, 255)).all()
    assert (pad[:9] == 0).all()
    assert (pad[15, [2, 15]] == [(255, 0, 0), (0, 0, 255)]).all()


def bomb(width, height):
    """A PNG whose header promises that many pixels, in a few bytes."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(99))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def bad_files():
    """Content and reason of files that cannot be read, by name."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    damaged = bytearray(encoded(noise))
    damaged[2000] ^= 255  # the checksum of its block is wrong now
    return {
        "truncated.jpg": (encoded(noise, "JPEG")[:900], "truncated"),
        "truncated.png": (encoded(noise)[:900], "truncated"),
        "nothing.jpg": (b"", "not an image"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not an image"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "random.png": (np.random.default_rng(1).bytes(5000), "not an image"),
        "checksum.png": (bytes(damaged), ""),
        "bomb.png": (bomb(60000, 60000), "more than the 89,478,485"),
        "large.png": (bomb(10000, 9000), "more than the 89,478,485"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_unusable_bytes_raise_one_error_with_path_and_reason(name, tmp_path):
    content, reason = bad_files()[name]
    file = tmp_path / "bad.jpg"
    file.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read(file, 32)
    again = pickle.loads(pickle.dumps(caught.value))  # on the way from a worker
    assert (again.path, str(again)) == (str(file), f"{file}: {again.reason}")
    assert reason in again.reason
    assert "\n" not in again.reason


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


def test_pipe_is_refused_instead_of_waited_for_and_a_missing_file_named(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for name, reason in (("x.png", "not a regular file"), ("none.png", "no such file")):
        with pytest.raises(ImageError, match=reason):
            read(tmp_path / name, 32)
