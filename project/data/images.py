"""Bytes to RGB uint8: the one way an image is read and resized, for training, prediction and serving alike.

Only Pillow and NumPy, so that whoever consumes an exported model without torch gets the same pixels.
"""

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

Resize = Literal["stretch", "crop", "pad"]
Pixels = npt.NDArray[np.uint8]

_ENDINGS = "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
EXTENSIONS = tuple(f".{ending}" for ending in _ENDINGS.split())
# Only these decoders see a file's bytes, whatever its name says: Pillow would hand PostScript to Ghostscript.
Image.init()
FORMATS = tuple({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN))
ORIENTATION = 0x0112  # EXIF tag
MAX_PIXELS = 89_478_485  # Pillow's limit, at which it only warns; here an image above it is refused
MAX_MARKERS = 100  # libtiff's limit of scans for JPEGs inside TIFFs; a usual progressive JPEG has ten

# Pillow warns between MAX_PIXELS and twice that; `opened` checks the same header and refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a truncated image must raise, not turn grey"


class ImageError(Exception):
    """An image that cannot be used.

    Attributes:
        path: The file as it was given, or a name for bytes.
        reason: Why, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it pickles across worker processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read(source: str | os.PathLike[str] | bytes, size: int, resize: Resize = "stretch") -> Pixels:
    """Reads one image as the network sees it.

    EXIF orientation is applied, transparency is laid on white, an animation gives its first frame, 16-bit and float
    greys are scaled to 8 bits (see `to_rgb`).

    Args:
        source: A path, or the encoded bytes of an image.
        size: Side of the square result, in pixels.
        resize: `stretch` ignores the aspect ratio (the article's `Resize((224, 224))`), `crop` cuts out the centre
            square, `pad` keeps everything and adds black borders. All are Pillow's BILINEAR.

    Returns:
        (size, size, 3) uint8, RGB.

    Raises:
        ImageError: The file is missing, unreadable, truncated, not an image, or larger than `MAX_PIXELS`.
    """
    with opened(source) as image:
        square = RESIZERS[resize]
        upright(image)
        if is_plain_grey(image):  # a third of the work, and the same pixels
            return np.array(square(image, size).convert("RGB"))
        return np.array(square(to_rgb(image), size))


@contextmanager
def opened(source: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """Opens an image, not yet decoded, whose header is in order.

    Raises:
        ImageError: As `read`; an exception inside the `with` block becomes one, too.
    """
    name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(Path(source).stat().st_mode):  # a pipe would block
            raise ImageError(name, "not a regular file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(name, f"{width}x{height} pixels, more than the {MAX_PIXELS:,} allowed")
            yield image
    except ImageError:
        raise
    except Exception as error:  # hostile bytes make decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(name, _reason(error)) from error


def require_short_decoding(content: bytes, name: str = "<bytes>") -> None:
    """Checks that a small file does not keep its decoder busy for minutes, as a stranger's upload may.

    Raises:
        ImageError: A JPEG has too many scans, each of which covers the whole image, or a text PPM too many comments.
    """
    scans = content.count(b"\xff\xda\x00") if content.startswith(b"\xff\xd8") else 0
    comments = content.count(b"#") if content.startswith((b"P1", b"P2", b"P3")) else 0
    for count, what in ((scans, "scans"), (comments, "comments")):
        if count > MAX_MARKERS:
            raise ImageError(name, f"{count:,} {what}, more than the {MAX_MARKERS} allowed")


def is_plain_grey(image: Image.Image) -> bool:
    """Whether an image is 8-bit grey without transparency."""
    return image.mode == "L" and "transparency" not in image.info


def upright(image: Image.Image) -> None:
    """Applies the EXIF orientation, in place."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB.

    Integer greys are scaled by their type, not by their content, so that brightness stays comparable between
    images: 16 bits by 1/257; 32-bit values and floats by the smallest of the usual ranges that holds them
    (0 to 1 for floats, 0 to 255, 0 to 65535), and by their own minimum and maximum where none does.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith(("I", "F")):
        return _scaled(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)  # changed in place: 8 bytes a pixel are enough
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else _range(values)
    values -= low
    values *= 255.0 / max(high - low, 1e-12)
    return Image.fromarray(np.round(values, out=values).astype(np.uint8))


def _range(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The values that become 0 and 255."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        return low, high
    if high <= 1 and not np.all((values == 0) | (values == 1)):
        return 0.0, 1.0
    return 0.0, 255.0 if high <= 255 else 65535.0


def _pad(image: Image.Image, size: int) -> Image.Image:
    # not ImageOps.pad: it rounds the short side of a very long image to 0 and fails
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new(image.mode, (size, size))
    square.paste(image.resize((width, height), Image.Resampling.BILINEAR), ((size - width) // 2, (size - height) // 2))
    return square


RESIZERS: dict[Resize, Callable[[Image.Image, int], Image.Image]] = {
    "stretch": lambda image, size: image.resize((size, size), Image.Resampling.BILINEAR),
    "crop": lambda image, size: ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR),
    "pad": _pad,
}


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than the {MAX_PIXELS:,} pixels allowed"
    if isinstance(error, OSError) and error.strerror:  # the system's own: no such file, permission denied
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    return " ".join(str(error).split()) or type(error).__name__


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return name.lower().endswith(EXTENSIONS)
