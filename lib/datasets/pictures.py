"""Pictures on disk: finding them, and decoding every kind of file that users have.

No torch here: scoring must start fast.
"""
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib.errors import UserError, itemized, listed, shorten
from lib.files import missing_files, read_lines

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 1 << 27  # of one file, such as 16384 x 8192; larger ones are refused before they are decompressed
ORIENTATION = 0x0112  # EXIF tag
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image has a limit of its own


def find_pictures(folder: str | Path, list_file: str | Path | None = None) -> list[Path]:
    """The pictures in a folder and its subfolders, sorted by path; hidden files and folders are left out.

    list_file: only the pictures named there, one a line relative to the folder, in that order.
    Raises UserError for a missing or unreadable folder, no picture, and listed files that do not exist.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{shorten(folder)}: no such folder; it should hold pictures")
    if list_file is not None:
        return listed_pictures(list_file, [folder])

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    found, visited = [], set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in visited]
        if real not in visited:  # a link may lead back to a folder above it
            found += [os.path.join(path, name) for name in names
                      if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        visited.add(real)
    if not found:
        raise UserError(f"{folder}: no picture in this folder or below it ({', '.join(SUFFIXES)})")
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


def listed_pictures(list_file: str | Path, folders: Sequence[Path]) -> list[Path]:
    """The files of a list, one a line, each relative to the first of ``folders`` that holds it. Raises UserError."""
    lines = read_lines(list_file)
    paths: list[Path | None] = [None] * len(lines)
    left = list(range(len(lines)))
    for folder in folders:
        candidates = [folder / lines[i] for i in left]
        missing = set(missing_files(candidates))
        for position, i in enumerate(left):
            if position not in missing:
                paths[i] = candidates[position]
        left = [i for position, i in enumerate(left) if position in missing]
    if left:
        places = " or ".join(dict.fromkeys(map(str, folders)))
        raise UserError(f"{list_file}: {len(left)} of {len(lines)} images do not exist below {places}: "
                        + listed([lines[i] for i in left]))
    return paths


def output_names(images: Sequence[Path]) -> list[str]:
    """Names without an ending for the files of each image: its own, or where those repeat its path below their folder.

    Raises UserError where two images differ in their endings only.
    """
    names = [path.stem for path in images]
    if len(set(names)) < len(names):
        root = os.path.commonpath([path.parent for path in images])
        names = [path.relative_to(root).with_suffix("").as_posix() for path in images]
    seen: dict[str, Path] = {}
    for name, path in zip(names, images, strict=True):
        if name in seen:
            raise UserError(f"{path} and {seen[name]} have the same name and would share one output file")
        seen[name] = path
    return names


def check_pictures(images: Sequence[Path], check_all: bool = False, sample: int = 50) -> None:
    """Raises a UserError that lists the files that cannot be decoded: among ``sample`` of them spread evenly over the
    list (about a second, for every start), or among all."""
    problems = []
    for index in spread(len(images), len(images) if check_all else sample):
        try:
            read_image(images[index])
        except UserError as error:
            problems.append(error)
    if problems:
        raise UserError(f"{len(problems)} of the pictures cannot be used:\n{itemized(problems)}")


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices below ``length``, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int)).tolist()


def read_image(path: str | Path) -> Image.Image:
    """An image file as a loaded RGB image of 8 bits, upright as its EXIF orientation says.

    Of 16-bit samples the high byte is taken, so that the whole range becomes 0..255. Transparent pixels show white, as
    in a viewer; an alpha channel that is 0 everywhere, which some simulators write, is ignored. Of several frames the
    first is taken. Raises UserError for a file that cannot be decoded, is larger than MAX_PIXELS, or holds samples
    without a fixed range (floats, 32-bit integers).
    """
    image = load(path, open_image(path))
    grey16 = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode == "F" or image.mode.startswith("I") and not grey16:
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise UserError(f"{path}: its samples are {kind}, whose range is unknown; save it with 8 or 16 bits")
    try:
        image = _upright(image)
        if grey16:
            image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).astype(np.uint8))
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = _on_white(image)
        return image.convert("RGB")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be converted to RGB from {image.mode}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # EXIF that is broken; the picture itself is not
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    lowest, highest = alpha.getextrema()
    if lowest == 255 or highest == 0:
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=alpha)
    return white


def open_image(path: str | Path) -> Image.Image:
    """An image file whose header is read, and nothing else yet. Raises UserError."""
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has more than {MAX_PIXELS >> 20} million pixels; is it the right file?") from None
    except Exception as error:  # broken files make Pillow raise many types
        raise UserError(f"{shorten(path)}: not an image that can be read: {shorten(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{path}: {image.width}x{image.height} are more than {MAX_PIXELS >> 20} million pixels; "
                        "is it the right file?")
    return image


def picture_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as read_image turns it, from its header. Raises UserError."""
    image = open_image(path)
    return image.size[::-1] if image.getexif().get(ORIENTATION, 1) >= 5 else image.size


def require_same_sizes(images: Sequence[Path], copies: Sequence[Path], advice: str) -> None:
    """Raises a UserError with ``advice`` that lists the copies that are not as large as their images."""
    wrong = [copy for image, copy in zip(images, copies, strict=True) if picture_size(image) != open_image(copy).size]
    if wrong:
        raise UserError(f"{len(wrong)} pictures have not the size of their originals: {listed(wrong)}. {advice}")


def load(path: str | Path, image: Image.Image) -> Image.Image:
    """The same image with its pixels decoded. Raises UserError."""
    try:
        image.load()
    except Exception as error:  # as in open_image
        raise UserError(f"{path}: the image is broken or truncated: {shorten(error)}") from None
    return image
