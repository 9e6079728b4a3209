"""A data set is described by one JSON file: where its images and labels lie, and what the label values mean.

Training, evaluation and scoring read the same file; the shipped ones lie beside this module. Its keys:

    name      of the data set, used in file names
    root      its default folder
    images    pattern of the images' paths below the root, such as
              "leftImg8bit/{set}/{city}/{stem}_leftImg8bit.png". {set} is the name of a set; every other {placeholder}
              matches any text without a slash
    labels    pattern of the label of an image, with the image's placeholders; null for a data set without labels
    list      null, or a pattern such as "lists/{set}.txt": a file that names the images of a set, one a line, used if
              it exists
    sets      {"train": .., "val": .., "source": ..}: the default sets to train on, to score on, and to train on as
              labelled source (default: that of "train")
    size      [width, height] to resize to
    encoding  "ids": 8-bit values or palette indices; "uint16": first channel of a 16-bit PNG (SYNTHIA); "rgb": colours
    classes   [{"name": "road", "color": [128, 64, 128], "ids": [7]}, ..] with the label values of each class. For
              "rgb", "colors": [[r, g, b], ..] lists its label colours instead (default: its color)
    void      further label values (or colours) that may occur; they belong to no class
    ignore    the class index that stands for void in training (default 255)
    subsets   {"16": [names]}: named subsets of the classes
    maps      {"camvid": {"tree": "building or vegetation", "pole": null}}: which class here a class of another data set
              is; null means none. A class that is not listed keeps its name
    sizes_may_differ  true if an image and its label may differ in size (some of GTA5's do); both are resized anyway

No torch here: scoring must start fast.
"""
from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from lib.datasets.pictures import listed_pictures
from lib.errors import UserError, listed, shorten
from lib.files import read_json, write_json, write_text

SHIPPED = Path(__file__).parent
ENCODINGS = ("ids", "uint16", "rgb")
REQUIRED = ("name", "root", "images", "labels", "sets", "size", "encoding", "classes")
OPTIONAL = ("list", "ignore", "void", "subsets", "maps", "sizes_may_differ")


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
    if not os.path.isfile(path):
        raise UserError(f"no data set '{shorten(name_or_path)}': give one of {', '.join(shipped)}, or the path of a "
                        ".json file")
    entries = read_json(path)
    try:
        return _parse(entries)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parse(entries) -> Description:
    _require(isinstance(entries, dict), "a description is one JSON object {...}")
    for key in REQUIRED:
        _require(key in entries, f"the key '{key}' is missing")
    for key in entries:
        _require(key in REQUIRED + OPTIONAL, f"unknown key '{shorten(key)}'; known: {', '.join(REQUIRED + OPTIONAL)}")
    encoding, size, sets = entries["encoding"], entries["size"], entries["sets"]
    _require(encoding in ENCODINGS, f"unknown 'encoding' '{shorten(encoding)}'; known: {', '.join(ENCODINGS)}")
    _require(isinstance(size, list) and len(size) == 2 and all(_is_int(v, 1, 1 << 16) for v in size),
             "'size' must be [width, height] in pixels")
    _require(isinstance(sets, dict) and {"train", "val"} <= sets.keys() <= {"train", "val", "source"}
             and all(isinstance(v, str) and v for v in sets.values()),
             "'sets' must name the sets {\"train\": .., \"val\": ..} and may name a \"source\"")
    _check_paths(entries)
    names, palette, ids = _parse_classes(entries["classes"], encoding)

    ignore, void = entries.get("ignore", 255), entries.get("void", [])
    _require(_is_int(ignore, len(names), 255), f"'ignore' must be a value {len(names)}..255 that no class index takes")
    _require(isinstance(void, list), "'void' must be a list of label values")
    void = [_parse_value(v, encoding, "'void'") for v in void]
    class_of = {v: name for name, values in zip(names, ids, strict=True) for v in values}
    for v in void:
        _require(v not in class_of, f"label value {show_value(v, encoding)} is both void and class '{class_of.get(v)}'")
    _require(len(class_of) + len(void) <= 256, "more than 256 label values")

    subsets, maps = entries.get("subsets", {}), entries.get("maps", {})
    _require(isinstance(subsets, dict), "'subsets' must be {\"name\": [class names]}")
    for key, subset in subsets.items():
        _require(isinstance(subset, list) and set(map(str, subset)) <= set(names) and len(set(subset)) == len(subset),
                 f"'subsets': '{key}' must list names of 'classes', each once")
    _require(isinstance(maps, dict), "'maps' must be {\"other data set\": {\"its class\": \"class\"}}")
    for key, mapping in maps.items():
        _require(isinstance(mapping, dict), f"'maps': '{key}' must be {{\"its class\": \"class of this set\"}}")
        for other, own in mapping.items():
            _require(own is None or own in names, f"'maps': '{key}': '{other}' becomes '{shorten(own)}', no class here")
    sizes_may_differ = entries.get("sizes_may_differ", False)
    _require(isinstance(sizes_may_differ, bool), "'sizes_may_differ' must be true or false")
    return Description(
        name=entries["name"], root=entries["root"], classes=names, palette=palette, ignore=ignore, ids=ids,
        void=frozenset(void), encoding=encoding, images=entries["images"], labels=entries["labels"],
        list=entries.get("list"), sets={"source": sets["train"], **sets}, size=tuple(size),
        subsets={k: tuple(v) for k, v in subsets.items()}, maps=maps, sizes_may_differ=sizes_may_differ)


def _check_paths(entries: dict) -> None:
    for key in ("name", "root", "images"):
        _require(isinstance(entries[key], str) and entries[key], f"'{key}' must be a text")
    for key in ("labels", "list"):
        _require(entries.get(key) is None or isinstance(entries[key], str), f"'{key}' must be a text or null")
    texts = {key: [entries.get(key) or ""] for key in ("root", "images", "labels", "list")}
    for key, values in {**texts, "sets": entries["sets"].values()}.items():
        _require(not any(re.search("[\0\ud800-\udfff]", v) for v in values),
                 f"'{key}' holds a character that no path can")
    _require(re.fullmatch(r"\w[\w .+-]{0,99}", entries["name"]),
             "'name' becomes part of file names: it must start with a letter or digit and have at most 100 letters, "
             "digits, spaces and . + - _")
    placeholders = _placeholders(entries["images"], "images")
    _require(placeholders - {"set"}, "'images' must hold a placeholder such as {stem}")
    _require(_placeholders(entries["labels"] or "", "labels") <= placeholders | {"set"},
             "'labels' holds a placeholder that 'images' does not")
    _require(_placeholders(entries.get("list") or "", "list") <= {"set"}, "'list' may hold no placeholder but {set}")


def _placeholders(pattern: str, key: str) -> set[str]:
    names = re.findall(r"{(\w*)}", pattern)
    _require(all(name.isidentifier() for name in names) and not re.search(r"[{}]", re.sub(r"{\w+}", "", pattern)),
             f"'{key}': a placeholder is a name in braces, such as {{stem}}")
    return set(names)


def _parse_classes(classes, encoding: str) -> tuple[tuple[str, ...], np.ndarray, tuple[tuple[int, ...], ...]]:
    """(names, palette uint8 [C, 3], label values of each class)."""
    _require(isinstance(classes, list) and classes,
             "'classes' must list one {\"name\": .., \"color\": .., \"ids\": ..} for each class")
    values_key = "colors" if encoding == "rgb" else "ids"
    names, palette, ids, class_of = [], [], [], {}
    for n, entry in enumerate(classes):
        _require(isinstance(entry, dict) and isinstance(entry.get("name"), str), f"class {n} has no 'name'")
        name = entry["name"]
        _require(name not in names, f"two classes are called '{name}'")
        _require(_is_colour(entry.get("color")), f"class '{name}': 'color' must be [r, g, b] with values 0..255")
        unknown = entry.keys() - {"name", "color", values_key}
        _require(not unknown, f"class '{name}': unknown key '{min(unknown, default='')}'")
        values = entry.get(values_key, [entry["color"]] if encoding == "rgb" else None)
        _require(isinstance(values, list) and values, f"class '{name}': '{values_key}' must list its label values")
        values = tuple(_parse_value(v, encoding, f"class '{name}'") for v in values)
        for v in values:
            _require(v not in class_of,
                     f"label value {show_value(v, encoding)} is given twice, to '{class_of.get(v)}' and '{name}'")
            class_of[v] = name
        names.append(name)
        palette.append(entry["color"])
        ids.append(values)
    return tuple(names), np.array(palette, np.uint8), tuple(ids)


def _require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


def _is_int(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_colour(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_int(v, 0, 255) for v in value)


def _parse_value(value, encoding: str, where: str) -> int:
    if encoding == "rgb":
        _require(_is_colour(value),
                 f"{where}: a label colour must be [r, g, b] with values 0..255, not {shorten(value)}")
        return value[0] << 16 | value[1] << 8 | value[2]
    _require(_is_int(value, 0, 255), f"{where}: a label value must be an integer 0..255, not {shorten(value)}")
    return value


def show_value(value: int, encoding: str) -> str:
    """A label value as a description writes it."""
    return str([value >> 16, value >> 8 & 255, value & 255]) if encoding == "rgb" else str(value)


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


class MissingSet(UserError):
    """A set of a data set is not on disk: its folder, its list, or every image of it."""


def require_set(d: Description, root: Path, set_: str) -> None:
    """Raises MissingSet where neither folders, nor the description's sets, nor a list below ``root`` know ``set_``."""
    if "{set}" in d.images + (d.labels or ""):
        return
    known = set(d.sets.values())
    if d.list and "{set}" in d.list:
        paths = glob.iglob(pattern_glob(d.list.replace("{set}", "{any}"), ""), root_dir=root)
        known |= {match["set"] for match in map(pattern_regex(d.list).fullmatch, paths) if match}
    if set_ not in known:
        raise MissingSet(f"'{d.name}' has no set '{shorten(set_)}' (it has: {', '.join(sorted(known))})")


@dataclass(frozen=True)
class Domain:
    """The images of one domain: a data set, the folder where it lies, one of its sets and, if given, a list of images.

    A line of a list is relative to the fixed start of the pattern ("images/", "leftImg8bit/train/") or to the root.
    """

    description: Description
    root: Path
    set: str
    list_file: Path | None = None

    @classmethod
    def open(cls, data: str | Path | Description, root: str | Path | None = None, set_: str | None = None,
             list_file: str | Path | None = None, default_set: str = "train",
             dataroot: str | Path | None = None) -> Domain:
        """The set ``set_`` of a described data set; what is None comes from its description.

        data: a shipped name, a .json file or a loaded description. default_set: "train", "val" or "source", the key
        of the description's "sets" that holds where ``set_`` is None. dataroot: what takes the place of the data/ that
        the description's root may start with. Raises UserError for a bad description; whether the images are there
        shows when they are listed.
        """
        description = data if isinstance(data, Description) else load_description(data)
        if not root and dataroot and Path(description.root).parts[:1] == ("data",):
            root = Path(dataroot, Path(description.root).relative_to("data"))
        return cls(description, Path(root or description.root), set_ or description.sets[default_set],
                   Path(list_file) if list_file else None)

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) to work at."""
        return self.description.size

    def with_set(self, set_: str) -> Domain:
        """Another set of the same data set below the same root, without the list."""
        return replace(self, set=set_, list_file=None)

    def __str__(self) -> str:
        return f"{self.name} ({self.root}, {self.set})"

    def list_images(self) -> list[Path]:
        """The images, as paths below the root: those of the list, of the description's own list where that exists, or
        all that match the pattern, sorted.

        Raises UserError for a list that cannot be used and listed images that do not exist, and its subclass
        MissingSet for a missing folder, a set that the description cannot tell apart, and no image at all.
        """
        d, shown = self.description, f"the set '{shorten(self.set)}' of '{self.name}'"
        if not os.path.isdir(self.root):
            raise MissingSet(f"{shorten(self.root)}: no such folder; it should hold the data set '{d.name}' "
                             f"({d.images})")
        list_file = self.list_file
        if list_file is None and d.list:
            list_file = self.root / d.list.format(set=self.set)
            if not os.path.isfile(list_file):
                if "{set}" not in d.images:
                    raise MissingSet(f"{shorten(list_file)}: no such list; it should name the images of {shown}")
                list_file = None
        elif list_file is None and "{set}" not in d.images and self.set not in d.sets.values():
            raise MissingSet(f"'{d.name}' has no set '{shorten(self.set)}' (it has: "
                             f"{', '.join(sorted(set(d.sets.values())))}); give a list file to choose images")
        if list_file is not None:
            require_set(d, self.root, self.set)
            start = re.split(r"{(?!set})", d.images)[0].replace("{set}", self.set)
            return listed_pictures(list_file, [self.root / start[:start.rfind("/") + 1], self.root])
        pattern = pattern_glob(d.images, self.set)
        found = sorted(glob.iglob(pattern, root_dir=self.root), key=lambda path: path.split("/"))
        if not found:
            raise MissingSet(f"{self.root}: no image of {shown} (looked for {shorten(pattern)})")
        return [self.root / path for path in found]

    def label_paths(self, images: Sequence[Path]) -> list[Path]:
        """Where the labels of images (paths below the root) should lie.

        Raises UserError where the data set has no labels, or an image does not match the description's pattern.
        """
        d = self.description
        if d.labels is None:
            raise UserError(f"the data set '{d.name}' has no labels, and they are needed here")
        pattern, paths = pattern_regex(d.images), []
        start = str(self.root / "_")[:-1]  # "" where the root is the working directory
        for image in map(str, images):
            match = pattern.fullmatch(image.removeprefix(start)) if image.startswith(start) else None
            if not match:
                raise UserError(f"{image}: has no label: it does not match the pattern {d.images} of '{d.name}' below "
                                f"{self.root}")
            paths.append(self.root / d.labels.format(**{"set": self.set, **match.groupdict()}))
        return paths


def describe_copy(domain: Domain, data: str | Path, out: Path, file: Path) -> None:
    """Write the description of a copy of a domain's images, PNG files below ``out``, with the labels where they are.

    data: the description of the original, a shipped name or a file. A list of the set is written below ``out``.
    """
    shipped, list_ = SHIPPED / f"{data}.json", "lists/{set}.txt"
    entries = read_json(shipped if shipped.is_file() else data)
    sets = {**domain.description.sets, "source": domain.set} if "{set}" in entries["images"] else \
        {key: domain.set for key in domain.description.sets}
    entries |= {"root": str(out.resolve()), "images": str(PurePosixPath(entries["images"]).with_suffix(".png")),
                "labels": entries["labels"] and f"{domain.root.resolve()}/{entries['labels']}", "list": list_,
                "sets": sets}
    names = [image.relative_to(domain.root).with_suffix(".png").as_posix() for image in domain.list_images()]
    write_text(out / list_.format(set=domain.set), "\n".join(names) + "\n")
    write_json(file, entries)


def names_in(task: Description, d: Description) -> list[str | None]:
    """The classes of `d` under the names of `task`; None for those that `task` ignores or does not have.

    Raises UserError where `task.maps` speaks of a class that `d` does not have.
    """
    mapping = task.maps.get(d.name, {}) if task is not d else {}
    unknown = [name for name in mapping if name not in d.classes]
    if unknown:
        raise UserError(f"'maps' of the data set '{task.name}' names {listed(unknown)}, no class of '{d.name}', which "
                        f"has {', '.join(d.classes)}")
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
        labelled = set(names_in(task, other))
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
        other_classes = f", '{other.name}' has {', '.join(other.classes)}" if other is not None else ""
        raise UserError(f"fewer than two classes to tell apart: '{task.name}' has {', '.join(task.classes)}"
                        + other_classes)
    return tuple(chosen)
