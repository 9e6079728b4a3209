"""Label files: decoding, and the maps between label values and classes.

No torch here: scoring must start fast.
"""
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lib.datasets.description import Description, names_in, show_value
from lib.datasets.pictures import load, open_image
from lib.errors import UserError, listed


def label_table(d: Description, classes: Sequence[str], task: Description | None = None) -> np.ndarray:
    """int16 [256]: label value (with "rgb": colour index) -> index in `classes`.

    Void values and classes outside `classes` become `d.ignore`, values that the description does not know -1. Where a
    `task` is given, `classes` are names of that data set, and the classes of `d` are renamed as `task.maps` says.
    """
    table = np.full(256, -1, np.int16)
    values = d.values()
    index = {int(v): (n if d.encoding == "rgb" else int(v)) for n, v in enumerate(values)}
    table[[index[v] for v in d.void]] = d.ignore
    for name, ids in zip(names_in(task or d, d), d.ids, strict=True):
        table[[index[v] for v in ids]] = classes.index(name) if name in classes else d.ignore
    return table


def written_values(d: Description) -> tuple[list[int], int]:
    """(the 8-bit value of each class in new label files of a data set, the value of unlabelled pixels).

    These are the data set's own ids, so that its own description reads the files. Unlabelled pixels are 0 or, where 0
    is the id of a class, the lowest void id. A data set whose labels are colours gets class indices and 255.
    """
    if d.encoding == "rgb":
        return list(range(len(d.classes))), 255
    taken = {i for ids in d.ids for i in ids}
    return [ids[0] for ids in d.ids], next(v for v in (0, *sorted(d.void), 255, *range(256)) if v not in taken)


def derived_description(d: Description, root: Path, labels: Path, list_: str, set_: str) -> dict:
    """The JSON entries of ``d`` with new labels in place of its own: ``written_values`` in labels/IMAGE.png.

    IMAGE is the path of the image below ``root``. list_: the path of the list of images, which may hold {set}; set_:
    the name of the set.
    """
    (ids, unlabelled), indexed = written_values(d), d.encoding == "rgb"
    return {"name": d.name, "root": str(root.resolve()), "images": d.images,
            "labels": f"{labels.resolve()}/{PurePosixPath(d.images).with_suffix('.png')}", "list": list_,
            "sets": {"train": set_, "val": set_}, "size": list(d.size), "encoding": "ids", "ignore": d.ignore,
            "void": sorted({unlabelled} if indexed else d.void | {unlabelled}),
            "classes": [{"name": name, "color": colour, "ids": [value] if indexed else list(values)}
                        for name, colour, value, values in zip(d.classes, d.palette.tolist(), ids, d.ids, strict=True)],
            "subsets": {name: list(names) for name, names in d.subsets.items()},
            "maps": {name: dict(mapping) for name, mapping in d.maps.items()}}


def read_label(path: str | Path, d: Description, table: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: one label file as class indices, through a table of `label_table`.

    Raises UserError for a file that cannot be decoded, colours where values are expected (or the reverse), and for
    label values that the description does not know.
    """
    values = label_values(path, d)
    # an 8-bit value that stands for "unknown"; all 256 are taken only where no value is unknown
    spare = min(set(range(257)) - set(table.tolist()))
    table = np.where(table < 0, spare, table).astype(np.uint8)
    label = np.frombuffer(bytearray(values).translate(table), np.uint8).reshape(values.shape)  # 3x faster than indexing
    if (label == spare).any():
        raise UserError(f"{path}: unknown label values {listed(np.unique(values[label == spare]))}; "
                        f"'{d.name}' does not list them")
    return label


def label_values(path: str | Path, d: Description) -> np.ndarray:
    """uint8 [H, W]: the values in a label file (with "rgb": colour indices). Raises UserError."""
    if d.encoding == "rgb":
        return _colour_indices(path, open_image(path), d)
    return _values_of_16_bits(path, d) if d.encoding == "uint16" else read_indices(path)


def read_indices(path: str | Path) -> np.ndarray:
    """uint8 [H, W]: the values of an 8-bit label or prediction file; palette indices, not colours. Raises UserError."""
    return _indices(path, open_image(path))


def _indices(path, image: Image.Image) -> np.ndarray:
    if image.mode not in ("L", "P"):
        raise UserError(f"{path}: one 8-bit class value a pixel is expected, but this file is {image.mode}; "
                        "does it hold colours, or is it a wrong file?")
    return np.asarray(load(path, image))


def _values_of_16_bits(path, d: Description) -> np.ndarray:
    image = open_image(path)
    if not image.mode.startswith("I") and not (image.tile and image.tile[0][3] == "RGB;16B"):
        return _indices(path, image)  # conversions of SYNTHIA to 8 bit
    if image.mode != "RGB":
        values = np.asarray(load(path, image))
        high = values > 255
    else:
        # Pillow keeps the high byte of each 16-bit sample; reading the samples as little-endian keeps the low byte
        low = open_image(path)
        low.tile = [(*low.tile[0][:3], "RGB;16L")]
        values = np.asarray(load(path, low).getchannel(0))
        high = np.asarray(load(path, image).getchannel(0)) > 0
    if high.any():
        raise UserError(f"{path}: label values above 255; '{d.name}' does not list them")
    return values.astype(np.uint8)


def _colour_indices(path, image: Image.Image, d: Description) -> np.ndarray:
    if image.mode not in ("RGB", "RGBA", "P"):
        raise UserError(f"{path}: a label of '{d.name}' holds colours, this file is {image.mode}")
    rgb = np.asarray(load(path, image).convert("RGB")).astype(np.int32)
    packed = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    known = d.values()
    index = np.searchsorted(known, packed).clip(max=len(known) - 1)
    wrong = known[index] != packed
    if wrong.any():
        colours = [show_value(int(v), "rgb") for v in np.unique(packed[wrong])]
        raise UserError(f"{path}: unknown label colours {listed(colours)}; '{d.name}' does not list them")
    return index.astype(np.uint8)


