"""Pictures of label maps, side-by-side panels with captions and a legend, and curves from a run's log.jsonl."""
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.errors import UserError
from lib.files import atomic_write

INK, PALE, PAPER = (30, 30, 30), (205, 205, 205), (255, 255, 255)


def colour_map(label: np.ndarray, palette: np.ndarray, ignore: int = 255) -> Image.Image:
    """A palette image of train ids.

    label: uint8 [H, W]; palette: uint8 [C, 3]. The pixels keep their ids; `ignore` and ids from C on are black.
    """
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(palette)] = palette
    colours[ignore] = 0
    image = Image.fromarray(np.ascontiguousarray(label, np.uint8))
    image.putpalette(colours.tobytes())
    return image


def save_colour(label: np.ndarray, palette: np.ndarray, path: Path, ignore: int = 255) -> None:
    """Writes colour_map as PNG, at the compression level that costs least time."""
    colour_map(label, palette, ignore).save(path, compress_level=1)


def overlay(image: Image.Image, label: np.ndarray, palette: np.ndarray, alpha: float = 0.5,
            ignore: int = 255) -> Image.Image:
    """The image with the classes' colours mixed in by `alpha` (0: image, 1: colours); pixels to ignore stay.

    image: RGB, W x H; label: uint8 [H, W]; palette: uint8 [C, 3]. Raises ValueError where the sizes differ.
    """
    image = image.convert("RGB")
    if image.size != label.shape[::-1]:
        raise ValueError(f"image is {image.width}x{image.height}, label {label.shape[1]}x{label.shape[0]}")
    mixed = Image.blend(image, colour_map(label, palette, ignore).convert("RGB"), alpha)
    return Image.composite(mixed, image, Image.fromarray((label != ignore).astype(np.uint8) * 255))


def legend(names: Sequence[str], palette: np.ndarray, width: int, size: int = 12) -> Image.Image:
    """The classes' names beside their colours, in as many rows as `width` pixels need; size: letters, in pixels."""
    font = ImageFont.load_default(size)
    box, row = round(size * 1.1), round(size * 1.8)
    places, x, y = [], size // 2, size // 3
    for name in names:
        needed = 2 * size + round(font.getlength(name))
        if places and x + needed > width:
            x, y = size // 2, y + row
        places.append((x, y))
        x += needed + size // 2
    image = Image.new("RGB", (width, y + row), PAPER)
    draw = ImageDraw.Draw(image)
    for name, colour, (x, y) in zip(names, np.asarray(palette).tolist(), places, strict=True):
        draw.rectangle((x, y + 1, x + box, y + 1 + box), tuple(colour), PALE)
        draw.text((x + box + size // 3, y), name, INK, font)
    return image


def panel(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], width: int | None = None, size: int = 14,
          gap: int = 4, key: Image.Image | None = None) -> Image.Image:
    """Images side by side under their columns' captions.

    rows: one list of len(captions) images each, of any mode. width: of a column, in pixels (default: the first
    image's); heights follow from each row's first image. Palette images are enlarged without mixing colours. size:
    letters, in pixels; gap: pixels between images. key: what stands below, such as legend(...).
    """
    if not rows or any(len(row) != len(captions) for row in rows):
        raise ValueError(f"every row needs {len(captions)} images, one for each caption")
    width = width or rows[0][0].width
    heights = [round(row[0].height * width / row[0].width) for row in rows]
    font, head = ImageFont.load_default(size), round(size * 1.7)
    total = head + sum(heights) + gap * (len(rows) - 1) + (gap + key.height if key else 0)
    image = Image.new("RGB", (len(captions) * (width + gap) - gap, total), PAPER)
    draw = ImageDraw.Draw(image)
    for i, caption in enumerate(captions):
        draw.text((i * (width + gap) + width / 2, head / 2), caption, INK, font, anchor="mm")
    top = head
    for row, height in zip(rows, heights, strict=True):
        for i, cell in enumerate(row):
            if cell.mode == "P":
                cell = cell.resize((width, height), Image.Resampling.NEAREST).convert("RGB")
            else:
                cell = cell.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            image.paste(cell, (i * (width + gap), top))
        top += height + gap
    if key:
        image.paste(key, (0, top))
    return image


def draw_associations(pair: Sequence[Image.Image], grids: Sequence[tuple[int, int]], start: np.ndarray,
                      end: np.ndarray, colours: np.ndarray, wrong: np.ndarray, max_lines: int = 40,
                      gap: int = 4) -> Image.Image:
    """Two images side by side with lines from pixels of the first feature map to pixels of the second.

    grids: (height, width) of each feature map; start, end: int [N] places in the flattened maps; colours: uint8 [N, 3]
    of the lines; wrong: bool [N], lines that end in a cross. At most ``max_lines``, evenly spread, are drawn.
    """
    sheet = stack([pair], gap)
    offset = pair[0].width + gap
    draw = ImageDraw.Draw(sheet)

    def centre(place: int, image: Image.Image, grid: tuple[int, int]) -> tuple[float, float]:
        height, width = grid
        return (place % width + 0.5) * image.width / width, (place // width + 0.5) * image.height / height

    for k in np.unique(np.linspace(0, len(start) - 1, min(max_lines, len(start))).astype(int)).tolist():
        (x0, y0), (x1, y1) = centre(int(start[k]), pair[0], grids[0]), centre(int(end[k]), pair[1], grids[1])
        x1 += offset
        colour = tuple(colours[k].tolist())
        draw.line((x0, y0, x1, y1), colour, 1)
        if wrong[k]:
            draw.line((x1 - 3, y1 - 3, x1 + 3, y1 + 3), colour, 2)
            draw.line((x1 - 3, y1 + 3, x1 + 3, y1 - 3), colour, 2)
    return sheet


def stack(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Rows of images, each at its own size, on white with ``gap`` pixels between them."""
    widths = [sum(image.width + gap for image in row) - gap for row in rows]
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", (max(widths), sum(heights) + gap * (len(rows) - 1)), PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + gap
        top += height + gap
    return sheet


def save(image: Image.Image, path: Path, **options: object) -> None:
    """Write a picture whole or not at all. Raises UserError where it cannot be written."""
    with atomic_write(path) as new:
        image.save(new, **options)


def read_log(log_jsonl: Path) -> list[dict]:
    """The log's lines in order; a last line that a killed run left unfinished is dropped. Raises UserError."""
    try:
        lines = Path(log_jsonl).read_text().splitlines()
    except OSError as error:
        raise UserError(f"{log_jsonl}: cannot be read ({error.strerror}); name a run's log.jsonl") from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{log_jsonl}, line {number}: not JSON; remove the line") from None
    return entries


def curves(log_jsonl: Path, keys: Sequence[str], out: Path, width: int = 420, height: int = 240) -> None:
    """Draws each key of a log over the iterations, one plot of width x height pixels per key, and saves the figure.

    The log holds one JSON object per line with "iteration"; lines without a key are left out of its plot. A running
    mean is drawn over more than 100 values. Raises UserError where a key never occurs or the log cannot be read.
    """
    entries = read_log(log_jsonl)
    columns = min(2, len(keys))
    image = Image.new("RGB", (columns * width, -(-len(keys) // columns) * height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for i, key in enumerate(keys):
        points = np.array([(e["iteration"], e[key]) for e in entries if "iteration" in e and key in e], float)
        points = points[np.isfinite(points).all(1)] if len(points) else points
        if not len(points):
            held = sorted({k for e in entries for k in e})
            raise UserError(f"{log_jsonl}: no finite value of '{key}'; it holds {held}")
        left, top = i % columns * width + 52, i // columns * height + 30
        right, bottom = left + width - 72, top + height - 60
        (x0, y0), (x1, y1) = points.min(0), points.max(0)

        def place(xy: np.ndarray, x0=x0, y0=y0, x1=x1, y1=y1, box=(left, top, right, bottom)) -> list[tuple]:
            x = box[0] + (xy[:, 0] - x0) / max(x1 - x0, 1e-12) * (box[2] - box[0])
            y = box[3] - (xy[:, 1] - y0) / max(y1 - y0, 1e-12) * (box[3] - box[1])
            return [tuple(p) for p in np.stack([x, y], 1).tolist()]

        for share in (0, .5, 1):
            y = bottom - share * (bottom - top)
            x = left + share * (right - left)
            draw.line((left, y, right, y), PALE)
            draw.text((left - 6, y), f"{y0 + share * (y1 - y0):.4g}", INK, font, anchor="rm")
            draw.text((x, bottom + 6), f"{x0 + share * (x1 - x0):.0f}", INK, font, anchor="mt")
        draw.text(((left + right) / 2, top - 10), key, INK, font, anchor="mb")
        many = len(points) > 100
        colour = (44, 110, 180)
        if len(points) == 1:
            (x, y), = place(points)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        draw.line(place(points), (190, 210, 232) if many else colour, 1 if many else 2)
        if many:
            window = len(points) // 20
            mean = np.stack([np.convolve(points[:, k], np.ones(window) / window, "valid") for k in (0, 1)], 1)
            draw.line(place(mean), colour, 2)
    image.save(out)
