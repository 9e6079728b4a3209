"""Label maps and class-balanced pseudo-labels (Zou et al., ECCV 2018, ICCV 2019), without H x W x C values."""
from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.ops.build import operator


def upsample_argmax(logits: Tensor, size: tuple[int, int] | None = None, align_corners: bool = True) -> Tensor:
    """Label map of bilinearly upsampled logits, without writing the upsampled logits.

    logits: [C, h, w] or [N, C, h, w], C <= 255, any floating dtype (half and bfloat16 are interpolated in float32).
    size: (height, width) of the label map; None keeps the logits' size.
    Returns uint8 [H, W] or [N, H, W] on the same device, equal to F.interpolate(logits, size, mode="bilinear",
    align_corners=align_corners).argmax(-3); ties go to the lowest class. The compiled CPU operator interpolates in
    ATen's own order of operations, so not even the last bit differs; where ATen uses another order (H + W <= 128,
    channels-last logits, CUDA), a class may win over another one that is equal to within rounding.
    Raises ValueError for wrong shapes and for logits that are not finite (the CUDA kernel does not look).
    """
    batch, size = _as_batch(logits, size)
    label = _upsample_argmax(batch, size, align_corners)
    return label if logits.dim() == 4 else label[0]


def _as_batch(logits: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
    if logits.dim() not in (3, 4) or not logits.is_floating_point():
        raise ValueError("logits: expected floating [C, h, w] or [N, C, h, w], "
                         f"got {logits.dtype} {tuple(logits.shape)}")
    batch = logits.detach() if logits.dim() == 4 else logits.detach()[None]
    if not 1 <= batch.shape[1] <= 255:
        raise ValueError(f"logits: 1 to 255 classes, got {batch.shape[1]}")
    size = tuple(batch.shape[2:]) if size is None else tuple(size)
    if len(size) != 2 or min(*size, *batch.shape[2:]) < 1:
        raise ValueError(f"logits of shape {tuple(logits.shape)} cannot become a map of size {size}")
    return batch, size


def _upsample(image: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """[C, h, w] -> [C, H, W], float32 or float64; ValueError when it is not finite."""
    image = image if image.dtype == torch.float64 else image.float()
    if not image.isfinite().all():
        raise ValueError("logits hold NaN or infinite values")
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None].contiguous(), size, mode="bilinear", align_corners=align_corners)[0]


class Thresholds(NamedTuple):
    """What select_threshold returns; see there."""

    value: Tensor     # [C] float32
    selected: Tensor  # [C] int64
    bins: Tensor      # [C] int64


_BIN_BITS = 12                         # a coarse bin holds 2^12 neighbouring floats
_BINS = 0x40000000 >> _BIN_BITS        # bins for [0, 2): the bits of 2.0f are 0x40000000
_INVALID, _PIXELS = _BINS, _BINS + 1   # columns: pixels whose confidence is NaN or not below 2; all pixels of the class


def new_histogram(num_classes: int, device: torch.device | str = "cpu", *, fine: bool = False) -> Tensor:
    """Empty counts for confidence_histogram_ (2 MB a class) or, with fine, for refine_histogram_ (32 KB a class).

    int64 [C, 2^18 + 2] or [C, 2^12]. Histograms of several processes merge by addition (all_reduce).
    """
    return torch.zeros(num_classes, 1 << _BIN_BITS if fine else _BINS + 2, dtype=torch.int64, device=device)


def confidence_histogram_(hist: Tensor, logits: Tensor, size: tuple[int, int] | None = None, *,
                          align_corners: bool = True, flipped: Tensor | None = None, prior: Tensor | None = None,
                          probabilities: bool = False, ds_rate: int = 1, value: str = "conf",
                          return_maps: bool = True) -> tuple[Tensor, Tensor] | None:
    """Count the confidences of a batch of images, for the thresholds of CBST (Zou et al., ECCV 2018, algorithm 2).

    hist: from new_histogram, added to in place.
    logits: [C, h, w] or [N, C, h, w], any floating dtype (arithmetic is float32), upsampled bilinearly to size =
        (height, width) and softmaxed; with probabilities they are used as they are (after upsampling).
    flipped: the same for the images mirrored left to right; the mean of both is taken, mirrored back.
    prior: float32 [C, H, W] at the output size; the product is not renormalised.
    ds_rate: every ds_rate-th pixel of a class counts, in raster order, starting anew in each image and class.
    value: "conf" counts a pixel's largest probability for the class predicted there; "prob" counts, for each class, its
        own probability at every ds_rate-th pixel of the image.
    return_maps: returns label [H, W] or [N, H, W] uint8, the first class of the largest probability, and confidence
        float32, that probability: what refine_from_maps_ and pseudo_label can use in place of the logits, at 5 bytes a
        pixel. Without, nothing of the images' size is written, which is faster on the CPU.

    Compiled and reference results are equal to the last bit for probabilities given at full size. For logits, exp may
    differ in its last place between them (and between CPU and CUDA), but not between the passes of one implementation.
    Raises ValueError for wrong shapes, dtypes or devices and for NaN or infinity in the logits or the prior; the CUDA
    kernel, which does not wait for its result, counts such pixels as invalid instead, and select_threshold raises.
    """
    return _count(hist, None, logits, size, align_corners, flipped, prior, probabilities, ds_rate, value, return_maps)


def refine_histogram_(fine: Tensor, bins: Tensor, logits: Tensor, size: tuple[int, int] | None = None, *,
                      align_corners: bool = True, flipped: Tensor | None = None, prior: Tensor | None = None,
                      probabilities: bool = False, ds_rate: int = 1, value: str = "conf",
                      return_maps: bool = True) -> tuple[Tensor, Tensor] | None:
    """The second pass to exact thresholds: count the confidences inside one coarse bin per class, float by float.

    fine: from new_histogram(..., fine=True), added to in place; bins: from select_threshold after the first pass.
    Everything else, results included, as in confidence_histogram_, and with the same values.
    """
    return _count(fine, bins, logits, size, align_corners, flipped, prior, probabilities, ds_rate, value, return_maps)


def refine_from_maps_(fine: Tensor, bins: Tensor, label: Tensor, confidence: Tensor, *, ds_rate: int = 1) -> None:
    """refine_histogram_ of value "conf" from the maps that confidence_histogram_ returned; the same counts.

    label, confidence: [H, W] or [N, H, W]. Pixels whose label is no class (255) are left out.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    label, confidence = _checked_maps((label, confidence), label.shape, label.device)
    _check_histogram(fine, bins, len(fine), label.device, ds_rate)
    _refine_from_maps_(fine, bins, label, confidence, ds_rate)


def predicted_pixels(hist: Tensor) -> Tensor:
    """[C] int64: all pixels predicted as each class, not subsampled (for rare classes and patch mining)."""
    return hist[:, _PIXELS].clone()


def select_threshold(hist: Tensor, portion: float, *, fine: Tensor | None = None, pooled: bool = False) -> Thresholds:
    """Per class the k-th largest of its n counted confidences, k = floor(n * portion); 1 where k = 0.

    hist: after confidence_histogram_ over all images; fine: after refine_histogram_ over the same images.
    pooled: one threshold from the confidences of all classes (--kc-policy global).
    value: with fine exactly the float that sorting would give. Without, the lower edge of its coarse bin, which is at
        most 2^-11 of the value below it. A threshold of 0 (from a prior of 0) becomes 1 as in the original.
    selected: k per class (pooled: of all classes together); bins: the coarse bin that holds the k-th largest, or -1.
    Raises ValueError for a portion outside 0..1 and for counted confidences that are NaN or not below 2.
    """
    if not 0 <= portion <= 1:
        raise ValueError(f"portion must be between 0 and 1, not {portion}")
    invalid = int(hist[:, _INVALID].sum())
    if invalid:
        raise ValueError(f"{invalid} confidences are NaN or not below 2: the network's output is not finite, "
                         "or not probabilities")
    classes = len(hist)
    rows = hist.sum(0, keepdim=True) if pooled else hist
    fine_rows = None if fine is None else fine.sum(0, keepdim=True) if pooled else fine
    value, selected, bins = [], [], []
    for c, row in enumerate(rows[:, :_BINS]):
        k = math.floor(int(row.sum()) * portion)
        coarse, rank = _kth_largest(row, k) if k else (-1, 0)
        bits = max(coarse, 0) << _BIN_BITS
        if fine_rows is not None and k:
            inside = int(fine_rows[c].sum())
            if inside != int(row[coarse]):
                warnings.warn(f"class {c}: the second pass counted {inside} confidences in a bin that held "
                              f"{int(row[coarse])} in the first; is the forward pass deterministic?", stacklevel=2)
            if inside:
                bits += _kth_largest(fine_rows[c], min(rank, inside))[0]
        value.append(bits)
        selected.append(k)
        bins.append(coarse)
    value = torch.tensor(value, dtype=torch.int32).view(torch.float32)
    value = torch.where(value > 0, value, 1.0).expand(classes)
    selected, bins = (torch.tensor(x).expand(classes) for x in (selected, bins))
    return Thresholds(*(x.contiguous().to(hist.device) for x in (value, selected, bins)))


def pseudo_label(logits: Tensor, thresholds: Tensor, size: tuple[int, int] | None = None, *, align_corners: bool = True,
                 flipped: Tensor | None = None, prior: Tensor | None = None, probabilities: bool = False,
                 maps: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """CBST's labels (Zou et al., ECCV 2018): argmax_c p_c / thresholds_c, 255 where that maximum is below 1.

    thresholds: [C] float32, positive. Everything else as in confidence_histogram_.
    maps: (label, confidence) that confidence_histogram_ returned for the same images and settings. The labels are the
        same as without; but the CPU reads logits only where the largest probability leaves a label open, and that is
        rare where every threshold is above 1/2.
    Returns uint8 [H, W] or [N, H, W]; quotients are IEEE divisions in float32, ties go to the lowest class. Neither the
    upsampled logits nor the probabilities are written.
    Raises ValueError for wrong shapes, dtypes or devices and for NaN or infinity in what is read (the CUDA kernel
    labels such pixels 255).
    """
    batch, size, flipped, prior = _checked(logits, size, flipped, prior)
    thresholds = torch.as_tensor(thresholds, dtype=torch.float32, device=batch.device)
    if thresholds.shape != batch.shape[1:2] or not bool((thresholds > 0).all()):
        raise ValueError(f"thresholds: expected {batch.shape[1]} positive numbers, got {thresholds.tolist()}")
    shape = (*logits.shape[:-3], *size)
    known = (None, None) if maps is None else _checked_maps(maps, shape, batch.device)
    label = _pseudo_label(batch, thresholds, flipped, prior, *known, size, align_corners, probabilities)
    return label if logits.dim() == 4 else label[0]


def _count(hist, bins, logits, size, align_corners, flipped, prior, probabilities, ds_rate, value, return_maps):
    batch, size, flipped, prior = _checked(logits, size, flipped, prior)
    _check_histogram(hist, bins, batch.shape[1], batch.device, ds_rate)
    if value not in ("conf", "prob"):
        raise ValueError(f"value must be 'conf' or 'prob', not {value!r}")
    label, confidence = _confidence_histogram_(hist, bins, batch, flipped, prior, size, align_corners, probabilities,
                                               ds_rate, value == "prob", return_maps)
    if not return_maps:
        return None
    return (label, confidence) if logits.dim() == 4 else (label[0], confidence[0])


def _check_histogram(hist, bins, classes, device, ds_rate):
    width = _BINS + 2 if bins is None else 1 << _BIN_BITS
    if hist.dtype != torch.int64 or hist.shape != (classes, width) or not hist.is_contiguous():
        raise ValueError(f"histogram: expected contiguous int64 {(classes, width)} (see new_histogram), "
                         f"got {hist.dtype} {tuple(hist.shape)}")
    if hist.device != device or (bins is not None and bins.device != device):
        raise ValueError(f"the histogram and bins must be on the images' device: new_histogram({classes}, {device!s})")
    if bins is not None and (bins.dtype != torch.int64 or bins.shape != (classes,)):
        raise ValueError(f"bins: expected int64 [{classes}] from select_threshold, got {tuple(bins.shape)}")
    if ds_rate < 1:
        raise ValueError(f"ds_rate must be at least 1, not {ds_rate}")


def _checked_maps(maps, shape, device):
    """Label and confidence as [N, H, W]."""
    label, confidence = maps
    for name, x, dtype in (("label", label, torch.uint8), ("confidence", confidence, torch.float32)):
        if x.dtype != dtype or x.shape != shape or x.dim() not in (2, 3) or x.device != device:
            raise ValueError(f"{name} map: expected {dtype} {tuple(shape)} on {device} from confidence_histogram_, "
                             f"got {x.dtype} {tuple(x.shape)} on {x.device}")
    return (label, confidence) if label.dim() == 3 else (label[None], confidence[None])


def _checked(logits, size, flipped, prior):
    batch, size = _as_batch(logits, size)
    if flipped is not None:
        if flipped.shape != logits.shape or flipped.dtype != logits.dtype or flipped.device != logits.device:
            raise ValueError(f"flipped: expected {logits.dtype} {tuple(logits.shape)} like the logits, "
                             f"got {flipped.dtype} {tuple(flipped.shape)}")
        flipped = flipped.detach().reshape(batch.shape)
    if prior is not None and (prior.dtype != torch.float32 or prior.shape != (batch.shape[1], *size)
                              or prior.device != logits.device):
        raise ValueError(f"prior: expected float32 {(batch.shape[1], *size)} on {logits.device}, "
                         f"got {prior.dtype} {tuple(prior.shape)} on {prior.device}")
    return batch, size, flipped, prior


def _kth_largest(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest (k >= 1) of the counted values, and which of that bin's largest it is."""
    reached = counts.flip(0).cumsum(0)
    from_top = int(torch.searchsorted(reached, k))
    index = len(counts) - 1 - from_top
    return index, k - int(reached[from_top] - counts[index])


def _probabilities(logits, flipped, prior, size, align_corners, probabilities) -> Tensor:
    """One image, [C, h, w] -> [C, H, W] float32."""
    p = _upsample(logits.float(), size, align_corners)
    if not probabilities:
        p = p.softmax(0)
    if flipped is not None:
        p = (p + _probabilities(flipped, None, None, size, align_corners, probabilities).flip(-1)) * 0.5
    if prior is None:
        return p
    if not prior.isfinite().all():
        raise ValueError("the prior holds NaN or infinite values")
    return p * prior


def _count_confidences(hist, bins, label, confidence, ds_rate):
    for n in range(len(label)):
        for c in range(len(hist)):
            _add_confidences(hist, bins, c, confidence[n][label[n] == c][::ds_rate])


def _add_confidences(hist, bins, c, values):
    values = values[values < 2].contiguous()
    bits = values.view(torch.int32).where(values > 0, 0).long()
    bucket = bits >> _BIN_BITS
    if bins is None:
        hist[c, :_BINS] += torch.bincount(bucket, minlength=_BINS)
    else:
        inside = bits[bucket == bins[c]] & ((1 << _BIN_BITS) - 1)
        hist[c] += torch.bincount(inside, minlength=1 << _BIN_BITS)


def _count_pixels(hist, label, confidence):
    """Fills the columns that count every pixel, sampled or not."""
    for column, counted in ((_INVALID, label[~(confidence < 2)]), (_PIXELS, label)):
        hist[:, column] += torch.bincount(counted.flatten(), minlength=len(hist))


def probabilities_at(logits: Tensor, size: tuple[int, int], rows: np.ndarray, cols: np.ndarray,
                     prior: Tensor | None = None) -> Tensor:
    """Probabilities [C, rows, cols] of the other operators, at some rows and columns of a label map (height, width).

    logits [1 or 2, C, h, w]: of the image and, if two, of its mirror image, of which the mean is taken. prior: float32
    [C, height, width].
    """
    def lines(places: np.ndarray, length: int, n: int) -> Tensor:  # interpolation as a matrix [places, n]
        at = torch.from_numpy(places.copy()).double() * (n - 1) / max(length - 1, 1)
        low = at.floor().clamp(max=max(n - 2, 0)).long()
        matrix = torch.zeros(len(places), n, dtype=torch.float64).scatter_(1, low[:, None], (1 - (at - low))[:, None])
        high = (low + 1).clamp(max=n - 1)
        return matrix.scatter_add_(1, high[:, None], (at - low)[:, None]).to(logits.dtype)

    (height, width), (h, w) = size, logits.shape[2:]
    p = 0.0
    for image, columns in zip(logits, (cols, width - 1 - cols), strict=False):
        up = lines(rows, height, h) @ image @ lines(columns, width, w).T
        p = p + up.softmax(0) / len(logits)
    return p if prior is None else p * prior[:, torch.from_numpy(rows.copy())[:, None], torch.from_numpy(cols.copy())]


# ---- operators -----------------------------------------------------------------------------------------------------

@operator("upsample_argmax(Tensor logits, SymInt[2] size, bool align_corners) -> Tensor label")
def _upsample_argmax(logits, size, align_corners):
    """logits [N, C, h, w] -> label uint8 [N, H, W]; see upsample_argmax."""
    label = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    for n in range(len(logits)):  # one at a time: the upsampled logits are large
        label[n] = _upsample(logits[n], size, align_corners).argmax(0)
    return label


@_upsample_argmax.register_fake
def _(logits, size, align_corners):
    return logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)


@operator("confidence_histogram_(Tensor(a!) hist, Tensor? bins, Tensor logits, Tensor? flipped, Tensor? prior, "
          "SymInt[2] size, bool align_corners, bool probabilities, int ds_rate, bool own, bool return_maps) "
          "-> (Tensor label, Tensor confidence)")
def _confidence_histogram_(hist, bins, logits, flipped, prior, size, align_corners, probabilities, ds_rate, own,
                           return_maps):
    """confidence_histogram_, or with bins refine_histogram_, of a batch; own: value "prob".

    hist: [C, 2^18 + 2] without bins (2^18 bins of 2^12 floats over [0, 2), then invalid values, then all pixels of the
    class); [C, 2^12] with bins (the floats inside bin bins[c]). p has the same bits in every pass. Without return_maps
    the results are empty.
    """
    label = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    confidence = torch.empty((len(logits), *size), dtype=torch.float32, device=logits.device)
    for n in range(len(logits)):
        mirrored = None if flipped is None else flipped[n]
        p = _probabilities(logits[n], mirrored, prior, size, align_corners, probabilities)
        confidence[n], predicted = p.max(0)
        label[n] = predicted
        if own:
            for c in range(len(hist)):
                _add_confidences(hist, bins, c, p[c].flatten()[::ds_rate])
    if not own:
        _count_confidences(hist, bins, label, confidence, ds_rate)
    if bins is None:
        _count_pixels(hist, label, confidence)
    return (label, confidence) if return_maps else (label.new_empty(0), confidence.new_empty(0))


@_confidence_histogram_.register_fake
def _(hist, bins, logits, flipped, prior, size, align_corners, probabilities, ds_rate, own, return_maps):
    shape = (logits.shape[0], *size) if return_maps else (0,)
    return logits.new_empty(shape, dtype=torch.uint8), logits.new_empty(shape, dtype=torch.float32)


@operator("refine_from_maps_(Tensor(a!) fine, Tensor bins, Tensor label, Tensor confidence, int ds_rate) -> ()")
def _refine_from_maps_(fine, bins, label, confidence, ds_rate):
    """label, confidence: [N, H, W]; see refine_from_maps_."""
    _count_confidences(fine, bins, label, confidence, ds_rate)


@_refine_from_maps_.register_fake
def _(fine, bins, label, confidence, ds_rate):
    return None


@operator("pseudo_label(Tensor logits, Tensor thresholds, Tensor? flipped, Tensor? prior, Tensor? known_label, "
          "Tensor? known_confidence, SymInt[2] size, bool align_corners, bool probabilities) -> Tensor label")
def _pseudo_label(logits, thresholds, flipped, prior, known_label, known_confidence, size, align_corners,
                  probabilities):
    """argmax_c p_c / thresholds_c of a batch, 255 where the maximum is below 1; see pseudo_label.

    known_label, known_confidence: [N, H, W], both or neither; here they are not used.
    """
    label = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    for n in range(len(logits)):
        mirrored = None if flipped is None else flipped[n]
        p = _probabilities(logits[n], mirrored, prior, size, align_corners, probabilities)
        ratio, predicted = (p / thresholds[:, None, None]).max(0)
        label[n] = predicted.where(ratio >= 1, 255)
    return label


@_pseudo_label.register_fake
def _(logits, thresholds, flipped, prior, known_label, known_confidence, size, align_corners, probabilities):
    return logits.new_empty((logits.shape[0], *size), dtype=torch.uint8)
