"""Pixel-level cycle association.

Kang, Wei, Yang, Zhuang, Hauptmann: "Pixel-Level Cycle Association: A New Perspective for Domain Adaptive Semantic
Segmentation", NeurIPS 2020, https://arxiv.org/abs/2011.00147. Results: docs/pixel_assoc.md.

    python train_pixel_assoc.py --demo                        # a miniature pair, minutes on a laptop
    python train_pixel_assoc.py --restore-from imagenet       # data/GTA5 to data/Cityscapes/data

A source pixel is associated with its most similar target pixel and that one with its most similar source pixel. Where
the cycle ends in the class it started from, both associations are strengthened against all others (section 3.2), after
every target pixel has gathered what similar target pixels hold (section 3.3): on features by cosine, on class
probabilities by Kullback-Leibler divergence. ``association`` below is this loss as the paper writes it, with N x N
matrices (--association direct); the operator of lib/ops/ computes the same without them (--association fused).

The total objective is L_ce + 0.75 L_lovasz on the source, + 0.1 (L_asso of features + L_asso of classes)
+ 0.01 (L_lsr of source + L_lsr of target), averaged over the passes and processes of a step. The release multiplied the
Lovasz weight by both counts, so its 2 x 2 setting had four times this weight: --lambda-lovasz 3 is that. As in the
release the target goes through the network before the source, all BN layers train, every parameter stands once in the
optimiser, and up-sampling has align_corners=False.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, predict, runtime
from lib.datasets.description import Domain
from lib.datasets.folder import open_pair
from lib.datasets.transforms import Augment
from lib.demo.comparison import train_and_compare
from lib.demo.streets import render_demo
from lib.errors import UserError
from lib.models.deeplab import build, downsample, set_train_mode, upsample
from lib.optim import deeplab_sgd, set_poly_lr
from lib.runtime import as_float32
from lib.session import Session

# --demo: settings for a ResNet-18 from random weights on the rendered pair; flags given override them.
DEMO = dict(**flags.DEMO_DATA, snapshot_dir="snapshots/demo_pixel_assoc/{seed}", arch="resnet18", input_size=(192, 96),
            input_size_target=(192, 96), batch_size=1, iter_size=1, num_steps=400, learning_rate=1e-2,
            save_pred_every=400, bn_stats="target", aggregate=False)  # at 25 x 13 features aggregation costs points


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__)
    method = p.add_argument_group("method")
    method.add_argument("--source-only", action="store_true", help="L_ce and L_lovasz alone, no target image")
    method.add_argument("--lambda-lovasz", type=flags.amount, default=0.75)
    method.add_argument("--lambda-asso", type=flags.amount, default=0.1, help="association of features and of classes")
    method.add_argument("--lambda-lsr", type=flags.amount, default=0.01, help="adaptive label smoothing")
    method.add_argument("--lsr-threshold", type=flags.amount, default=10.0)
    method.add_argument("--alpha", type=flags.share, default=0.5, help="share of the spatial aggregate (0: none)")
    method.add_argument("--aggregate", action=argparse.BooleanOptionalAction, default=None,
                        help="aggregation in validations too (default: yes, unless --source-only)")
    method.add_argument("--association", choices=["fused", "direct"], default="fused",
                        help="the operator of lib/ops/, or the paper's formulas with N x N matrices")
    net = flags.add_network(p)
    net.add_argument("--freeze-bn", action="store_true", help="BN statistics are used, not updated")
    flags.add_bn_stats(net)
    data = flags.add_data(p, resized="a random short side and a crop")
    data.add_argument("--resize-short", type=flags.size, default=(760, 988),
                      help="minimum,maximum of the random short side, unless --input-size is given")
    data.add_argument("--crop-size", type=flags.size, default=(730, 730),
                      help="width,height cut out afterwards, likewise")
    data.add_argument("--test-size", type=flags.size,
                      help="width,height in validations (default: 1460,730, or --input-size-target)")
    data.add_argument("--random-mirror", action=argparse.BooleanOptionalAction, default=True)
    opt = flags.add_optimisation(p, rate="of the backbone; the head takes --lr-mult-classifier times as much")
    opt.add_argument("--iter-size", type=flags.count, default=2, help="backward passes a step")
    opt.add_argument("--lr-mult-classifier", type=flags.amount, default=1.0,
                     help="rate of the head over the backbone's")
    opt.add_argument("--epochs", type=flags.count,
                     help="of the target set, where the decay would reach 0 (30; SYNTHIA 10)")
    opt.add_argument("--epochs-stop", type=flags.count, help="where training ends (28; SYNTHIA 8)")
    opt.add_argument("--num-steps", type=flags.count, help="steps instead of --epochs")
    opt.add_argument("--num-steps-stop", type=flags.count, help="steps instead of --epochs-stop (default: --num-steps)")
    flags.add_run(p)
    p.set_defaults(save_pred_every=1000, batch_size=2)
    args = flags.parse(p, argv, DEMO)
    if args.source_only:
        p.note("with --source-only", "lambda_asso", "lambda_lsr", "lsr_threshold", "association")
    if args.input_size:
        p.note("with images of a fixed size (--input-size, --demo)", "resize_short", "crop_size")
    if "num_steps" not in p.given and "epochs" in p.given:
        args.num_steps = None  # the demo's default
    if args.num_steps:
        p.refuse("with a number of steps (--num-steps, --demo)", "epochs", "epochs_stop")
    if args.num_steps_stop:
        p.refuse("with --num-steps-stop", "epochs_stop")
    if args.demo and not args.source_only and args.epochs and args.num_steps_stop:
        p.error("--demo --epochs needs --epochs-stop instead of --num-steps-stop")
    args.snapshot_dir = args.snapshot_dir or flags.run_folder(
        "pixel_assoc", args.source, args.target, source_only=args.source_only,
        **{args.arch: args.arch != p.get_default("arch")})
    args.aggregate = not args.source_only if args.aggregate is None else args.aggregate
    if args.resize_short[0] > args.resize_short[1]:
        p.error("--resize-short takes the minimum, then the maximum")
    if bool(args.input_size) != bool(args.input_size_target):
        p.error("--input-size and --input-size-target go together")
    return args


# --- association: a are source rows [N_s, C], v target rows [N_t, C] of one image pair --------------------------------


def similarity(p: Tensor, q: Tensor, metric: str) -> Tensor:
    """(1) S_ij [N, M] of rows p_i and q_j: the cosine, or for class probabilities -KL(p_i || q_j)."""
    if metric == "cos":
        return F.normalize(p, dim=1) @ F.normalize(q, dim=1).T
    return p @ (q + 1e-10).log().T - (p * (p + 1e-10).log()).sum(1, keepdim=True)


def contrast(s: Tensor) -> Tensor:
    """(2) Each row of S less its mean, over its standard deviation; both are constants in the backward pass."""
    return (s - s.mean(1, keepdim=True).detach()) / (s.std(1, keepdim=True).detach() + 1e-10)


def aggregate(v: Tensor, alpha: float, metric: str) -> Tensor:
    """(3) v'_j = (1 - alpha) v_j + alpha sum_k A_jk v_k, A the softmax over the rows of S_tt (section 3.3)."""
    s = similarity(v, v, metric)
    attention = (contrast(s) if metric == "cos" else s).softmax(1)
    return (1 - alpha) * v + alpha * attention @ v


def cycle(a: Tensor, v: Tensor, y: Tensor, metric: str, ignore: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(4) j*(i) = argmax_j P_ij and i*(i) = argmax_i' Q_j*i', and the pixels whose cycle ends in their class y [N_s].

    Returns (-log(P_ij* Q_j*i*) of the kept pixels i, their mask [N_s], j* [N_s], i* [N_s]).
    """
    p = contrast(similarity(a, v, metric)).softmax(1)                # [N_s, N_t], source to target
    q = contrast(similarity(v, a, metric)).softmax(1)                # [N_t, N_s], and back
    j, back = p.argmax(1), q.argmax(1)
    i = back[j]
    kept = (y == y[i]) & (y != ignore)
    rows = kept.nonzero()[:, 0]
    return -(p[rows, j[rows]] * q[j[rows], i[rows]]).log().clamp_min(-100), kept, j, i


def association(x_s: Tensor, x_t: Tensor, y_s: Tensor, *, metric: str = "cos", alpha: float = 0.5,
                ignore_index: int = 255) -> ops.CycleAssociation:
    """(5) L_asso, sections 3.2 and 3.3: the mean of (4) over the kept pixels of all image pairs; 0 where none is kept.

    x_s, x_t [B, C, h, w]: features (metric "cos") or class probabilities ("kl"); y_s int64 [B, h, w]. What
    ops.cycle_association_loss computes, and returns, without a matrix of N_s x N_t numbers.
    """
    found = [cycle(a, aggregate(v, alpha, metric) if alpha else v, y, metric, ignore_index)
             for a, v, y in zip(x_s.flatten(2).mT, x_t.flatten(2).mT, y_s.flatten(1), strict=True)]
    logs, kept, j, i = (list(parts) for parts in zip(*found, strict=True))
    count = sum(mask.sum() for mask in kept)
    attached = 0.0 * (x_s.sum() + x_t.sum())                         # a zero with a gradient where nothing is kept
    return ops.CycleAssociation(torch.cat(logs).sum() / count.clamp(min=1) + attached, count,
                                torch.stack(kept).view_as(y_s), torch.stack(j), torch.stack(i))


ASSOCIATION = {"fused": ops.cycle_association_loss, "direct": association}

# --- losses -----------------------------------------------------------------------------------------------------------


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
    """Of the terms of the objective."""

    lovasz: float = 0.75
    asso: float = 0.1
    lsr: float = 0.01
    lsr_threshold: float = 10.0
    alpha: float = 0.5


def objective(net: nn.Module, x_s: Tensor, y_s: Tensor, x_t: Tensor | None, weights: Weights, run: runtime.Run,
              ignore: int = 255, loss_asso: Callable = ops.cycle_association_loss
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """(the total objective of one batch, its unweighted terms and statistics); x_t None: source only.

    Images of x_s and x_t [N, 3, H, W] are paired in order and may differ in size. Under several processes each term's
    mean is that of all their pixels, except L_lovasz, which is each process's own.
    """
    if x_t is not None:
        with run.autocast():
            feat_t, pred_t = net(x_t, return_features=True)          # before the source: the order matters to BN
    with run.autocast():
        feat_s, pred_s = net(x_s, return_features=True)
    pred = upsample(pred_s, y_s.shape[1:], align_corners=False)
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
        found = loss_asso(s, t, y, metric=metric, alpha=weights.alpha, ignore_index=ignore)
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


def step(net: nn.Module, x_s: Tensor, y_s: Tensor, x_t: Tensor | None, weights: Weights, run: runtime.Run, *,
         iter_size: int, loss_asso: Callable = ops.cycle_association_loss,
         scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict[str, Tensor]:
    """Accumulate the gradients of one batch; returns the unweighted terms and statistics of ``objective``."""
    total, values = objective(net, x_s, y_s, x_t, weights, run, loss_asso=loss_asso)
    scale(total / iter_size).backward()
    return {key: value.detach() for key, value in values.items()}


# --- the run ----------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    folder = Path(args.snapshot_dir)

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
        augment = [Augment(None, pixels, random_mirror=args.random_mirror, crop=args.crop_size,
                           short=args.resize_short)] * 2
    if min(*sizes[0], *sizes[1]) < 17:
        raise UserError(f"cycles need images of at least 17x17, not {sizes[0]} and {sizes[1]}: choose a larger "
                        "--input-size and --input-size-target, or --crop-size")
    test_size = args.test_size or args.input_size_target or (1460, 730)
    data = open_pair(
        source, target, *augment, val_set=args.val_set, num_classes=args.num_classes, seed=args.random_seed,
        check_all=args.check_data)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        raise SystemExit(0)

    # schedule
    step_pairs = args.batch_size * run.world * args.iter_size
    per_epoch = max(1, len(data.target) // step_pairs)
    epochs, epochs_stop = (10, 8) if source.name == "synthia" else (30, 28)
    num_steps = args.num_steps or (args.epochs or epochs) * per_epoch
    stop_at = args.num_steps_stop or (num_steps if args.num_steps or args.epochs and not args.epochs_stop
                                      else (args.epochs_stop or epochs_stop) * per_epoch)
    if stop_at > num_steps:
        raise UserError(f"training would end at step {stop_at}, after the decay reaches 0 at step {num_steps}: raise "
                        "--num-steps or --epochs")

    # network and optimiser
    net = build("DeeplabPixelAssoc", len(data.classes), args.arch, stride_on=stride_on)
    loaded = checkpoint.initialise(net, weights, heads=not args.not_restore_last, source=args.restore_from,
                                   aspp=meta.get("aspp", "released"))
    net = run.place_net(net, compiled=args.compile)
    optimizer = deeplab_sgd(net, "once", args.learning_rate, args.momentum, args.weight_decay, args.lr_mult_classifier)
    scaler = run.scaler()
    terms = Weights(args.lambda_lovasz, args.lambda_asso, args.lambda_lsr, args.lsr_threshold, args.alpha)

    def meta_of(iteration: int) -> dict[str, object]:
        return {"script": "train_pixel_assoc.py", "iteration": iteration, "model": "DeeplabPixelAssoc",
                "arch": args.arch, "aspp": "full", "stride_on": stride_on, "pixels": pixels, "task": args.target,
                "classes": list(data.classes), "size": list(test_size), "align_corners": False,
                "bn_stats": args.bn_stats, "aggregate": args.alpha if args.aggregate else 0.0}

    validation = None if data.validation is None else predict.Validation(
        data, test_size, pixels, run, folder, bn_stats=args.bn_stats, workers=args.num_workers,
        max_pictures=args.save_num_images, align_corners=False, aggregate=args.alpha if args.aggregate else 0.0)
    with Session(run, args, folder, {"": net}, [optimizer], scaler=scaler, meta=meta_of,
                 prefix=f"{source.name.upper()}_", validation=validation,
                 free={"num_steps_stop", "association"}) as session:
        session.header({
            "weights": loaded, "network": f"DeeplabPixelAssoc {args.arch}, {len(data.classes)} classes",
            "pixels": pixels, **data.summary(*sizes, target_trains=not args.source_only),
            "batch": f"{step_pairs} pairs a step = {args.batch_size} x {run.world} processes x {args.iter_size} passes",
            "steps": f"{session.iteration} to {stop_at} of {num_steps}, {per_epoch} an epoch"})
        pairs = session.pairs(data, args.random_seed, args.iter_size, args.source_only)
        set_train_mode(net, args.freeze_bn)
        for i in session.steps(stop_at):
            lr = set_poly_lr(optimizer, args.learning_rate, i, num_steps, args.power)
            optimizer.zero_grad()
            losses, names = [], []
            for _ in range(args.iter_size):
                x_s, y_s, x_t, files = next(pairs)
                names += files
                losses.append(step(net, x_s, y_s, x_t, terms, run, iter_size=args.iter_size,
                                   loss_asso=ASSOCIATION[args.association], scale=scaler.scale))
            run.average_gradients([net])
            scaler.step(optimizer)
            scaler.update()
            session.end_step(losses, names, lr=lr)
            if validation is not None and session.is_due(args.eval_every) and args.save_num_images:
                right = predict.right_associations(net, data, sizes, pixels, args.alpha, args.save_num_images,
                                           folder / "pictures" / f"{i + 1}_associations.png", run)
                session.log.scores(i + 1, {"right_associations": right})
    return session


def demo(args: argparse.Namespace) -> int:
    """Train source-only and adapted on the rendered pair, print their tables, draw result/demo/pixel_assoc.png.

    Associations need features that mean something: the paper's come from ImageNet, the demo's from source-only
    training, from where three quarters of the steps at half the rate adapt.
    """
    adapted = {"restore_from": f"{args.snapshot_dir}/source_only/resume.pth", "learning_rate": args.learning_rate / 2}
    for unit in ("num_steps", "epochs"):
        if length := getattr(args, unit):
            adapted[unit] = length = max(length * 3 // 4, 1)
            if stop := getattr(args, f"{unit}_stop"):
                adapted[f"{unit}_stop"] = min(stop, length)
    return train_and_compare(train, args, {"source_only": True, "bn_stats": "running", "aggregate": False}, adapted,
                             Path("result/demo/pixel_assoc.png"))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_demo(Path(f"data/demo/{args.random_seed}"), seed=args.random_seed)
    if args.demo and not args.source_only:
        return demo(args)
    return train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
