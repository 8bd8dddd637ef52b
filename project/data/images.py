"""Bytes to RGB uint8: the one way an image is read and resized, for training, prediction and serving alike.

Only Pillow and NumPy, so that whoever consumes an exported model without torch gets the same pixels.
"""

import errno
import importlib
import io
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from project.data import shards
from project.errors import FailedRun, UserError

# stretch, pad:bicubic, crop:bicubic:0.875: the way, the interpolation and, of a crop, the share of the short side
RESIZE = re.compile(r"(?:stretch|pad|(crop))(?::(nearest|bilinear|bicubic|lanczos)(?(1)(?::(0?\.0?[1-9][0-9]*|1))?))?")
Pixels = npt.NDArray[np.uint8]

_ENDINGS = "avif bmp gif heic heif hif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
_UNREAD = "3fr arw cr2 cr3 crw dcm dng exr fits iiq jxl kdc nef nrw orf pef psd raf raw rw2 sr2 srw tga x3f"
EXTENSIONS, UNREAD_EXTENSIONS = (tuple(f".{ending}" for ending in text.split()) for text in (_ENDINGS, _UNREAD))
# Only these decoders see a file's bytes, whatever its name says: Pillow would hand PostScript to Ghostscript.
Image.init()
FORMATS = tuple({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN))
PNG, JPEG, TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", (b"II*\0", b"MM\0*")  # first bytes
HEIF = tuple(b"ftyp" + brand for brand in b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split())  # bytes 4 to 12
# TIFF tags, of EXIF, too; the last is GDAL's
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT, NO_DATA = 258, 262, 274, 339, 42113
PIXEL_TAGS = {*range(256, 267), 273, ORIENTATION, *range(277, 280), 284, 292, 293, 317, *range(320, 326)}
PIXEL_TAGS |= {338, 339, 347, *range(512, 533)}
MAX_PIXELS = 89_478_485  # Pillow's limit, at which it only warns; here an image above it is refused
MAX_MARKERS = 100  # libtiff's limit of scans for JPEGs inside TIFFs; a usual progressive JPEG has ten

# Pillow warns between MAX_PIXELS and twice that; `opened` checks the same header and refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # about metadata, without the file's name
assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a truncated image must raise, not turn grey"


class ImageError(Exception):
    """An image that cannot be used: `path`, as it was given, or a name for bytes; `reason`, in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it pickles across worker processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read(source: str | os.PathLike[str] | bytes, size: int, resize: str = "stretch") -> Pixels:
    """Reads one image as the network sees it.

    EXIF orientation is applied, transparency is laid on white, an animation gives its first frame, 16-bit and float
    greys are scaled to 8 bits (see `to_8_bits`). Metadata that cannot be read counts as absent.

    Args:
        source: A path, or the encoded bytes of an image.
        size: Side of the square result, in pixels.
        resize: `stretch` ignores the aspect ratio (the article's `Resize((224, 224))`), `crop` cuts out the centre
            square, `pad` keeps everything and adds black borders. By BILINEAR unless another follows; see `RESIZE`.

    Returns:
        (size, size, 3) uint8, RGB; ImageError where the file is missing, unreadable, truncated, not an image, or larger
        than `MAX_PIXELS`.
    """
    with opened(source) as image:
        upright(image)
        return np.array(_square(to_8_bits(image), size, resize).convert("RGB"))


@contextmanager
def opened(source: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """Opens an image whose header is in order; it may not be decoded yet.

    ImageError as by `read`; an exception inside the `with` block becomes one, too, unless too many files are open.
    """
    name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
    try:
        if not isinstance(source, bytes) and not Path(source).is_file():
            if Path(source).exists():  # a pipe would block
                raise ImageError(name, "not a regular file")
            source = shards.read(name)
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as stream:
            try:
                image = _open(stream, name)
            except Exception as error:  # perhaps from metadata that browsers pass over
                stream.seek(0)
                if isinstance(error, ImageError) or not (head := stream.read(8)).startswith((PNG, JPEG, *TIFF)):
                    raise
                image = _open(io.BytesIO(without_metadata(head + stream.read())), name)
            yield image
    except Exception as error:  # hostile bytes make decoders raise anything: OSError, SyntaxError, struct.error, ...
        if isinstance(error, (ImageError, FailedRun)) or getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE):
            raise  # but for the first no fault of the image: storage out of reach, too many open files
        raise ImageError(name, _reason(error)) from error


def _open(stream: IO[bytes], name: str) -> Image.Image:
    is_heif = (head := stream.read(12))[4:] in HEIF
    if is_heif and "HEIF" not in Image.OPEN:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            raise ImageError(name, "a HEIF image, which needs the extra heif: pip install -e .[heif]") from error
    image = Image.open(stream, formats=("HEIF",) if is_heif else FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(name, f"{width}x{height} pixels, more than the {MAX_PIXELS:,} allowed")
    if image.format == "PNG":
        image.load()  # with the metadata behind the pixels
    if isinstance(image, TiffImageFile):
        image.getexif()
        first = int.from_bytes(head[4:8], "little" if head.startswith(b"I") else "big")
        if image.tag_v2.next == first:  # Pillow leaves out all tags after a damaged one, with a warning
            raise OSError("a TIFF with a damaged tag")
    return image


def without_metadata(content: bytes) -> bytes:
    """A PNG, JPEG or TIFF without what its pixels do not need, but with orientation and transparency."""
    if content.startswith(TIFF):
        order: Literal["little", "big"] = "little" if content.startswith(b"I") else "big"
        start = 2 + int.from_bytes(content[4:8], order)
        end = start + 12 * int.from_bytes(content[start - 2 : start], order)
        tags = (content[at : at + 12] for at in range(start, end, 12))
        kept = [tag for tag in tags if int.from_bytes(tag[:2], order) in PIXEL_TAGS]
        table = len(kept).to_bytes(2, order) + b"".join(kept)
        return content[: start - 2] + table.ljust(end - start + 6, b"\0") + content[end + 4 :]  # and no other image
    kept, at = [content[: 8 if content.startswith(PNG) else 2]], 8 if content.startswith(PNG) else 2
    while content.startswith(PNG) and (part := content[at : at + 12 + int.from_bytes(content[at : at + 4])]):
        kind, data, at = part[4:8], part[8:-4], at + len(part)
        fits = kind == b"eXIf" or (kind == b"tRNS" and len(data) == {0: 2, 2: 6}.get(content[25], len(data)))
        if kind[:1].isupper() or (fits and zlib.crc32(kind + data) == int.from_bytes(part[-4:])):
            kept.append(part)
    while content.startswith(JPEG) and b"\xff\xc0" <= (marker := content[at : at + 2]) != b"\xff\xda":
        part = content[at : at + 2 + int.from_bytes(content[at + 2 : at + 4])]
        at += len(part)
        says_colors = len(part) > 15 and part[4:8] in (b"Adob", b"JFIF")
        if marker < b"\xff\xe0" or says_colors or part[4:10] == b"Exif\0\0":
            kept.append(part)
    return b"".join([*kept, content[at:]])


def require_short_decoding(content: bytes, name: str = "<bytes>") -> None:
    """ImageError for what may decode for minutes: a JPEG of many scans, each of the whole image, a PPM of comments."""
    scans = content.count(b"\xff\xda\x00") if content.startswith(b"\xff\xd8") else 0
    comments = content.count(b"#") if content.startswith((b"P1", b"P2", b"P3")) else 0
    for count, what in ((scans, "scans"), (comments, "comments")):
        if count > MAX_MARKERS:
            raise ImageError(name, f"{count:,} {what}, more than the {MAX_MARKERS} allowed")


def upright(image: Image.Image) -> None:
    """Decodes an image and applies its EXIF orientation, in place."""
    image.load()
    with suppress(Exception):  # damaged metadata raises anything
        ImageOps.exif_transpose(image, in_place=True)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB, but for 8-bit grey, which is a third of the work to resize.

    Integer greys are scaled by their type, not by their content, so that brightness stays comparable between
    images: 16 bits by 1/257; 32-bit values and floats by the smallest of the usual ranges that holds them
    (0 to 1 for floats, 0 to 255, 0 to 65535), and by their own minimum and maximum where none does. No-data values
    such as -9999 do not count for that. An alpha channel that is 0 everywhere says nothing: the colours are used.
    """
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if image.mode.startswith(("I", "F")):
        return _scaled(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        is_color = isinstance(image.info.get("transparency"), int | tuple)  # which is all there is, where alpha is 0
        if (alpha := rgba.getchannel("A").getextrema()) != (255, 255) and (is_color or alpha != (0, 0)):
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = rgba
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)  # changed in place: 8 bytes a pixel are enough
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags and tags.get(SAMPLE_FORMAT, (1,)) == (1,):  # unsigned, which Pillow reads as signed
        values %= 2.0**32
    low, high = 0.0, 4095.0 if tags.get(BITS) == (12,) else 65535.0
    if not image.mode.startswith("I;16"):
        with suppress(ValueError):
            values[values == float(str(tags.get(NO_DATA, "nan")))] = np.nan
        low, high = _range(values)
        image.info["has_no_data"] = not np.all((values >= low) & (values <= high))  # for `check`
    if tags.get(PHOTOMETRIC) == 0:  # WhiteIsZero, which Pillow obeys up to 8 bits
        low, high = high, low
    values -= low
    values *= 255.0 / ((high - low) or 1.0)
    np.clip(np.nan_to_num(values, copy=False), 0, 255, out=values)
    return Image.fromarray(np.round(values, out=values).astype(np.uint8))


def _range(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The values that become 0 and 255: of the usual ranges the smallest that holds all, or else the outermost ones.

    An outermost value is no-data if it is negative, above 65535, or above 255 among fractions, and further from the
    next one than all others are from each other.
    """
    kept = values[np.isfinite(values)]
    low, high = (float(kept.min()), float(kept.max())) if len(kept) else (0.0, 0.0)
    highest = 255 if high > 255 and np.any(kept % 1) else 65535
    while low < 0 or high > highest:
        above, below = kept[kept > low], kept[kept < high]
        if low < 0 and len(above) and above.min() - low > (high - above.min() or 255):
            kept, low = above, float(above.min())
        elif high > highest and len(below) and high - below.max() > (below.max() - low or 255):
            kept, high = below, float(below.max())
        else:
            break
    if low < 0 or high > 65535:
        return low, high
    if high <= 1 and np.any(kept % 1):
        return 0.0, 1.0
    return 0.0, 255.0 if high <= 255 else 65535.0


def parse_resize(resize: str) -> tuple[str, Image.Resampling, float]:
    """The way, the interpolation and the share of the short side; UserError for what does not match `RESIZE`."""
    if (found := RESIZE.fullmatch(resize)) is None:
        raise UserError(
            f"There is no resize {resize}; give stretch, pad:nearest or crop:bicubic:0.875, say; docs/data.md has all."
        )
    return resize.partition(":")[0], Image.Resampling[(found[2] or "bilinear").upper()], float(found[3] or 1)


def _square(image: Image.Image, size: int, resize: str) -> Image.Image:
    way, resampling, share = parse_resize(resize)
    if way == "stretch":
        return image.resize((size, size), resampling)
    if way == "crop":  # in one step, of the pixels that are kept alone
        return ImageOps.fit(image, (size, size), resampling, bleed=(1 - share) / 2)
    # not ImageOps.pad: it rounds the short side of a very long image to 0 and fails
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new(image.mode, (size, size))
    square.paste(image.resize((width, height), resampling), ((size - width) // 2, (size - height) // 2))
    return square


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
