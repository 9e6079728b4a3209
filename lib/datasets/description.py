"""A data set is one JSON file: where its images and labels lie, and what the label values mean.

The file serves training, evaluation and scoring; the shipped ones lie beside this module. Its keys:

    name, root      the set's name and its default folder
    images, labels  patterns below the root, such as "leftImg8bit/{set}/{city}/{stem}_leftImg8bit.png". {set} is the
                    set's name; every other {placeholder} is found on disk for an image and filled in for its label.
                    "labels": null for images only
    list            null, or "lists/{set}.txt": the images of a set, one a line, used when that file exists
    sets            {"train": .., "val": .., "source": ..}: the set taken by default to train on, to score on, and to
                    train on as the labelled source (default: that of "train")
    size            [width, height] to work at
    encoding        "ids": 8-bit values or palette indices; "uint16": first channel of a 16-bit PNG (SYNTHIA);
                    "rgb": colours
    classes         [{"name": "road", "color": [128, 64, 128], "ids": [7]}, ..], ids being label values; with "rgb",
                    instead of ids, "colors": [[r, g, b], ..] may list the label colours of a class (default: its color)
    void, ignore    further label values (or colours) that may occur and train as `ignore` (default 255)
    subsets         {"16": [names]}: named subsets of the classes
    sizes_may_differ  true: an image and its label may differ in size (some of GTA5's do); both are resized anyway
    maps            {"camvid": {"tree": "building or vegetation", "pole": null}}: the classes of another set as classes
                    of this one; null = ignore. A class that is not listed keeps its name

No torch here: scoring must start fast.
"""
import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lib.errors import UserError

SHIPPED = Path(__file__).parent
ENCODINGS = ("ids", "uint16", "rgb")
REQUIRED = ("name", "root", "images", "labels", "sets", "size", "encoding", "classes")
OPTIONAL = ("list", "ignore", "void", "subsets", "maps", "sizes_may_differ")
LISTED = 8  # file names in a message


@dataclass(frozen=True, eq=False)
class Description:
    """One data set. Label values are file values 0..255, or 0xRRGGBB for the encoding "rgb"."""

    name: str
    root: str
    classes: tuple[str, ...]
    palette: np.ndarray  # uint8 [C, 3]
    ignore: int
    ids: tuple[tuple[int, ...], ...]  # label values of each class; ids[c][0] is the one to write
    void: frozenset[int]
    encoding: str
    images: str
    labels: str | None
    list: str | None
    sets: Mapping[str, str]
    size: tuple[int, int]  # (width, height)
    subsets: Mapping[str, tuple[str, ...]]
    maps: Mapping[str, Mapping[str, str | None]]
    sizes_may_differ: bool

    def values(self) -> np.ndarray:
        """int64 [K], sorted: every known label value; with "rgb", the position is the colour index of `label_table`."""
        return np.array(sorted({*self.void, *(i for ids in self.ids for i in ids)}))


def load_description(name_or_path: str | Path) -> Description:
    """The description of a shipped data set ("cityscapes") or of a JSON file.

    Raises UserError for a missing file, broken JSON and every key that is missing, unknown or wrong.
    """
    shipped = {p.stem: p for p in sorted(SHIPPED.glob("*.json"))}
    path = shipped.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise UserError(f"no data set '{name_or_path}': give one of {', '.join(shipped)}, or the path of a .json file")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not JSON: {e.msg} at line {e.lineno}, column {e.colno}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    try:
        return _parse(entries)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def _parse(entries) -> Description:
    _require(isinstance(entries, dict), "a description is one JSON object {...}")
    for key in REQUIRED:
        _require(key in entries, f"the key '{key}' is missing")
    for key in entries:
        _require(key in REQUIRED + OPTIONAL, f"unknown key '{key}'; known: {', '.join(REQUIRED + OPTIONAL)}")
    for key in ("name", "root", "images"):
        _require(isinstance(entries[key], str) and entries[key], f"'{key}' must be a text")
    for key in ("labels", "list"):
        _require(entries.get(key) is None or isinstance(entries[key], str), f"'{key}' must be a text or null")
    encoding = entries["encoding"]
    _require(encoding in ENCODINGS, f"unknown 'encoding' {encoding!r}; known: {', '.join(ENCODINGS)}")

    size = entries["size"]
    _require(isinstance(size, list) and len(size) == 2 and all(_is_int(v, 1, 1 << 16) for v in size),
             "'size' must be [width, height] in pixels")
    sets = entries["sets"]
    _require(isinstance(sets, dict) and {"train", "val"} <= sets.keys() <= {"train", "val", "source"}
             and all(isinstance(v, str) for v in sets.values()),
             "'sets' must name the sets {\"train\": .., \"val\": ..} and may name a \"source\"")

    fields = _fields(entries["images"], "images")
    _require(fields - {"set"}, "'images' must hold a placeholder such as {stem}")
    _require(entries["labels"] is None or _fields(entries["labels"], "labels") <= fields | {"set"},
             "'labels' holds a placeholder that 'images' has not")
    _require(entries.get("list") is None or _fields(entries["list"], "list") <= {"set"},
             "'list' may hold no placeholder but {set}")

    classes = entries["classes"]
    _require(isinstance(classes, list) and classes,
             "'classes' must list one {\"name\": .., \"color\": .., \"ids\": ..} for each class")
    names, palette, ids, seen = [], [], [], {}
    for n, entry in enumerate(classes):
        _require(isinstance(entry, dict) and isinstance(entry.get("name"), str), f"class {n} has no 'name'")
        name = entry["name"]
        _require(name not in names, f"two classes are called '{name}'")
        _require(_is_colour(entry.get("color")), f"class '{name}': 'color' must be [r, g, b] with values 0..255")
        values_key = "colors" if encoding == "rgb" else "ids"
        unknown = entry.keys() - {"name", "color", values_key}
        _require(not unknown, f"class '{name}': unknown key '{min(unknown, default='')}'")
        values = entry.get(values_key, [entry["color"]] if encoding == "rgb" else None)
        _require(isinstance(values, list) and values, f"class '{name}': '{values_key}' must list its label values")
        values = [_value(v, encoding, f"class '{name}'") for v in values]
        for v in values:
            _require(v not in seen, f"label value {_show(v, encoding)} is given twice, to '{seen.get(v)}' and '{name}'")
            seen[v] = name
        names.append(name)
        palette.append(entry["color"])
        ids.append(tuple(values))
    ignore = entries.get("ignore", 255)
    _require(_is_int(ignore, len(names), 255), f"'ignore' must be a value {len(names)}..255 that no class index takes")
    void = entries.get("void", [])
    _require(isinstance(void, list), "'void' must be a list of label values")
    void = [_value(v, encoding, "'void'") for v in void]
    for v in void:
        _require(v not in seen, f"label value {_show(v, encoding)} is both void and class '{seen.get(v)}'")
    _require(len(seen) + len(void) <= 256, "more than 256 label values")

    subsets = entries.get("subsets", {})
    _require(isinstance(subsets, dict), "'subsets' must be {\"name\": [class names]}")
    for key, subset in subsets.items():
        _require(isinstance(subset, list) and set(map(str, subset)) <= set(names) and len(set(subset)) == len(subset),
                 f"'subsets': '{key}' must list names of 'classes', each once")
    maps = entries.get("maps", {})
    _require(isinstance(maps, dict), "'maps' must be {\"other data set\": {\"its class\": \"class\"}}")
    for key, mapping in maps.items():
        _require(isinstance(mapping, dict), f"'maps': '{key}' must be {{\"its class\": \"class of this set\"}}")
        for theirs, ours in mapping.items():
            _require(ours is None or ours in names, f"'maps': '{key}': '{theirs}' leads to {ours!r}, no class here")
    sizes_may_differ = entries.get("sizes_may_differ", False)
    _require(isinstance(sizes_may_differ, bool), "'sizes_may_differ' must be true or false")
    return Description(
        name=entries["name"], root=entries["root"], classes=tuple(names), palette=np.array(palette, np.uint8),
        ignore=ignore, ids=tuple(ids), void=frozenset(void), encoding=encoding, images=entries["images"],
        labels=entries["labels"], list=entries.get("list"), sets={"source": sets["train"], **sets}, size=tuple(size),
        subsets={k: tuple(v) for k, v in subsets.items()}, maps=maps, sizes_may_differ=sizes_may_differ)


def _require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


def _is_int(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_colour(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_int(v, 0, 255) for v in value)


def _value(value, encoding: str, where: str) -> int:
    if encoding == "rgb":
        _require(_is_colour(value), f"{where}: a label colour must be [r, g, b] with values 0..255, not {value!r}")
        return value[0] << 16 | value[1] << 8 | value[2]
    _require(_is_int(value, 0, 255), f"{where}: a label value must be an integer 0..255, not {value!r}")
    return value


def _show(value: int, encoding: str) -> str:
    return str([value >> 16, value >> 8 & 255, value & 255]) if encoding == "rgb" else str(value)


def _fields(pattern: str, key: str) -> set[str]:
    fields = re.findall(r"{(\w*)}", pattern)
    _require(all(f.isidentifier() for f in fields) and "{" not in re.sub(r"{\w+}", "", pattern),
             f"'{key}': a placeholder is a name in braces, such as {{stem}}")
    return set(fields)


def pattern_glob(pattern: str, set_: str) -> str:
    """A pattern as a glob: {set} filled in, "*" for every other placeholder."""
    return re.sub(r"{(\w+)}", lambda m: glob.escape(set_) if m[1] == "set" else "*", pattern)


@lru_cache
def pattern_regex(pattern: str) -> re.Pattern:
    """A pattern as a regular expression with one named group for each placeholder; none matches across folders."""
    seen: set[str] = set()

    def group(m: re.Match) -> str:
        again = m[1] in seen
        seen.add(m[1])
        return f"(?P={m[1]})" if again else f"(?P<{m[1]}>[^/]+)"

    return re.compile(re.sub(r"\\{(\w+)\\}", group, re.escape(pattern)))


def list_images(d: Description, root: str | Path, set_: str, list_file: str | Path | None = None) -> list[Path]:
    """The images of one set, as paths below `root`.

    They are those of `list_file`, of the description's own list where it exists, or all that match the pattern, sorted.
    A line of a list is relative to the fixed start of the pattern ("images/", "leftImg8bit/train/") or to the root.
    Raises UserError for a missing folder or list, a set that the description cannot tell apart, a listed image that
    does not exist, and for an empty result.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; it should hold the data set '{d.name}' ({d.images})")
    if list_file is None and d.list:
        list_file = root / d.list.format(set=set_)
        if not list_file.is_file():
            if "{set}" not in d.images:
                raise UserError(f"{list_file}: no such list; it should name the images of the set '{set_}' "
                                f"of '{d.name}'")
            list_file = None
    elif list_file is None and "{set}" not in d.images and set_ not in d.sets.values():
        raise UserError(f"'{d.name}' has no set '{set_}' (it has: {', '.join(sorted(set(d.sets.values())))}); "
                        "give a list file to choose images")
    if list_file is not None:
        return _listed_images(d, root, set_, Path(list_file))
    pattern = pattern_glob(d.images, set_)
    found = sorted(root / p for p in glob.glob(pattern, root_dir=root))
    if not found:
        raise UserError(f"{root}: no image of the set '{set_}' of '{d.name}' (looked for {pattern})")
    return found


def _listed_images(d: Description, root: Path, set_: str, list_file: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in list_file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{list_file}: the list cannot be read: {e}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{list_file}: the list is empty; it should hold one image a line")
    start = re.split(r"{(?!set})", d.images)[0].replace("{set}", set_)
    folder = root / start[:start.rfind("/") + 1]
    paths, missing = [], []
    for line in lines:
        path = next((p for p in (folder / line, root / line) if p.is_file()), None)
        (missing if path is None else paths).append(path or line)
    if missing:
        raise UserError(f"{list_file}: {len(missing)} of {len(lines)} images do not exist below {folder} or {root}: "
                        + ", ".join(missing[:LISTED]) + (", ..." if len(missing) > LISTED else ""))
    return paths


def label_path(d: Description, root: str | Path, image: str | Path, set_: str) -> Path | None:
    """Where the label of one image (a path below `root`) should lie; None when the data set has no labels.

    Raises UserError when the image does not match the description's pattern.
    """
    if d.labels is None:
        return None
    root, image = Path(root), Path(image)
    inside = image.relative_to(root).as_posix() if image.is_relative_to(root) else ""
    match = pattern_regex(d.images).fullmatch(inside)
    if not match:
        raise UserError(f"{image}: has no label: it does not match the pattern {d.images} of '{d.name}' below {root}")
    return root / d.labels.format(**{"set": set_, **match.groupdict()})


def _names_in(task: Description, d: Description) -> list[str | None]:
    """The classes of `d` under the names of `task`; None for those that `task` ignores or does not have."""
    mapping = task.maps.get(d.name, {}) if task is not d else {}
    names = (mapping.get(name, name) for name in d.classes)
    return [name if name in task.classes else None for name in names]


def select_classes(task: Description, other: Description | None, num_classes: int | None = None) -> tuple[str, ...]:
    """The class names a run uses, in the order of `task`: those that `other` (if given) labels too.

    Classes of `other` count under their own name or through `task.maps`.
    `num_classes` asks for that many of them: all of `task`, its subset of that name, or all shared classes.
    Raises UserError if there is no such selection, if `other` lacks a class of it, or if fewer than two classes remain.
    """
    shared = task.classes
    if other is not None:
        labelled = set(_names_in(task, other))
        shared = tuple(name for name in task.classes if name in labelled)
    chosen = shared
    if num_classes is not None and num_classes != len(shared):
        chosen = task.classes if num_classes == len(task.classes) else task.subsets.get(str(num_classes))
        if chosen is None:
            sizes = sorted({len(task.classes), len(shared), *map(len, task.subsets.values())})
            raise UserError(f"'{task.name}' has no choice of {num_classes} classes; it has {str(sizes)[1:-1]}")
        lacking = [name for name in chosen if name not in shared]
        if lacking:
            raise UserError(f"'{other.name}' has no labels for {', '.join(lacking)} of the {num_classes} classes of "
                            f"'{task.name}'; they share {len(shared)}")
    if len(chosen) < 2:
        raise UserError(f"fewer than two classes to tell apart: '{task.name}' has {', '.join(task.classes)}"
                        + (f", '{other.name}' has {', '.join(other.classes)}" if other is not None else ""))
    return tuple(chosen)


def label_table(d: Description, classes: Sequence[str], task: Description | None = None) -> np.ndarray:
    """int16 [256]: label value (with "rgb": colour index) -> index in `classes`.

    Void values and classes outside `classes` lead to `d.ignore`, values that the description does not know to -1.
    `classes` are names of `task` where one is given, and `d`'s classes pass through `task.maps`.
    """
    table = np.full(256, -1, np.int16)
    values = d.values()
    index = {int(v): (n if d.encoding == "rgb" else int(v)) for n, v in enumerate(values)}
    table[[index[v] for v in d.void]] = d.ignore
    for name, ids in zip(_names_in(task or d, d), d.ids, strict=True):
        table[[index[v] for v in ids]] = classes.index(name) if name in classes else d.ignore
    return table


def written_values(d: Description) -> tuple[list[int], int]:
    """(the 8-bit value to write for each class into new label files of a data set, the value for unlabelled pixels).

    They are the data set's own ids and, where 0 is none of them, 0; where it is, the set's lowest void id, so that its
    own description reads the files. A data set whose labels are colours gets class indices and 255.
    """
    if d.encoding == "rgb":
        return list(range(len(d.classes))), 255
    taken = {i for ids in d.ids for i in ids}
    return [ids[0] for ids in d.ids], next(v for v in (0, *sorted(d.void), 255, *range(256)) if v not in taken)


def derived_description(d: Description, root: Path, labels: Path, list_: str, set_: str) -> dict:
    """The JSON entries of ``d`` with other labels: those of ``written_values`` at labels/PATH OF THE IMAGE.png.

    root: of the images; list_: the path of the list, which may hold {set}; set_: the set's name.
    """
    (ids, unlabelled), indexed = written_values(d), d.encoding == "rgb"
    return {"name": d.name, "root": str(root.resolve()), "images": d.images,
            "labels": f"{labels.resolve()}/{PurePosixPath(d.images).with_suffix('.png')}", "list": list_,
            "sets": {"train": set_, "val": set_}, "size": list(d.size), "encoding": "ids", "ignore": d.ignore,
            "void": sorted({unlabelled} if indexed else d.void | {unlabelled}),
            "classes": [{"name": name, "color": colour, "ids": [value] if indexed else list(all_)}
                        for name, colour, value, all_ in zip(d.classes, d.palette.tolist(), ids, d.ids, strict=True)],
            "subsets": {name: list(names) for name, names in d.subsets.items()},
            "maps": {name: dict(mapping) for name, mapping in d.maps.items()}}


def read_label(path: str | Path, d: Description, table: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: one label file as class indices, through a table of `label_table`.

    Raises UserError for a file that cannot be decoded, colours where values are expected (or the reverse), and for
    label values that the description does not know.
    """
    values = label_values(path, d)
    spare = min(set(range(257)) - set(table.tolist()))  # stands for "unknown" in 8 bits; 256 only if nothing is unknown
    table = np.where(table < 0, spare, table).astype(np.uint8)
    label = np.frombuffer(bytearray(values).translate(table), np.uint8).reshape(values.shape)  # 3x faster than indexing
    if (label == spare).any():
        raise UserError(f"{path}: unknown label values {', '.join(map(str, np.unique(values[label == spare])))}; "
                        f"'{d.name}' does not list them")
    return label


def label_values(path: str | Path, d: Description) -> np.ndarray:
    """uint8 [H, W]: the values of a label file as they stand there (with "rgb": colour indices). Raises UserError."""
    if d.encoding == "rgb":
        return _colour_indices(path, _open(path), d)
    return _deep_values(path, d) if d.encoding == "uint16" else read_indices(path)


def read_indices(path: str | Path) -> np.ndarray:
    """uint8 [H, W]: the values of an 8-bit label or prediction file; palette indices, not colours. Raises UserError."""
    return _indices(path, _open(path))


def _indices(path, image: Image.Image) -> np.ndarray:
    if image.mode not in ("L", "P"):
        raise UserError(f"{path}: one 8-bit class value a pixel is expected, but this file is {image.mode}; "
                        "does it hold colours, or is it a wrong file?")
    return np.asarray(_load(path, image))


def _deep_values(path, d: Description) -> np.ndarray:
    image = _open(path)
    if not image.mode.startswith("I") and not (image.tile and image.tile[0][3] == "RGB;16B"):
        return _indices(path, image)  # conversions of SYNTHIA to 8 bit
    if image.mode != "RGB":
        values = np.asarray(_load(path, image))
        high = values > 255
    else:
        # Pillow keeps the high byte of each 16-bit sample; reading the samples as little-endian keeps the low byte
        low = _open(path)
        low.tile = [(*low.tile[0][:3], "RGB;16L")]
        values = np.asarray(_load(path, low).getchannel(0))
        high = np.asarray(_load(path, image).getchannel(0)) > 0
    if high.any():
        raise UserError(f"{path}: label values above 255; '{d.name}' does not list them")
    return values.astype(np.uint8)


def _colour_indices(path, image: Image.Image, d: Description) -> np.ndarray:
    if image.mode not in ("RGB", "RGBA", "P"):
        raise UserError(f"{path}: a label of '{d.name}' holds colours, this file is {image.mode}")
    rgb = np.asarray(_load(path, image).convert("RGB")).astype(np.int64)
    packed = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    known = d.values()
    index = np.searchsorted(known, packed).clip(max=len(known) - 1)
    wrong = known[index] != packed
    if wrong.any():
        shown = [_show(int(v), "rgb") for v in np.unique(packed[wrong])[:LISTED]]
        raise UserError(f"{path}: unknown label colours {', '.join(shown)}; '{d.name}' does not list them")
    return index.astype(np.uint8)


def read_image(path: str | Path) -> Image.Image:
    """An image file as a loaded Pillow RGB image. Raises UserError for a file that cannot be decoded."""
    return _load(path, _open(path)).convert("RGB")


def _open(path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:  # broken files make Pillow raise many types
        raise UserError(f"{path}: not an image that can be read: {e}") from None


def _load(path, image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as e:  # as in _open
        raise UserError(f"{path}: the image is broken or truncated: {e}") from None
    return image
