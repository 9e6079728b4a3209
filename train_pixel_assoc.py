"""Pixel-level cycle association.

Kang, Wei, Yang, Zhuang, Hauptmann: "Pixel-Level Cycle Association: A New Perspective for Domain Adaptive Semantic
Segmentation", NeurIPS 2020, https://arxiv.org/abs/2011.00147. Results: README.md, "Pixel-level cycle association".

    python train_pixel_assoc.py --demo                        # a miniature pair, minutes on a laptop
    python train_pixel_assoc.py --restore-from imagenet       # data/GTA5 to data/Cityscapes/data

A source pixel is associated with its most similar target pixel and that one with its most similar source pixel. Where
the cycle ends in the class it started from, both associations are strengthened against all others (section 3.2), after
every target pixel has gathered what similar target pixels hold (section 3.3): on features by cosine, on class
probabilities by Kullback-Leibler divergence. The operator of lib/ops.py needs no N x N matrix for it.

The total objective is L_ce + 0.75 L_lovasz on the source, + 0.1 (L_asso of features + L_asso of classes)
+ 0.01 (L_lsr of source + L_lsr of target), averaged over the passes and processes of a step. The release multiplied the
Lovasz weight by both counts, so its 2 x 2 setting had four times this weight: --lambda-lovasz 3 is that. As in the
release the target goes through the network before the source, all BN layers train, every parameter stands once in the
optimiser, and up-sampling has align_corners=False.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, predict, runtime
from lib.datasets.description import Domain
from lib.datasets.folder import DomainPair, endless, open_pair
from lib.datasets.transforms import PIXELS, Augment, ShortSideCrop, resize, to_tensor
from lib.demo.streets import render_demo
from lib.errors import UserError
from lib.models.deeplab import ARCHITECTURES, build, set_train_mode
from lib.optim import deeplab_sgd, set_poly_lr
from lib.runtime import as_float32

# Choices that change neither the data nor the mathematics of a run, so that a resumed run may change them.
FREE_ARGUMENTS = {"resume", "num_workers", "num_steps_stop", "save_pred_every", "eval_every", "log_every", "log_dir",
                  "tensorboard", "save_num_images", "gpu", "cpu", "check_data", "snapshot_dir", "ops", "compile"}
# --demo: settings for a ResNet-18 from random weights on the rendered pair; any flag given besides wins.
DEMO = dict(source="gta5", target="demo", data_dir="data/demo/gta5", data_dir_target="data/demo/cityscapes",
            arch="resnet18", input_size=(192, 96), input_size_target=(192, 96), batch_size=1, iter_size=1,
            num_steps=400, learning_rate=1e-2, save_pred_every=400, snapshot_dir="snapshots/demo_pixel_assoc",
            num_workers=0, bn_stats="target", aggregate=False)  # at 25 x 13 features aggregation costs points


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    method = p.add_argument_group("method")
    method.add_argument("--source-only", action="store_true", help="L_ce and L_lovasz alone, no target image")
    method.add_argument("--lambda-lovasz", type=flags.amount, default=0.75)
    method.add_argument("--lambda-asso", type=flags.amount, default=0.1, help="association of features and of classes")
    method.add_argument("--lambda-lsr", type=flags.amount, default=0.01, help="adaptive label smoothing")
    method.add_argument("--lsr-threshold", type=flags.amount, default=10.0)
    method.add_argument("--alpha", type=flags.share, default=0.5, help="share of the spatial aggregate (0: none)")
    method.add_argument("--aggregate", action=argparse.BooleanOptionalAction, default=None,
                        help="aggregation in validations too (default: yes, unless --source-only)")
    method.add_argument("--demo", action="store_true", help="render a small pair, train source-only and adapted")
    net = p.add_argument_group("networks")
    net.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet101")
    net.add_argument("--restore-from", metavar="FILE|imagenet", help="initial weights in any dialect; none: random")
    net.add_argument("--not-restore-last", action="store_true", help="leave the head of --restore-from out")
    net.add_argument("--freeze-bn", action="store_true", help="BN statistics are used, not updated")
    net.add_argument("--pixels", choices=list(PIXELS), help="pixel convention (default: the weights', else caffe)")
    net.add_argument("--num-classes", type=flags.count, help="how many of the target's classes (default: all shared)")
    data = p.add_argument_group("data")
    data.add_argument("--source", default="gta5", help="a description in lib/datasets, or a .json file")
    data.add_argument("--target", default="cityscapes", help="likewise")
    data.add_argument("--data-dir", help="source folder (default: the description's)")
    data.add_argument("--data-list", help="file with one source image a line")
    data.add_argument("--source-set", help="set of the source (default: the description's)")
    data.add_argument("--data-dir-target", help="target folder")
    data.add_argument("--data-list-target", help="file with one target image a line")
    data.add_argument("--set", help="set of the target to train on (default: the description's)")
    data.add_argument("--val-set", help="labelled set of the target to score on (default: the description's, if there)")
    data.add_argument("--resize-short", type=flags.size, default=(760, 988), help="least,most: range of the short side")
    data.add_argument("--crop-size", type=flags.size, default=(730, 730), help="width,height cut out afterwards")
    data.add_argument("--input-size", type=flags.size, help="width,height of source images instead, nothing cut")
    data.add_argument("--input-size-target", type=flags.size, help="width,height of target images instead, nothing cut")
    data.add_argument("--test-size", type=flags.size,
                      help="width,height in validations (default: 1460,730, or --input-size-target)")
    data.add_argument("--random-mirror", action=argparse.BooleanOptionalAction, default=True)
    data.add_argument("--num-workers", type=flags.natural, default=min(4, os.cpu_count() or 1),
                      help="loader processes of each of the two data sets")
    data.add_argument("--check-data", action="store_true", help="read every file, report, and leave")
    opt = p.add_argument_group("optimisation")
    opt.add_argument("--batch-size", type=flags.count, default=2, help="pairs a process and backward pass")
    opt.add_argument("--iter-size", type=flags.count, default=2, help="backward passes a step")
    opt.add_argument("--learning-rate", type=flags.amount, default=2.5e-4)
    opt.add_argument("--lr-mult-classifier", type=flags.amount, default=1.0,
                     help="rate of the head over the backbone's")
    opt.add_argument("--momentum", type=flags.below_one, default=0.9)
    opt.add_argument("--weight-decay", type=flags.amount, default=5e-4)
    opt.add_argument("--power", type=flags.amount, default=0.9, help="of the polynomial decay")
    opt.add_argument("--epochs", type=flags.count,
                     help="of the target set, where the decay would reach 0 (30; SYNTHIA 10)")
    opt.add_argument("--epochs-stop", type=flags.count, help="where training ends (28; SYNTHIA 8)")
    opt.add_argument("--num-steps", type=flags.count, help="steps instead of --epochs")
    opt.add_argument("--num-steps-stop", type=flags.count, help="steps instead of --epochs-stop (default: --num-steps)")
    out = p.add_argument_group("run")
    out.add_argument("--snapshot-dir", default="snapshots/pixel_assoc", help="weights, resume file, log, pictures")
    out.add_argument("--save-pred-every", type=flags.count, default=1000, help="iterations between snapshots")
    out.add_argument("--eval-every", type=flags.count, help="iterations between evaluations (default: as snapshots)")
    out.add_argument("--bn-stats", choices=["running", "target"], default="running",
                     help="target: re-estimate BN statistics on the target before scoring")
    out.add_argument("--save-num-images", type=flags.natural, default=2, help="pictures at each evaluation")
    out.add_argument("--log-every", type=flags.count, default=10)
    out.add_argument("--tensorboard", action="store_true")
    out.add_argument("--log-dir", help="folder for TensorBoard (default: the snapshot folder)")
    out.add_argument("--resume", action="store_true", help="go on from the snapshot folder's resume.pth")
    out.add_argument("--random-seed", type=flags.natural, default=1234)
    out.add_argument("--deterministic", action="store_true")
    out.add_argument("--cpu", action="store_true")
    out.add_argument("--gpu", type=flags.natural, default=0, help="number of the GPU of a single process")
    out.add_argument("--amp", choices=list(runtime.AMP_DTYPES), default="off", help="mixed precision")
    out.add_argument("--compile", action="store_true", help="torch.compile the network")
    out.add_argument("--ops", choices=["auto", "compiled", "reference"], default="auto", help="kernels of csrc/")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    args.aggregate = not args.source_only if args.aggregate is None else args.aggregate
    args.eval_every = args.eval_every or args.save_pred_every
    if args.resize_short[0] > args.resize_short[1]:
        p.error("--resize-short takes the least, then the most")
    if bool(args.input_size) != bool(args.input_size_target):
        p.error("--input-size and --input-size-target go together")
    return args


# --- losses -----------------------------------------------------------------------------------------------------------


def upsample(pred: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, align_corners=False (in training and test): [N, C, h, w] -> [N, C, *size]."""
    return F.interpolate(as_float32(pred), tuple(size), mode="bilinear", align_corners=False)


def downsample(label: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest: int64 [N, H, W] -> [N, *size]."""
    return F.interpolate(label[:, None].double(), tuple(size), mode="nearest")[:, 0].long()


def loss_ce(pred: Tensor, label: Tensor, ignore: int = 255, valid: Tensor | None = None) -> Tensor:
    """L_ce: cross-entropy of logits [N, C, H, W] with int64 [N, H, W], the mean over labelled pixels; 0 without any.

    valid: the count to divide by, where other processes hold pixels of the batch too.
    """
    total = F.cross_entropy(pred, label, ignore_index=ignore, reduction="sum")
    return total / ((label != ignore).sum() if valid is None else valid).clamp(min=1e-3)


def loss_lovasz(prob: Tensor, label: Tensor, ignore: int = 255) -> Tensor:
    """L_lovasz, the Lovasz extension of the Jaccard loss, mean over the classes present in the batch.

    Berman, Triki, Blaschko: "The Lovasz-Softmax loss", CVPR 2018, algorithm 1. prob [N, C, H, W], label int64
    [N, H, W]. All classes are sorted at once. No labelled pixel: 0, attached to the graph.
    """
    valid = label != ignore
    target = label[valid]                                            # [M]
    present = target.unique()                                        # [P]
    errors = prob.transpose(0, 1)[present][:, valid]                 # [P, M], of the present classes
    truth = target == present[:, None]
    errors = torch.where(truth, 1 - errors, errors)
    errors, order = errors.sort(dim=1, descending=True)
    truth = truth.gather(1, order).to(prob.dtype)                    # sums of up to 2^24 ones are exact in float32
    hits = truth.cumsum(1)
    count = hits[:, -1:]
    rank = torch.arange(1, truth.shape[1] + 1, device=prob.device, dtype=prob.dtype)
    jaccard = 1 - (count - hits) / (count + rank - hits)             # loss when the first k pixels are wrong
    gradient = torch.diff(jaccard, dim=1, prepend=jaccard.new_zeros(len(jaccard), 1))
    return (errors * gradient).sum() / max(len(present), 1)


def loss_lsr(pred: Tensor, threshold: float = 10.0) -> Tensor:
    """L_lsr, adaptive label smoothing: mean over pixels of (u / threshold - 1) u, the bracket a constant,

    where u = -mean_c log p_c is the cross-entropy to the uniform distribution. pred: logits [N, C, h, w]. threshold 0:
    the mean of u.
    """
    u = -F.log_softmax(as_float32(pred), dim=1).mean(1)
    return ((u / threshold - 1).detach() * u).mean() if threshold > 0 else u.mean()


class Weights(NamedTuple):
    """What the terms of the objective count."""

    lovasz: float = 0.75
    asso: float = 0.1
    lsr: float = 0.01
    lsr_threshold: float = 10.0
    alpha: float = 0.5


def objective(net: nn.Module, x_s: Tensor, y_s: Tensor, x_t: Tensor | None, weights: Weights, run: runtime.Run,
              ignore: int = 255) -> tuple[Tensor, dict[str, Tensor]]:
    """(the total objective of one batch, its unweighted terms and statistics); x_t None: source only.

    Images of x_s and x_t [N, 3, H, W] are paired in order and may differ in size. Under several processes each term's
    mean is that of all their pixels, except L_lovasz, which is each process's own.
    """
    if x_t is not None:
        with run.autocast():
            feat_t, pred_t = net(x_t, return_features=True)          # before the source: the order matters to BN
    with run.autocast():
        feat_s, pred_s = net(x_s, return_features=True)
    pred = upsample(pred_s, y_s.shape[1:])
    valid = run.sum((y_s != ignore).sum().to(pred.dtype)) / run.world
    values = {"loss_ce": loss_ce(pred, y_s, ignore, valid)}
    total = values["loss_ce"]
    if weights.lovasz:
        values["loss_lovasz"] = loss_lovasz(F.softmax(pred, dim=1), y_s, ignore)
        total = total + weights.lovasz * values["loss_lovasz"]
    if x_t is None:
        return total, values

    y = downsample(y_s, feat_s.shape[2:])
    maps = {"feat": (as_float32(feat_s), as_float32(feat_t), "cos"),
            "cls": (F.softmax(as_float32(pred_s), dim=1), F.softmax(as_float32(pred_t), dim=1), "kl")}
    for name, (s, t, metric) in maps.items():
        found = ops.cycle_association_loss(s, t, y, metric=metric, alpha=weights.alpha, ignore_index=ignore)
        kept = found.kept.to(found.loss.dtype)
        values[f"loss_asso_{name}"] = found.loss * (kept / (run.sum(kept) / run.world).clamp(min=1e-3))
        total = total + weights.asso * values[f"loss_asso_{name}"]
        values[f"kept_{name}"] = run.sum(kept) / run.sum((y != ignore).sum().to(kept.dtype)).clamp(min=1)
        values[f"cover_{name}"] = coverage(found.forward, t.shape[2] * t.shape[3]).to(kept.dtype)
    for name, pred in (("s", pred_s), ("t", pred_t)):
        values[f"loss_lsr_{name}"] = loss_lsr(pred, weights.lsr_threshold)
        total = total + weights.lsr * values[f"loss_lsr_{name}"]
    return total, values


def coverage(forward: Tensor, pixels: int) -> Tensor:
    """Share of the target's ``pixels`` that some source pixel is associated with; forward int64 [N, N1]."""
    hit = torch.zeros(len(forward), pixels, device=forward.device)
    return hit.scatter_(1, forward, 1.0).mean()


def backward(net: nn.Module, x_s: Tensor, y_s: Tensor, x_t: Tensor | None, weights: Weights, run: runtime.Run, *,
             iter_size: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict[str, Tensor]:
    """Accumulate the gradients of one batch; returns what ``objective`` reports."""
    total, values = objective(net, x_s, y_s, x_t, weights, run)
    scale(total / iter_size).backward()
    return {key: value.detach() for key, value in values.items()}


# --- pictures of associations -----------------------------------------------------------------------------------------


@torch.no_grad()
def draw_associations(net: nn.Module, data: DomainPair, size_s: tuple[int, int], size_t: tuple[int, int], pixels: str,
                      alpha: float, most: int, path: Path, run: runtime.Run, lines: int = 40) -> float:
    """Write ``most`` pairs of a source and a validation image with some of their kept associations as lines.

    A line has the colour of its class; a wrong one (by the label of the validation image) ends in a cross. Returns the
    share of all kept associations that end in a pixel of the right class (nan: nothing could be judged).
    """
    net, right, judged, rows = predict.prepare(net), 0, 0, []
    for n in range(min(most, len(data.validation))):
        pair, labels = [], []
        for folder, size in ((data.source, size_s), (data.validation, size_t)):
            image, label = resize(*folder.read(n * (len(folder) - 1) // max(most - 1, 1)), size)
            pair.append(image)
            labels.append(label)
        feat_s, feat_t = (as_float32(net(to_tensor(image, pixels)[None].to(run.device), return_features=True)[0])
                          for image in pair)
        y_s, y_t = (downsample(torch.from_numpy(label.astype(np.int64))[None], feat.shape[2:])[0].flatten()
                    for label, feat in zip(labels, (feat_s, feat_t), strict=True))
        y = y_s.reshape(1, *feat_s.shape[2:]).to(run.device)
        found = ops.cycle_association_loss(feat_s, feat_t, y, alpha=alpha)
        kept = found.selected.flatten().nonzero().flatten().cpu()
        ends = found.forward[0].cpu()[kept]
        known = y_t[ends] != 255
        correct = y_t[ends] == y_s[kept]
        right, judged = right + int(correct[known].sum()), judged + int(known.sum())

        sheet = Image.new("RGB", (size_s[0] + size_t[0] + 4, max(size_s[1], size_t[1])), "white")
        sheet.paste(pair[0], (0, 0))
        sheet.paste(pair[1], (size_s[0] + 4, 0))
        draw = ImageDraw.Draw(sheet)
        for k in np.unique(np.linspace(0, len(kept) - 1, min(lines, len(kept))).astype(int)).tolist():
            (x0, y0), (x1, y1) = (((i % w + 0.5) * s[0] / w, (i // w + 0.5) * s[1] / h) for i, s, (h, w) in (
                (int(kept[k]), size_s, feat_s.shape[2:]), (int(ends[k]), size_t, feat_t.shape[2:])))
            colour = tuple(data.palette[y_s[kept[k]]].tolist())
            x1 += size_s[0] + 4
            draw.line((x0, y0, x1, y1), colour, 1)
            if known[k] and not correct[k]:
                draw.line((x1 - 3, y1 - 3, x1 + 3, y1 + 3), colour, 2)
                draw.line((x1 - 3, y1 + 3, x1 + 3, y1 - 3), colour, 2)
        rows.append(sheet)
    if run.is_main:
        whole = Image.new("RGB", (rows[0].width, sum(row.height + 4 for row in rows) - 4), "white")
        for n, row in enumerate(rows):
            whole.paste(row, (0, n * (row.height + 4)))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.save(path)
    return right / judged if judged else float("nan")


# --- the run ----------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    net: nn.Module
    data: DomainPair
    confusion: np.ndarray | None  # of the last weights on the validation set
    pixels: str
    test_size: tuple[int, int]


def train(args: argparse.Namespace) -> Outcome | int:
    """One run; returns its outcome, or an exit code when it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)

    # initial weights decide the pixel convention and where the stride of a bottleneck stands
    weights, meta = checkpoint.initial_weights(args.restore_from, args.arch)
    pixels, stride_on = args.pixels or meta.get("pixels", "caffe"), meta.get("stride_on", "1x1")

    # data
    source = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
    target = Domain.open(args.target, args.data_dir_target, args.set, args.data_list_target)
    if args.input_size:
        sizes = args.input_size, args.input_size_target
        augment = [Augment(size, pixels, random_mirror=args.random_mirror) for size in sizes]
    else:
        sizes = args.crop_size, args.crop_size
        augment = [ShortSideCrop(args.crop_size, args.resize_short, pixels, args.random_mirror)] * 2
    test_size = args.test_size or args.input_size_target or (1460, 730)
    data = open_pair(
        source, target, *augment, val_set=args.val_set, num_classes=args.num_classes, seed=args.random_seed,
        check_all=args.check_data)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        return 0
    pairs = args.batch_size * run.world * args.iter_size
    per_epoch = max(1, len(data.target) // pairs)
    epochs, epochs_stop = (10, 8) if source.name == "synthia" else (30, 28)
    num_steps = args.num_steps or (args.epochs or epochs) * per_epoch
    stop_at = args.num_steps_stop or (num_steps if args.num_steps or args.epochs and not args.epochs_stop
                                      else (args.epochs_stop or epochs_stop) * per_epoch)
    if stop_at > num_steps:
        raise UserError(f"training would end at step {stop_at}, after the decay reaches 0 at step {num_steps}: raise "
                        "--num-steps or --epochs")
    prefix = f"{source.name.upper()}_"
    folder = Path(args.snapshot_dir)
    resume_file = folder / "resume.pth"

    # network
    net = build("DeeplabPixelAssoc", len(data.classes), args.arch, stride_on=stride_on)
    loaded = "none, random weights (the paper starts from ImageNet: --restore-from imagenet or a file)"
    if weights is not None:
        loaded = checkpoint.load_into(net, weights, heads=not args.not_restore_last, source=args.restore_from)
    net.to(run.device, memory_format=run.memory_format)
    if run.world > 1 and run.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    terms = Weights(args.lambda_lovasz, args.lambda_asso, args.lambda_lsr, args.lsr_threshold, args.alpha)

    # optimiser
    optimizer = deeplab_sgd(net, "once", args.learning_rate, args.momentum, args.weight_decay, args.lr_mult_classifier)
    scaler = run.scaler()

    # resume
    validation = None if data.validation is None else predict.Validation(
        data, test_size, pixels, run, folder, bn_stats=args.bn_stats, workers=args.num_workers,
        most=args.save_num_images, align_corners=False, aggregate=args.alpha if args.aggregate else 0.0)
    first = 0
    everything = net, [], [optimizer], scaler
    arguments = {**{k: v for k, v in vars(args).items() if k not in FREE_ARGUMENTS}, "nproc_per_node": run.world}
    if args.resume and resume_file.exists():
        state = checkpoint.load_resume(resume_file, *everything, arguments, FREE_ARGUMENTS)
        first = state["iteration"]
        if validation is not None and state["validation"]:
            validation.load_state_dict(state["validation"])
        loaded = f"resumed at iteration {first}"
    elif args.resume:
        run.say(f"note: there is no {resume_file} yet: starting at the beginning")
    elif resume_file.exists():
        run.say(f"note: {resume_file} of an earlier run will be overwritten (--resume goes on with it)")

    runtime.header(run, {
        "kernels": ops.backend(), "weights": loaded,
        "network": f"DeeplabPixelAssoc {args.arch}, {len(data.classes)} classes",
        "pixels": pixels, "source": f"{len(data.source)} images of {args.source} at {sizes[0]}",
        "target": "none in training" if args.source_only else
                  f"{len(data.target)} images of {args.target} at {sizes[1]}",
        "validation": "none" if data.validation is None else
                      f"{len(data.validation)} images of {args.target} at {test_size}",
        "batch": f"{pairs} pairs a step = {args.batch_size} x {run.world} processes x {args.iter_size} passes",
        "steps": f"{first} to {stop_at} of {num_steps}, {per_epoch} an epoch", "output": folder})
    if args.compile:
        net.compile()

    def meta_of(iteration: int) -> dict[str, object]:
        return {"script": "train_pixel_assoc.py", "iteration": iteration, "model": "DeeplabPixelAssoc",
                "arch": args.arch, "aspp": "full", "stride_on": stride_on, "pixels": pixels, "task": args.target,
                "classes": list(data.classes), "size": list(test_size), "align_corners": False}

    def save(iteration: int, snapshot: bool) -> None:
        """The resume file, and with ``snapshot`` the weights."""
        if not run.is_main:
            return
        if snapshot:
            checkpoint.save_weights(net, folder / f"{prefix}{iteration}.pth", meta_of(iteration))
        checkpoint.save_resume(resume_file, *everything, meta_of(iteration), iteration=iteration, arguments=arguments,
                               validation=validation and validation.state_dict())

    # the loop
    tensorboard = Path(args.log_dir or folder) if args.tensorboard else None
    log = runtime.Log(run, folder / "log.jsonl", first, stop_at, tensorboard)
    stream = dict(batch=args.batch_size, workers=args.num_workers, start=first * args.iter_size, rank=run.rank,
                  world=run.world, pin=run.device.type == "cuda")
    batches_s = endless(data.source, seed=args.random_seed, **stream)
    batches_t = None if args.source_only else endless(data.target, seed=args.random_seed + 1, **stream)
    set_train_mode(net, args.freeze_bn)
    last_good = resume_file if first else None
    with runtime.StopRequest() as stop:
        for i in range(first, stop_at):
            lr = set_poly_lr(optimizer, args.learning_rate, i, num_steps, args.power)
            optimizer.zero_grad()
            sums: dict[str, Tensor] = {}
            names: list[str] = []
            for _ in range(args.iter_size):
                batch_s = next(batches_s)
                batch_t = next(batches_t) if batches_t is not None else None
                names += [*batch_s.name, *(batch_t.name if batch_t is not None else ())]
                values = backward(net, run.place(batch_s.image), batch_s.label.to(run.device),
                                  None if batch_t is None else run.place(batch_t.image), terms, run,
                                  iter_size=args.iter_size, scale=scaler.scale)
                for key, value in values.items():
                    sums[key] = sums.get(key, 0.0) + value / args.iter_size
            values = run.mean_values(sums)
            runtime.require_finite(values, i + 1, names, last_good)
            run.average_gradients([net])
            scaler.step(optimizer)
            scaler.update()

            done = i + 1
            runtime.require_finite_weights([net], done, names, last_good)
            log.step()
            if done % args.log_every == 0 or done == stop_at:
                log.losses(done, {**values, "lr": lr})
            if validation is not None and (done % args.eval_every == 0 or done == stop_at):
                validation(net, done, meta_of(done), log)
                set_train_mode(net, args.freeze_bn)
                if args.save_num_images:
                    right = draw_associations(net, data, sizes[0], sizes[1], pixels, args.alpha, args.save_num_images,
                                              folder / "pictures" / f"{done}_associations.png", run)
                    log.scores(done, {"right_associations": right})
            leaving = run.any(stop.signal is not None)
            snapshot = done % args.save_pred_every == 0 or done == stop_at
            if snapshot or leaving:
                save(done, snapshot)
                last_good = resume_file
            if leaving and done < stop_at:
                log.close()
                run.say(f"stopped at iteration {done}; --resume goes on from {resume_file}")
                return 128 + (stop.signal or 0)
    if validation is not None:
        if validation.iteration != stop_at:  # resumed at its end, which had not been scored
            validation(net, stop_at, meta_of(stop_at), log)
        validation.report()
    log.close()
    run.barrier()
    return Outcome(net, data, validation and validation.confusion, pixels, test_size)


def demo(args: argparse.Namespace) -> int:
    """Train source-only and adapted on the rendered pair, print their tables, draw result/demo/pixel_assoc.png.

    Associations need features that mean something: the paper's come from ImageNet, the demo's from source-only
    training, from where three quarters of the steps at half the rate adapt.
    """
    outcomes = []
    for name, changes in (
            ("source only", {"source_only": True, "bn_stats": "running", "aggregate": False}),
            ("adapted", {"restore_from": f"{args.snapshot_dir}/source_only/resume.pth",
                         "num_steps": max(args.num_steps * 3 // 4, 1), "learning_rate": args.learning_rate / 2})):
        print(f"--- {name}")
        folder = f"{args.snapshot_dir}/{name.replace(' ', '_')}"
        outcome = train(argparse.Namespace(**{**vars(args), **changes, "snapshot_dir": folder}))
        if isinstance(outcome, int):
            return outcome
        outcomes.append(outcome)
    source_only, adapted = outcomes
    run = runtime.Run(next(adapted.net.parameters()).device, 0, 1, "off")
    predict.compare((source_only.net, source_only.confusion), (adapted.net, adapted.confusion), adapted.data,
                    adapted.test_size, adapted.pixels, run, Path("result/demo/pixel_assoc.png"),
                    bn_stats=args.bn_stats, workers=args.num_workers, align_corners=False)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_demo(Path("data/demo"), seed=args.random_seed)
    if args.demo and not args.source_only:
        return demo(args)
    outcome = train(args)
    return outcome if isinstance(outcome, int) else 0


if __name__ == "__main__":
    runtime.cli(main)
