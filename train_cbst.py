"""CBST: class-balanced self-training, and its confidence-regularised successors.

Zou, Yu, Kumar, Wang: "Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced Self-Training",
ECCV 2018, https://arxiv.org/abs/1810.07911. Zou, Yu, Liu, Kumar, Wang: "Confidence Regularized Self-Training", ICCV
2019, https://arxiv.org/abs/1908.09822. Results: docs/cbst.md.

    python train_cbst.py --demo                                                     # a miniature pair, on a laptop
    python train_cbst.py --restore-from snapshots/start/GTA5_150000.pth             # GTA5 to Cityscapes
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
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lib import checkpoint, flags, ops, predict, runtime
from lib.datasets.description import Domain
from lib.datasets.folder import DomainPair, ImageFolder, endless, open_pair
from lib.datasets.prior import open_prior
from lib.datasets.pseudo_labels import (
    IGNORE,
    PseudoLabels,
    complete_rounds,
    remove_rounds,
    reopen_round,
    write_list,
    write_rounds,
    write_text,
)
from lib.datasets.transforms import to_tensor
from lib.demo.comparison import compare
from lib.demo.streets import render_demo
from lib.errors import UserError
from lib.files import atomic_write
from lib.metrics import confusion_matrix, iou_dict, iou_table, mean_iou, selection_table
from lib.models.deeplab import MODELS, build, logits_of, set_bn_affine, set_train_mode, upsample
from lib.optim import deeplab_sgd, set_poly_lr
from lib.session import Passes, Session

PASSES = ("score", "count", "refine", "label")  # of a round, over the validation set and then three times the target
# --demo: settings for a ResNet-18 from random weights on the rendered pair; flags given override them.
DEMO = dict(**flags.DEMO_DATA, snapshot_dir="snapshots/demo_cbst/{seed}", arch="resnet18", input_size=(192, 96),
            input_size_target=(192, 96), crop_size=(192, 96), learning_rate=5e-4, power=0.9, num_rounds=4, epr=2,
            init_src_port=0.2, max_src_port=0.5, src_port_step=0.05, spatial_prior="build", prior_norm="class",
            eval_scale=1.0, test_scales=(1.0,), is_training=True, pixels="caffe", bn_stats="target")
DEMO_START_STEPS, DEMO_START_RATE = 400, 2.5e-3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__)
    method = p.add_argument_group("method")
    method.add_argument("--num-rounds", type=flags.up_to(1000), default=4, help="the last one only scores")
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
    net = flags.add_network(p, trained=True)
    net.add_argument("--model", choices=list(MODELS), help="default: recognised by the checkpoint's keys")
    net.add_argument("--aspp", choices=["released", "full"],
                     help="rates summed: 6, 12 or all four (default: the checkpoint's, else full)")
    net.add_argument("--bn-affine", choices=["train", "frozen"], default="frozen", help="BN weights and biases")
    net.add_argument("--is-training", action=argparse.BooleanOptionalAction, default=False,
                     help="BN statistics update while training")
    net.add_argument("--bn-stats", choices=["running", "target", "both"], default="running",
                     help="each round begins by re-estimating BN statistics on the target, or on it and the next "
                          "round's source images")
    data = flags.add_data(p)
    data.add_argument("--subset", type=flags.count, metavar="N",
                      help="use N target images, drawn by --seed and listed in subset.txt")
    data.add_argument("--allow-overlap", action="store_true", help="label images that are scored too")
    data.add_argument("--crop-size", type=flags.size, default=(1024, 512), help="width,height in training")
    data.add_argument("--random-scale", action=argparse.BooleanOptionalAction, default=True,
                      help="scale training images by 0.5, 0.6, .. 1.5")
    data.add_argument("--random-mirror", action=argparse.BooleanOptionalAction, default=True)
    data.add_argument("--eval-scale", type=flags.scale, default=0.9, help="of target images while they are labelled")
    data.add_argument("--test-flipping", action="store_true", help="average with the mirrored image while labelling")
    data.add_argument("--test-scales", type=flags.scales, default=(0.9, 1.0, 1.2),
                      help="whose logits are averaged for scores")
    data.add_argument("--score-flipping", action=argparse.BooleanOptionalAction, default=True,
                      help="average with the mirrored image for scores")
    opt = flags.add_optimisation(p)
    opt.add_argument("--sgd", choices=["released", "once"], default="released",
                     help="released: the backbone's updates are repeated as in the release")
    out = flags.add_run(p, aliases={"--snapshot-dir": "--save"}, evaluations=False)
    out.add_argument("--save-color", action="store_true", help="also pseudo_labels_color: every label in colours")
    out.add_argument("--cache-mb", type=flags.natural, default=64,
                     help="memory for logits between the passes over the target")
    p.set_defaults(batch_size=2, learning_rate=5e-5, power=0.0,
                   save_pred_every=500, save_num_images=4, random_seed=3)
    args = flags.parse(p, argv, DEMO)
    method = "lrent" if args.lr_weight_ent else "mrkld" if args.mr_weight_kld else \
        "st" if args.kc_policy == "global" else "cbst"
    args.snapshot_dir = args.snapshot_dir or flags.run_folder(
        method, args.source, args.target, sp=args.spatial_prior, balanced=args.prior_norm == "class")
    if not args.restore_from and not args.demo and not args.check_data:
        p.error("--restore-from FILE is needed: rounds begin from a source-trained network, such as "
                "train_adaptsegnet.py --source-only makes")
    return args


# --- selection: p are probabilities [C, ...], thresholds [C] ----------------------------------------------------------


def portion(init: float, step: float, maximum: float, round_: int) -> float:
    """The portion of round 0, 1, ...: one step more each round, added up as in the release, up to ``maximum``."""
    value = min(init, maximum)
    for _ in range(round_):
        value = min(value + step, maximum)
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


# --- losses -----------------------------------------------------------------------------------------------------------


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


def step(net: nn.Module, x: Tensor, label: Tensor, on_target: Tensor, *, mr_weight_kld: float, run: runtime.Run,
         scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict[str, Tensor]:
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


class Crop(NamedTuple):
    """What random_crop returns; rows and cols are the places in the label file of the crop's pixels."""

    image: Tensor     # float32 [3, h, w]
    label: Tensor     # int64 [h, w]
    rows: np.ndarray  # int64, at most h
    cols: np.ndarray  # int64, at most w


def random_crop(image: Image.Image, label: np.ndarray, rng: np.random.Generator, *, working: tuple[int, int] | None,
            crop: tuple[int, int], pixels: str, scale: bool, mirrored: bool, mine: Sequence[int] = (),
            mine_chance: float = 0.0, ignore: int = 255) -> Crop:
    """A training crop (width, height) of an image of the ``working`` size (None: its own) at a random scale.

    With chance ``mine_chance``, where the label holds a class of ``mine``, one such class and one of its pixels are
    drawn, and the crop is centred there, shifted back inside. Images smaller than the crop are padded.
    """
    factor = rng.integers(5, 16) / 10 if scale else 1.0
    w, h = (max(1, round(n * factor)) for n in working or image.size)
    (height, width), (cw, ch) = label.shape, crop
    room_x, room_y = max(w - cw, 0), max(h - ch, 0)
    x, y = rng.integers(room_x + 1), rng.integers(room_y + 1)
    present = [c for c in mine if (label == c).any()]
    if present and rng.random() < mine_chance:
        place = rng.choice(np.flatnonzero(label == rng.choice(present)))
        x = np.clip(round((place % width + 0.5) * w / width - cw / 2), 0, room_x)
        y = np.clip(round((place // width + 0.5) * h / height - ch / 2), 0, room_y)
    n, m = min(cw, w), min(ch, h)
    step_x, step_y = image.width / w, image.height / h
    picture = image.resize((n, m), Image.Resampling.BICUBIC,
                           box=(x * step_x, y * step_y, min((x + n) * step_x, image.width),
                                min((y + m) * step_y, image.height)))
    rows = ((np.arange(y, y + m) + 0.5) * height / h).astype(np.int64)
    cols = ((np.arange(x, x + n) + 0.5) * width / w).astype(np.int64)
    content = to_tensor(picture, pixels)
    if mirrored and rng.random() < 0.5:
        content, cols = content.flip(2), cols[::-1].copy()
    out = torch.full((ch, cw), ignore, dtype=torch.int64)
    out[:m, :n] = torch.from_numpy(label[rows[:, None], cols].astype(np.int64))
    return Crop(F.pad(content, (0, cw - n, 0, ch - m)), out, rows, cols)


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
                stored = torch.from_numpy(np.load(logits / f"{index}.npy"))
                p = probabilities_at(stored, label.shape, found.rows, found.cols, prior)
                soft[:, :len(found.rows), :len(found.cols)] = soft_label(p, thresholds, alpha)[0]
            y = soft * kept
        return Sample(found.image, y, float(on_target), folder.images[index].stem)


# --- the passes of a round --------------------------------------------------------------------------------------------


class Labelling(NamedTuple):
    """How the target is labelled: the network in its fast form, the images, and what --help says of the rest."""

    net: nn.Module
    views: predict.ViewSet
    prior: Tensor | None
    portion: float
    args: argparse.Namespace
    run: runtime.Run
    cache: dict

    def load(self, indices: list[int]) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """((height, width) of the file, logits [1 or 2, C, h, w]) of each image."""
        return predict.image_logits(self.net, self.views, indices, self.run, flip=self.args.test_flipping,
                                    workers=self.args.num_workers, cache=self.cache, room=self.args.cache_mb << 20)


def score(net: nn.Module, data: DomainPair, views: predict.ViewSet, passes: Passes, run: runtime.Run, *, flip: bool,
          workers: int) -> Tensor:
    """Pass "score": the confusion matrix int64 [C, C] of ``net`` on the validation set."""
    load = partial(predict.load_views, views, workers=workers)
    for index, item in passes.over("score", len(views), load):
        label = predict.predict(net, item.tensors, item.image.shape[1::-1], run, flip=flip)
        passes.counts["scored"] += score_label(label, data.validation.truth(index), len(data.classes),
                                               data.task.ignore)
    return run.sum(passes.counts["scored"]).cpu()


def choose_thresholds(how: Labelling, passes: Passes, require_diverse: Callable[[Tensor], None]
                      ) -> tuple[ops.Thresholds | None, Tensor | None]:
    """Passes "count" and "refine", Zou et al., algorithm 2: the k-th largest confidence of each class.

    Returns (thresholds, predicted pixels [C]), or None in place of what a stop request prevented.
    """
    args, run = how.args, how.run
    options = dict(prior=how.prior, ds_rate=args.ds_rate, value=args.kc_value, return_maps=False)
    threshold = partial(ops.select_threshold, portion=how.portion, pooled=args.kc_policy == "global")
    for index, (shape, logits) in passes.over("count", len(how.views), how.load):
        if how.prior is not None and how.prior.shape[1:] != shape:
            raise UserError(f"{how.views.images[index]} is {shape[1]}x{shape[0]}, the spatial prior "
                            f"{how.prior.shape[2]}x{how.prior.shape[1]}: target images must have its size")
        ops.confidence_histogram_(passes.counts["hist"], logits[0], shape, flipped=mirrored(logits), **options)
    if passes.leaving:
        return None, None
    counted = run.sum(passes.counts["hist"])
    predicted, bins = ops.predicted_pixels(counted), threshold(counted).bins
    del counted  # 2 MiB a class
    require_diverse(predicted)
    for _, (shape, logits) in passes.over("refine", len(how.views), how.load):
        ops.refine_histogram_(passes.counts["fine"], bins, logits[0], shape, flipped=mirrored(logits), **options)
    if passes.leaving:
        return None, predicted
    return threshold(run.sum(passes.counts["hist"]), fine=run.sum(passes.counts["fine"])), predicted


def write_labels(how: Labelling, passes: Passes, thresholds: Tensor, files: PseudoLabels) -> Tensor:
    """Pass "label": argmax_c p_c / t_c where it is at least 1, into ``files``. Returns the pixels [256] by label."""
    for index, (shape, logits) in passes.over("label", len(how.views), how.load):
        if how.args.lr_weight_ent:
            (files.work / "logits").mkdir(parents=True, exist_ok=True)
            with atomic_write(files.work / f"logits/{index}.npy") as new:
                np.save(new, logits.cpu().numpy())
            prior = None if how.prior is None else how.prior.cpu()
            label = soft_selection(logits.cpu(), shape, thresholds.cpu(), how.args.lr_weight_ent, prior)
        else:
            label = ops.pseudo_label(logits[0], thresholds, shape, flipped=mirrored(logits), prior=how.prior)
        label = label.cpu().numpy()
        passes.counts["labelled"] += torch.from_numpy(np.bincount(label.ravel(), minlength=256)).to(how.run.device)
        files.write(index, label, how.args.save_color)
    return how.run.sum(passes.counts["labelled"])


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


# --- reports ----------------------------------------------------------------------------------------------------------


def selection_report(classes: Sequence[str], thresholds: ops.Thresholds, predicted: Tensor, labelled: Tensor, *,
                     rare_cls_num: int, mine_port: float) -> dict[str, object]:
    """What a round selected, by class name. predicted: pixels [C]; labelled: pixels [256] by label."""
    rare, mine = rare_classes(predicted, rare_cls_num, mine_port)
    report = {key: dict(zip(classes, values.tolist(), strict=True)) for key, values in (
        ("thresholds", thresholds.value), ("selected", thresholds.selected), ("predicted", predicted),
        ("labelled", labelled[:len(classes)]))}
    return report | {"labelled_share": sum(report["labelled"].values()) / int(labelled.sum()),
                     "rare": [classes[i] for i in rare], "mine": [classes[i] for i in mine]}


# --- the run ----------------------------------------------------------------------------------------------------------


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


def open_network(args: argparse.Namespace, classes: Sequence[str]) -> tuple[nn.Module, dict, str]:
    """--restore-from as (network, the conventions it was trained with, what was loaded). Raises UserError."""
    net, known, report = checkpoint.open_network(
        args.restore_from, {"aspp": "full", "pixels": "imagenet"}, model=args.model, arch=args.arch, aspp=args.aspp,
        pixels=args.pixels)
    if list(known.get("classes", classes)) != list(classes) or known["num_classes"] != len(classes):
        raise UserError(f"{args.restore_from} tells {known['num_classes']} classes apart, not the {len(classes)} of "
                        f"this run ({', '.join(classes)}): choose --source, --target and --num-classes to fit")
    if known["model"] not in MODELS:
        raise UserError(f"{args.restore_from} is a {known['model']}; self-training is for {', '.join(MODELS)}")
    return net, known, f"{args.restore_from}: {report}"


class Schedule(NamedTuple):
    """Source images and training steps of each round."""

    args: argparse.Namespace
    sources: int   # images of the source
    targets: int   # images to label
    world: int

    def source_images(self, r: int) -> list[int]:
        """Places of the source images of round r."""
        args = self.args
        share = portion(args.init_src_port, args.src_port_step, args.max_src_port, r)
        return source_sample(self.sources, share, args.random_seed, r, args.src_sampling_policy)

    def target_portion(self, r: int) -> float:
        return portion(self.args.init_tgt_port, self.args.tgt_port_step, self.args.max_tgt_port, r)

    def steps(self, r: int) -> int:
        images = len(self.source_images(r)) + self.targets
        return max(1, self.args.epr * images // (self.args.batch_size * self.world))

    def steps_before(self, r: int) -> int:
        return sum(map(self.steps, range(r)))


class Rounds:
    """How far a run has come. A round is labelled (stage "label"), then trained on (stage "train")."""

    def __init__(self):
        self.number, self.stage = 0, "label"
        self.reports: list[dict] = []         # of the rounds that were labelled, or at the end only scored
        self.confusion: Tensor | None = None  # of the network that entered the last one, on the validation set

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def train(args: argparse.Namespace) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    folder = Path(args.snapshot_dir)
    data = open_data(args)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        raise SystemExit(0)

    if args.is_training and min(args.crop_size) < 17:
        raise UserError(f"--is-training needs crops of at least 17x17 for BN statistics, not {args.crop_size}: choose "
                        "a larger --crop-size")
    net, known, loaded = open_network(args, data.classes)
    pixels = known["pixels"]
    set_bn_affine(net, args.bn_affine == "train")
    net = run.place_net(net, sync_bn=args.is_training, compiled=args.compile)
    optimizer = deeplab_sgd(net, args.sgd, args.learning_rate, args.momentum, args.weight_decay)
    scaler = run.scaler()
    schedule, rounds = Schedule(args, len(data.source), len(data.target), run.world), Rounds()
    views = predict.ViewSet(data.target.images, args.input_size_target, pixels, (args.eval_scale,))
    validation_views = None if data.validation is None else predict.ViewSet(
        data.validation.images, args.input_size_target, pixels, args.test_scales)
    with Image.open(data.target.images[0]) as image:
        file_size = image.size
    size = list(args.input_size_target or file_size)

    def meta_of(_: int) -> dict[str, object]:
        return {"script": "train_cbst.py", "round": rounds.number, "task": args.target, "classes": list(data.classes),
                "size": size, "align_corners": True,
                **{key: known[key] for key in ("model", "arch", "aspp", "stride_on", "pixels")}}

    def labels_of(r: int) -> PseudoLabels:
        return PseudoLabels(data, work=folder / f"{r}.partial", final=folder / str(r))

    def weights_before(r: int) -> str:
        """The weights that entered the round before r: the last good ones if those that enter r have gone wrong."""
        return str(folder / f"{r - 2}/weights.pth") if r > 1 else args.restore_from

    def require_diverse(r: int, pixels: Tensor) -> None:
        """Stop where one class has almost all predicted pixels [C] of the network that enters round r."""
        share = pixels.double() / pixels.sum()
        if share.max() > args.collapse:
            what, advice = ("the network to start from", "Try") if r == 0 else (
                f"the network trained in round {r - 1}",
                f"Last good checkpoint: {weights_before(r)}. Try a lower --learning-rate or")
            raise UserError(f"round {r}: {what} has collapsed: {100 * share.max():.1f} % of the pixels are "
                            f"'{data.classes[int(share.argmax())]}' (--collapse {args.collapse}). {advice} another BN "
                            "mode (--is-training, --bn-stats target) and the --pixels of the network's training")

    def enter(r: int) -> None:
        """The network is what enters round r; as the result of round r - 1 it is saved, and that round is complete."""
        if args.bn_stats != "running":
            of_source = schedule.source_images(r) if args.bn_stats == "both" else []
            images = data.target.images + [data.source.images[i] for i in of_source]
            net.load_state_dict(predict.reestimate_bn(net, images, args.input_size_target, pixels, run,
                                                      args.num_workers).state_dict())
        rounds.number, rounds.stage = r, "label"
        if run.is_main and r:
            checkpoint.save_weights(net, folder / f"{r - 1}.partial/weights.pth", meta_of(0))
        session.save()

    labels_of(0)  # refuses a folder that cannot hold a data set
    prior_of_run = partial(open_prior, args.spatial_prior, data.source, len(data.classes), file_size[::-1],
                           args.prior_norm, folder / "prior.npz", rebuild=not args.resume, run=run)
    # a bad file is refused before anything is written; a prior is built where the run may write
    prior = None if args.spatial_prior == "build" else prior_of_run()
    last = args.num_rounds - 1
    with Session(run, args, folder, {"": net}, [optimizer], scaler=scaler, meta=meta_of,
                 extra_state={"rounds": rounds}, free={"num_rounds", "save_color", "cache_mb"}) as session:
        if args.spatial_prior == "build":
            prior = prior_of_run()
        session.header(header(args, run, data, known, loaded, schedule, rounds))
        if session.resumed:
            session.last_good = Path(weights_before(rounds.number))
            if rounds.stage == "train" and "thresholds" not in rounds.reports[-1] and rounds.number < last:
                # a run that ended with fewer --num-rounds only scored its last round: it is labelled now
                rounds.stage, rounds.reports = "label", rounds.reports[:-1]
                reopen_round(folder, rounds.number, run)
        else:
            if args.overwrite and run.is_main:
                remove_rounds(folder)
            enter(0)
        if args.subset is not None and run.is_main:
            write_list(data.target.images, data.target.domain.root, folder / "subset.txt")

        for r in range(rounds.number, args.num_rounds):
            complete_rounds(folder, r, run)
            files = labels_of(r)
            if rounds.stage == "label":
                fast = predict.prepare(net)
                counts = {"hist": ops.new_histogram(len(data.classes), run.device),
                          "fine": ops.new_histogram(len(data.classes), run.device, fine=True),
                          "scored": torch.zeros(2 * [len(data.classes)], dtype=torch.int64, device=run.device),
                          "labelled": torch.zeros(256, dtype=torch.int64, device=run.device)}
                passes = Passes(PASSES, files.work / "progress.pth", run, counts, args.save_pred_every, session.stop)
                how = Labelling(fast, views, None if prior is None else prior.to(run.device),
                                schedule.target_portion(r), args, run, cache={})
                report = {"round": r}
                try:
                    if validation_views is not None:
                        rounds.confusion = score(fast, data, validation_views, passes, run, flip=args.score_flipping,
                                                 workers=args.num_workers)
                    if validation_views is not None and not passes.leaving:
                        report |= keep_best(rounds, net, data, folder, meta_of(0), run)
                        if 0 < r == last:
                            require_diverse(r, rounds.confusion.sum(0))
                    if r < last:
                        thresholds, predicted = choose_thresholds(how, passes, partial(require_diverse, r))
                except ValueError as error:
                    raise UserError(f"round {r}: {error}. Last good checkpoint: {weights_before(r)}") from None
                if r < last and not passes.leaving:
                    labelled = write_labels(how, passes, thresholds.value, files)
                if session.leave_if_asked():
                    break
                if r < last:
                    report |= {"target_portion": how.portion, "source_images": len(schedule.source_images(r)),
                               **selection_report(data.classes, thresholds, predicted, labelled,
                                                  rare_cls_num=args.rare_cls_num, mine_port=args.mine_port)}
                    run.say(f"round {r}: portion {how.portion:.3g}, {100 * report['labelled_share']:.1f} % of the "
                            f"pixels labelled, {report['source_images']} source images; rare: "
                            f"{', '.join(report['rare']) or 'none'}; mined: {', '.join(report['mine']) or 'none'}\n"
                            f"{selection_table(report)}")
                rounds.reports, rounds.stage = [*rounds.reports, report], "train"
                if run.is_main:
                    if r < last:
                        files.describe()
                        write_list([data.source.images[i] for i in schedule.source_images(r)],
                                   data.source.domain.root, files.work / "source.txt")
                    write_text(files.work / "report.json", json.dumps(report, indent=1) + "\n")
                    write_rounds(rounds.reports, folder / "rounds.jsonl")
                optimizer.state.clear()  # each round trains with a fresh momentum
                session.save()
            if r == last:
                break

            images = training_set(args, data, files, schedule.source_images(r), rounds.reports[r], prior, pixels, run)
            before = schedule.steps_before(r)
            batches = session.batches(images, 1000 * args.random_seed + r, start=session.iteration - before)
            set_train_mode(net, freeze_bn=not args.is_training)
            for i in session.steps(before + schedule.steps(r), first=before, total=schedule.steps_before(last)):
                lr = set_poly_lr(optimizer, args.learning_rate, i - before, schedule.steps(r), args.power)
                optimizer.zero_grad()
                batch = next(batches)
                losses = step(net, run.place(batch.image), batch.label.to(run.device), batch.on_target.to(run.device),
                              mr_weight_kld=args.mr_weight_kld, run=run, scale=scaler.scale)
                run.average_gradients([net])
                scaler.step(optimizer)
                scaler.update()
                session.end_step(losses, batch.name, round=r, lr=lr)
            if session.exit_code:
                break
            enter(r + 1)
        if not session.exit_code:
            complete_rounds(folder, args.num_rounds, run)
            if rounds.confusion is not None:
                say_result(rounds, data, run)
    session.validation = predict.Validation(data, args.input_size_target, pixels, run, folder, bn_stats="running",
                                            workers=args.num_workers, max_pictures=0) if data.validation else None
    if session.validation and rounds.confusion is not None:
        session.validation.confusion = rounds.confusion.numpy()
    return session


def header(args: argparse.Namespace, run: runtime.Run, data: DomainPair, known: Mapping, loaded: str,
           schedule: Schedule, rounds: Rounds) -> dict[str, object]:
    kld = [f"MRKLD with weight {args.mr_weight_kld} (what --mr-weight-kld {args.mr_weight_kld ** 0.5:.3g} did in the "
           "release)"] if args.mr_weight_kld else []
    prior = f", spatial prior {args.spatial_prior}" if args.spatial_prior else ""
    summary = data.summary("", "")
    return {
        "weights": loaded,
        "network": f"{known['model']} {known['arch']}, {len(data.classes)} classes, ASPP {known['aspp']}",
        "batch norm": f"weights {'train' if args.bn_affine == 'train' else 'frozen'}, statistics "
                      f"{'update' if args.is_training else 'frozen'}"
                      + {"running": "", "target": ", re-estimated on the target for each round",
                         "both": ", re-estimated on both domains for each round"}[args.bn_stats],
        "pixels": known["pixels"],
        "source": f"{len(data.source)} images of {args.source}, {len(schedule.source_images(0))} in round 0",
        "target": f"{len(data.target)} images of {args.target} to label", "validation": summary["validation"],
        "thresholds": {"cb": "one per class", "global": "one for all classes"}[args.kc_policy]
                      + f" ({args.kc_value}){prior}",
        "losses": ", ".join(["soft labels (LRENT)" if args.lr_weight_ent else "hard labels", *kld]),
        "batch": f"{args.batch_size * run.world} images a step = {args.batch_size} x {run.world} processes",
        "rounds": f"{rounds.number} to {args.num_rounds - 1}, {schedule.steps_before(args.num_rounds - 1)} steps, "
                  f"SGD {args.sgd}"}


def keep_best(rounds: Rounds, net: nn.Module, data: DomainPair, folder: Path, meta: Mapping,
              run: runtime.Run) -> dict[str, object]:
    """Report the scores of the network that enters a round; its weights are kept where they are the best so far."""
    miou = 100 * mean_iou(rounds.confusion.numpy())
    best = max((report["mIoU"] for report in rounds.reports), default=None)
    if run.is_main and (best is None or miou > best):
        checkpoint.save_weights(net, folder / "best.pth", {**meta, "mIoU": miou})
    so_far = "" if best is None else f" (best so far {max(best, miou):.2f})"
    run.say(f"round {rounds.number}: target mIoU {miou:.2f}{so_far}")
    return {"mIoU": miou, "iou": iou_dict(data.classes, rounds.confusion.numpy())["iou"]}


def say_result(rounds: Rounds, data: DomainPair, run: runtime.Run) -> None:
    run.say(iou_table(data.classes, {"IoU": rounds.confusion.numpy()}))
    scores = [report["mIoU"] for report in rounds.reports]
    run.say(f"target mIoU by round: {', '.join(f'{x:.2f}' for x in scores)}; last {scores[-1]:.2f}, best "
            f"{max(scores):.2f} (round {int(np.argmax(scores))}, chosen on the validation set)")


def training_set(args: argparse.Namespace, data: DomainPair, files: PseudoLabels, source_images: Sequence[int],
                 report: Mapping, prior: Tensor | None, pixels: str, run: runtime.Run) -> RoundSet:
    """The source subset and the pseudo-labels of a round."""
    if run.is_main and args.save_num_images:
        files.draw(args.save_num_images, files.work / "pictures.png")
    soft = None
    if args.lr_weight_ent:
        soft = files.work / "logits", torch.tensor(list(report["thresholds"].values())), args.lr_weight_ent, prior
    crop = dict(crop=args.crop_size, pixels=pixels, scale=args.random_scale, mirrored=args.random_mirror)
    return RoundSet(data.source, source_images, files.open(), crop, (args.input_size, args.input_size_target),
                    [data.classes.index(name) for name in report["mine"]], args.mine_chance,
                    (args.random_seed, report["round"]), soft)


# --- the demo ---------------------------------------------------------------------------------------------------------


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
        losses = step(net, run.place(batch.image), batch.label.to(run.device), batch.on_target.to(run.device),
                      mr_weight_kld=0.0, run=run)
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
    if args.restore_from is None:
        args.restore_from = f"{args.snapshot_dir}/start.pth"
        if args.resume is False or not Path(args.restore_from).exists():
            train_start(args, Path(args.restore_from))
    session = train(args)
    if session.exit_code:
        return session.exit_code
    data, run = session.validation.data, session.run
    start, _, _ = checkpoint.open_network(args.restore_from)
    scored = predict.Validation(data, args.input_size_target, session.validation.pixels, run, session.folder,
                                bn_stats="running", workers=args.num_workers, max_pictures=0)
    scored.confusion = predict.score(start.to(run.device), data.validation, args.input_size_target, scored.pixels,
                                     len(data.classes), run, workers=args.num_workers)
    compare(start, scored, session.net, session.validation, Path("result/demo_cbst/report.png"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_demo(Path(f"data/demo/{args.random_seed}"), seed=args.random_seed)
        return demo(args)
    return train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
