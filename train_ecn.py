"""ECN: person re-identification without labels in the target's cameras; CamStyle, source-only, SPGAN's second stage.

Zhong, Zheng, Luo, Li, Yang: "Invariance Matters: Exemplar Memory for Domain Adaptive Person Re-identification",
CVPR 2019, https://arxiv.org/abs/1904.01990. Results, and what to consider before using it on people: docs/ecn.md.

    python train_ecn.py --demo                                              # rendered people, minutes on a laptop
    python train_ecn.py -s msmt17 -t market --logs-dir logs/ecn             # ECN
    python train_ecn.py --method ide -s msmt17 -t market --logs-dir logs/source-only
    python train_ecn.py --method ide --preset spgan -s msmt17-as-market -t market --logs-dir logs/spgan

The network learns to name the people of the source (Eq. 1). A memory V holds one feature for each image of the target
(Eq. 2), and asks the network to tell each of them from all the others (exemplar invariance), also when the image is
shown as another camera would take it (camera invariance, Eq. 4 and 5), but to take its nearest neighbours for the same
person (neighbourhood invariance, Eq. 6 to 8). --method ide trains on the source alone; --method camstyle adds source
images in the style of the target's cameras, with smoothed labels (https://arxiv.org/abs/1711.10295).

Where paper and released code differ, this follows the code, which made the published numbers: dropout after the norm of
a target feature, neighbours' weights that do not sum to 1, shortcut norms that train although their layers are frozen.
It deviates where that could only hurt: a batch never ends with an epoch, a feature that dropout emptied gives no NaN,
--print-freq and --dist-metric act, and --resume goes on exactly. Scores are those of the last weights: choosing a
snapshot by them would need the target's labels.
"""
from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, runtime
from lib.datasets.persons import (
    DUKE_NOTICE,
    STYLES,
    CameraStyles,
    PersonImages,
    PersonSet,
    TestTransform,
    TrainTransform,
    check,
    describe,
    open_persons,
    parts_of,
    style_images,
)
from lib.datasets.transforms import PIXELS
from lib.demo.persons import render_persons
from lib.errors import UserError
from lib.models.reid import ARCHITECTURES, EARLY, IDNet, SPGANNet, freeze, from_weights, set_train_mode
from lib.predict_reid import PersonValidation
from lib.runtime import as_float32
from lib.session import Session

SCORING = ("evaluate", "output_feature", "mirrored", "lmp", "dist_metric", "rerank", "bn_stats")  # flags of the scores
INVARIANCES = ("no_camstyle", "inv_alpha", "inv_beta", "knn", "neighbour_epoch", "lmd")  # flags of ECN alone
# Settings of the methods; flags given override them. lr_trunk is the rate of the pretrained layers.
METHODS = {"ecn": dict(features=4096, epochs=60, bn="ecn"), "ide": dict(features=1024, epochs=50, bn="train"),
           "camstyle": dict(features=1024, epochs=50, bn="train", camstyle=46)}
PRESETS = {
    # SPGAN's second stage in PyTorch (IDE+ of eSPGAN): the statistics of the trunk stay, which matters
    "spgan": dict(layout=SPGANNet, features=512, learning_rate=0.01, lr_trunk=0.001, batch_size=16, epochs=60,
                  epochs_decay=40, bn="trunk", re=0.0, mirrored=True),
    # and in Caffe: pool5 straight to the classifier, every norm and conv1 fixed
    "spgan-caffe": dict(layout=IDNet, features=0, learning_rate=0.002, lr_trunk=0.001, batch_size=16, num_steps=50000,
                        steps_decay=20000, bn="fixed", freeze="conv1", height=224, width=224, re=0.0),
}
# --demo: a ResNet-18 from random weights on the rendered pair
DEMO = dict(source="plaza", target="campus", data_dir="data/demo/persons/{seed}", snapshot_dir="logs/demo/{seed}",
            arch="resnet18", features=256, restore_from="none", height=64, width=32, num_workers=0, batch_size=32,
            learning_rate=0.05, lr_trunk=0.05, epochs=12, epochs_decay=9, bn="train", save_num_images=6)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__)
    method = p.add_argument_group("method")
    method.add_argument("--method", choices=list(METHODS), default="ecn")
    method.add_argument("--preset", choices=list(PRESETS), help="SPGAN's second stage, for --method ide")
    method.add_argument("--camstyle", type=flags.up_to(4096, 0), default=0, metavar="B",
                        help="style images a step (46 with --method camstyle)")
    method.add_argument("--no-camstyle", action="store_true", help="ECN: real images only")
    method.add_argument("--camstyle-dir", default=STYLES, help="folder of the style images beside the training images")
    method.add_argument("--inv-alpha", type=flags.amount, default=0.01, help="alpha of Eq. 2 grows by this every epoch")
    method.add_argument("--inv-beta", type=flags.positive, default=0.05, help="temperature of Eq. 3")
    method.add_argument("--knn", type=flags.natural, default=6, help="neighbours of Eq. 6; 0: none")
    method.add_argument("--neighbour-epoch", type=flags.natural, default=5, help="first epoch in which they count")
    method.add_argument("--lmd", type=flags.share, default=0.3, help="lambda of Eq. 9: the target's share of the loss")
    net = p.add_argument_group("network")
    net.add_argument("-a", "--arch", choices=list(ARCHITECTURES), default="resnet50")
    net.add_argument("--features", type=flags.up_to(65536, 0),
                     help="width of the embedding (4096 ECN, 1024 ide and camstyle)")
    net.add_argument("--dropout", type=flags.below_one, default=0.5)
    net.add_argument("--restore-from", default="imagenet", metavar="FILE|imagenet|none", help="initial weights")
    net.add_argument("--pixels", choices=list(PIXELS), help="pixel convention (default: the weights', else imagenet)")
    net.add_argument("--bn", choices=["ecn", "train", "trunk", "fixed"],
                     help="which BN statistics stay in training (default: the method's, see lib/models/reid.py)")
    net.add_argument("--freeze", choices=["auto", "early", "conv1", "none"], default="auto",
                     help="layers without gradient; auto: conv1 to layer2 for ECN, but none from random weights")
    data = p.add_argument_group("data")
    data.add_argument("-s", "--source", default="msmt17", help="a folder below --data-dir, with labels")
    data.add_argument("-t", "--target", default="market", help="likewise; the labels of its training set play no part")
    data.add_argument("--data-dir", default="data", help="where the data sets lie")
    data.add_argument("--height", type=flags.side, default=256)
    data.add_argument("--width", type=flags.side, default=128)
    data.add_argument("--re", type=flags.share, default=0.5, help="chance of random erasing (0 for MSMT17 as target)")
    data.add_argument("--msmt-val", action=argparse.BooleanOptionalAction, default=True,
                      help="MSMT17's list_val trains too, as in the published counts")
    data.add_argument("-j", "--workers", "--num-workers", dest="num_workers", type=flags.workers,
                      default=min(4, os.cpu_count() or 1), help="loader processes of each data set")
    data.add_argument("--check-data", action="store_true", help="read every file, print counts, and leave")
    opt = p.add_argument_group("optimisation")
    opt.add_argument("-b", "--batch-size", type=flags.batch, default=128, help="images of each domain and process")
    opt.add_argument("--lr", "--learning-rate", dest="learning_rate", type=flags.amount, default=0.1, help="new layers")
    opt.add_argument("--lr-trunk", type=flags.amount, help="pretrained layers (default: a tenth of --lr)")
    opt.add_argument("--momentum", type=flags.below_one, default=0.9)
    opt.add_argument("--weight-decay", type=flags.amount, default=5e-4)
    opt.add_argument("--epochs", type=flags.count, help="passes of the source (60 ECN, 50 ide and camstyle)")
    opt.add_argument("--epochs_decay", "--epochs-decay", type=flags.count, help="between drops of the rate (40)")
    opt.add_argument("--num-steps", type=flags.count, help="iterations, in place of --epochs")
    opt.add_argument("--steps-decay", type=flags.count, help="iterations between drops, in place of --epochs_decay")
    score = p.add_argument_group("scores")
    score.add_argument("--evaluate", action="store_true",
                       help="score a checkpoint (--resume FILE, else --restore-from FILE, else the folder's) and leave")
    flags.add_features(score)
    score.add_argument("--dist-metric", choices=["euclidean", "kissme"], default="euclidean",
                       help="kissme: a distance learnt from the source's training images")
    score.add_argument("--rerank", action="store_true", help="scores after k-reciprocal re-ranking too")
    p.conflict_handler = "resolve"  # the release's names for flags of the run
    run = flags.add_run(p)
    run.add_argument("--logs-dir", "--snapshot-dir", dest="snapshot_dir",
                     help="checkpoint, log (default: logs/METHOD_SOURCE_TARGET, with a --preset PRESET_SOURCE_TARGET)")
    run.add_argument("--print-freq", "--log-every", dest="log_every", type=flags.count, default=10)
    run.add_argument("--resume", nargs="?", const="", metavar="FILE", help="go on from resume.pth, or FILE")
    p.set_defaults(save_pred_every=1000)
    known = p.parse_known_args(argv)[0]
    if known.preset and known.method != "ide":
        p.error(f"--preset {known.preset} is a setting of --method ide")
    preset = {key: value for key, value in PRESETS.get(known.preset, {}).items() if key != "layout"}
    if known.epochs or known.epochs_decay:  # given in epochs, not in the preset's steps
        preset = {**preset, "num_steps": None, "steps_decay": None}
    p.set_defaults(**METHODS[known.method] | preset)
    args = flags.parse(p, argv, DEMO)
    if args.demo:
        p.refuse("with --demo, which runs all methods", "method", "preset", "camstyle", "no_camstyle", "evaluate")
    if args.evaluate:
        args.given = p.given
    if args.method != "ecn":
        p.note(f"with --method {args.method}", *INVARIANCES)
        if not args.camstyle:
            p.note(f"with --method {args.method} without --camstyle", "camstyle_dir")
    if args.num_steps:
        p.note("with --num-steps", "epochs")
    if args.steps_decay:
        p.note("with --steps-decay", "epochs_decay")
    args.epochs_decay = args.epochs_decay or 40
    args.snapshot_dir = args.snapshot_dir or f"logs/{args.preset or args.method}_{args.source}_{args.target}"
    args.lr_trunk = 0.1 * args.learning_rate if args.lr_trunk is None else args.lr_trunk
    if args.bn != "fixed" and 1 in (args.batch_size, args.camstyle):
        p.error("batch normalisation needs at least 2 images: raise -b and --camstyle, or take --bn fixed")
    if args.lmp and args.output_feature == "fc":
        p.error("--lmp takes the parts of pool5, not of fc")
    if args.preset == "spgan" and not args.features:
        p.error("--preset spgan has an embedding: --features 512")
    if args.method == "camstyle" and not args.camstyle:
        p.error("--method camstyle needs style images in a step: --camstyle 46")
    return args


# --- the memory and its invariances -----------------------------------------------------------------------------------


class ExemplarMemory(nn.Module):
    """V: one feature of length 1 for each image of the target; rows of images not seen yet are 0."""

    def __init__(self, images: int, features: int):
        super().__init__()
        self.register_buffer("em", torch.zeros(images, features))

    def logits(self, f: Tensor, beta: float) -> Tensor:
        """Exponents of Eq. 3, p(j|x) = softmax_j(V[j]^T f / beta): f [B, D] -> [B, images]."""
        return f @ self.em.T / beta

    @torch.no_grad()
    def update(self, f: Tensor, index: Tensor, alpha: float) -> None:
        """Eq. 2: V[i] <- alpha V[i] + (1 - alpha) f, then V[i] / |V[i]|, for f [B, D] and index [B] one by one.

        An image that stands in the batch twice is updated twice. f is what the loss saw, with its dropout.
        """
        turn = (index[:, None] == index).tril(-1).sum(1)  # how often the image came earlier in the batch
        for n in range(int(turn.max()) + 1):
            now = index[turn == n]
            self.em[now] = F.normalize(alpha * self.em[now] + (1 - alpha) * f[turn == n])


def loss_exemplar(logits: Tensor, index: Tensor) -> Tensor:
    """Eq. 4 and 5: -log p(i|x), x the image i itself, or as the drawn camera would show it. logits [B, images]."""
    return F.cross_entropy(logits, index)


def neighbours(logits: Tensor, index: Tensor, k: int) -> Tensor:
    """Eq. 6 and 7, w [B, images]: 1 / k on the k largest logits, then 1 on the own index.

    A row sums to 2, or to 1 + (k - 1) / k where the own index is among the k; the release normalises neither.
    Rows of V that are still 0 outrank negative logits; which of them are taken changes neither loss nor gradient.
    """
    w = torch.zeros_like(logits).scatter_(1, logits.topk(min(k, logits.shape[1]), dim=1).indices, 1 / k)
    return w.scatter_(1, index[:, None], 1.0)


def loss_neighbourhood(logits: Tensor, index: Tensor, k: int) -> Tensor:
    """Eq. 8: -sum_j w_j log p(j|x), the mean over the batch."""
    return F.cross_entropy(logits, neighbours(logits.detach(), index, k))


def loss_style(logits: Tensor, label: Tensor) -> Tensor:
    """CamStyle, Eq. 6 and 7: cross-entropy against 0.9 for the label and 0.1 shared by all identities."""
    return F.cross_entropy(logits, label, label_smoothing=0.1)


def step(net: nn.Module, x_s: Tensor, y_s: Tensor, run: runtime.Run, *, x_style: Tensor | None = None,
         y_style: Tensor | None = None, memory: ExemplarMemory | None = None, x_t: Tensor | None = None,
         index_t: Tensor | None = None, alpha: float = 0.0, beta: float = 0.05, k: int = 0, lmd: float = 0.3,
         scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict[str, Tensor]:
    """Gradients of one batch in ``net``, and the update of ``memory``. Returns the unweighted losses.

    x_s, y_s: source images [B, 3, H, W] and identities [B]. x_style, y_style: CamStyle's style images. memory, x_t,
    index_t: ECN's target images and their rows; k: neighbours of Eq. 6, 0 before they count.
    """
    with run.autocast():
        logits_s = as_float32(net(x_s))
    losses = {"loss_src": F.cross_entropy(logits_s, y_s)}  # Eq. 1
    total = losses["loss_src"]
    if x_style is not None:
        with run.autocast():
            logits_style = as_float32(net(x_style))
        losses["loss_style"] = loss_style(logits_style, y_style)
        total = total + losses["loss_style"]
    if memory is not None:
        with run.autocast():
            f = as_float32(net(x_t, "target"))
        z = memory.logits(f, beta)
        losses["loss_tgt"] = loss_neighbourhood(z, index_t, k) if k else loss_exemplar(z, index_t)
        total = (1 - lmd) * total + lmd * losses["loss_tgt"]  # Eq. 9
    scale(total).backward()
    if memory is not None:  # now that the gradient has used the old V
        memory.update(run.gather(f.detach()), run.gather(index_t), alpha)
    return losses


def make_optimizer(net: IDNet | SPGANNet, lr: float, lr_trunk: float, momentum: float, weight_decay: float,
                   preset: str | None = None) -> torch.optim.SGD:
    """SGD with one rate for the trunk and one for what is new; each group keeps its first rate as ``base_lr``."""
    trunk, new = [], []
    for name, p in net.named_parameters():
        if p.requires_grad:
            (trunk if name.split(".")[0] in ("base", "model") and not name.startswith("model.fc.") else new).append(p)
    groups = [{"params": trunk, "lr": lr_trunk}, {"params": new, "lr": lr}]
    if preset == "spgan-caffe":  # the multipliers of its prototxt
        groups[1:] = [{"params": new[:1], "lr": lr, "weight_decay": 2 * weight_decay},
                      {"params": new[1:], "lr": 2 * lr, "weight_decay": 0.0}]
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.SGD(groups, lr, momentum, weight_decay=weight_decay, nesterov=preset != "spgan-caffe")


def set_step_lr(optimizer: torch.optim.Optimizer, drops: int) -> float:
    """A tenth of each group's first rate for each drop; returns the rate of what is new."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * 0.1 ** drops
    return optimizer.param_groups[1]["lr"]


# --- the run ----------------------------------------------------------------------------------------------------------


def knn_of_epoch(epoch: int, knn: int, first: int) -> int:
    """Neighbours that count in an epoch: none before the memory has been filled for a while."""
    return knn if epoch >= first else 0


def open_data(args: argparse.Namespace, run: runtime.Run) -> tuple[PersonSet, PersonSet]:
    """Source and target, checked. Raises UserError for everything that would disturb the run later."""
    target_parts = parts_of(args.data_dir, args.target)
    if args.method == "ecn":
        target_parts = ["train", *(part for part in target_parts if part != "train")]
    source = open_persons(args.data_dir, args.source, ["train"], msmt_val=args.msmt_val)
    target = open_persons(args.data_dir, args.target, target_parts, msmt_val=args.msmt_val)
    for data in (source, target):
        check(data, check_all=args.check_data)
        if args.check_data:
            run.say("\n".join([f"{data.name}: {data.root}", *(f"  {line}" for line in describe(data))]))
    if "duke" in (source.name.lower(), target.name.lower()):
        run.say(DUKE_NOTICE)
    return source, target


def validation_of(args: argparse.Namespace, source: PersonSet | None, target: PersonSet, pixels: str,
                  run: runtime.Run) -> PersonValidation:
    return PersonValidation(target, TestTransform((args.height, args.width), pixels), run, bn_stats=args.bn_stats,
                            metric_from=source.train if args.dist_metric == "kissme" else (), rerank=args.rerank,
                            panels=Path(args.snapshot_dir) / "ranks",
                            max_panels=args.save_num_images, workers=args.num_workers, output=args.output_feature,
                            mirrored=args.mirrored, lmp=args.lmp)


def train(args: argparse.Namespace) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    folder, size = Path(args.snapshot_dir), (args.height, args.width)

    # data
    source, target = open_data(args, run)
    styles = style_people = None
    if args.method == "ecn" and not args.no_camstyle and len(target.cameras) > 1:
        styles = CameraStyles(target, args.camstyle_dir)
    if args.camstyle:
        style_people = style_images(source, args.camstyle_dir)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} can be read")
        raise SystemExit(0)
    weights, meta = checkpoint.initial_weights(None if args.restore_from == "none" else args.restore_from, args.arch)
    pixels = args.pixels or meta.get("pixels", "imagenet")
    augment, seed = TrainTransform(size, args.re, pixels), args.random_seed
    images_s = PersonImages(source.train, augment, seed=seed)
    images_t = PersonImages(target.train, augment, seed=seed + 1, styles=styles)

    # network, memory, optimiser
    layout = PRESETS.get(args.preset, {}).get("layout", IDNet)
    net = layout(len(source.identities), args.arch, args.features, args.dropout)
    loaded = checkpoint.initialise(net, weights, heads=True, source=args.restore_from)
    pretrained = EARLY if args.method == "ecn" and weights is not None else ()
    freeze(net, {"auto": pretrained, "early": EARLY, "conv1": ("conv1",), "none": ()}[args.freeze])
    net = run.place_net(net, sync_bn=args.bn != "fixed", compiled=args.compile)
    modules: dict[str, nn.Module] = {"": net}
    memory = None
    if args.method == "ecn":
        memory = modules["_inv"] = ExemplarMemory(len(images_t), net.features).to(run.device)
    optimizer = make_optimizer(net, args.learning_rate, args.lr_trunk, args.momentum, args.weight_decay, args.preset)
    scaler = run.scaler()

    # an epoch is one pass of the source
    epoch_steps = max(1, len(images_s) // (args.batch_size * run.world))
    num_steps = args.num_steps or args.epochs * epoch_steps
    drop_steps = args.steps_decay or args.epochs_decay * epoch_steps
    if memory is not None and args.inv_alpha * ((num_steps - 1) // epoch_steps) > 1:
        raise UserError(f"--inv-alpha {args.inv_alpha}: alpha of Eq. 2 is that times the epoch, and would exceed 1 in "
                        f"{num_steps} steps of {epoch_steps} an epoch")

    def meta_of(iteration: int) -> dict[str, object]:
        return {"script": "train_ecn.py", "iteration": iteration, "method": args.method, "pixels": pixels,
                "size": list(size), "source": args.source, "target": args.target}

    def snapshot(iteration: int) -> None:
        """The release's file: state_dict, state_dict_inv (ECN's memory) and the epoch."""
        state = net.state_dict()
        state.segadapt = meta_of(iteration)
        inv = {} if memory is None else {"state_dict_inv": memory.state_dict()}
        checkpoint.save({"state_dict": state, **inv, "epoch": iteration // epoch_steps}, folder / "checkpoint.pth.tar")

    validation = validation_of(args, source, target, pixels, run) if target.query and target.gallery else None
    with Session(run, args, folder, modules, [optimizer], scaler=scaler, meta=meta_of, snapshot=snapshot,
                 validation=validation, free={"epochs", "num_steps", *SCORING}) as session:
        session.header({
            "method": args.method + (f", preset {args.preset}" if args.preset else ""), "weights": loaded,
            "network": f"{args.arch}, {net.features} features, {len(source.identities)} identities, BN {args.bn}",
            "source": f"{len(images_s)} images of {args.source}",
            "target": "none in training" if memory is None else
                      f"{len(images_t)} images of {args.target}, {len(target.cameras)} cameras, " + (
                          "real images only (camera styles add to the result)" if styles is None else "camera styles"),
            "validation": f"{len(target.query)} queries, {len(target.gallery)} in the gallery" if validation else
                          "none: the target has no query or no gallery",
            "style images": len(style_people) if style_people else "none in the source's batch",
            "batch": f"{args.batch_size} images of a domain x {run.world} processes, {epoch_steps} steps an epoch",
            "steps": f"{session.iteration} to {num_steps}"})
        batches_s = session.batches(images_s, seed)
        batches_t = session.batches(images_t, seed + 1) if memory is not None else None
        batches_style = None
        if style_people:
            batches_style = session.batches(PersonImages(style_people, augment, seed=seed + 2), seed + 2,
                                            batch_size=args.camstyle)
        set_train_mode(net, args.bn)
        for i in session.steps(num_steps):
            epoch = i // epoch_steps
            lr = set_step_lr(optimizer, i // drop_steps)
            batch_s, more = next(batches_s), {}
            names = list(batch_s.name)
            if batches_style is not None:
                style = next(batches_style)
                more = {"x_style": run.place(style.image), "y_style": style.identity.to(run.device)}
                names += style.name
            if batches_t is not None:
                batch_t = next(batches_t)
                names += batch_t.name
                more |= {"memory": memory, "x_t": run.place(batch_t.image), "index_t": batch_t.index.to(run.device),
                         "alpha": args.inv_alpha * epoch, "beta": args.inv_beta, "lmd": args.lmd,
                         "k": knn_of_epoch(epoch, args.knn, args.neighbour_epoch)}
            optimizer.zero_grad()
            losses = step(net, run.place(batch_s.image), batch_s.identity.to(run.device), run, scale=scaler.scale,
                          **more)
            run.average_gradients([net])
            scaler.step(optimizer)
            scaler.update()
            session.end_step(losses, names, lr=lr, epoch=epoch)
    return session


def evaluate(args: argparse.Namespace) -> int:
    """Score a checkpoint of this script or of the release on the target."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    initial = args.restore_from if args.restore_from not in ("imagenet", "none") else None
    path = args.resume or initial or f"{args.snapshot_dir}/checkpoint.pth.tar"
    weights, meta = checkpoint.read_weights(path)
    height, width = meta.get("size", (args.height, args.width))
    args.height = args.height if "height" in args.given else height
    args.width = args.width if "width" in args.given else width
    net = run.place_net(from_weights(weights, path))
    source = None
    if args.dist_metric == "kissme":
        source = open_persons(args.data_dir, args.source, ["train"], msmt_val=args.msmt_val)
    target = open_persons(args.data_dir, args.target, msmt_val=args.msmt_val)
    check(target)
    pixels = args.pixels or meta.get("pixels", "imagenet")
    runtime.header(run, {"weights": path, "target": target.root, "kernels": ops.backend(),
                         "images": f"{args.height} x {args.width} (height x width), {pixels}"})
    validation = validation_of(args, source, target, pixels, run)
    validation.score(net)
    validation.report()
    return 0


# --demo, run by run: what is changed from its defaults
DEMO_RUNS = {
    "source only": dict(method="ide", camstyle=0, no_camstyle=False),
    "CamStyle": dict(method="camstyle", camstyle=11, no_camstyle=False),
    "ECN: exemplar": dict(method="ecn", camstyle=0, no_camstyle=True, knn=0),
    "ECN: + camera": dict(method="ecn", camstyle=0, no_camstyle=False, knn=0),
    "ECN: + neighbourhood": dict(method="ecn", camstyle=0, no_camstyle=False),
}


def demo(args: argparse.Namespace) -> int:
    """Train every method on the rendered pair from the same random weights and print their scores side by side."""
    rows = {}
    for name, changes in DEMO_RUNS.items():
        print(f"--- {name}")
        folder = f"{args.snapshot_dir}/{re.sub(r'[^a-z]+', '_', name.lower())}"
        session = train(argparse.Namespace(**{**vars(args), **changes, "snapshot_dir": folder}))
        if session.exit_code:
            return session.exit_code
        rows[name] = session.validation.scores
        panels = session.validation.panels
        if name == "source only":
            session.validation.bn_stats = "target"
            rows["source only, target BN"] = session.validation.score(session.net)
    width = max(map(len, rows))
    print(f"{'':{width}}     R1     R5    R10    mAP")
    for name, row in rows.items():
        print(f"{name:{width}} " + " ".join(f"{row[key]:6.1f}" for key in ("R1", "R5", "R10", "mAP")))
    print(f"rank panels: {panels}, and beside the other runs")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_persons(args.data_dir, args.random_seed)
        return demo(args)
    return evaluate(args) if args.evaluate else train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
