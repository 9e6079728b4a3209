"""Scores saved predictions against ground truth: IoU per class and mean.

    python compute_iou.py data/Cityscapes/data/gtFine/val result/cityscapes
    python compute_iou.py data/Cityscapes/data/gtFine/val result/cityscapes --classes 16 --json scores.json

GT_DIR is the data set's root or any folder below it that holds the labels (gtFine, gtFine/val); the data set's
description (--data) says which of its files those are. The prediction for an image lies in PRED_DIR, or there in the
subfolder of its label, under the image's name as an 8-bit .png of class indices: 0..18, the positions in the
description's list of classes (frankfurt_000000_000294_leftImg8bit.png). *_color.png files are never read.

Every label needs a sound prediction. Missing and broken files, unequal sizes, unknown label values and predictions
outside the classes are listed, all at once, and nothing is scored (exit code 2); the original evaluation skipped some
of these and miscounted others.

--classes 13 or 16 (SYNTHIA's), or a list of names, scores those classes the way the field does: pixels whose truth is
another class are ignored; on the remaining ones the prediction of another class counts as wrong. --predicted 16 says
that the predictions' values are indices into that list (0..15), not into the data set's; by default it scores those.
--label-ids says that they are the data set's own label values (7 is road in Cityscapes); void values count as wrong.
--devkit_dir reads the original release's folder (info.json, label.txt, val.txt) instead of a description.

Nothing here imports torch, so that the scores come at once.
"""
import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lib import flags
from lib.datasets.description import load_description
from lib.datasets.labels import label_table, label_values, read_indices
from lib.datasets.predictions import Pair, find_pairs, read_devkit
from lib.errors import UserError, itemized, listed, shorten
from lib.files import atomic_write, check_writable
from lib.metrics import fold_rows, iou_dict, iou_table, joint_histogram, mean_iou, per_class_iou, restrict

MAX_WORKERS = 64


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = flags.parser(__doc__, whole=True)
    parser.add_argument("gt_dir", type=Path, metavar="GT_DIR", help="folder of the ground truth")
    parser.add_argument("pred_dir", type=Path, metavar="PRED_DIR", help="folder of the predictions")
    parser.add_argument("--data", default="cityscapes", help="data set: shipped name or .json")
    parser.add_argument("--set", help="the set to score where GT_DIR holds several (default: the data set's 'val')")
    parser.add_argument("--list", type=Path, metavar="FILE", help="score only the images of this list, one a line")
    parser.add_argument("--devkit_dir", type=Path, metavar="DIR", help="folder with info.json, label.txt and val.txt")
    parser.add_argument("--classes", help="13, 16 or another subset of the data set, or class names with commas")
    values = parser.add_mutually_exclusive_group()
    values.add_argument("--predicted", metavar="CLASSES", help="likewise: the classes that the predictions index")
    values.add_argument("--label-ids", action="store_true", help="the predictions hold the data set's label values")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores and confusion matrix there")
    parser.add_argument("--workers", type=flags.count, metavar="N",
                        help="processes (default: one for every 50 images, at most one for each processor)")
    args = parser.parse_args(argv)
    if args.devkit_dir and (args.set or args.list or args.data != parser.get_default("data")):
        parser.error("--devkit_dir takes the place of --data, --set and --list: give one or the other")
    if args.workers and args.workers > MAX_WORKERS:
        parser.error(f"--workers {args.workers}: at most {MAX_WORKERS} processes")
    return args


def choose_classes(text: str | None, names: Sequence[str], subsets: Mapping[str, Sequence[str]]) -> list[int]:
    """The indices in `names` of the classes that --classes or --predicted asks for; all for None. Raises UserError."""
    if text is None or text == str(len(names)):
        return list(range(len(names)))
    chosen = subsets.get(text) or [name.strip() for name in text.split(",")]
    unknown = [name for name in chosen if name not in names]
    if unknown or len(set(chosen)) < len(chosen):
        reason = "there is no " + listed([f"'{name}'" for name in unknown]) if unknown else "one is given twice"
        raise UserError(f"no classes '{shorten(text)}': {reason}; the choice is "
                        f"{', '.join([*subsets, str(len(names))])}, or names out of {', '.join(names)}")
    return [names.index(name) for name in chosen]


def score_pair(pair: Pair, read: Callable[[Path], np.ndarray], table: np.ndarray, num_classes: int,
               allowed: np.ndarray) -> tuple[np.ndarray | None, list[tuple[str, str]]]:
    """(int64 [C, 256], pixels of a class by the prediction's value, []), or (None, the problems as (kind, text)).

    table [256]: the classes of the values that `read` finds in a label; allowed: bool [256], values of predictions.
    """
    label, prediction = pair
    if not os.path.isfile(prediction):
        return None, [("missing predictions", str(prediction))]
    try:
        truth, guess = read(label), read_indices(prediction)
    except UserError as e:
        return None, [("files that cannot be used", str(e))]
    if truth.shape != guess.shape:
        sizes = " and ".join(f"{w} x {h}" for h, w in (guess.shape, truth.shape))
        return None, [("predictions of another size than their label", f"{prediction}: {sizes}")]
    joint = joint_histogram(truth, guess)
    unknown, beyond = np.flatnonzero(joint.any(1) & (table < 0)), np.flatnonzero(joint.any(0) & ~allowed)
    problems = []
    if len(unknown):
        problems.append(("labels with values that the data set does not list", f"{label}: {listed(unknown)}"))
    if len(beyond):
        count = allowed.sum()
        kind = f"predictions outside 0..{count - 1}" if allowed[:count].all() else "predictions with unknown label ids"
        hint = " (label ids? Then give --label-ids)" if ((table >= 0) & (table < num_classes))[beyond].all() else ""
        problems.append((kind, f"{prediction}: {listed(beyond)}{hint}"))
    return (None, problems) if problems else (fold_rows(joint, table, num_classes), [])


def score(pairs: Sequence[Pair], read: Callable[[Path], np.ndarray], table: np.ndarray, num_classes: int,
          allowed: np.ndarray, workers: int | None = None) -> np.ndarray:
    """int64 [C, 256]: `score_pair` summed over all pairs. Raises one UserError that lists every problem found."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, MAX_WORKERS, len(pairs) // 50)
    np.empty(31 << 20, np.uint8)  # freed at once: glibc then keeps one image's memory for the next, a fifth faster
    task = partial(score_pair, read=read, table=table, num_classes=num_classes, allowed=allowed)
    if min(workers, len(pairs)) <= 1:
        return _sum(map(task, pairs), len(pairs), num_classes)
    from concurrent.futures import ProcessPoolExecutor  # here, since a small run need not wait for it
    with ProcessPoolExecutor(min(workers, len(pairs))) as pool:
        return _sum(pool.map(task, pairs, chunksize=4), len(pairs), num_classes)


def _sum(results: Iterable[tuple[np.ndarray | None, list]], total: int, num_classes: int) -> np.ndarray:
    if sys.stderr.isatty():
        from tqdm import tqdm  # likewise
        results = tqdm(results, total=total, unit=" images", leave=False)
    counts, problems = np.zeros((num_classes, 256), np.int64), defaultdict(list)
    for counted, found in results:
        if counted is not None:
            counts += counted
        for kind, text in found:
            problems[kind].append(text)
    if problems:
        raise UserError("\n".join([f"nothing was scored: {sum(map(len, problems.values()))} problems in {total} images",
                                   *(f"{len(texts)} {kind}:\n{itemized(texts)}" for kind, texts in problems.items())]))
    return counts


def by_class(counts: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """int64 [C, C + 1]: counts [C, 256] by the predicted class; columns [256]: the class of each value, else C."""
    confusion = np.zeros((len(counts), len(counts) + 1), np.int64)
    np.add.at(confusion.T, columns, counts.T)
    return confusion


def look_like_ids(as_ids: np.ndarray, as_indices: np.ndarray) -> bool:
    """Whether predictions with these confusion matrices are label ids; not where they hold a single value, which may be
    that of a network that has collapsed."""
    def kappa(confusion: np.ndarray) -> float:  # agreement beyond chance (Cohen 1960)
        share = confusion / max(confusion.sum(), 1)
        chance = share.sum(1) @ share.sum(0)[:len(share)]
        return (share.trace() - chance) / max(1 - chance, 1e-9)

    several = np.count_nonzero(as_ids.any(0)) > 1
    never_right = as_indices.trace() == 0 and as_ids.trace() > 0
    return several and (never_right or kappa(as_ids) > max(0.1, 2 * kappa(as_indices)))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.json is not None:
        check_writable(args.json, "Choose another --json")
    if args.devkit_dir:
        data, read, subsets, encoding = str(args.devkit_dir), read_indices, {}, "ids"
        names, table, pairs = read_devkit(args.devkit_dir, args.gt_dir, args.pred_dir)
    else:
        d = load_description(args.data)
        data, read, subsets, encoding = d.name, partial(label_values, d=d), d.subsets, d.encoding
        names, table = d.classes, label_table(d, d.classes)
        pairs = find_pairs(d, args.gt_dir, args.pred_dir, args.set, args.list)
    if args.label_ids and encoding == "rgb":
        raise UserError(f"--label-ids: the labels of '{data}' are colours; predictions must hold class indices")
    predicted = choose_classes(args.predicted, names, subsets)
    keep = choose_classes(args.predicted if args.classes is None else args.classes, names, subsets)

    ids = np.where((table >= 0) & (table < len(names)), table, len(names))  # the class of each label value
    indices = np.full(256, len(names))
    indices[:len(predicted)] = predicted
    allowed = table >= 0 if args.label_ids else np.arange(256) < len(predicted)
    counts = score(pairs, read, table, len(names), allowed, args.workers)
    confusion = by_class(counts, ids if args.label_ids else indices)
    unclear = not (args.label_ids or args.predicted or encoding == "rgb")
    if unclear and look_like_ids(by_class(counts, ids), confusion):
        raise UserError(f"{args.pred_dir}: the predictions look like label ids: as such they agree with the labels, as "
                        f"class indices they do not. Give --label-ids, or --predicted {len(names)} if they are indices")
    confusion = restrict(confusion if args.label_ids else confusion[:, :-1], keep)
    scored = [names[c] for c in keep]

    print("Num classes", len(scored))
    for name, iou in zip(scored, per_class_iou(confusion), strict=True):
        print(f"===>{name}:\t{round(iou * 100, 2)}")
    print(f"===> mIoU: {round(mean_iou(confusion) * 100, 2)}\n")
    print(iou_table(scored, {"IoU": confusion}))
    print(f"{len(pairs)} images")
    if args.json is not None:
        result = {"data": data, "ground_truth": str(args.gt_dir), "predictions": str(args.pred_dir),
                  "images": len(pairs), **iou_dict(scored, confusion),
                  "confusion_columns": [*scored, *(name for name in names if name not in scored),
                                        *(["void"] if args.label_ids else [])]}
        with atomic_write(args.json, "Choose another --json") as new:
            new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except UserError as e:
        print(f"compute_iou.py: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:  # a full disk, or a reader such as head that left early
        print(f"compute_iou.py: the scores cannot be written: {e.strerror}", file=sys.stderr)
        os._exit(2)  # Python would try to write them again
    except KeyboardInterrupt:
        sys.exit(130)
