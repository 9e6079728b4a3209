"""CBST: class-balanced self-training, and its confidence-regularised successors.

Zou, Yu, Kumar, Wang: "Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced Self-Training",
ECCV 2018, https://arxiv.org/abs/1810.07911. Zou, Yu, Liu, Kumar, Wang: "Confidence Regularized Self-Training", ICCV
2019, https://arxiv.org/abs/1908.09822. Results: README.md, section "CBST".

    python train_cbst.py --demo                                                     # a miniature pair, on a laptop
    python train_cbst.py --restore-from snapshots/source_only/GTA5_150000.pth       # data/GTA5 to data/Cityscapes/data
    python train_cbst.py --restore-from FILE --kc-policy global                     # ST: one threshold for all classes
    python train_cbst.py --restore-from FILE --spatial-prior build                  # CBST-SP
    python train_cbst.py --restore-from FILE --mr-weight-kld 0.01                   # MRKLD as published, see below
    python train_cbst.py --restore-from FILE --lr-weight-ent 0.25                   # LRENT: soft pseudo-labels

Rounds begin from a source-trained network: label the target's images with it, keep the most confident portion of each
class, train on these and some source images, repeat with a larger portion. Each round first scores its network on the
validation set, so the last of --num-rounds only scores what the one before it trained.

It follows the PyTorch release, except that: --kc-value prob thresholds each class by its own probabilities, as meant
(the release left these thresholds at 1); --mr-weight-kld is the weight that acts (the release multiplied it in twice,
so its 0.1 was 0.01); --lr-weight-ent keeps logits at an eighth of the size, not soft labels at full size; a batch
without labels has loss 0 instead of nan. Thresholds are exactly those of the sorted lists but come from histograms.
Labels cannot be given before all images have been counted, and keeping 5 bytes a pixel until then is what filled users'
disks, so each image passes the network three times (counted, counted finely, labelled), or once where the logits at an
eighth of the size fit --cache-mb.
"""
from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lib import checkpoint, flags, ops, predict, rounds, runtime, visual
from lib.datasets.description import Domain
from lib.datasets.folder import DomainPair, ImageFolder, endless, open_pair
from lib.datasets.labels import label_table, written_values
from lib.datasets.transforms import PIXELS, random_crop
from lib.demo.streets import render_demo
from lib.errors import UserError
from lib.files import atomic_write
from lib.metrics import confusion_matrix, iou_dict, iou_table, mean_iou
from lib.models.deeplab import ARCHITECTURES, MODELS, build, logits_of, set_bn_affine, set_train_mode
from lib.optim import deeplab_sgd, set_poly_lr
from lib.runtime import as_float32

IGNORE = 255
RELEASED_SIGMA = 70 / 6 / 1024  # of the spatial prior, in image heights: the paper's 70 x 70 kernel at 1024, cut at 3
# Choices that change neither the data nor the mathematics of a run, so that a resumed run may change them.
FREE_ARGUMENTS = {"resume", "num_workers", "num_rounds", "save_pred_every", "log_every", "tensorboard", "log_dir",
                  "save_num_images", "save_color", "cache_mb", "gpu", "cpu", "check_data", "snapshot_dir", "ops",
                  "compile"}
# --demo: settings for a ResNet-18 from random weights on the rendered pair; any flag given besides wins.
DEMO = dict(source="gta5", target="demo", data_dir="data/demo/gta5", data_dir_target="data/demo/cityscapes",
            arch="resnet18", input_size=(192, 96), input_size_target=(192, 96), crop_size=(192, 96),
            snapshot_dir="snapshots/demo_cbst", learning_rate=5e-4, power=0.9, num_rounds=4, epr=2,
            init_src_port=0.2, max_src_port=0.5, src_port_step=0.05, spatial_prior="build", prior_norm="class",
            eval_scale=1.0, test_scales=(1.0,), is_training=True, num_workers=0, pixels="caffe", bn_stats="target")
DEMO_START_STEPS, DEMO_START_RATE = 400, 2.5e-3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    method = p.add_argument_group("method")
    method.add_argument("--num-rounds", type=flags.count, default=4, help="the last one only scores")
    method.add_argument("--epr", type=flags.count, default=2, help="epochs of training a round")
    method.add_argument("--kc-policy", choices=["cb", "global"], default="cb", help="a threshold per class, or one")
    method.add_argument("--kc-value", choices=["conf", "prob"], default="conf",
                        help="what thresholds count: the predicted class's probability, or each class's own")
    method.add_argument("--ds-rate", type=flags.count, default=4, help="every n-th pixel of an image and class counts")
    method.add_argument("--init-tgt-port", type=flags.share, default=0.2,
                        help="portion of target pixels in the first round")
    method.add_argument("--tgt-port-step", type=flags.amount, default=0.05)
    method.add_argument("--max-tgt-port", type=flags.share, default=0.5)
    method.add_argument("--init-src-port", type=flags.share, default=0.03, help="portion of source images, first round")
    method.add_argument("--src-port-step", type=flags.amount, default=0.0025)
    method.add_argument("--max-src-port", type=flags.share, default=0.06)
    method.add_argument("--src-sampling-policy", choices=["r", "c"], default="r",
                        help="r: drawn anew each round; c: the same images and more")
    method.add_argument("--rare-cls-num", type=flags.natural, default=3, help="rarest classes to report")
    method.add_argument("--mine-port", type=flags.share, default=0.001, help="classes predicted on less are mined")
    method.add_argument("--mine-chance", type=flags.share, default=0.8, help="that a crop is centred on a mined class")
    method.add_argument("--spatial-prior", metavar="build|FILE", help="build it from the source labels, or .npz, .mat")
    method.add_argument("--prior-norm", choices=["frequency", "class"], default="frequency",
                        help="class: every class's prior has the same sum over the pixels, so that rare ones keep up")
    method.add_argument("--mr-weight-kld", type=flags.amount, default=0.0,
                        help="MRKLD: weight of KL to uniform (0: off)")
    method.add_argument("--lr-weight-ent", type=flags.amount, default=0.0,
                        help="LRENT: alpha of soft labels (0: hard labels)")
    method.add_argument("--collapse", type=flags.share, default=0.95,
                        help="share of pixels in one class that ends the run")
    method.add_argument("--demo", action="store_true", help="render a small pair, train on its source, then rounds")
    net = p.add_argument_group("network")
    net.add_argument("--restore-from", metavar="FILE", help="a source-trained network, in any dialect")
    net.add_argument("--model", choices=list(MODELS), help="default: recognised by the checkpoint's keys")
    net.add_argument("--arch", choices=list(ARCHITECTURES), help="default: recognised")
    net.add_argument("--aspp", choices=["released", "full"],
                     help="rates summed: 6, 12 or all four (default: the checkpoint's, else full)")
    net.add_argument("--pixels", choices=list(PIXELS), help="default: the checkpoint's, else imagenet")
    net.add_argument("--num-classes", type=flags.count, help="how many of the target's classes (default: all shared)")
    net.add_argument("--bn-affine", choices=["train", "frozen"], default="frozen", help="BN weights and biases")
    net.add_argument("--is-training", action=argparse.BooleanOptionalAction, default=False,
                     help="BN statistics update while training")
    net.add_argument("--bn-stats", choices=["running", "target", "both"], default="running",
                     help="each round begins by re-estimating BN statistics on the target, or on it and the next "
                          "round's source images")
    data = p.add_argument_group("data")
    data.add_argument("--source", default="gta5", help="a description in lib/datasets, or a .json file")
    data.add_argument("--target", default="cityscapes", help="likewise")
    data.add_argument("--data-dir", help="source folder (default: the description's)")
    data.add_argument("--data-list", help="file with one source image a line")
    data.add_argument("--source-set", help="set of the source (default: the description's)")
    data.add_argument("--data-dir-target", help="target folder")
    data.add_argument("--data-list-target", help="file with one target image a line, those to label")
    data.add_argument("--set", help="set of the target to label and train on (default: the description's)")
    data.add_argument("--val-set", help="labelled set of the target to score on (default: the description's, if there)")
    data.add_argument("--subset", type=flags.count, metavar="N",
                      help="use N target images, drawn by --seed and listed in subset.txt")
    data.add_argument("--allow-overlap", action="store_true", help="label images that are scored too")
    data.add_argument("--input-size", type=flags.size, help="width,height of source images (default: the files')")
    data.add_argument("--input-size-target", type=flags.size,
                      help="width,height of target images (default: the files')")
    data.add_argument("--crop-size", type=flags.size, default=(1024, 512), help="width,height in training")
    data.add_argument("--random-scale", action=argparse.BooleanOptionalAction, default=True,
                      help="scale training images by 0.5, 0.6, .. 1.5")
    data.add_argument("--random-mirror", action=argparse.BooleanOptionalAction, default=True)
    data.add_argument("--eval-scale", type=flags.positive, default=0.9, help="of target images while they are labelled")
    data.add_argument("--test-flipping", action="store_true", help="average with the mirrored image while labelling")
    data.add_argument("--test-scales", type=flags.scales, default=(0.9, 1.0, 1.2),
                      help="whose logits are averaged for scores")
    data.add_argument("--score-flipping", action=argparse.BooleanOptionalAction, default=True,
                      help="average with the mirrored image for scores")
    data.add_argument("--num-workers", type=flags.natural, default=min(4, os.cpu_count() or 1), help="loader processes")
    data.add_argument("--check-data", action="store_true", help="read every file, report, and leave")
    opt = p.add_argument_group("optimisation")
    opt.add_argument("--batch-size", type=flags.count, default=2, help="images a process and step, of both domains")
    opt.add_argument("--learning-rate", type=flags.amount, default=5e-5, help="heads take 10 times as much")
    opt.add_argument("--momentum", type=flags.below_one, default=0.9)
    opt.add_argument("--weight-decay", type=flags.amount, default=5e-4)
    opt.add_argument("--power", type=flags.amount, default=0.0,
                     help="of the polynomial decay within a round; 0: constant")
    opt.add_argument("--sgd", choices=["released", "once"], default="released",
                     help="released: the backbone's updates are repeated as in the release")
    out = p.add_argument_group("run")
    out.add_argument("--snapshot-dir", "--save", default="snapshots/cbst", help="one folder a round, logs, best.pth")
    out.add_argument("--save-pred-every", type=flags.count, default=500,
                     help="training steps (images, while labelling and scoring) between points to resume from")
    out.add_argument("--save-num-images", type=flags.natural, default=4, help="pseudo-labels in each round's picture")
    out.add_argument("--save-color", action="store_true", help="also pseudo_labels_color: every label in colours")
    out.add_argument("--cache-mb", type=flags.natural, default=64,
                     help="memory for logits between the passes over the target")
    out.add_argument("--log-every", type=flags.count, default=10)
    out.add_argument("--tensorboard", action="store_true")
    out.add_argument("--log-dir", help="folder for TensorBoard (default: the snapshot folder)")
    out.add_argument("--resume", action="store_true", help="go on from the snapshot folder")
    out.add_argument("--random-seed", "--seed", type=flags.natural, default=3)
    out.add_argument("--deterministic", action="store_true")
    out.add_argument("--cpu", action="store_true")
    out.add_argument("--gpu", type=flags.natural, default=0, help="number of the GPU of a single process")
    out.add_argument("--amp", choices=list(runtime.AMP_DTYPES), default="off", help="mixed precision")
    out.add_argument("--compile", action="store_true", help="torch.compile the network")
    out.add_argument("--ops", choices=["auto", "compiled", "reference"], default="auto", help="kernels of csrc/")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    if not args.restore_from and not args.demo and not args.check_data:
        p.error("--restore-from FILE is needed: rounds begin from a source-trained network, such as "
                "train_adaptsegnet.py --source-only makes")
    return args


# --- selection: p are probabilities [C, ...], thresholds [C] ----------------------------------------------------------


def portion(init: float, step: float, most: float, round_: int) -> float:
    """The portion of round 0, 1, ...: one step more each round, added up as in the release, at most ``most``."""
    value = min(init, most)
    for _ in range(round_):
        value = min(value + step, most)
    return value


def source_sample(count: int, share: float, seed: int, round_: int, policy: str) -> list[int]:
    """floor(count * share) source images of a round, at least one; the release's draw."""
    generator = np.random.RandomState(seed + round_ + 1 if policy == "r" else seed)
    return generator.choice(count, max(1, int(np.floor(count * share))), replace=False).tolist() if share else []


def rare_classes(pixels: Tensor, number: int, mine_port: float) -> tuple[list[int], list[int]]:
    """(the ``number`` rarest classes, those under a share of ``mine_port``), rarest first; pixels: int64 [C]."""
    order = pixels.argsort(stable=True)
    mine = order[pixels[order].double() / pixels.sum() < mine_port]
    return order[:number].tolist(), mine.tolist()


def soft_label(p: Tensor, thresholds: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """LRENT: (y_c = (p_c / t_c)^(1/alpha) / Z [C, ...], selected [...]); Z the sum over classes, selected where Z > 1.

    Z > 1 is the paper's test: sum_c (-y_c log p_c + alpha y_c log y_c) < -sum_c y_c log t_c.
    """
    ratio = (p / thresholds.reshape(-1, *[1] * (p.dim() - 1))) ** (1 / alpha)
    z = ratio.sum(0)
    return ratio / z.clamp(min=torch.finfo(p.dtype).tiny), z > 1


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


def load_prior(path: str | Path, classes: int) -> np.ndarray:
    """float32 [C, H, W] from ``prior_array`` in a .npz or MATLAB file. Raises UserError."""
    try:
        if str(path).endswith(".mat"):
            from scipy.io import loadmat
            prior = loadmat(path)["prior_array"]
        else:
            prior = np.load(path)["prior_array"]
    except Exception as error:  # NumPy and SciPy raise many kinds for a broken file
        raise UserError(f"--spatial-prior {path}: no prior can be read from it ({error}); it should be a .npz or "
                        ".mat file with prior_array, or 'build'") from None
    prior = np.asarray(prior, np.float32)
    if prior.ndim != 3 or len(prior) != classes or not (np.isfinite(prior).all() and 0 <= prior.min() <= prior.max()
                                                        <= 1):
        raise UserError(f"--spatial-prior {path}: prior_array is {' x '.join(map(str, prior.shape))}; it should be "
                        f"{classes} x height x width (one map for each class), with values 0..1")
    return prior


def balanced_prior(prior: Tensor) -> Tensor:
    """The prior [C, H, W] with the same sum over the pixels for every class that occurs; its largest value is 1."""
    prior = prior / prior.sum((1, 2), keepdim=True).clamp(min=torch.finfo(prior.dtype).tiny)
    return prior / prior.max().clamp(min=torch.finfo(prior.dtype).tiny)


# --- losses -----------------------------------------------------------------------------------------------------------


def upsample(pred: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, align_corners=True (in training and test): [N, C, h, w] -> [N, C, *size]."""
    return F.interpolate(as_float32(pred), tuple(size), mode="bilinear", align_corners=True)


def labelled_pixels(label: Tensor) -> Tensor:
    """bool [N, H, W]: where hard labels [N, H, W] are not IGNORE, or soft ones [N, C, H, W] not all zero."""
    return label != IGNORE if label.dim() == 3 else label.sum(1) > 0


def loss_seg(log_p: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of log-probabilities [N, C, H, W] with hard or soft labels, over ``valid`` labelled pixels."""
    if label.dim() == 3:
        total = F.nll_loss(log_p, label, ignore_index=IGNORE, reduction="sum")
    else:
        total = -(log_p * label).sum()
    return total / valid.clamp(min=1e-3)


def loss_kld(log_p: Tensor, label: Tensor, weight: Tensor, regularised: Tensor) -> Tensor:
    """MRKLD: KL to uniform, sum_c -log p_c / C, over labelled pixels of samples with ``weight`` [N] above 0.

    regularised: the number of these pixels, to divide by.
    """
    pixels = labelled_pixels(label) * weight[:, None, None].to(log_p.dtype)
    return -(pixels * log_p.mean(1)).sum() / regularised.clamp(min=1e-3)


def self_training_backward(net: nn.Module, x: Tensor, label: Tensor, on_target: Tensor, *, mr_weight_kld: float,
                           run: runtime.Run, scale: Callable[[Tensor], Tensor] = lambda loss: loss
                           ) -> dict[str, Tensor]:
    """Gradients of one batch of both domains. on_target [N]: 1 for target images, 0 for source. Returns the losses."""
    with run.autocast():
        pred = logits_of(net(x))
    log_p = F.log_softmax(upsample(pred, x.shape[2:]), 1)
    counts = torch.stack([labelled_pixels(label).sum(), (labelled_pixels(label) * on_target[:, None, None]).sum()])
    valid, regularised = run.sum(counts.to(log_p.dtype)) / run.world
    losses = {"loss_seg": loss_seg(log_p, label, valid)}
    total = losses["loss_seg"]
    if mr_weight_kld:
        losses["loss_kld"] = loss_kld(log_p, label, on_target, regularised)
        total = total + mr_weight_kld * losses["loss_kld"]
    scale(total).backward()
    return losses


# --- training data of a round -----------------------------------------------------------------------------------------


def probabilities_at(logits: Tensor, size: tuple[int, int], rows: np.ndarray, cols: np.ndarray,
                     prior: Tensor | None = None) -> Tensor:
    """Probabilities [C, rows, cols] at some rows and columns of a label map (height, width), as lib.ops has them.

    logits [1 or 2, C, h, w]: of the image and, if two, of its mirror image, of which the mean is taken.
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


class Sample(NamedTuple):
    image: object      # float32 [3, H, W]; in a batch [N, 3, H, W]
    label: object      # int64 [H, W], or float32 [C, H, W] where labels are soft
    on_target: object  # 1.0 target, 0.0 source
    name: str


class RoundSet(Dataset):
    """Source images ``chosen`` and all pseudo-labelled target images, as crops; item (index, draw), draw the seed.

    soft: (folder of logits, thresholds [C], alpha, prior or None) for LRENT.
    """

    def __init__(self, source: ImageFolder, chosen: Sequence[int], target: ImageFolder | None, crop: Mapping,
                 sizes: tuple, mine: Sequence[int], mine_chance: float, seed: Sequence[int], soft: tuple | None = None):
        self.source, self.chosen, self.target, self.crop, self.sizes = source, list(chosen), target, crop, sizes
        self.mine, self.mine_chance, self.seed, self.soft = mine, mine_chance, list(seed), soft

    def __len__(self) -> int:
        return len(self.chosen) + (0 if self.target is None else len(self.target))

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, draw = key
        rng, on_target = np.random.default_rng([*self.seed, draw]), index >= len(self.chosen)
        folder, index = (self.target, index - len(self.chosen)) if on_target else (self.source, self.chosen[index])
        image, label = folder.read(index)
        found = random_crop(image, label, rng, working=self.sizes[on_target], **self.crop,
                        mine=self.mine if on_target else (), mine_chance=self.mine_chance)
        y = found.label
        if self.soft is not None:
            logits, thresholds, alpha, prior = self.soft
            kept = y != IGNORE
            soft = torch.zeros(len(thresholds), *y.shape).scatter_(0, (y * kept)[None], 1.0)
            if on_target:
                held = torch.from_numpy(np.load(logits / f"{index}.npy"))
                p = probabilities_at(held, label.shape, found.rows, found.cols, prior)
                soft[:, :len(found.rows), :len(found.cols)] = soft_label(p, thresholds, alpha)[0]
            y = soft * kept
        return Sample(found.image, y, float(on_target), folder.images[index].stem)


def soft_selection(logits: Tensor, size: tuple[int, int], thresholds: Tensor, alpha: float,
                   prior: Tensor | None) -> Tensor:
    """LRENT's hard form: argmax_c p_c / t_c, 255 where soft_label does not select; uint8 [H, W]."""
    bands = []
    for rows in np.array_split(np.arange(size[0]), -(-size[0] // 64)):  # all rows at once would be a softmax map
        p = probabilities_at(logits, size, rows, np.arange(size[1]), prior)
        label = (p / thresholds[:, None, None]).argmax(0)
        bands.append(label.where(soft_label(p, thresholds, alpha)[1], IGNORE).to(torch.uint8))
    return torch.cat(bands)


def score_label(label: Tensor, truth: np.ndarray, classes: int, ignore: int) -> Tensor:
    """Confusion matrix int64 [C, C] of one predicted label map, at the size of its truth, on the label's device."""
    resized = Image.fromarray(label.cpu().numpy()).resize(truth.shape[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(confusion_matrix(truth, np.asarray(resized), classes, ignore)).to(label.device)


def mirrored(logits: Tensor) -> Tensor | None:
    """The mirror image's logits among [1 or 2, C, h, w]."""
    return logits[1] if len(logits) > 1 else None


def require_diverse(pixels: Tensor, classes: Sequence[str], most: float, r: int, good: str) -> None:
    """Stop where one class has over ``most`` of all predicted pixels [C] of the network entering round r.

    good: the last good checkpoint. Raises UserError.
    """
    share = pixels.double() / pixels.sum()
    if share.max() > most:
        what, hint = ("the network to start from", "Try") if r == 0 else \
            (f"the network trained in round {r - 1}", f"Last good checkpoint: {good}. Try a lower --learning-rate or")
        raise UserError(f"round {r}: {what} has collapsed: {100 * share.max():.1f} % of the pixels are "
                        f"'{classes[int(share.argmax())]}' (--collapse {most}). {hint} another BN mode (--is-training, "
                        "--bn-stats target) and the --pixels that the network was trained with")


# --- the run ----------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    net: nn.Module
    data: DomainPair
    confusion: np.ndarray | None  # of the last weights on the validation set
    pixels: str


def open_data(args: argparse.Namespace) -> DomainPair:
    source = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
    target = Domain.open(args.target, args.data_dir_target, args.set, args.data_list_target)
    data = open_pair(source, target, None, None, val_set=args.val_set, num_classes=args.num_classes, ignore=IGNORE,
                     check_all=args.check_data, allow_overlap=args.allow_overlap)
    if args.subset is not None:
        if args.subset > len(data.target):
            raise UserError(f"--subset {args.subset}: the target has {len(data.target)} images")
        drawn = np.random.RandomState(args.random_seed).choice(len(data.target), args.subset, replace=False)
        data.target.images = [data.target.images[i] for i in sorted(drawn.tolist())]
    return data


def open_prior(args: argparse.Namespace, data: DomainPair, folder: Path, run: runtime.Run) -> Tensor | None:
    """The prior [C, H, W] at the size of the target's files, built once into ``folder``. Raises UserError."""
    if not args.spatial_prior:
        return None
    with Image.open(data.target.images[0]) as image:
        shape = image.height, image.width
    path = folder / "prior.npz" if args.spatial_prior == "build" else Path(args.spatial_prior)
    if args.spatial_prior == "build" and run.is_main and not (args.resume and path.exists()):
        labels = (data.source.truth(i) for i in range(len(data.source)))
        with atomic_write(path) as new:
            np.savez_compressed(new, prior_array=spatial_prior(labels, len(data.classes), shape))
    run.barrier()
    prior = torch.from_numpy(load_prior(path, len(data.classes)))
    if prior.shape[1:] != shape:
        raise UserError(f"--spatial-prior {path} is {prior.shape[2]}x{prior.shape[1]}, but the target's images are "
                        f"{shape[1]}x{shape[0]}: build one for them with --spatial-prior build")
    return balanced_prior(prior) if args.prior_norm == "class" else prior


def open_network(args: argparse.Namespace, classes: Sequence[str]) -> tuple[nn.Module, dict, str]:
    """--restore-from as (network, the conventions it was trained with, what was loaded). Raises UserError."""
    weights, meta = checkpoint.read_weights(args.restore_from)
    known = {"aspp": "full", "pixels": "imagenet", "stride_on": "1x1", **checkpoint.recognise(weights), **meta}
    known |= {key: getattr(args, key) for key in ("model", "arch", "aspp", "pixels") if getattr(args, key)}
    if known["num_classes"] != len(classes) or known.get("classes", list(classes)) != list(classes):
        raise UserError(f"{args.restore_from} tells {known['num_classes']} classes apart, not the {len(classes)} of "
                        f"this run ({', '.join(classes)}): choose --source, --target and --num-classes to fit")
    net = build(known["model"], len(classes), known["arch"], known["aspp"], known["stride_on"])
    loaded = checkpoint.load_into(net, weights, source=args.restore_from)
    if loaded.missing or loaded.mismatched:
        raise UserError(f"{args.restore_from} does not fill the network: {loaded}. Is --model or --arch wrong?")
    return net, known, f"{args.restore_from}: {loaded}"


class SelfTraining:
    """A run: its data and network, and how far its rounds have come.

    A round has two stages: "label" (with its own progress.pth) and "train".
    """

    def __init__(self, args: argparse.Namespace, run: runtime.Run, data: DomainPair):
        self.args, self.run, self.data, self.classes = args, run, data, data.classes
        self.folder = Path(args.snapshot_dir)
        self.resume_file = self.folder / "resume.pth"
        if self.resume_file.exists() and not args.resume:
            raise UserError(f"{self.folder} holds an earlier run: --resume goes on with it; else choose another "
                            "--snapshot-dir")
        self.net, self.known, self.loaded = open_network(args, data.classes)
        self.pixels = self.known["pixels"]
        set_bn_affine(self.net, args.bn_affine == "train")
        self.net.to(run.device, memory_format=run.memory_format)
        if run.world > 1 and run.device.type == "cuda" and args.is_training:
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        self.scaler, self.optimizer = run.scaler(), self.new_optimizer()
        self.prior = open_prior(args, data, self.folder, run)
        self.prior_here = None if self.prior is None else self.prior.to(run.device)
        self.reports: list[dict] = []
        self.confusion: Tensor | None = None  # of the network that entered the last round, on the validation set

        self.views_t = predict.ViewSet(data.target.images, args.input_size_target, self.pixels, (args.eval_scale,))
        self.views_v = None if data.validation is None else predict.ViewSet(
            data.validation.images, args.input_size_target, self.pixels, args.test_scales)
        with Image.open(data.target.images[0]) as image:
            self.shown_size = list(args.input_size_target or image.size)
        ids, unlabelled = written_values(data.task)
        self.to_ids = np.full(256, unlabelled, np.uint8)
        self.to_ids[:len(self.classes)] = [ids[data.task.classes.index(name)] for name in self.classes]

    def new_optimizer(self) -> torch.optim.Optimizer:
        args = self.args
        return deeplab_sgd(self.net, args.sgd, args.learning_rate, args.momentum, args.weight_decay)

    # --- the schedule

    def chosen_in(self, r: int) -> list[int]:
        """The source images of round r."""
        args = self.args
        share = portion(args.init_src_port, args.src_port_step, args.max_src_port, r)
        return source_sample(len(self.data.source), share, args.random_seed, r, args.src_sampling_policy)

    def steps_of(self, r: int) -> int:
        images = len(self.chosen_in(r)) + len(self.data.target)
        return max(1, self.args.epr * images // (self.args.batch_size * self.run.world))

    def steps_before(self, r: int) -> int:
        return sum(map(self.steps_of, range(r)))

    # --- what a killed run goes on from

    def resume(self) -> tuple[int, str, int] | None:
        """(round, stage, steps done) of resume.pth, whose state is loaded; None: there is none."""
        args = self.args
        arguments = {k: v for k, v in vars(args).items() if k not in FREE_ARGUMENTS}
        arguments["nproc_per_node"] = self.run.world
        self.arguments = json.loads(json.dumps(arguments))  # lists for tuples, as they come back
        if not self.resume_file.exists():
            if args.resume:
                self.run.say(f"note: there is no {self.resume_file} yet: starting at the beginning")
            return None
        state = checkpoint.load_resume(self.resume_file, self.net, [], [self.optimizer], self.scaler, self.arguments,
                                       FREE_ARGUMENTS)
        r, stage, done, self.reports, self.confusion = (
            state[k] for k in ("round", "stage", "iteration", "reports", "confusion"))
        if stage == "train" and "thresholds" not in self.reports[-1] and r < args.num_rounds - 1:
            stage, self.reports = "label", self.reports[:-1]  # it ended here, with fewer --num-rounds
            if self.run.is_main and (self.folder / str(r)).exists():
                os.replace(self.folder / str(r), self.work(r))
        self.loaded = f"resumed in round {r}, {stage}" + f", step {done}" * (stage == "train")
        return r, stage, done

    def save(self, r: int, stage: str, iteration: int = 0) -> None:
        if self.run.is_main:
            checkpoint.save_resume(self.resume_file, self.net, [], [self.optimizer], self.scaler, self.meta(r), round=r,
                                   stage=stage, iteration=iteration, reports=self.reports, confusion=self.confusion,
                                   arguments=self.arguments)
        self.run.barrier()

    def meta(self, r: int) -> dict[str, object]:
        known = {key: self.known[key] for key in ("model", "arch", "aspp", "stride_on", "pixels")}
        return {"script": "train_cbst.py", "round": r, **known, "task": self.args.target,
                "classes": list(self.classes), "size": self.shown_size, "align_corners": True}

    def work(self, r: int) -> Path:
        """The folder of round r until it is complete."""
        return self.folder / f"{r}.partial"

    def weights_before(self, r: int) -> str:
        """The weights that entered the round before r: the last good ones if those that enter r have gone wrong."""
        return str(self.folder / f"{r - 2}/weights.pth") if r > 1 else self.args.restore_from

    def enter(self, r: int) -> None:
        """The network is what enters round r; as the result of round r - 1 it is saved, then that round is complete."""
        args, data = self.args, self.data
        if args.bn_stats != "running":
            of_source = self.chosen_in(r) if args.bn_stats == "both" else []
            images = data.target.images + [data.source.images[i] for i in of_source]
            self.net.load_state_dict(predict.reestimate_bn(self.net, images, args.input_size_target, self.pixels,
                                                           self.run, args.num_workers).state_dict())
        if self.run.is_main and r:
            checkpoint.save_weights(self.net, self.work(r - 1) / "weights.pth", self.meta(r))
        self.save(r, "label")

    # --- stage "label"

    def label(self, r: int, stop: runtime.StopRequest) -> bool:
        """Score the network that enters round r and, but in the last one, label the target. False: told to leave."""
        args, run, c, last = self.args, self.run, len(self.classes), r == self.args.num_rounds - 1
        net, work, report = predict.prepare(self.net), self.work(r), {"round": r}
        progress = rounds.Progress(work / "progress.pth", run, {
            "hist": ops.new_histogram(c, run.device), "fine": ops.new_histogram(c, run.device, fine=True),
            "scored": torch.zeros(c, c, dtype=torch.int64, device=run.device),
            "counted": torch.zeros(256, dtype=torch.int64, device=run.device)}, args.save_pred_every, stop)
        load = partial(predict.image_logits, net, self.views_t, run=run, flip=args.test_flipping,
                       workers=args.num_workers, cache={}, room=args.cache_mb << 20)
        try:
            report |= self.score(r, net, progress)
            found, predicted = (None, None) if last else self.select(r, progress, load)
        except ValueError as error:
            raise UserError(f"round {r}: {error}. Last good checkpoint: {self.weights_before(r)}") from None
        if not last:
            self.write_labels(r, found, progress, load)
        if progress.left:
            run.say(f"stopped in round {r}; --resume goes on from {self.folder}")
            return False
        if not last:
            report |= self.selection_report(r, found, predicted, run.sum(progress.counts["counted"]))
            run.say(f"round {r}: portion {report['target_portion']:.3g}, {100 * report['labelled_share']:.1f} % of the "
                    f"pixels labelled, {report['source_images']} source images; rare: "
                    f"{', '.join(report['rare']) or 'none'}; mined: {', '.join(report['mine']) or 'none'}\n"
                    f"{rounds.round_table(report)}")
        self.reports = [*self.reports, report]
        if run.is_main:
            rounds.write_text(work / "report.json", json.dumps(report, indent=1) + "\n")
            rounds.write_rounds(self.reports, self.folder)
        self.optimizer = self.new_optimizer()
        self.save(r, "train")
        return True

    def score(self, r: int, net: nn.Module, progress: rounds.Progress) -> dict[str, object]:
        """The validation set's entries of the report; the best weights so far are kept."""
        args, run, data, classes = self.args, self.run, self.data, self.classes
        load = partial(predict.load_views, self.views_v, workers=args.num_workers)
        for index, item in progress.sweep(0, 0 if self.views_v is None else len(self.views_v), load):
            label = predict.predict(net, item.tensors, item.image.shape[1::-1], run, flip=args.score_flipping)
            progress.counts["scored"] += score_label(label, data.validation.truth(index), len(classes),
                                                     data.task.ignore)
        if self.views_v is None or progress.left:
            return {}
        self.confusion = run.sum(progress.counts["scored"]).cpu()
        score = 100 * mean_iou(self.confusion.numpy())
        best = max((x["mIoU"] for x in self.reports), default=None)
        if run.is_main and (best is None or score > best):
            checkpoint.save_weights(self.net, self.folder / "best.pth", {**self.meta(r), "mIoU": score})
        run.say(f"round {r}: target mIoU {score:.2f}"
                + ("" if best is None else f" (best so far {max(best, score):.2f})"))
        if 0 < r == args.num_rounds - 1:
            require_diverse(self.confusion.sum(0), classes, args.collapse, r, self.weights_before(r))
        return {"mIoU": score, "iou": iou_dict(classes, self.confusion.numpy())["iou"]}

    def select(self, r: int, progress: rounds.Progress, load: Callable
               ) -> tuple[ops.Thresholds | None, Tensor | None]:
        """Zou et al., algorithm 2: the k-th largest confidence of each class; (thresholds, predicted pixels [C])."""
        args, run = self.args, self.run
        options = dict(prior=self.prior_here, ds_rate=args.ds_rate, value=args.kc_value)
        hist, fine = progress.counts["hist"], progress.counts["fine"]
        threshold = partial(ops.select_threshold, portion=self.target_portion(r), pooled=args.kc_policy == "global")
        for index, (shape, logits) in progress.sweep(1, len(self.views_t), load):
            if self.prior is not None and self.prior.shape[1:] != shape:
                raise UserError(f"{self.data.target.images[index]} is {shape[1]}x{shape[0]}, the spatial prior "
                                f"{self.prior.shape[2]}x{self.prior.shape[1]}: target images must have its size")
            ops.confidence_histogram_(hist, logits[0], shape, flipped=mirrored(logits), **options)
        if progress.left:
            return None, None
        counted = run.sum(hist)
        predicted, bins = ops.predicted_pixels(counted), threshold(counted).bins
        del counted  # 2 MiB a class
        require_diverse(predicted, self.classes, args.collapse, r, self.weights_before(r))
        for _, (shape, logits) in progress.sweep(2, len(self.views_t), load):
            ops.refine_histogram_(fine, bins, logits[0], shape, flipped=mirrored(logits), **options)
        return None if progress.left else threshold(run.sum(hist), fine=run.sum(fine)), predicted

    def target_portion(self, r: int) -> float:
        return portion(self.args.init_tgt_port, self.args.tgt_port_step, self.args.max_tgt_port, r)

    def labelled(self, r: int) -> ImageFolder:
        """The target with the labels of round r."""
        folder = copy.copy(self.data.target)
        folder.labels = [rounds.label_file(self.work(r) / "pseudo_labels", folder, i) for i in range(len(folder))]
        return folder

    def write_labels(self, r: int, found: ops.Thresholds | None, progress: rounds.Progress, load: Callable) -> None:
        """pseudo_labels with their description, and source.txt."""
        args, work, labelled = self.args, self.work(r), self.labelled(r)
        for index, (shape, logits) in progress.sweep(3, len(self.views_t), load):
            if args.lr_weight_ent:
                (work / "logits").mkdir(parents=True, exist_ok=True)
                np.save(work / f"logits/{index}.npy", logits.cpu().numpy())
                label = soft_selection(logits.cpu(), shape, found.value.cpu(), args.lr_weight_ent, self.prior)
            else:
                label = ops.pseudo_label(logits[0], found.value, shape, flipped=mirrored(logits),
                                         prior=self.prior_here)
            label = label.cpu().numpy()
            counted = torch.from_numpy(np.bincount(label.ravel(), minlength=256))
            progress.counts["counted"] += counted.to(self.run.device)
            rounds.write_png(Image.fromarray(self.to_ids[label]), labelled.labels[index])
            if args.save_color:
                rounds.write_png(visual.colour_map(label, self.data.palette),
                                 rounds.label_file(work / "pseudo_labels_color", self.data.target, index))
        if self.run.is_main and not progress.left:
            rounds.write_description(labelled, work, self.folder / str(r))
            source = self.data.source
            rounds.write_list([source.images[i] for i in self.chosen_in(r)], source.domain.root, work / "source.txt")

    def selection_report(self, r: int, found: ops.Thresholds, predicted: Tensor, counted: Tensor) -> dict[str, object]:
        """The labels' entries of the report. counted: pixels [256] by label."""
        classes = self.classes
        rare, mine = rare_classes(predicted, self.args.rare_cls_num, self.args.mine_port)
        report = {"target_portion": self.target_portion(r), "source_images": len(self.chosen_in(r))}
        report |= {key: dict(zip(classes, values.tolist(), strict=True)) for key, values in (
            ("thresholds", found.value), ("selected", found.selected), ("predicted", predicted),
            ("labelled", counted[:len(classes)]))}
        return report | {"labelled_share": sum(report["labelled"].values()) / int(counted.sum()),
                         "rare": [classes[i] for i in rare], "mine": [classes[i] for i in mine]}

    # --- stage "train"

    def training_set(self, r: int) -> RoundSet:
        """The source subset and the pseudo-labels of round r."""
        args, data, work, report, labelled = self.args, self.data, self.work(r), self.reports[r], self.labelled(r)
        labelled.domain = Domain.open(work / "pseudo_labels.json")
        labelled.table = label_table(labelled.domain.description, self.classes)
        labelled.table[labelled.table == labelled.domain.description.ignore] = IGNORE
        if self.run.is_main and args.save_num_images:
            rounds.draw_labels(data, labelled, args.save_num_images, work / "pictures.png")
        soft = None
        if args.lr_weight_ent:
            soft = work / "logits", torch.tensor(list(report["thresholds"].values())), args.lr_weight_ent, self.prior
        crop = dict(crop=args.crop_size, pixels=self.pixels, scale=args.random_scale, mirrored=args.random_mirror)
        return RoundSet(data.source, self.chosen_in(r), labelled, crop, (args.input_size, args.input_size_target),
                        [self.classes.index(name) for name in report["mine"]], args.mine_chance,
                        (args.random_seed, r), soft)

    def fit(self, r: int, first_step: int, stop: runtime.StopRequest, log: runtime.Log) -> bool:
        """The training of round r from a step on. False: told to leave."""
        args, run, steps, offset = self.args, self.run, self.steps_of(r), self.steps_before(r)
        batches = endless(self.training_set(r), args.batch_size, args.num_workers, seed=1000 * args.random_seed + r,
                          start=first_step, rank=run.rank, world=run.world, pin=run.device.type == "cuda")
        set_train_mode(self.net, freeze_bn=not args.is_training)
        for i in range(first_step, steps):
            lr = set_poly_lr(self.optimizer, args.learning_rate, i, steps, args.power)
            self.optimizer.zero_grad()
            batch = next(batches)
            losses = self_training_backward(
                self.net, run.place(batch.image), batch.label.to(run.device), batch.on_target.to(run.device),
                mr_weight_kld=args.mr_weight_kld, run=run, scale=self.scaler.scale)
            values = run.mean_values({key: loss.detach() for key, loss in losses.items()})
            where = offset + i + 1, batch.name, Path(self.weights_before(r + 1))
            runtime.require_finite(values, *where)
            run.average_gradients([self.net])
            self.scaler.step(self.optimizer)
            self.scaler.update()

            done = i + 1
            runtime.require_finite_weights([self.net], *where)
            log.step()
            if done % args.log_every == 0 or done == steps:
                log.losses(offset + done, {"round": r, **values, "lr": lr})
            leaving = run.any(stop.signal is not None)
            if leaving or done % args.save_pred_every == 0:
                self.save(r, "train", done)
            if leaving:
                run.say(f"stopped in round {r} after step {done} of {steps}; --resume goes on from {self.folder}")
                return False
        return True


def say_header(this: SelfTraining, first: int) -> None:
    args, run, data = this.args, this.run, this.data
    kld = f"MRKLD with weight {args.mr_weight_kld} (what --mr-weight-kld {args.mr_weight_kld ** 0.5:.3g} did in the " \
          "release)" if args.mr_weight_kld else ""
    runtime.header(run, {
        "kernels": ops.backend(), "weights": this.loaded,
        "network": "{model} {arch}, {n} classes, ASPP {aspp}".format(**this.known, n=len(data.classes)),
        "batch norm": f"weights {'train' if args.bn_affine == 'train' else 'frozen'}, statistics "
                      f"{'update' if args.is_training else 'frozen'}"
                      + {"running": "", "target": ", re-estimated on the target for each round",
                         "both": ", re-estimated on both domains for each round"}[args.bn_stats],
        "pixels": this.pixels,
        "source": f"{len(data.source)} images of {args.source}, {len(this.chosen_in(0))} in round 0",
        "target": f"{len(data.target)} images of {args.target} to label",
        "validation": "none" if data.validation is None else f"{len(data.validation)} images of {args.target}",
        "thresholds": {"cb": "one per class", "global": "one for all classes"}[args.kc_policy]
                      + f" ({args.kc_value})" + f", spatial prior {args.spatial_prior}" * (this.prior is not None),
        "losses": ", ".join(x for x in ("soft labels (LRENT)" if args.lr_weight_ent else "hard labels", kld) if x),
        "batch": f"{args.batch_size * run.world} images a step = {args.batch_size} x {run.world} processes",
        "rounds": f"{first} to {args.num_rounds - 1}, {this.steps_before(args.num_rounds - 1)} steps, SGD {args.sgd}",
        "output": this.folder})


def train(args: argparse.Namespace) -> Outcome | int:
    """One run; returns its outcome, or an exit code when it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    data = open_data(args)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        return 0
    this = SelfTraining(args, run, data)
    folder, found = this.folder, this.resume()
    first, stage, first_step = found or (0, "label", 0)
    say_header(this, first)
    if args.compile:
        this.net.compile()
    if not found:
        this.enter(0)
    if args.subset is not None and run.is_main:
        rounds.write_list(data.target.images, data.target.domain.root, folder / "subset.txt")
    tensorboard = Path(args.log_dir or folder) if args.tensorboard else None
    log = runtime.Log(run, folder / "log.jsonl", this.steps_before(first) + first_step,
                      this.steps_before(args.num_rounds - 1), tensorboard)

    with runtime.StopRequest() as stop:
        for r in range(first, args.num_rounds):
            if run.is_main:
                rounds.complete(folder, r, drop=("progress.pth", "logits"))
            run.barrier()
            last = r == args.num_rounds - 1
            if (stage == "label" and not this.label(r, stop)) or not (last or this.fit(r, first_step, stop, log)):
                log.close()
                return 128 + (stop.signal or 0)
            if not last:
                this.enter(r + 1)
            stage, first_step = "label", 0
    if run.is_main:
        rounds.complete(folder, args.num_rounds, drop=("progress.pth", "logits"))
    log.close()
    confusion = None if this.confusion is None else this.confusion.numpy()
    if confusion is not None:
        run.say(iou_table(data.classes, {"last": confusion}))
        scores = [report["mIoU"] for report in this.reports]
        run.say(f"target mIoU by round: {', '.join(f'{x:.2f}' for x in scores)}; last {scores[-1]:.2f}, best "
                f"{max(scores):.2f} (round {int(np.argmax(scores))}, chosen on the validation set)")
    run.barrier()
    return Outcome(this.net, data, confusion, this.pixels)


def train_start(args: argparse.Namespace, path: Path) -> None:
    """The demo's start: a network from random weights, trained on all source images."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    data = open_data(args)
    net = build(args.model or "Deeplab", len(data.classes), args.arch, args.aspp or "full")
    set_bn_affine(net, True)
    set_train_mode(net.to(run.device, memory_format=run.memory_format))
    optimizer = deeplab_sgd(net, args.sgd, DEMO_START_RATE, args.momentum, args.weight_decay)
    crop = dict(crop=args.crop_size, pixels=args.pixels, scale=False, mirrored=True)
    images = RoundSet(data.source, range(len(data.source)), None, crop, (args.input_size, None), (), 0.0,
                      [args.random_seed])
    batches = endless(images, 1, args.num_workers, seed=args.random_seed, rank=run.rank, world=run.world)
    for i in range(DEMO_START_STEPS):
        set_poly_lr(optimizer, DEMO_START_RATE, i, DEMO_START_STEPS, 0.9)
        optimizer.zero_grad()
        batch = next(batches)
        losses = self_training_backward(net, run.place(batch.image), batch.label.to(run.device),
                                        batch.on_target.to(run.device), mr_weight_kld=0.0, run=run)
        run.average_gradients([net])
        optimizer.step()
        if (i + 1) % 50 == 0:
            run.say(f"start: step {i + 1} of {DEMO_START_STEPS}, loss {losses['loss_seg'].item():.3f}")
    if run.is_main:
        checkpoint.save_weights(net, path, {
            "script": "train_cbst.py", "model": args.model or "Deeplab", "arch": args.arch,
            "aspp": args.aspp or "full", "stride_on": "1x1", "pixels": args.pixels, "task": args.target,
            "classes": list(data.classes), "size": list(args.input_size_target), "align_corners": True})
    run.barrier()


def demo(args: argparse.Namespace) -> int:
    """Train on the rendered source, then rounds; print the tables, draw result/demo_cbst/report.png."""
    args.restore_from = args.restore_from or f"{args.snapshot_dir}/start.pth"
    if not Path(args.restore_from).exists():
        train_start(args, Path(args.restore_from))
    outcome = train(args)
    if isinstance(outcome, int):
        return outcome
    run = runtime.Run(next(outcome.net.parameters()).device, 0, 1, "off")
    weights, meta = checkpoint.read_weights(args.restore_from)
    start = build(meta["model"], len(outcome.data.classes), meta["arch"], meta["aspp"], meta["stride_on"])
    start.load_state_dict(weights)
    confusion = predict.score(start.to(run.device), outcome.data.validation, args.input_size_target, outcome.pixels,
                              len(outcome.data.classes), run, workers=args.num_workers)
    predict.compare((start, confusion), (outcome.net, outcome.confusion), outcome.data, args.input_size_target,
                    outcome.pixels, run, Path("result/demo_cbst/report.png"), bn_stats="running",
                    workers=args.num_workers)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_demo(Path("data/demo"), seed=args.random_seed)
        return demo(args)
    outcome = train(args)
    return outcome if isinstance(outcome, int) else 0


if __name__ == "__main__":
    runtime.cli(main)
