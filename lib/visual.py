"""Pictures of label maps, and side-by-side panels with captions and a legend."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.files import atomic_write

INK, PALE, PAPER = (30, 30, 30), (205, 205, 205), (255, 255, 255)


def colour_map(label: np.ndarray, palette: np.ndarray, ignore: int = 255) -> Image.Image:
    """A palette image of class indices.

    label: uint8 [H, W]; palette: uint8 [C, 3]. The pixels keep their values; `ignore` and values from C on are black.
    """
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(palette)] = palette
    colours[ignore] = 0
    image = Image.fromarray(np.ascontiguousarray(label, np.uint8))
    image.putpalette(colours.tobytes())
    return image


def overlay(image: Image.Image, label: np.ndarray, palette: np.ndarray, alpha: float = 0.5,
            ignore: int = 255) -> Image.Image:
    """The image with the classes' colours mixed in by `alpha` (0: image, 1: colours); ignored pixels stay.

    image: RGB, W x H; label: uint8 [H, W]; palette: uint8 [C, 3]. Raises ValueError where the sizes differ.
    """
    image = image.convert("RGB")
    if image.size != label.shape[::-1]:
        raise ValueError(f"image is {image.width}x{image.height}, label {label.shape[1]}x{label.shape[0]}")
    mixed = Image.blend(image, colour_map(label, palette, ignore).convert("RGB"), alpha)
    return Image.composite(mixed, image, Image.fromarray((label != ignore).astype(np.uint8) * 255))


def legend(names: Sequence[str], palette: np.ndarray, width: int, size: int = 12) -> Image.Image:
    """The classes' names beside their colours, in as many rows as `width` pixels need; size: of the font, in pixels."""
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
