"""Bytes to RGB uint8: the one way a picture is read and resized, for training, prediction and serving alike.

Only Pillow and NumPy, so that whoever consumes an exported model without torch gets the same pixels.
"""

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

Resize = Literal["stretch", "crop", "pad"]
Pixels = npt.NDArray[np.uint8]

_ENDINGS = "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
EXTENSIONS = frozenset(f".{ending}" for ending in _ENDINGS.split())
# Only these decoders see a file's bytes, whatever its name says: Pillow would hand PostScript to Ghostscript.
Image.init()
FORMATS = tuple({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN))
ORIENTATION = 0x0112  # EXIF's number for it
MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns; here it refuses

SCANS = (b"\xff\xda\x00", 100, "scans")  # libtiff's own limit for JPEGs inside TIFFs; a usual picture has ten
MOST = {"JPEG": SCANS, "MPO": SCANS, "PPM": (b"#", 100, "comments")}  # what begins one, how many there may be
PLAIN = (b"P1", b"P2", b"P3")  # beginnings of PPMs that are text
STRIP = 1_000_000  # pixels that are converted at once: in between, one takes 24 bytes or more

# Pillow warns between MAX_PIXELS and twice that; the check below judges the same header, and refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """A picture that cannot be used.

    Attributes:
        path: The file as it was given, or a name for bytes.
        reason: Why, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it pickles across worker processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read(source: str | os.PathLike[str] | bytes, size: int, resize: Resize = "stretch") -> Pixels:
    """Reads one picture as the network sees it.

    EXIF orientation is applied, transparency is laid on white, an animation gives its first frame, 16-bit and float
    greys are scaled to 8 bits (see `to_rgb`).

    Args:
        source: A path, or the encoded bytes of a picture.
        size: Side of the square result, in pixels.
        resize: `stretch` ignores the aspect ratio (the article's `Resize((224, 224))`), `crop` cuts out the centre
            square, `pad` keeps everything and adds black borders. All are Pillow's BILINEAR.

    Returns:
        (size, size, 3) uint8, RGB.

    Raises:
        ImageError: The file is missing, unreadable, truncated, not a picture, or larger than `MAX_PIXELS`.
    """
    with opened(source) as image:
        square = RESIZERS[resize]
        upright(image)
        if is_plain_grey(image):  # a third of the work, and the same pixels
            return np.array(square(image, size).convert("RGB"))
        return np.array(square(to_rgb(image), size))


@contextmanager
def opened(source: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """Opens a picture, not yet decoded, whose header is in order.

    Raises:
        ImageError: As `read`; whatever goes wrong until the block ends is the picture's fault.
    """
    name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(Path(source).stat().st_mode):  # a pipe would wait
            raise ImageError(name, "not a regular file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(name, f"{width}x{height} pixels, more than the {MAX_PIXELS:,} allowed")
            _require_short_work(name, image)
            yield image
    except ImageError:
        raise
    except Exception as error:  # hostile bytes make decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(name, _reason(error)) from error


def _require_short_work(name: str, image: Image.Image) -> None:
    """Refuses what is small but keeps a decoder busy: each scan of a JPEG goes over the whole picture again."""
    if (kind := MOST.get(image.format or "")) and isinstance(image, ImageFile.ImageFile):
        mark, most, what = kind
        stream: Any = image.fp
        place = stream.tell()
        stream.seek(0)
        content = stream.read() if image.format != "PPM" or stream.read(2) in PLAIN else b""
        stream.seek(place)
        if (found := content.count(mark)) > most:
            raise ImageError(name, f"{found:,} {what}, more than the {most} allowed")


def is_plain_grey(image: Image.Image) -> bool:
    """Whether a picture is 8-bit grey and nothing else."""
    return image.mode == "L" and "transparency" not in image.info


def upright(image: Image.Image) -> None:
    """Turns a picture as its EXIF orientation says."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB.

    Integer greys are scaled by their type, not by their content, so that brightness stays comparable between
    pictures: 16 bits by 1/257; 32-bit values and floats by the smallest of the usual ranges that holds them
    (0 to 1 for floats, 0 to 255, 0 to 65535), and by their own minimum and maximum where none does.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        low, high = _range(image)
        factor = 255.0 / max(high - low, 1e-12)
        return _in_strips(
            image, lambda strip: Image.fromarray(np.round((_values(strip) - low) * factor).astype(np.uint8))
        )
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    return image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    made = Image.new("RGB", image.size)
    for box in _strips(image):
        made.paste(convert(image.crop(box)).convert("RGB"), box)
    return made


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    width, height = image.size
    rows = max(1, STRIP // width)
    return ((0, top, width, min(top + rows, height)) for top in range(0, height, rows))


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _values(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _range(image: Image.Image) -> tuple[float, float]:
    """Values that become 0 and 255."""
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    low, high, is_whole = np.inf, -np.inf, True
    for box in _strips(image):
        values = _values(image.crop(box))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        is_whole = is_whole and not np.any(values % 1)
    limits = (255.0, 65535.0) if is_whole else (1.0, 255.0, 65535.0)
    if low >= 0 and high <= limits[-1]:
        return 0.0, next(limit for limit in limits if high <= limit)
    return low, high


def _stretch(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _crop(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def _pad(image: Image.Image, size: int) -> Image.Image:
    # not ImageOps.pad: it rounds the short side of a very long picture to 0 and fails
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new(image.mode, (size, size))
    square.paste(image.resize((width, height), Image.Resampling.BILINEAR), ((size - width) // 2, (size - height) // 2))
    return square


RESIZERS: dict[str, Callable[[Image.Image, int], Image.Image]] = {"stretch": _stretch, "crop": _crop, "pad": _pad}


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than the {MAX_PIXELS:,} pixels allowed"
    if isinstance(error, OSError) and error.strerror:  # the system's own: no such file, permission denied
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of an unknown format"
    return " ".join(str(error).split()) or type(error).__name__


def is_picture(name: str) -> bool:
    """Whether a file's name says that it is a picture."""
    return Path(name).suffix.lower() in EXTENSIONS


assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a truncated picture must raise, not turn grey"
