"""Pairs of a label file and the prediction for its image: found on disk, or read from the original release's folder.

No torch here: scoring must start fast.
"""
import glob
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePath

import numpy as np

from lib.datasets.description import Description, pattern_glob, pattern_regex, require_set
from lib.errors import UserError, listed, shorten
from lib.files import read_json, read_lines

VOID = 255  # in a table of label values: this one is no class
Pair = tuple[Path, Path]  # label, prediction


def find_pairs(d: Description, gt_dir: Path, pred_dir: Path, set_: str | None, list_file: Path | None) -> list[Pair]:
    """(label, prediction) for every label of the set below `gt_dir`, sorted; the predictions need not exist.

    Raises UserError for missing folders, no labels, a list that does not fit, labels that would share a prediction.
    """
    for folder in (gt_dir, pred_dir):
        if not os.path.isdir(folder):
            raise UserError(f"{shorten(folder)}: no such folder")
    wanted = set_ or d.sets["val"]
    labels, tail, depth = _find_labels(d, gt_dir, wanted)
    root = [gt_dir.absolute(), *gt_dir.absolute().parents][depth]
    if set_ and d.list:
        require_set(d, root, set_)
    if list_file is None and d.list:
        list_file = root / d.list.format(set=wanted)
        list_file = list_file if os.path.isfile(list_file) else None
    if set_ and "{set}" not in tail and not (list_file and d.list):
        raise UserError(f"{gt_dir}: --set {set_} has no meaning here, since the folder does not tell sets apart")

    names, by_name = {}, defaultdict(list)  # of the predictions
    for path, fields in labels.items():
        try:
            names[path] = _png(PurePath(d.images).name.format(**{"set": wanted, **fields}))
        except KeyError as e:
            raise UserError(f"{gt_dir}: give a folder further up, its name is part of the images' names: {e}") from None
        by_name[names[path]].append(path)
    chosen = names if list_file is None else _listed_labels(list_file, by_name, gt_dir)
    pairs = [(gt_dir / path, _prediction(pred_dir, PurePath(path).parent, names[path])) for path in chosen]
    claims = defaultdict(list)
    for label, prediction in pairs:
        claims[prediction].append(label)
    for prediction, shared in claims.items():
        if len(shared) > 1:
            raise UserError(f"{prediction} would be the prediction for {shared[0]} and {shared[1]}; "
                            "keep the predictions in the subfolders of their labels")
    return pairs


def _find_labels(d: Description, gt_dir: Path, set_: str) -> tuple[dict[str, dict[str, str]], str, int]:
    """({path of a label below `gt_dir`: its placeholders}, the last part of the pattern `d.labels` that these paths
    match, how many folders `gt_dir` lies below the data set's root)."""
    if d.labels is None:
        raise UserError(f"'{d.name}' has no labels to score against")
    parts = PurePath(d.labels.lstrip("/")).parts
    for depth in range(len(parts)):
        tail = "/".join(parts[depth:])
        found = sorted(glob.iglob(pattern_glob(tail, set_), root_dir=gt_dir), key=lambda path: path.split("/"))
        matches = ((path, pattern_regex(tail).fullmatch(path)) for path in found)
        labels = {path: match.groupdict() for path, match in matches if match}
        if labels:
            return labels, tail, depth
    raise UserError(f"{gt_dir}: no label of the set '{shorten(set_)}' of '{d.name}' (looked for {d.labels} and for its "
                    "last parts); choose the data with --data and --set")


def _png(image: str) -> str:
    """The name of the prediction for an image."""
    return f"{PurePath(image).stem}.png"


def _listed_labels(list_file: Path, by_name: Mapping[str, list[str]], gt_dir: Path) -> list[str]:
    lines = read_lines(list_file)
    found = [by_name.get(_png(line), []) for line in lines]
    wrong = [line for line, labels in zip(lines, found, strict=True) if len(labels) != 1]
    if wrong:
        raise UserError(f"{list_file}: {len(wrong)} of {len(lines)} images have no label, or several, in {gt_dir}: "
                        + listed(wrong))
    twice = [line for line, n in Counter(lines).items() if n > 1]
    if twice:
        raise UserError(f"{list_file}: {len(twice)} images are listed more than once: {listed(twice)}")
    return [labels[0] for labels in found]


def _prediction(pred_dir: Path, subfolder: PurePath, name: str) -> Path:
    places = [pred_dir.joinpath(*subfolder.parts[i:], name) for i in range(len(subfolder.parts))]
    return next((place for place in places if os.path.isfile(place)), pred_dir / name)


def read_devkit(devkit: Path, gt_dir: Path, pred_dir: Path) -> tuple[tuple[str, ...], np.ndarray, list[Pair]]:
    """(class names, int16 [256] label value -> class, pairs) of the original release's folder."""
    info = read_json(devkit / "info.json")
    try:
        names = tuple(map(str, info["label"]))
        mapping = {int(value): int(index) for value, index in info["label2train"]}
    except (ValueError, TypeError, KeyError, OverflowError) as e:
        raise UserError(f"{devkit / 'info.json'}: must hold 'label' and 'label2train': {e!r}") from None
    outside = [index for index in mapping.values() if index != VOID and not 0 <= index < len(names)]
    if outside:
        raise UserError(f"{devkit / 'info.json'}: 'label2train' has the class {listed(outside)}, but 'label' names the "
                        f"classes 0..{len(names) - 1}; {VOID} stands for void")
    labels, images = read_lines(devkit / "label.txt"), read_lines(devkit / "val.txt")
    if len(labels) != len(images):
        raise UserError(f"{devkit}: label.txt has {len(labels)} lines and val.txt {len(images)}; they must pair")
    table = np.array([mapping.get(value, VOID if value == VOID else -1) for value in range(256)], np.int16)
    return names, table, [(gt_dir / a, pred_dir / PurePath(b).name) for a, b in zip(labels, images, strict=True)]
