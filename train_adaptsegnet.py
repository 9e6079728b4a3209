"""AdaptSegNet: adversarial adaptation of the structured output space.

Tsai, Hung, Schulter, Sohn, Yang, Chandraker: "Learning to Adapt Structured Output Space for Semantic Segmentation",
CVPR 2018, https://arxiv.org/abs/1802.10349. Results: docs/adaptsegnet.md.

    python train_adaptsegnet.py --multi-level --demo                    # a miniature pair, minutes on a laptop
    python train_adaptsegnet.py --multi-level --restore-from imagenet   # data/GTA5 to data/Cityscapes/data

A segmentation network G is trained on labelled source images (Eq. 3). A discriminator D_i at each output level i learns
to tell the softmax maps of the two domains apart (Eq. 2), and G learns to make target maps look like source maps to it
(Eq. 4, 5).

Where paper and released code differ, this follows the code, which made the published numbers: no Nesterov momentum,
no up-sampling layer in D, only rates 6 and 12 of the head (--aspp full adds the others), the release's repeated SGD
updates (--sgd released, see lib/optim.py). It deviates from the code where that could only hurt: --source-only runs no
target image through the network (the release let them change the BN statistics), and the mirror, scale, seed and
picture flags act.
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
from lib.models.deeplab import build, set_bn_affine, set_train_mode, upsample
from lib.optim import ReleasedAdam, deeplab_sgd, set_poly_lr
from lib.runtime import as_float32
from lib.session import Session

SOURCE, TARGET = 0, 1  # domain labels of the code; the paper writes the reverse
# --demo: settings for a ResNet-18 from random weights on the rendered pair; flags given override them.
DEMO = dict(**flags.DEMO_DATA, snapshot_dir="snapshots/demo/{seed}", arch="resnet18", input_size=(192, 96),
            input_size_target=(192, 96), num_steps=400, learning_rate=2.5e-3, lambda_adv_target1=0.01,
            lambda_adv_target2=0.05, random_mirror=True, save_pred_every=400, bn_stats="target")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__)
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
    net = flags.add_network(p)
    net.add_argument("--model", choices=["DeepLab", "DeeplabMulti", "Deeplab", "DeeplabVGG"], default="DeepLab",
                     help="DeepLab: by --multi-level")
    net.add_argument("--aspp", choices=["released", "full"], default="released", help="rates summed: 6, 12 or all four")
    flags.add_batch_norm(net, affine="auto", is_training=True)
    net.add_argument("--freeze-bn", dest="is_training", action="store_false", default=argparse.SUPPRESS,
                     help="the same as --no-is-training")
    flags.add_data(p, augmentation=True)
    opt = flags.add_optimisation(p, sgd=True)
    opt.add_argument("--iter-size", type=flags.count, default=1, help="backward passes a step")
    opt.add_argument("--learning-rate-D", dest="learning_rate_D", type=flags.amount, default=1e-4)
    opt.add_argument("--num-steps", type=flags.count, default=250000, help="where the decay would reach 0")
    opt.add_argument("--num-steps-stop", type=flags.count,
                     help="where training ends (default: 150000, at most --num-steps)")
    flags.add_run(p)
    args = flags.parse(p, argv, DEMO)
    if args.multi_level and args.model in ("Deeplab", "DeeplabVGG"):
        p.error(f"--multi-level needs --model DeeplabMulti: {args.model} has one level")
    if args.model == "DeepLab":
        args.model = "DeeplabMulti" if args.multi_level else "Deeplab"
    args.multi_level = args.model == "DeeplabMulti"
    if args.source_only:
        p.note("with --source-only", "gan", "adapt", "lambda_adv_target1", "lambda_adv_target2", "learning_rate_D")
    elif not args.multi_level:
        p.note("without --multi-level", "lambda_seg", "lambda_adv_target1")
    if args.model == "DeeplabVGG":
        vgg = "with --model DeeplabVGG, a VGG-16 without batch normalisation"
        p.note(vgg, "arch", "bn_affine", "is_training")
        p.refuse(vgg, "bn_stats")
        args.bn_stats = "running"  # the demo's default is another
    args.snapshot_dir = args.snapshot_dir or flags.run_folder(
        "adaptsegnet", args.source, args.target, source_only=args.source_only, multi=args.multi_level,
        feature=args.adapt == "feature", ls=args.gan == "LS", full=args.aspp == "full",
        **{"vgg16": True} if args.model == "DeeplabVGG" else {args.arch: args.arch != p.get_default("arch")})
    single_adv = 0.01 if args.gan == "LS" else 0.001
    for name, multi, single in (("lambda_seg", 0.1, 0.0), ("lambda_adv_target1", 0.0002, 0.0),
                                ("lambda_adv_target2", 0.001, single_adv)):
        if getattr(args, name) is None:
            setattr(args, name, multi if args.multi_level else single)
    args.num_steps_stop = args.num_steps_stop or min(150000, args.num_steps)
    if args.num_steps_stop > args.num_steps:
        p.error(f"--num-steps-stop must be 1..{args.num_steps} (--num-steps)")
    if args.adapt == "feature" and args.multi_level:
        p.error("--adapt feature is the single-level baseline: leave --multi-level out")
    return args


# --- networks ---------------------------------------------------------------------------------------------------------


class FCDiscriminator(nn.Module):
    """D, section 4.2: five 4x4 convolutions of stride 2, LeakyReLU(0.2) between them, no BN, no sigmoid."""

    def __init__(self, num_classes: int, ndf: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(num_classes, ndf, 4, 2, 1)
        self.conv2 = nn.Conv2d(ndf, ndf * 2, 4, 2, 1)
        self.conv3 = nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1)
        self.conv4 = nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1)
        self.classifier = nn.Conv2d(ndf * 8, 1, 4, 2, 1)
        self.leaky_relu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, num_classes, H, W], H and W at least 32 -> domain scores [N, 1, H // 32, W // 32] (no sigmoid)."""
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.leaky_relu(conv(x))
        return self.classifier(x)


# --- losses: pred are logits [N, C, H, W] at the size of their image, score is D's output -----------------------------


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
        return [upsample(out[-1], x.shape[2:])], [as_float32(out[0])]
    preds = [upsample(pred, x.shape[2:]) for pred in (out if isinstance(out, tuple) else (out,))]
    return preds, preds


def domain_score(level: Level, seen: Tensor, adapt: str, run: runtime.Run) -> Tensor:
    with run.autocast():
        return as_float32(level.discriminator(F.softmax(seen, dim=1) if adapt == "output" else seen))


def step(net: nn.Module, levels: Sequence[Level], x_s: Tensor, y_s: Tensor, x_t: Tensor | None, *, gan: str,
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


def train(args: argparse.Namespace) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    folder = Path(args.snapshot_dir)

    # initial weights decide the pixel convention and where the stride of a bottleneck stands
    backbone = "vgg16" if args.model == "DeeplabVGG" else args.arch
    weights, meta = checkpoint.initial_weights(args.restore_from, backbone)
    pixels, stride_on = args.pixels or meta.get("pixels", "caffe"), meta.get("stride_on", "1x1")

    # data
    source = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
    target = Domain.open(args.target, args.data_dir_target, args.set, args.data_list_target)
    size_s, size_t = args.input_size or source.size, args.input_size_target or target.size
    # D halves five times, and features are an eighth of the image; BN needs more than one pixel of them
    min_size, what = (17, "--source-only") if args.source_only else \
        (32 if args.adapt == "output" else 256, f"--adapt {args.adapt}")
    if min(*size_s, *size_t) < min_size:
        raise UserError(f"{what} needs images of at least {min_size}x{min_size}, not {size_s} and {size_t}: choose a "
                        "larger --input-size and --input-size-target")
    data = open_pair(
        source, target, Augment(size_s, pixels, args.random_scale, args.random_mirror, args.ignore_label),
        Augment(size_t, pixels, False, args.random_mirror, args.ignore_label), val_set=args.val_set,
        num_classes=args.num_classes, ignore=args.ignore_label, seed=args.random_seed, check_all=args.check_data)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        raise SystemExit(0)

    # networks
    net = build(args.model, len(data.classes), args.arch, args.aspp, stride_on)
    loaded = checkpoint.initialise(net, weights, heads=not args.not_restore_last, source=args.restore_from)
    affine = args.bn_affine == "train" or (args.bn_affine == "auto" and weights is None)
    set_bn_affine(net, affine)
    net = run.place_net(net, sync_bn=args.is_training, compiled=args.compile)
    discriminators = {}
    if not args.source_only:
        channels = len(data.classes) if args.adapt == "output" else net.channels[-1]
        discriminators = {n: run.place_net(FCDiscriminator(channels), compiled=args.compile)
                          for n in ((1, 2) if args.multi_level else (2,))}
    levels = [Level(1, discriminators.get(1), args.lambda_seg, args.lambda_adv_target1)] if args.multi_level else []
    levels += [Level(2, discriminators.get(2), 1.0, args.lambda_adv_target2)]
    modules = {"": net, **{f"_D{n}": d for n, d in discriminators.items()}}

    # optimisers
    optimizer = deeplab_sgd(net, args.sgd, args.learning_rate, args.momentum, args.weight_decay)
    adam = ReleasedAdam if args.sgd == "released" else torch.optim.Adam
    optimizers_d = [adam(d.parameters(), lr=args.learning_rate_D, betas=(0.9, 0.99)) for d in discriminators.values()]
    scaler = run.scaler()

    def meta_of(iteration: int) -> dict[str, object]:
        return {"script": "train_adaptsegnet.py", "iteration": iteration, "model": args.model, "arch": args.arch,
                "aspp": args.aspp, "stride_on": stride_on, "pixels": pixels, "task": args.target,
                "classes": list(data.classes), "size": list(size_t), "align_corners": True, "bn_stats": args.bn_stats}

    validation = None if data.validation is None else predict.Validation(
        data, size_t, pixels, run, folder, bn_stats=args.bn_stats, workers=args.num_workers,
        max_pictures=args.save_num_images)
    with Session(run, args, folder, modules, [optimizer, *optimizers_d], scaler=scaler, meta=meta_of,
                 prefix=f"{source.name.upper()}_", validation=validation, free={"num_steps_stop"}) as session:
        session.header({
            "weights": loaded, "networks": f"{args.model} {backbone}, {len(data.classes)} classes, ASPP {args.aspp}",
            "batch norm": f"weights {'train' if affine else 'frozen'}, "
                          f"statistics {'update' if args.is_training else 'frozen'}",
            "pixels": pixels, **data.summary(size_s, size_t, target_trains=not args.source_only),
            "batch": f"{args.batch_size * run.world * args.iter_size} pairs a step = {args.batch_size} x {run.world} "
                     f"processes x {args.iter_size} passes",
            "steps": f"{session.iteration} to {args.num_steps_stop}, SGD {args.sgd}"})
        pairs = session.pairs(data, args.random_seed, args.iter_size, args.source_only)
        set_train_mode(net, freeze_bn=not args.is_training)
        for i in session.steps(args.num_steps_stop):
            lr = set_poly_lr(optimizer, args.learning_rate, i, args.num_steps, args.power)
            optimizer.zero_grad()
            for o in optimizers_d:
                set_poly_lr(o, args.learning_rate_D, i, args.num_steps, args.power)
                o.zero_grad()
            losses, names = [], []
            for _ in range(args.iter_size):
                x_s, y_s, x_t, files = next(pairs)
                names += files
                losses.append(step(net, levels, x_s, y_s, x_t, gan=args.gan, adapt=args.adapt,
                                   iter_size=args.iter_size, ignore=args.ignore_label, run=run, scale=scaler.scale))
            run.average_gradients(modules.values())
            for o in (optimizer, *optimizers_d):
                scaler.step(o)
            scaler.update()
            session.end_step(losses, names, lr=lr)
    return session


def demo(args: argparse.Namespace) -> int:
    """Train source-only and adapted on the rendered pair, print their tables, draw result/demo/report.png."""
    return train_and_compare(train, args, {"source_only": True, "bn_stats": "running"}, {},
                             Path("result/demo/report.png"))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_demo(Path(f"data/demo/{args.random_seed}"), seed=args.random_seed)
    if args.demo and not args.source_only:
        return demo(args)
    return train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
