"""Intersection over union from confusion matrices: rows are the truth, columns the prediction.

NumPy only, so that scoring saved predictions starts at once. A label map consists of long runs of equal pixels;
counting runs instead of pixels costs 2 ms for 2048 x 1024 pixels where mapping and histogram of every pixel cost 60.
"""
from collections.abc import Mapping, Sequence

import numpy as np

from lib.errors import UserError, listed

CHUNK = 1 << 17  # pixels whose 64-bit codes stay in cache


def joint_histogram(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """int64 [256, 256]: how many pixels hold the value i in `a` and j in `b`; both uint8, of one shape.

    Raises UserError when the shapes differ.
    """
    if a.shape != b.shape:
        raise UserError(f"truth and prediction differ in size: {_size(a)} and {_size(b)}")
    a, b = a.ravel(), b.ravel()
    changes = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    counts = np.zeros(256 * 256, np.int64)
    if np.count_nonzero(changes[::61]) < len(changes[::61]) / 4:
        starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
        codes = a[starts].astype(np.int64) << 8 | b[starts]
        lengths = np.diff(starts, append=len(a))
        counts += np.bincount(codes, lengths, len(counts)).astype(np.int64)  # float64 sums: exact below 2^53 pixels
    else:  # noise: runs would cost more than pixels
        for i in range(0, len(a), CHUNK):
            codes = a[i:i + CHUNK].astype(np.int64) << 8 | b[i:i + CHUNK]
            counts += np.bincount(codes, minlength=len(counts))
    return counts.reshape(256, 256)


def fold_rows(joint: np.ndarray, table: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [C, 256]: a joint histogram [256, 256] whose rows, values of label files, are added up by class.

    table [256]: the class of each value; values whose class lies outside 0..C-1 are not counted.
    """
    rows = np.flatnonzero((table >= 0) & (table < num_classes))
    folded = np.zeros((num_classes, 256), np.int64)
    np.add.at(folded, table[rows], joint[rows])
    return folded


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int, ignore: int = 255,
                     out: np.ndarray | None = None) -> np.ndarray:
    """int64 [C, C]: counts of (truth, prediction) pairs, which are class indices of one shape, of any integer type.

    Pixels whose truth is `ignore` are not counted. With `out`, the counts are added to it. Raises UserError for
    different shapes, and for any other value outside 0..C-1: in the truth, or in the prediction on any pixel.
    """
    joint = joint_histogram(_bytes(truth, "truth"), _bytes(prediction, "prediction"))
    wrong = [v for v in np.flatnonzero(joint.any(1)) if v >= num_classes and v != ignore]
    if wrong:
        raise UserError(f"the truth holds {listed(wrong)}, but the classes are 0..{num_classes - 1}, ignore {ignore}")
    wrong = np.flatnonzero(joint[:, num_classes:].any(0)) + num_classes
    if len(wrong):
        raise UserError(f"the prediction holds {listed(wrong)}, but the classes are 0..{num_classes - 1}")
    classes = np.where(np.arange(256) == ignore, -1, np.arange(256))
    confusion = fold_rows(joint, classes, num_classes)[:, :num_classes]
    if out is None:
        return confusion
    out += confusion
    return out


def _bytes(values: np.ndarray, what: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype != np.uint8 and values.size and not 0 <= values.min() <= values.max() <= 255:
        raise UserError(f"the {what} holds values outside 0..255 ({values.min()}..{values.max()})")
    return values.astype(np.uint8, copy=False)


def _size(a: np.ndarray) -> str:
    return " x ".join(str(n) for n in a.shape[::-1])


def restrict(confusion: np.ndarray, keep: Sequence[int]) -> np.ndarray:
    """int64 [K, C]: the matrix for a score over the classes `keep` only, as for SYNTHIA's 16 and 13.

    Pixels whose truth is another class are ignored; the predictions of other classes on the remaining pixels stay, as
    columns after the first K, and count as wrong.
    """
    others = [c for c in range(confusion.shape[1]) if c not in keep]
    return confusion[np.ix_(list(keep), [*keep, *others])]


def per_class_iou(confusion: np.ndarray) -> np.ndarray:
    """float64 [C]: TP / (TP + FP + FN) of a confusion matrix [C, C] (or [C, more], see `restrict`).

    nan for a class that occurs neither in the truth nor in the prediction; 0 for one that is only predicted.
    """
    hit = confusion.diagonal()
    return _ratio(hit, confusion.sum(1) + confusion.sum(0)[:len(hit)] - hit)


def mean_iou(confusion: np.ndarray) -> float:
    """The mean of `per_class_iou` without the nan; nan when nothing is left.

    Added from the first class to the last, as the official Cityscapes tool does: NumPy's order of adding gives another
    last bit.
    """
    iou = [float(v) for v in per_class_iou(confusion) if not np.isnan(v)]
    total = 0.0
    for value in iou:  # not sum(), which compensates its rounding errors from Python 3.12 on
        total += value
    return total / len(iou) if iou else float("nan")


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that means "does not occur"
        return part / whole


def iou_dict(names: Sequence[str], confusion: np.ndarray) -> dict:
    """What a JSON file needs: {"miou": .., "iou": {class: ..}, "confusion": [[..]]}; 0..1, unrounded, None for nan."""
    iou = {name: None if np.isnan(v) else float(v) for name, v in zip(names, per_class_iou(confusion), strict=True)}
    mean = mean_iou(confusion)
    return {"miou": None if np.isnan(mean) else mean, "iou": iou, "confusion": confusion.tolist()}


def iou_table(names: Sequence[str], confusions: Mapping[str, np.ndarray]) -> str:
    """The scores in per cent as lines of text, one class a line and the mean last.

    Several matrices {label: confusion} stand side by side with their IoU; a single one is shown with recall, precision
    and the share of each class in the truth.
    """
    corner = "in %" if len(confusions) == 1 else ""
    columns = {label: [*per_class_iou(c), mean_iou(c)] for label, c in confusions.items()}
    if len(confusions) == 1:
        (label, c), = confusions.items()
        hit, truth, guess = c.diagonal(), c.sum(1), c.sum(0)[:len(c)]
        columns = {label or "IoU": columns[label], "recall": _ratio(hit, truth), "precision": _ratio(hit, guess),
                   "share": _ratio(truth, truth.sum())}
    first = max(map(len, [*names, "mean"]))
    lines = [f"{corner:<{first}}" + "".join(f"  {label:>9}" for label in columns)]
    for n, name in enumerate([*names, "mean"]):
        cells = (f"{100 * values[n]:.2f}" if n < len(values) else "" for values in columns.values())
        lines.append(f"{name:<{first}}" + "".join(f"  {cell:>{max(9, len(label))}}"
                                                  for label, cell in zip(columns, cells, strict=True)))
    return "\n".join(line.rstrip() for line in lines)


def selection_table(report: Mapping) -> str:
    """What a round of self-training selected, one class a line: threshold, per cent of the predicted and of the
    labelled pixels, IoU of the network that was scored.

    report: {"thresholds", "predicted", "labelled": {class: number}, "iou": {class: 0..1}}.
    """
    names = list(report["predicted"])
    predicted, labelled = (max(sum(report[key].values()), 1) for key in ("predicted", "labelled"))
    width = max(map(len, names))
    lines = [f"{'':{width}}  threshold  predicted %  labelled %    IoU"]
    for name in names:
        iou = report.get("iou", {}).get(name)
        lines.append(f"{name:{width}}  {report['thresholds'][name]:9.4f}  "
                     f"{100 * report['predicted'][name] / predicted:11.2f}  "
                     f"{100 * report['labelled'][name] / labelled:10.2f}  "
                     f"{'' if iou is None else format(100 * iou, '5.1f'):>5}".rstrip())
    return "\n".join(lines)
