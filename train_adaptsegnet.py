"""AdaptSegNet: adversarial adaptation of the structured output space.

Tsai, Hung, Schulter, Sohn, Yang, Chandraker: "Learning to Adapt Structured Output Space for Semantic Segmentation",
CVPR 2018, https://arxiv.org/abs/1802.10349. Results: README.md, section "AdaptSegNet".

    python train_adaptsegnet.py --multi-level --demo                    # a miniature pair, minutes on a laptop
    python train_adaptsegnet.py --multi-level --restore-from imagenet   # data/GTA5 to data/Cityscapes/data

A segmentation network G is trained on labelled source images (Eq. 3), while discriminators D_i on its softmax maps,
one a level i, are trained to tell the domains apart (Eq. 2) and G to make target maps pass for source maps (Eq. 4, 5).

Where paper and released code differ, this follows the code, which made the published numbers: no Nesterov momentum,
no up-sampling layer in D, only rates 6 and 12 of the head (--aspp full adds the others), the release's repeated SGD
updates (--sgd released, see lib/optim.py). It deviates from the code where that could only hurt: --source-only runs no
target image through the network (the release let them change the BN statistics), and the mirror, scale, seed and
picture flags act.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, predict, runtime
from lib.datasets.demo import render_demo
from lib.datasets.description import load_description
from lib.datasets.folder import DomainPair, endless, open_pair
from lib.datasets.transforms import PIXELS, Augment
from lib.errors import UserError
from lib.models.deeplab import ARCHITECTURES, build, set_bn_affine, set_train_mode
from lib.models.discriminator import FCDiscriminator
from lib.optim import ReleasedAdam, deeplab_sgd, set_poly_lr
from lib.runtime import as_float32

SOURCE, TARGET = 0, 1  # domain labels of the code; the paper writes the reverse
# Choices that change neither the data nor the mathematics of a run, so that a resumed run may change them.
FREE_ARGUMENTS = {"resume", "num_workers", "num_steps_stop", "save_pred_every", "eval_every", "log_every", "log_dir",
                  "tensorboard", "save_num_images", "gpu", "cpu", "check_data", "snapshot_dir", "ops", "compile"}
# --demo: settings for a ResNet-18 from random weights on the rendered pair; any flag given besides wins.
DEMO = dict(source="gta5", target="demo", data_dir="data/demo/gta5", data_dir_target="data/demo/cityscapes",
            arch="resnet18", input_size=(192, 96), input_size_target=(192, 96), snapshot_dir="snapshots/demo",
            num_steps=400, learning_rate=2.5e-3, lambda_adv_target1=0.01, lambda_adv_target2=0.05, random_mirror=True,
            save_pred_every=400, num_workers=0, bn_stats="target")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    method = p.add_argument_group("method")
    method.add_argument("--multi-level", action="store_true", help="two levels: DeeplabMulti and its lambdas")
    method.add_argument("--source-only", action="store_true", help="no adaptation, no target image in training")
    method.add_argument("--gan", choices=["Vanilla", "LS"], default="Vanilla", help="cross-entropy or squared error")
    method.add_argument("--adapt", choices=["output", "feature"], default="output", help="what D sees")
    method.add_argument("--lambda-seg", type=flags.amount,
                        help="segmentation, auxiliary level (0.1 multi-level, else 0)")
    method.add_argument("--lambda-adv-target1", type=flags.amount,
                        help="adversarial, auxiliary level (0.0002 multi-level)")
    method.add_argument("--lambda-adv-target2", type=flags.amount, help="adversarial, main level (0.001; 0.01 with LS)")
    method.add_argument("--demo", action="store_true", help="render a small pair, train source-only and adapted")
    net = p.add_argument_group("networks")
    net.add_argument("--model", choices=["DeepLab", "DeeplabMulti", "Deeplab", "DeeplabVGG"], default="DeepLab",
                     help="DeepLab: by --multi-level")
    net.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet101")
    net.add_argument("--aspp", choices=["released", "full"], default="released", help="rates summed: 6, 12 or all four")
    net.add_argument("--restore-from", metavar="FILE|imagenet", help="initial weights in any dialect; none: random")
    net.add_argument("--not-restore-last", action="store_true", help="leave the heads of --restore-from out")
    net.add_argument("--pixels", choices=list(PIXELS), help="pixel convention (default: the weights', else caffe)")
    net.add_argument("--num-classes", type=flags.count, help="how many of the target's classes (default: all shared)")
    net.add_argument("--bn-affine", choices=["auto", "train", "frozen"], default="auto",
                     help="BN weights and biases; auto: frozen, but trained from random weights")
    net.add_argument("--is-training", action=argparse.BooleanOptionalAction, default=True,
                     help="BN statistics update while training")
    net.add_argument("--freeze-bn", dest="is_training", action="store_false", help="the same as --no-is-training")
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
    data.add_argument("--input-size", type=flags.size,
                      help="width,height of source images (default: the description's)")
    data.add_argument("--input-size-target", type=flags.size, help="width,height of target images")
    data.add_argument("--random-mirror", action="store_true", help="mirror images at random")
    data.add_argument("--random-scale", action="store_true", help="scale source images by 0.5..1.5 at random")
    data.add_argument("--ignore-label", type=flags.label, default=255,
                      help="class index without loss; void labels get it")
    data.add_argument("--num-workers", type=flags.natural, default=min(4, os.cpu_count() or 1),
                      help="loader processes of each of the two data sets")
    data.add_argument("--check-data", action="store_true", help="read every file, report, and leave")
    opt = p.add_argument_group("optimisation")
    opt.add_argument("--batch-size", type=flags.count, default=1, help="pairs a process and backward pass")
    opt.add_argument("--iter-size", type=flags.count, default=1, help="backward passes a step")
    opt.add_argument("--learning-rate", type=flags.amount, default=2.5e-4, help="of G; heads take 10 times as much")
    opt.add_argument("--learning-rate-D", dest="learning_rate_D", type=flags.amount, default=1e-4)
    opt.add_argument("--momentum", type=flags.below_one, default=0.9)
    opt.add_argument("--weight-decay", type=flags.amount, default=5e-4)
    opt.add_argument("--power", type=flags.amount, default=0.9, help="of the polynomial decay")
    opt.add_argument("--num-steps", type=flags.count, default=250000, help="where the decay would reach 0")
    opt.add_argument("--num-steps-stop", type=flags.count,
                     help="where training ends (default: 150000, at most --num-steps)")
    opt.add_argument("--sgd", choices=["released", "once"], default="released",
                     help="released: the backbone's updates are repeated as in the release")
    out = p.add_argument_group("run")
    out.add_argument("--snapshot-dir", default="snapshots/adaptsegnet", help="weights, resume file, log, pictures")
    out.add_argument("--save-pred-every", type=flags.count, default=5000, help="iterations between snapshots")
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
    out.add_argument("--compile", action="store_true", help="torch.compile the networks")
    out.add_argument("--ops", choices=["auto", "compiled", "reference"], default="auto", help="kernels of csrc/")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    if args.model == "DeepLab":
        args.model = "DeeplabMulti" if args.multi_level else "Deeplab"
    args.multi_level = args.model == "DeeplabMulti"
    single_adv = 0.01 if args.gan == "LS" else 0.001
    for name, multi, single in (("lambda_seg", 0.1, 0.0), ("lambda_adv_target1", 0.0002, 0.0),
                                ("lambda_adv_target2", 0.001, single_adv)):
        if getattr(args, name) is None:
            setattr(args, name, multi if args.multi_level else single)
    args.num_steps_stop = args.num_steps_stop or min(150000, args.num_steps)
    args.eval_every = args.eval_every or args.save_pred_every
    if args.num_steps_stop > args.num_steps:
        p.error(f"--num-steps-stop must be 1..{args.num_steps} (--num-steps)")
    if args.adapt == "feature" and args.multi_level:
        p.error("--adapt feature is the single-level baseline: leave --multi-level out")
    return args


# --- losses: pred are logits [N, C, H, W] at the size of their image, score is D's output -----------------------------


def upsample(pred: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, align_corners=True (in training and test): [N, C, h, w] -> [N, C, *size]."""
    return F.interpolate(as_float32(pred), tuple(size), mode="bilinear", align_corners=True)


def loss_seg(pred: Tensor, label: Tensor, ignore: int, valid: Tensor | None = None) -> Tensor:
    """L_seg, Eq. 3: cross-entropy with int64 [N, H, W], the mean over labelled pixels; 0 where there is none.

    valid: the count to divide by, where other processes hold pixels of the batch too.
    """
    total = F.cross_entropy(pred, label, ignore_index=ignore, reduction="sum")
    return total / ((label != ignore).sum() if valid is None else valid).clamp(min=1e-3)


def loss_domain(score: Tensor, domain: int, gan: str) -> Tensor:
    """Eq. 2 and 4: -log of the probability that D gives to ``domain``; for LS the squared error of its raw score."""
    truth = torch.full_like(score, domain)
    return F.mse_loss(score, truth) if gan == "LS" else F.binary_cross_entropy_with_logits(score, truth)


class Level(NamedTuple):
    """One output of G with its discriminator and weights."""

    number: int             # 1 auxiliary, 2 main
    discriminator: nn.Module | None
    lambda_seg: float
    lambda_adv: float


def outputs(net: nn.Module, x: Tensor, adapt: str, run: runtime.Run) -> tuple[list[Tensor], list[Tensor]]:
    """(up-sampled logits of each level, what D sees of each level before the softmax)."""
    with run.autocast():
        out = net(x, return_features=adapt == "feature")
    if adapt == "feature":
        return [upsample(out[1], x.shape[2:])], [as_float32(out[0])]
    preds = [upsample(pred, x.shape[2:]) for pred in (out if isinstance(out, tuple) else (out,))]
    return preds, preds


def domain_score(level: Level, seen: Tensor, adapt: str, run: runtime.Run) -> Tensor:
    with run.autocast():
        return as_float32(level.discriminator(F.softmax(seen, dim=1) if adapt == "output" else seen))


def adapt_backward(net: nn.Module, levels: Sequence[Level], x_s: Tensor, y_s: Tensor, x_t: Tensor | None, *, gan: str,
                   adapt: str, iter_size: int, ignore: int, run: runtime.Run,
                   scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict[str, Tensor]:
    """Accumulate the gradients of one batch in G and all D_i (x_t None: source only). Returns the unweighted losses."""
    losses: dict[str, Tensor] = {}
    discriminators = [level.discriminator for level in levels if level.discriminator is not None]
    for d in discriminators:
        d.requires_grad_(False)

    # G on the source, Eq. 3 at each level (Eq. 5: their weighted sum)
    preds_s, seen_s = outputs(net, x_s, adapt, run)
    valid = run.sum((y_s != ignore).sum().to(preds_s[0].dtype)) / run.world
    total = 0.0
    for level, pred in zip(levels, preds_s, strict=True):
        losses[f"loss_seg{level.number}"] = loss = loss_seg(pred, y_s, ignore, valid)
        total = total + level.lambda_seg * loss
    scale(total / iter_size).backward()
    if x_t is None:
        return losses

    # G on the target, Eq. 4 at each level. A backward pass of its own, so that one graph at a time is held.
    _, seen_t = outputs(net, x_t, adapt, run)
    total = 0.0
    for level, seen in zip(levels, seen_t, strict=True):
        losses[f"loss_adv{level.number}"] = loss = loss_domain(domain_score(level, seen, adapt, run), SOURCE, gan)
        total = total + level.lambda_adv * loss
    scale(total / iter_size).backward()

    # D_i on both domains, Eq. 2; the halves are the code's
    for level, s, t in zip(levels, seen_s, seen_t, strict=True):
        level.discriminator.requires_grad_(True)
        losses[f"loss_D{level.number}"] = 0.0
        for seen, domain in ((s, SOURCE), (t, TARGET)):
            loss = loss_domain(domain_score(level, seen.detach(), adapt, run), domain, gan) / 2
            scale(loss / iter_size).backward()
            losses[f"loss_D{level.number}"] = losses[f"loss_D{level.number}"] + loss
    return losses


# --- the run ----------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    net: nn.Module
    data: DomainPair
    confusion: np.ndarray | None  # of the last weights on the validation set
    pixels: str


def train(args: argparse.Namespace) -> Outcome | int:
    """One run; returns its outcome, or an exit code when it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)

    # initial weights decide the pixel convention and where the stride of a bottleneck stands
    backbone = "vgg16" if args.model == "DeeplabVGG" else args.arch
    weights, meta = checkpoint.initial_weights(args.restore_from, backbone)
    pixels, stride_on = args.pixels or meta.get("pixels", "caffe"), meta.get("stride_on", "1x1")

    # data
    source, target = load_description(args.source), load_description(args.target)
    size_s, size_t = args.input_size or source.size, args.input_size_target or target.size
    least = 32 if args.adapt == "output" else 256  # D halves five times, and features are an eighth of the image
    if not args.source_only and min(*size_s, *size_t) < least:
        raise UserError(f"--adapt {args.adapt} needs images of at least {least}x{least} for its discriminators, not "
                        f"{size_s} and {size_t}: choose a larger --input-size and --input-size-target")
    data = open_pair(
        source, target, Augment(size_s, pixels, args.random_scale, args.random_mirror, args.ignore_label),
        Augment(size_t, pixels, False, args.random_mirror, args.ignore_label), num_classes=args.num_classes,
        root_s=args.data_dir, root_t=args.data_dir_target, set_s=args.source_set, set_t=args.set, set_val=args.val_set,
        list_s=args.data_list, list_t=args.data_list_target, ignore=args.ignore_label, seed=args.random_seed,
        fully=args.check_data)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        return 0
    prefix = f"{source.name.upper()}_"
    folder = Path(args.snapshot_dir)
    resume_file = folder / "resume.pth"

    # networks
    net = build(args.model, len(data.classes), args.arch, args.aspp, stride_on)
    loaded = "none, random weights (the paper starts from ImageNet: --restore-from imagenet or a file)"
    if weights is not None:
        loaded = checkpoint.load_into(net, weights, heads=not args.not_restore_last, source=args.restore_from)
    affine = args.bn_affine == "train" or (args.bn_affine == "auto" and weights is None)
    set_bn_affine(net, affine)
    net.to(run.device, memory_format=run.memory_format)
    if run.world > 1 and run.device.type == "cuda" and args.is_training:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    discriminators = {}
    if not args.source_only:
        channels = len(data.classes) if args.adapt == "output" else net.channels[1]
        discriminators = {n: FCDiscriminator(channels).to(run.device) for n in ((1, 2) if args.multi_level else (2,))}
    levels = [Level(1, discriminators.get(1), args.lambda_seg, args.lambda_adv_target1)] if args.multi_level else []
    levels += [Level(2, discriminators.get(2), 1.0, args.lambda_adv_target2)]

    # optimisers
    optimizer = deeplab_sgd(net, args.sgd, args.learning_rate, args.momentum, args.weight_decay)
    adam = ReleasedAdam if args.sgd == "released" else torch.optim.Adam
    optimizers_d = [adam(d.parameters(), lr=args.learning_rate_D, betas=(0.9, 0.99)) for d in discriminators.values()]
    scaler = run.scaler()

    # resume
    validation = None if data.validation is None else predict.Validation(
        data, size_t, pixels, run, folder, bn_stats=args.bn_stats, workers=args.num_workers, most=args.save_num_images)
    first = 0
    everything = net, list(discriminators.values()), [optimizer, *optimizers_d], scaler
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
        "networks": f"{args.model} {backbone}, {len(data.classes)} classes, ASPP {args.aspp}",
        "batch norm": f"weights {'train' if affine else 'frozen'}, "
                      f"statistics {'update' if args.is_training else 'frozen'}",
        "pixels": pixels, "source": f"{len(data.source)} images of {args.source} at {size_s}",
        "target": "none in training" if args.source_only else f"{len(data.target)} images of {args.target} at {size_t}",
        "validation": "none" if data.validation is None else f"{len(data.validation)} images of {args.target}",
        "batch": f"{args.batch_size * run.world * args.iter_size} pairs a step = {args.batch_size} x {run.world} "
                 f"processes x {args.iter_size} passes",
        "steps": f"{first} to {args.num_steps_stop}, SGD {args.sgd}", "output": folder})
    if args.compile:
        net.compile()
        for d in discriminators.values():
            d.compile()

    def meta_of(iteration: int) -> dict[str, object]:
        return {"script": "train_adaptsegnet.py", "iteration": iteration, "model": args.model, "arch": args.arch,
                "aspp": args.aspp, "stride_on": stride_on, "pixels": pixels, "task": args.target,
                "classes": list(data.classes), "size": list(size_t), "align_corners": True}

    def save(iteration: int, snapshot: bool) -> None:
        """The resume file, and with ``snapshot`` the weights under the names of the release."""
        if not run.is_main:
            return
        if snapshot:
            checkpoint.save_weights(net, folder / f"{prefix}{iteration}.pth", meta_of(iteration))
            for number, d in discriminators.items():
                checkpoint.save_weights(d, folder / f"{prefix}{iteration}_D{number}.pth", meta_of(iteration))
        checkpoint.save_resume(resume_file, *everything, meta_of(iteration), iteration=iteration, arguments=arguments,
                               validation=validation and validation.state_dict())

    # the loop
    tensorboard = Path(args.log_dir or folder) if args.tensorboard else None
    log = runtime.Log(run, folder / "log.jsonl", first, args.num_steps_stop, tensorboard)
    stream = dict(batch=args.batch_size, workers=args.num_workers, start=first * args.iter_size, rank=run.rank,
                  world=run.world, pin=run.device.type == "cuda")
    batches_s = endless(data.source, seed=args.random_seed, **stream)
    batches_t = None if args.source_only else endless(data.target, seed=args.random_seed + 1, **stream)
    set_train_mode(net, freeze_bn=not args.is_training)
    last_good = resume_file if first else None
    with runtime.StopRequest() as stop:
        for i in range(first, args.num_steps_stop):
            lr = set_poly_lr(optimizer, args.learning_rate, i, args.num_steps, args.power)
            optimizer.zero_grad()
            for o in optimizers_d:
                set_poly_lr(o, args.learning_rate_D, i, args.num_steps, args.power)
                o.zero_grad()
            sums: dict[str, Tensor] = {}
            names: list[str] = []
            for _ in range(args.iter_size):
                batch_s = next(batches_s)
                batch_t = next(batches_t) if batches_t is not None else None
                names += [*batch_s.name, *(batch_t.name if batch_t is not None else ())]
                losses = adapt_backward(
                    net, levels, run.place(batch_s.image), batch_s.label.to(run.device),
                    None if batch_t is None else run.place(batch_t.image), gan=args.gan, adapt=args.adapt,
                    iter_size=args.iter_size, ignore=args.ignore_label, run=run, scale=scaler.scale)
                for key, loss in losses.items():
                    sums[key] = sums.get(key, 0.0) + loss.detach() / args.iter_size
            values = run.mean_values(sums)
            runtime.require_finite(values, i + 1, names, last_good)
            run.average_gradients([net, *discriminators.values()])
            for o in (optimizer, *optimizers_d):
                scaler.step(o)
            scaler.update()

            done = i + 1
            runtime.require_finite_weights([net, *discriminators.values()], done, names, last_good)
            log.step()
            if done % args.log_every == 0 or done == args.num_steps_stop:
                log.losses(done, {**values, "lr": lr})
            if validation is not None and (done % args.eval_every == 0 or done == args.num_steps_stop):
                validation(net, done, meta_of(done), log)
                set_train_mode(net, freeze_bn=not args.is_training)
            leaving = run.any(stop.signal is not None)
            snapshot = done % args.save_pred_every == 0 or done == args.num_steps_stop
            if snapshot or leaving:
                save(done, snapshot)
                last_good = resume_file
            if leaving and done < args.num_steps_stop:
                log.close()
                run.say(f"stopped at iteration {done}; --resume goes on from {resume_file}")
                return 128 + (stop.signal or 0)
    if validation is not None:
        if validation.iteration != args.num_steps_stop:  # resumed at its end, which had not been scored
            validation(net, args.num_steps_stop, meta_of(args.num_steps_stop), log)
        validation.report()
    log.close()
    run.barrier()
    return Outcome(net, data, validation and validation.confusion, pixels)


def demo(args: argparse.Namespace) -> int:
    """Train source-only and adapted on the rendered pair, print their tables, draw result/demo/report.png."""
    outcomes = []
    for name, changes in (("source only", {"source_only": True, "bn_stats": "running"}), ("adapted", {})):
        print(f"--- {name}")
        folder = f"{args.snapshot_dir}/{name.replace(' ', '_')}"
        outcome = train(argparse.Namespace(**{**vars(args), **changes, "snapshot_dir": folder}))
        if isinstance(outcome, int):
            return outcome
        outcomes.append(outcome)
    source_only, adapted = outcomes
    run = runtime.Run(next(adapted.net.parameters()).device, 0, 1, "off")
    predict.compare((source_only.net, source_only.confusion), (adapted.net, adapted.confusion), adapted.data,
                    args.input_size_target, adapted.pixels, run, Path("result/demo/report.png"),
                    bn_stats=args.bn_stats, workers=args.num_workers)
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
