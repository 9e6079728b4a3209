"""People on disk: folders with Market-1501's names, MSMT17 as it is shipped, camera styles beside them.

    ROOT/bounding_box_train/*.jpg           training images; the name says who and where: 0002_c1s1_000451_03.jpg is
    ROOT/query/*.jpg                        person 2 before camera 1. Identity -1 is junk (a bad detection) and dropped
    ROOT/bounding_box_test/*.jpg            everywhere; 0 is a distractor and stays
    ROOT/bounding_box_train_camstyle/*.jpg  the training images as other cameras would show them:
                                            0002_c1s1_000451_03_fake_1to4.jpg, or ..._fake_4.jpg (ECN's MSMT17)
    ROOT/list_train.txt, list_val.txt, list_query.txt, list_gallery.txt, train/, test/   MSMT17, its lists as shipped

DukeMTMC-reID's names (0005_c2_f0046985.jpg) have this form, and so has any folder that is named so.
"""
from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from lib.datasets.pictures import read_image, spread
from lib.datasets.transforms import to_tensor
from lib.errors import UserError, itemized, listed, shorten
from lib.files import missing_files, read_text

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
STYLES = "bounding_box_train_camstyle"
ENDINGS = (".jpg", ".jpeg", ".png")
WHO_AND_WHERE = re.compile(r"(-?\d+)_c(\d+)")
JUNK, DISTRACTOR = -1, 0
# Folders looked for below the data folder where there is none of the data set's own name
ALIASES = {"market": ("market1501", "Market-1501-v15.09.15", "Market-1501"), "duke": ("dukemtmc-reid", "DukeMTMC-reID"),
           "msmt17": ("MSMT17_V2", "MSMT17_V1", "MSMT17")}
# Published: training images, identities, queries, gallery with its junk, cameras
PUBLISHED = {"market": (12936, 751, 3368, 19732, 6), "duke": (16522, 702, 2228, 17661, 8),
             "msmt17": (32621, 1041, 11659, 82161, 15)}
DUKE_NOTICE = ("DukeMTMC-reID shows students who did not consent; its authors withdrew it in 2019. Use it, if at all, "
               "to compare with older numbers (docs/ecn.md, section Ethics)")


class Person(NamedTuple):
    """One image of a person."""

    path: Path
    identity: int  # of its name; in training sets 0 .. n - 1 in the order of first appearance
    camera: int    # counted from 0: camera 0 is c1 in a name


@dataclass(frozen=True)
class PersonSet:
    """One data set. A part that was not asked for is empty."""

    name: str
    root: Path
    train: Sequence[Person]
    query: Sequence[Person]
    gallery: Sequence[Person]
    identities: Sequence[int]                       # of the names, in the order of the training labels
    junk: Mapping[str, int] = field(default_factory=dict)  # images of identity -1 that were dropped, by part

    @property
    def cameras(self) -> list[int]:
        """The cameras of the training images, ascending."""
        return sorted({p.camera for p in self.train})


# --- reading -------------------------------------------------------------------------------------------------------


def open_persons(data_dir: str | Path, name: str, parts: Iterable[str] = tuple(FOLDERS), *,
                 msmt_val: bool = True) -> PersonSet:
    """The data set ``name`` (a folder below data_dir, or the path of a folder), images sorted by name.

    msmt_val: MSMT17's training set takes list_val too, as ECN's counts do. Raises UserError where a part is missing or
    empty, a listed image does not exist, a name does not say who and where, or two names lead to one file.
    """
    root = _root(Path(data_dir), name)
    read, junk = {"train": [], "query": [], "gallery": []}, {}
    lists = _msmt_lists(root)
    for part in parts:
        found = list(_from_lists(lists, part, msmt_val) if lists else _from_folder(root / FOLDERS[part]))
        missing = [found[n].path for n in missing_files(p.path for p in found)]
        if missing:
            raise UserError(f"{lists}: {len(missing)} of the {len(found)} listed images for {part} do not exist: "
                            f"{listed(missing)}")
        read[part] = [p for p in found if p.identity != JUNK]
        junk[part] = len(found) - len(read[part])
        if not read[part]:
            raise UserError(f"{root}: no image for {part}" + " that is not junk (identity -1)" * bool(found))
    _require_one_name_each(root, read)
    labels = {identity: n for n, identity in enumerate(dict.fromkeys(p.identity for p in read["train"]))}
    read["train"] = [p._replace(identity=labels[p.identity]) for p in read["train"]]
    return PersonSet(name, root, **read, identities=list(labels), junk=junk)


def parts_of(data_dir: str | Path, name: str) -> list[str]:
    """The parts that a data set has; one without query or gallery can be trained on, and not scored."""
    root = _root(Path(data_dir), name)
    if _msmt_lists(root):
        return list(FOLDERS)
    return [part for part, folder in FOLDERS.items() if (root / folder).is_dir()]


def _root(data_dir: Path, name: str) -> Path:
    tried = [data_dir / n for n in (name, *ALIASES.get(name, ()))]
    for root in tried:
        if root.is_dir():
            return root
    raise UserError(f"no data set {name}: there is no folder {tried[0]}. Put it there (docs/ecn.md shows the layout), "
                    "or give another --data-dir")


def _from_folder(folder: Path) -> Iterator[Person]:
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: a data set holds {', '.join(FOLDERS.values())}, or MSMT17's lists")
    wrong = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in ENDINGS:
            if match := WHO_AND_WHERE.search(path.name):
                yield Person(path, int(match[1]), int(match[2]) - 1)
            else:
                wrong.append(path.name)
    if wrong:
        raise UserError(f"{folder} has {len(wrong)} images whose names do not say who and where: {listed(wrong)}. "
                        "Expected names such as 0002_c1s1_000451_03.jpg (person 2, camera 1)")


def _msmt_lists(root: Path) -> Path | None:
    """The folder with MSMT17's lists: the root, or one version below it."""
    return next((folder for folder in (root, root / "MSMT17_V2", root / "MSMT17_V1")
                 if (folder / "list_train.txt").is_file()), None)


def _from_lists(folder: Path, part: str, val: bool) -> Iterator[Person]:
    lists = {"train": ("list_train.txt", "list_val.txt")[:1 + val], "query": ("list_query.txt",),
             "gallery": ("list_gallery.txt",)}[part]
    half = "train" if part == "train" else "test"
    images = folder / (half if (folder / half).is_dir() else f"mask_{half}_v2")
    for name in lists:
        for number, line in enumerate(read_text(folder / name).splitlines(), 1):
            file, _, identity = line.strip().rpartition(" ")
            third = Path(file).name.split("_")[2:3]
            if not (_is_number(identity) and third and _is_number(third[0])):
                raise UserError(f"{folder / name}, line {number}: expected '0000/0000_000_01_...jpg 0' (the third "
                                f"field of the name is the camera), found '{shorten(line.strip())}'")
            # the numbers begin at 0 in training and in the test lists alike, where 0 is a person and no distractor
            yield Person(images / file, int(identity) + 1, int(third[0]) - 1)


def _require_one_name_each(root: Path, parts: Mapping[str, Sequence[Person]]) -> None:
    seen: dict[str, Path] = {}
    for person in (p for part in parts.values() for p in part):
        real = os.path.realpath(person.path) if person.path.is_symlink() else str(person.path.absolute())
        if real in seen:
            raise UserError(f"{root}: {seen[real]} and {person.path} are one file. Each image may stand in one part, "
                            "once: remove one of the two")
        seen[real] = person.path


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


# --- camera styles -------------------------------------------------------------------------------------------------


class CameraStyles:
    """For each training image and each other camera of the set, the file that shows it as that camera would.

    Which of the two forms of names is used is decided by what the folder holds. Raises UserError where images are
    missing.
    """

    def __init__(self, persons: PersonSet, folder: str = STYLES):
        self.folder, self.cameras = persons.root / folder, persons.cameras
        advice = "Make them (docs/ecn.md, section Camera styles), or train on real images only with --no-camstyle"
        if not self.folder.is_dir():
            raise UserError(f"there are no camera styles: {self.folder} does not exist. {advice}")
        self.names = {entry.name for entry in os.scandir(self.folder)}
        missing = [f"{p.path.stem} as camera {c + 1}" for p in persons.train for c in self.cameras
                   if c != p.camera and self._name(p, c) is None]
        if missing:
            raise UserError(f"{self.folder} lacks {len(missing)} of {len(persons.train) * (len(self.cameras) - 1)} "
                            f"camera styles: {listed(missing)}. {advice}")

    def path(self, person: Person, camera: int) -> Path:
        """The real image for the person's own camera, else the style image."""
        return person.path if camera == person.camera else self.folder / self._name(person, camera)

    def _name(self, person: Person, camera: int) -> str | None:
        stem = person.path.stem
        for name in (f"{stem}_fake_{person.camera + 1}to{camera + 1}", f"{stem}_fake_{camera + 1}"):
            for ending in (person.path.suffix, *ENDINGS):
                if name + ending in self.names:
                    return name + ending
        return None


def style_images(persons: PersonSet, folder: str = STYLES) -> list[Person]:
    """Every image of the style folder with the label of its training image: the style batch of CamStyle.

    Raises UserError where there is none, or where one was not made from a training image.
    """
    root, real = persons.root / folder, {p.path.stem: p for p in persons.train}
    if not root.is_dir():
        raise UserError(f"there are no style images: {root} does not exist")
    files = [path for path in sorted(root.iterdir()) if path.suffix.lower() in ENDINGS]
    unknown = [path.name for path in files if path.stem.rpartition("_fake_")[0] not in real]
    if unknown or not files:
        raise UserError(f"{root}: " + (f"{len(unknown)} files are not named after a training image: {listed(unknown)}"
                                       if unknown else "there is no style image"))
    return [real[path.stem.rpartition("_fake_")[0]]._replace(path=path) for path in files]


# --- images as tensors ---------------------------------------------------------------------------------------------


def crop_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of a random crop of an image (width, height), or None where none of 10 tries fits.

    Area 0.64 to 1 of the image's, height 2 to 3 times the width. A square image never fits.
    """
    width, height = size
    for _ in range(10):
        area = rng.uniform(0.64, 1.0) * width * height
        aspect = rng.uniform(2, 3)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            left, top = (int(rng.integers(0, room, endpoint=True)) for room in (width - w, height - h))
            return left, top, left + w, top + h
    return None


def erasing_box(size: tuple[int, int], probability: float,
                rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of the rectangle to erase from an image (height, width), or None for none.

    Random erasing (Zhong et al., 2017): area 0.02 to 0.2 of the image's, height 0.3 to 3 times the width.
    """
    height, width = size
    if rng.uniform(0, 1) > probability:
        return None
    for _ in range(100):
        area = rng.uniform(0.02, 0.2) * height * width
        aspect = rng.uniform(0.3, 3)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w < width and h < height:
            top, left = (int(rng.integers(0, room, endpoint=True)) for room in (height - h, width - w))
            return top, left, top + h, left + w
    return None


def random_sized_rect_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A random crop (see crop_box) at ``size`` (width, height), bilinear; the whole image where no crop fits."""
    box = crop_box(image.size, rng)
    if box is not None:
        return image.crop(box).resize(size, Image.Resampling.BILINEAR)
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


ERASED = (0.485, 0.456, 0.406)  # written after normalisation, where 0 would be the mean colour: the release's values


def erase(x: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Random erasing of x [3, H, W], in place (see erasing_box)."""
    box = erasing_box(tuple(x.shape[1:]), probability, rng)
    if box is not None:
        top, left, bottom, right = box
        x[:, top:bottom, left:right] = x.new_tensor(ERASED)[:, None, None]
    return x


@dataclass(frozen=True)
class TrainTransform:
    """Random crop, mirror (p = 0.5), normalise, erase. size: (height, width); pixels: see lib.datasets.transforms."""

    size: tuple[int, int]
    erasing: float
    pixels: str = "imagenet"

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        image = random_sized_rect_crop(image, self.size[::-1], rng)
        if rng.uniform(0, 1) < 0.5:
            image = ImageOps.mirror(image)
        return erase(to_tensor(image, self.pixels), self.erasing, rng)


@dataclass(frozen=True)
class TestTransform:
    """Resize (bicubic) and normalise. size: (height, width)."""

    __test__ = False  # no test, whatever pytest reads into its name

    size: tuple[int, int]
    pixels: str = "imagenet"

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        if image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BICUBIC)
        return to_tensor(image, self.pixels)


class PersonSample(NamedTuple):
    image: object     # float32 [3, H, W]; in a batch [N, 3, H, W]
    identity: object  # int
    camera: object    # int: of the person, not of the style
    index: object     # int: the image's place in its set, which is its row in ECN's memory
    name: object      # file name


class PersonImages(Dataset):
    """Images of people. Items are addressed by an index, or by (index, draw): the draw's number seeds the augmentation.

    styles: each draw first picks one of the set's cameras, its own included, and shows the person as it would.
    """

    def __init__(self, persons: Sequence[Person], transform: TrainTransform | TestTransform, *, seed: int = 0,
                 styles: CameraStyles | None = None):
        self.persons, self.transform, self.seed, self.styles = persons, transform, seed, styles

    def __len__(self) -> int:
        return len(self.persons)

    def __getitem__(self, key: int | tuple[int, int]) -> PersonSample:
        index, draw = key if isinstance(key, tuple) else (key, key)
        person, rng = self.persons[index], np.random.default_rng([self.seed, draw])
        path = person.path if self.styles is None else self.styles.path(person, rng.choice(self.styles.cameras))
        x = self.transform(read_image(path), rng)
        return PersonSample(x, person.identity, person.camera, index, path.name)


# --- checks --------------------------------------------------------------------------------------------------------


def describe(persons: PersonSet) -> list[str]:
    """What --check-data prints of a set: counts, and what they mean for training and scoring."""
    lines = []
    if persons.train:
        lines.append(f"train: {len(persons.train)} images of {len(persons.identities)} identities, "
                     f"{len(persons.cameras)} cameras" + _dropped(persons, "train"))
        lines += _one_camera(persons.train, "training")
    if persons.query:
        lines.append(f"query: {len(persons.query)} images of {len({p.identity for p in persons.query})} identities"
                     + _dropped(persons, "query"))
    if persons.gallery:
        known = {p.identity for p in persons.gallery} - {DISTRACTOR}
        distractors = sum(p.identity == DISTRACTOR for p in persons.gallery)
        lines.append(f"gallery: {len(persons.gallery)} images of {len(known)} identities, {distractors} of them "
                     "distractors" + _dropped(persons, "gallery"))
    if persons.query and persons.gallery:
        seen = defaultdict(set)
        for p in persons.gallery:
            seen[p.identity].add(p.camera)
        alone = sum(not seen[p.identity] - {p.camera} for p in persons.query)
        if alone:
            lines.append(f"note: {alone} queries have no image by another camera in the gallery and are not scored")
    counts = (len(persons.train), len(persons.identities), len(persons.query),
              len(persons.gallery) + persons.junk.get("gallery", 0), len(persons.cameras))
    if persons.name in PUBLISHED and all((persons.train, persons.query, persons.gallery)):
        published = PUBLISHED[persons.name]
        lines.append("the counts are the published ones" if counts == published else
                     f"note: published are {published}, here are {counts} (training images, identities, queries, "
                     "gallery with its junk, cameras)")
    return lines


def _dropped(persons: PersonSet, part: str) -> str:
    return f"; {persons.junk[part]} of junk dropped" if persons.junk.get(part) else ""


def _one_camera(train: Sequence[Person], what: str) -> list[str]:
    cameras = defaultdict(set)
    for p in train:
        cameras[p.identity].add(p.camera)
    alone = sum(len(c) == 1 for c in cameras.values())
    return [f"note: {alone} of {len(cameras)} {what} identities are seen by one camera only"] if alone else []


def check(persons: PersonSet, check_all: bool = False, sample: int = 50) -> None:
    """Raises UserError that lists files that cannot be used.

    Looked at are ``sample`` files spread over each part, or all with ``check_all`` (--check-data), and then the same
    picture under two identities counts too.
    """
    problems = []
    for part in (persons.train, persons.query, persons.gallery):
        for n in range(len(part)) if check_all else spread(len(part), sample):
            try:
                read_image(part[n].path)
            except UserError as error:
                problems.append(str(error))
    if check_all and not problems:
        problems = list(_same_pictures(persons.train))
    if problems:
        raise UserError(f"{persons.name} ({persons.root}) has {len(problems)} problems:\n{itemized(problems)}")


def _same_pictures(persons: Sequence[Person]) -> Iterator[str]:
    sizes = Counter(p.path.stat().st_size for p in persons)
    first: dict[bytes, Person] = {}
    for p in persons:
        if sizes[p.path.stat().st_size] > 1:
            other = first.setdefault(hashlib.sha1(p.path.read_bytes()).digest(), p)
            if other.identity != p.identity:
                yield f"{other.path} and {p.path} are the same picture under two identities"
