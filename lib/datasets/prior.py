"""The spatial prior of CBST-SP: how often each class covers each pixel of the source's labels (Zou et al. 2018)."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lib.datasets.folder import ImageFolder
from lib.errors import UserError
from lib.files import atomic_write
from lib.runtime import Run

RELEASED_SIGMA = 70 / 6 / 1024  # in image heights: the paper's 70 x 70 kernel at 1024, cut at 3


def open_prior(file: str | None, source: ImageFolder, classes: int, size: tuple[int, int], norm: str, built: Path,
               rebuild: bool, run: Run) -> Tensor | None:
    """The prior float32 [C, H, W] for label maps of ``size`` = (height, width); None without a file.

    file: .npz, .mat, or "build": from the labels of ``source`` into ``built``, where that does not exist or with
    ``rebuild``. norm: "frequency", or "class" for balanced_prior. Raises UserError.
    """
    if not file:
        return None
    path = built if file == "build" else Path(file)
    if file == "build" and run.is_main and (rebuild or not path.exists()):
        labels = (source.truth(i) for i in tqdm(range(len(source)), "prior", leave=False, disable=None))
        with atomic_write(path) as new:
            np.savez_compressed(new, prior_array=spatial_prior(labels, classes, size))
    run.barrier()
    prior = torch.from_numpy(load_prior(path, classes))
    if prior.shape[1:] != size:
        raise UserError(f"--spatial-prior {path} is {prior.shape[2]}x{prior.shape[1]}, but the target's images are "
                        f"{size[1]}x{size[0]}: build one for them with --spatial-prior build")
    return balanced_prior(prior) if norm == "class" else prior


def spatial_prior(labels: Iterable[np.ndarray], classes: int, size: tuple[int, int]) -> np.ndarray:
    """q float32 [C, H, W] in 0..1: how often each class covers each pixel of the labels, smoothed (a Gaussian).

    labels: class indices uint8, resized to ``size`` = (height, width) here; values from C on do not count.
    """
    from scipy.ndimage import gaussian_filter
    q, count = np.zeros((classes, *size), np.float32), 0
    for label in labels:
        label = np.asarray(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
        for c in np.unique(label[label < classes]):
            q[c] += label == c
        count += 1
    for c in range(classes):
        gaussian_filter(q[c], RELEASED_SIGMA * size[0], output=q[c], truncate=3)
    return np.clip(q / max(count, 1), 0, 1)


def balanced_prior(prior: Tensor) -> Tensor:
    """The prior [C, H, W] with the same sum over the pixels for every class that occurs; its largest value is 1."""
    prior = prior / prior.sum((1, 2), keepdim=True).clamp(min=torch.finfo(prior.dtype).tiny)
    return prior / prior.max().clamp(min=torch.finfo(prior.dtype).tiny)


def load_prior(path: str | Path, classes: int) -> np.ndarray:
    """float32 [C, H, W] from ``prior_array`` in a .npz or MATLAB file. Raises UserError."""
    try:
        if str(path).endswith(".mat"):
            from scipy.io import loadmat
            prior = loadmat(path)["prior_array"]
        else:
            prior = np.load(path)["prior_array"]
        prior = np.asarray(prior, np.float32)
    except Exception as error:  # NumPy and SciPy raise many kinds for a broken file
        raise UserError(f"--spatial-prior {path}: no prior can be read from it ({error}); it should be a .npz or "
                        ".mat file with prior_array, or 'build'") from None
    if prior.ndim != 3 or len(prior) != classes or not (np.isfinite(prior).all() and 0 <= prior.min() <= prior.max()
                                                        <= 1):
        raise UserError(f"--spatial-prior {path}: prior_array is {' x '.join(map(str, prior.shape))}; it should be "
                        f"{classes} x height x width (one map for each class), with values 0..1")
    return prior
