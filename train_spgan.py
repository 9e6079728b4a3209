"""CycleGAN and SPGAN: unpaired image translation with a cycle, and with a siamese network that keeps identities apart.

Zhu, Park, Isola, Efros: "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017,
https://arxiv.org/abs/1703.10593. Deng, Zheng, Ye, Kang, Yang, Jiao: "Image-Image Domain Adaptation with Preserved
Self-Similarity and Domain-Dissimilarity for Person Re-identification", CVPR 2018, https://arxiv.org/abs/1711.07027.
Results: docs/spgan.md. A trained generator is used by translate.py (docs/translation.md).

    python train_spgan.py --demo                                                    # a miniature pair of domains
    python train_spgan.py --dataroot datasets/horse2zebra --name horse2zebra        # CycleGAN, as in its release
    python train_spgan.py --source gta5 --target cityscapes --name gta5_city --preprocess scale_width_and_crop \\
        --load_size 1024 --crop_size 400                                            # streets, CyCADA's settings
    python train_spgan.py --method spgan --dataroot datasets/market2duke --name market2duke
    python train_spgan.py --cameras market --data-dir data                          # a translator for each camera pair

What follows the releases where they differ from the papers: least squares instead of Eq. 1's logarithms; identity loss
on; an epoch of CycleGAN is the longer list, its last one runs with rate 0; SPGAN follows its author's PyTorch port (G
every 2nd iteration, SiaNet from the 2nd epoch, its loss in G from the 3rd). What differs from the releases: resuming is
exact (Adam, pool, random state), one-colour crops are drawn again, a step with a gradient norm beyond 1e6 is not made.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, runtime
from lib.datasets.description import Domain
from lib.datasets.persons import open_persons
from lib.datasets.unpaired import (
    PREPROCESS,
    Domains,
    Pictures,
    Preprocess,
    find_domains,
    kind_of,
    open_domains,
    require_one_size,
)
from lib.demo.streets import render_demo
from lib.demo.translation import compare_translations
from lib.errors import UserError
from lib.files import remove
from lib.models.cyclegan import BLOCKS, InstanceNorm, ResnetGenerator, init_normal, load_networks
from lib.models.segmenter import load_segmenter, loss_semantic
from lib.models.translation import together
from lib.optim import GuardedStep
from lib.predict_translation import Panels
from lib.runtime import Run, as_float32
from lib.session import LastLosses, Session

# what follows from --method where a flag is not given
DEFAULTS = {
    "cyclegan": dict(load_size=(286, 286), crop_size=(256, 256), n_epochs=100, n_epochs_decay=100, batch_size=1,
                     lr=2e-4, lr_policy="linear", lambda_contrastive=0.0, init_type="normal"),
    "spgan": dict(load_size=(144, 286), crop_size=(128, 256), n_epochs=20, n_epochs_decay=0, batch_size=8,
                  lr=2e-4, lr_policy="constant", lambda_contrastive=2.0, init_type="default")}
# --demo: narrow networks on the rendered pair
DEMO = dict(**flags.DEMO_DATA, snapshot_dir="snapshots/demo_{method}/{seed}", preprocess="crop", crop_size=(96, 96),
            ngf=16, ndf=16, netG="resnet_6blocks", batch_size=1, lambda_identity=0.0, save_num_images=3, log_every=60)
DEMO_SCHEDULE = {"cyclegan": dict(n_epochs=2, n_epochs_decay=2, lr=1e-3),
                 "spgan": dict(n_epochs=6, n_epochs_decay=4, lr=5e-4, lr_policy="linear", init_type="normal")}
# --cameras: CamStyle's recipe
CAMERA_EPOCHS = dict(n_epochs=30, n_epochs_decay=20)


def side_or_size(text: str) -> tuple[int, int]:
    """"256", or "width,height"."""
    return flags.size(text if "," in text else f"{text},{text}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__)
    method = p.add_argument_group("method; the names are those of CycleGAN's release")
    method.add_argument("--method", choices=list(DEFAULTS), default="cyclegan")
    method.add_argument("--model", choices=["cycle_gan"], help="the release's word for --method cyclegan")
    method.add_argument("--direction", choices=["AtoB", "BtoA"], default="AtoB", help="BtoA swaps the two domains")
    method.add_argument("--lambda_A", type=flags.amount, default=10.0, help="cycle A to B to A")
    method.add_argument("--lambda_B", type=flags.amount, default=10.0, help="cycle B to A to B")
    method.add_argument("--lambda_identity", type=flags.amount, default=0.5, help="identity, times lambda_A or _B")
    method.add_argument("--lambda_contrastive", type=flags.amount, help="SPGAN: SiaNet's loss in G's (2)")
    method.add_argument("--margin", type=flags.positive, default=2.0, help="SPGAN: of negative pairs")
    method.add_argument("--gan_mode", choices=["lsgan", "vanilla", "wgangp"], default="lsgan")
    method.add_argument("--pool_size", type=flags.up_to(4096, 0), default=50, help="former fakes for D; SPGAN: batches")
    flags.add_semantic(p)
    net = p.add_argument_group("networks")
    net.add_argument("--netG", choices=list(BLOCKS), default="resnet_9blocks")
    net.add_argument("--netD", choices=["basic", "n_layers"], default="basic", help="basic: three strided layers")
    net.add_argument("--n_layers_D", type=flags.layers, help="with --netD n_layers (3)")
    net.add_argument("--ngf", type=flags.channels, default=64, help="filters of G's first layer")
    net.add_argument("--ndf", type=flags.channels, default=64, help="filters of D's first layer")
    net.add_argument("--upsample", choices=["transposed", "resize"], default="transposed",
                     help="resize: nearest neighbours and a convolution, free of checkerboards")
    net.add_argument("--init_type", choices=["normal", "default"], help="N(0, --init_gain) or PyTorch's (SPGAN)")
    net.add_argument("--init_gain", type=flags.positive, default=0.02)
    data = flags.add_domains(p)
    data.add_argument("--cameras", metavar="NAME", help="instead a re-ID data set below --data-dir: a translator for "
                                                        "each pair of its cameras")
    data.add_argument("--preprocess", choices=PREPROCESS, default="resize_and_crop")
    data.add_argument("--load_size", type=side_or_size, help="side, or width,height (286; SPGAN 144,286)")
    data.add_argument("--crop_size", type=side_or_size, help="side, or width,height (256; SPGAN 128,256)")
    data.add_argument("--no_flip", action="store_true", help="do not mirror images at random")
    opt = p.add_argument_group("optimisation")
    opt.add_argument("--batch-size", "--batch_size", type=flags.batch, help="pairs a process (1; SPGAN 8)")
    opt.add_argument("--lr", type=flags.amount, help="(2e-4)")
    opt.add_argument("--beta1", type=flags.below_one, default=0.5, help="of Adam")
    opt.add_argument("--lr_policy", choices=["linear", "constant"], help="(linear; SPGAN without decay constant)")
    opt.add_argument("--n_epochs", type=flags.natural, help="with the full rate (100; SPGAN 20)")
    opt.add_argument("--n_epochs_decay", type=flags.natural, help="linearly to 0 (100; SPGAN 0)")
    opt.add_argument("--max-gradient", type=flags.positive, default=1e6, help="steps with a larger norm are skipped")
    opt.add_argument("--epoch_count", type=flags.count, default=1, help="the first epoch, of weights that are read")
    out = flags.add_run(p, folder="CHECKPOINTS_DIR/NAME",
                        save="iterations between latest_net_*.pth and resume.pth (default: an epoch)",
                        evaluate="iterations between pictures (default: --save_epoch_freq epochs)")
    out.add_argument("--checkpoints_dir", default="checkpoints", help="the run's folder is NAME in it")
    out.add_argument("--name", default="experiment_name")
    out.add_argument("--continue_train", dest="resume", action="store_true", help="the same as --resume")
    out.add_argument("--epoch", default="latest", help="with --resume: the weights to read if there is nothing more")
    out.add_argument("--save_epoch_freq", type=flags.count, default=5, help="epochs between N_net_*.pth files")
    out.add_argument("--gpu_ids", type=int, help="number of the GPU; -1: CPU. Several GPUs: torchrun")
    p.set_defaults(save_pred_every=None)
    args = flags.parse(p, argv, DEMO)
    if args.model and args.method != "cyclegan":
        p.error(f"--model {args.model} is --method cyclegan")
    if "eval_every" not in p.given:
        args.eval_every = p.get_default("eval_every")  # not --save-pred-every, which flags.parse takes
    if args.n_epochs_decay and args.lr_policy is None:
        args.lr_policy = "linear"  # of SPGAN too, whose default has no decay
    schedule = DEMO_SCHEDULE[args.method] if args.demo else CAMERA_EPOCHS if args.cameras else {}
    for name, value in {**DEFAULTS[args.method], **schedule}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    note_idle(p, args)
    if args.gpu_ids is not None:
        args.cpu, args.gpu = args.cpu or args.gpu_ids < 0, max(args.gpu_ids, 0)
    args.snapshot_dir = args.snapshot_dir or f"{args.checkpoints_dir}/{args.name}"
    if args.labelled and args.direction != "AtoB":
        p.error("--labelled needs --direction AtoB")
    if args.n_epochs + args.n_epochs_decay < args.epoch_count:
        p.error(f"--epoch_count {args.epoch_count}: there are {args.n_epochs + args.n_epochs_decay} epochs")
    if args.netD == "basic" and args.n_layers_D not in (None, 3):
        p.error("--n_layers_D is of --netD n_layers")
    if args.method == "cyclegan" and args.lambda_contrastive:
        p.error("--lambda_contrastive is of --method spgan")
    args.n_layers_D = args.n_layers_D or 3
    return args


def note_idle(p: flags.Parser, args: argparse.Namespace) -> None:
    """Name the flags that are given and have no effect beside the others."""
    if args.demo:
        p.refuse("with --demo", "cameras")
    else:
        p.note("without --demo: training runs no kernel of csrc/", "ops")
    if args.cameras:
        p.refuse("with --cameras", "labelled")
        p.note("with --cameras, whose data lie below --data-dir", "direction", "epoch",
               *filter(kind_of, p.given - {"data_dir"}))
    elif not args.resume:
        p.note("without --resume", "epoch")
    if args.snapshot_dir:
        p.note("with --demo or --snapshot-dir", "name", "checkpoints_dir")
    if args.method == "cyclegan":
        p.note("with --method cyclegan", "margin")
    if args.init_type == "default":
        p.note("with --init_type default", "init_gain")
    if args.gpu_ids is not None:
        p.note("with --gpu_ids", "gpu")
    p.note(f"with --preprocess {args.preprocess}", *{"load_size", "crop_size"}.difference(sizes_of(args.preprocess)))


# --- networks: G maps A to B, F maps B to A (g_ab, g_ba); D_A judges images of A, D_B of B --------------------------


class PatchDiscriminator(nn.Module):
    """Images [N, 3, H, W] to one raw score a patch; layers=3 sees patches of 70 x 70.

    spgan: SPGAN's variant, without bias before a norm, and with paddings that make its map exactly H/8 x W/8.
    """

    def __init__(self, ndf: int = 64, layers: int = 3, spgan: bool = False):
        super().__init__()
        model = [nn.Conv2d(3, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        channels = ndf
        for n in range(1, layers + 1):
            last = n == layers
            out = ndf * min(2 ** n, 8)
            model += [nn.Conv2d(channels, out, 4, stride=1 if last else 2, padding=(1, 2) if last and spgan else 1,
                                bias=not spgan), InstanceNorm(), nn.LeakyReLU(0.2, True)]
            channels = out
        self.model = nn.Sequential(*model, nn.Conv2d(channels, 1, 4, padding=(2, 1) if spgan else 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class SiaNet(nn.Module):
    """SPGAN's embedding: images [N, 3, H, W] to unit vectors [N, 64].

    The last max pooling is adaptive, to 4 x 2, which at the release's 256 x 128 is its 2 x 2 pooling: any size will do.
    """

    hidden = 128

    def __init__(self, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1)
        self.fc1 = nn.Linear(4 * width * 8, self.hidden, bias=False)
        self.fc2 = nn.Linear(self.hidden, 64, bias=False)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """keep: [N, 128], 1 where dropout (p = 0.5, in every call) keeps a hidden unit."""
        x = F.max_pool2d(F.leaky_relu(self.conv1(x), 0.2), 2)
        x = F.max_pool2d(F.leaky_relu(self.conv2(x), 0.2), 2)
        x = F.adaptive_max_pool2d(F.leaky_relu(self.conv3(x), 0.2), (4, 2))
        x = F.leaky_relu(self.fc1(x.flatten(1)), 0.2) * keep * 2
        return F.normalize(as_float32(self.fc2(x)))


class Networks(NamedTuple):
    g_ab: nn.Module
    g_ba: nn.Module
    d_a: nn.Module
    d_b: nn.Module
    sia: SiaNet | None = None


def build(method: str, ngf: int = 64, ndf: int = 64, blocks: int = 9, layers: int = 3,
          upsample: str = "transposed") -> Networks:
    spgan = method == "spgan"
    return Networks(*(ResnetGenerator(ngf, blocks, not spgan, upsample) for _ in range(2)),
                    *(PatchDiscriminator(ndf, layers, spgan) for _ in range(2)), SiaNet() if spgan else None)


# --- losses -----------------------------------------------------------------------------------------------------------


def loss_gan(score: Tensor, real: bool, mode: str = "lsgan") -> Tensor:
    """CycleGAN, Eq. 1, for one set of D's raw scores that are to be called real, or not.

    lsgan: squared error, which both papers train with; vanilla: cross-entropy; wgangp: the mean score (without the
    gradient penalty, as in the release).
    """
    score = as_float32(score)
    if mode == "wgangp":
        return -score.mean() if real else score.mean()
    truth = torch.full_like(score, float(real))
    return F.mse_loss(score, truth) if mode == "lsgan" else F.binary_cross_entropy_with_logits(score, truth)


def loss_cyc(x: Tensor, x_reconstructed: Tensor) -> Tensor:
    """CycleGAN, Eq. 2: |F(G(x)) - x|, the mean."""
    return F.l1_loss(as_float32(x_reconstructed), x)


def loss_idt(x: Tensor, x_same: Tensor) -> Tensor:
    """CycleGAN, section 5.2, and SPGAN, Eq. 4: |F(x_a) - x_a|, the mean: what is in the domain already stays."""
    return F.l1_loss(as_float32(x_same), x)


def loss_con(u: Tensor, v: Tensor, positive: bool, margin: float = 2.0) -> Tensor:
    """SPGAN, Eq. 5: mean d^2 of positive pairs, mean max(0, m - d)^2 of negative ones; u, v [N, C] embeddings."""
    d = F.pairwise_distance(u, v)
    return (d ** 2).mean() if positive else (margin - d).clamp(min=0).pow(2).mean()


# --- one iteration ----------------------------------------------------------------------------------------------------


class ImagePool:
    """CycleGAN, section 4: D sees fakes of former iterations too. Holds ``size`` images, or whole batches (SPGAN).

    With several processes all fakes of an iteration enter every process's pool, in the order of one process, and each
    takes its share, so that the pools are equal and one of them is saved.
    """

    def __init__(self, size: int, rng: np.random.Generator, run: Run, whole_batches: bool = False):
        self.size, self.rng, self.run, self.whole_batches = size, rng, run, whole_batches
        self.held: list[Tensor] = []

    def query(self, images: Tensor) -> Tensor:
        """[N, 3, H, W]: for each image itself, or (p = 0.5 once the pool is full) one that it replaces in the pool."""
        if self.size == 0:
            return images
        gathered = self.run.gather(images.detach())
        out = []
        for image in [gathered] if self.whole_batches else gathered.split(1):
            if len(self.held) < self.size:
                self.held.append(image)
            elif self.rng.random() > 0.5:
                index = int(self.rng.integers(self.size))
                image, self.held[index] = self.held[index], image
            out.append(image)
        return self.run.share(torch.cat(out))

    def state_dict(self) -> dict[str, object]:
        return {"held": [image.cpu() for image in self.held], "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.held = [image.to(self.run.device) for image in state["held"]]
        self.rng.bit_generator.state = state["rng"]


class Weights(NamedTuple):
    lambda_A: float = 10.0           # cycle of A
    lambda_B: float = 10.0           # cycle of B
    lambda_identity: float = 0.5     # identity, times the weight of the cycle
    lambda_contrastive: float = 0.0  # SPGAN: 2
    margin: float = 2.0
    lambda_semantic: float = 0.0     # CyCADA


def step(nets: Networks, pool_a: ImagePool, pool_b: ImagePool, x_a: Tensor, x_b: Tensor, w: Weights, run: Run,
         update: GuardedStep, *, gan_mode: str = "lsgan", train_g: bool = True, contrastive: bool = False,
         train_sia: bool = False, keep: Callable[[], Tensor] | None = None, segmenter: nn.Module | None = None,
         y_a: Tensor | None = None) -> dict[str, Tensor]:
    """One iteration in the releases' order: G, SiaNet, D. Returns the losses, weights of cycle and identity included.

    update.backward("G" | "M" | "D", loss) adds gradients, update.step(..) uses them. SPGAN: G trains every 2nd
    iteration, SiaNet from the 2nd epoch on, and its loss is part of G's from the 3rd (contrastive); keep: draws a
    dropout mask [N, 128]. y_a: labels of x_a for the semantic loss.
    """
    g_ab, g_ba, d_a, d_b, sia = nets
    losses: dict[str, Tensor] = {}

    def set_trained(*trained: nn.Module) -> None:
        for net in filter(None, nets):
            net.requires_grad_(any(net is t for t in trained))

    def embed(x: Tensor, mask: Tensor) -> Tensor:
        with run.autocast():
            return sia(x, mask)

    # G (A to B) and F (B to A). No term needs both translations: their graphs are held one after the other.
    set_trained(*((g_ab, g_ba) if train_g else ()))
    contrastive, identity = contrastive and train_g, w.lambda_identity > 0 and train_g
    if contrastive:
        keep_a, keep_ab, keep_b, keep_ba = (keep() for _ in range(4))
        embeddings = {"A": (embed(x_a, keep_a), keep_ab, embed(x_b, keep_b))}
        embeddings["B"] = embeddings["A"][2], keep_ba, embeddings["A"][0]
    fakes = []
    for name, g, f, d, x, other, lambda_x, lambda_other, y in (
            ("A", g_ab, g_ba, d_b, x_a, x_b, w.lambda_A, w.lambda_B, y_a),
            ("B", g_ba, g_ab, d_a, x_b, x_a, w.lambda_B, w.lambda_A, None)):
        with torch.set_grad_enabled(train_g), run.autocast():
            fake, *same = together(g, x, *([other] if identity else []))
            fakes.append(as_float32(fake.detach()))
            if not train_g:
                continue
            score, back = d(fake), f(fake)
        terms = {"G": loss_gan(score, True, gan_mode), "cycle": lambda_x * loss_cyc(x, back)}
        if identity:
            terms["idt"] = lambda_other * w.lambda_identity * loss_idt(other, same[0])
        if contrastive:  # positive: an image and its translation; negative: the translation and the domain it enters
            e_x, mask, e_other = embeddings[name]
            e_fake = embed(fake, mask)
            terms["contrastive"] = w.lambda_contrastive / 4 * (
                loss_con(e_x, e_fake, True) + loss_con(e_fake, e_other, False, w.margin) / 2)
        if segmenter is not None:
            terms["semantic"] = w.lambda_semantic * loss_semantic(segmenter, as_float32(fake), x, y)
        update.backward("G", sum(terms.values()))  # CycleGAN, Eq. 3; SPGAN, Eq. 6
        losses |= {f"{term}_{name}": loss.detach() for term, loss in terms.items()}
    if train_g:
        update.step("G")
        losses["G"] = sum(losses.values())
    x_ab, x_ba = fakes

    if train_sia:
        set_trained(sia)
        e_a, e_ab, e_b, e_ba = (embed(x, keep()) for x in (x_a, x_ab, x_b, x_ba))
        losses["M"] = (loss_con(e_a, e_ab, True) + loss_con(e_b, e_ba, True)
                       + 2 * loss_con(e_a, e_b, False, w.margin)) / 3
        update.backward("M", losses["M"])
        update.step("M")

    # D, on the fakes from before the step of G
    set_trained(d_a, d_b)
    for name, d, real, fake in (("D_A", d_b, x_b, pool_b.query(x_ab)), ("D_B", d_a, x_a, pool_a.query(x_ba))):
        with run.autocast():
            score_real, score_fake = together(d, real, fake)
        losses[name] = (loss_gan(score_real, True, gan_mode) + loss_gan(score_fake, False, gan_mode)) / 2
        update.backward("D", losses[name])
    update.step("D")
    return {name: loss.detach() for name, loss in losses.items()}


def lr_factor(epoch: int, n_epochs: int, n_epochs_decay: int) -> float:
    """CycleGAN's schedule: epochs count from 1; n_epochs is already reduced, and the last epoch runs with 0."""
    return 1 - max(0, epoch + 1 - n_epochs) / (n_epochs_decay + 1)


def spgan_schedule(epoch: int, i: int) -> dict[str, bool]:
    """What the author trains in iteration i of an epoch (both from 0)."""
    return {"train_g": i % 2 == 0, "train_sia": epoch >= 1, "contrastive": epoch >= 2}


def dropout_masks(seed: int, i: int, n: int, run: Run) -> Callable[[], Tensor]:
    """SiaNet's masks of iteration i, call by call: this process's rows of those of one process with the whole batch."""
    rng = np.random.default_rng([seed, i])

    def keep() -> Tensor:
        mask = torch.from_numpy(rng.integers(0, 2, (n * run.world, SiaNet.hidden)))
        return run.share(mask).float().to(run.device)
    return keep


# --- the run ----------------------------------------------------------------------------------------------------------


def sizes_of(how: str) -> list[str]:
    """The sizes that a --preprocess uses."""
    return ["load_size"] * ("resize" in how or "scale" in how) + ["crop_size"] * how.endswith("crop")


def preprocess(args: argparse.Namespace) -> Preprocess:
    return Preprocess(args.preprocess, args.load_size, args.crop_size, not args.no_flip)


def open_data(args: argparse.Namespace, segmenter: nn.Module | None) -> Domains:
    """The two domains, B first with --direction BtoA. Raises UserError."""
    transform, found, labelled = preprocess(args), find_domains(**flags.domains(args)), None
    if args.direction == "BtoA":
        found = {f"{key[:-1]}{'b' if key[-1] == 'a' else 'a'}": paths for key, paths in found.items()}
    if args.labelled:
        source = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
        labelled = segmenter.labels_of(source)
    data = open_domains(found, transform, transform, args.random_seed, labelled, args.check_data)
    require_batches(args, data[:2])
    return data


def require_batches(args: argparse.Namespace, domains: Sequence[Pictures]) -> None:
    """Raises UserError where pictures of a domain have several sizes, of which no batch can be made."""
    for pictures in domains:
        if args.batch_size > 1 and not pictures.transform.crops:
            require_one_size(pictures, args.batch_size)


def train(args: argparse.Namespace, data: Domains | None = None) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops if args.demo else "reference")  # csrc/ is built for the demo's segmenters only
    folder, spgan = Path(args.snapshot_dir), args.method == "spgan"
    segmenter = load_segmenter(args.segmenter).to(run.device) if args.segmenter else None
    data = data or open_data(args, segmenter)
    a, b = data.train_a, data.train_b
    if args.check_data:
        run.say(f"all pictures of {a.name} and {b.name} are fine")
        raise SystemExit(0)

    # an epoch: the longer list in CycleGAN, the shorter in SPGAN
    batch = args.batch_size * run.world
    epoch_length = max(1, min(len(a), len(b)) // batch) if spgan else math.ceil(max(len(a), len(b)) / batch)
    last_epoch = args.n_epochs + args.n_epochs_decay
    total = (last_epoch - args.epoch_count + 1) * epoch_length
    args.save_pred_every = args.save_pred_every or epoch_length
    args.eval_every = args.eval_every or args.save_epoch_freq * epoch_length

    # networks and optimisers
    nets = build(args.method, args.ngf, args.ndf, BLOCKS[args.netG], args.n_layers_D, args.upsample)
    modules = {"G_A": nets.g_ab, "G_B": nets.g_ba, "D_A": nets.d_b, "D_B": nets.d_a}
    loaded = f"none, random weights ({args.init_type})"
    if args.init_type == "normal":
        for net in modules.values():
            init_normal(net, args.init_gain)
    if args.resume and args.epoch != "latest" and not (folder / f"{args.epoch}_net_G_A.pth").exists():
        raise UserError(f"--epoch {args.epoch}: there is no {folder}/{args.epoch}_net_G_A.pth")
    if args.resume and not (folder / "resume.pth").exists() and (folder / f"{args.epoch}_net_G_A.pth").exists():
        loaded = load_networks(modules, folder, args.epoch)
    modules |= {"M": nets.sia} if spgan else {}
    for net in modules.values():
        run.place_net(net, compiled=args.compile)
    parts = {"G": nn.ModuleList([nets.g_ab, nets.g_ba]), "D": nn.ModuleList([nets.d_a, nets.d_b])}
    parts |= {"M": nets.sia} if spgan else {}
    optimizers = {name: torch.optim.Adam(part.parameters(), args.lr, (args.beta1, 0.999))
                  for name, part in parts.items()}
    scaler = run.scaler()
    update = GuardedStep(run, parts, optimizers, scaler, args.max_gradient)
    pools = [ImagePool(args.pool_size, np.random.default_rng([args.random_seed, n]), run, whole_batches=spgan)
             for n in range(2)]
    w, last_losses = Weights(*(getattr(args, name) for name in Weights._fields)), LastLosses()

    def meta_of(iteration: int) -> dict[str, object]:
        return {"script": "train_spgan.py", "method": args.method, "direction": args.direction,
                "iteration": iteration, "scale": preprocess(args).scale}

    def snapshot(iteration: int, label: str | int = "latest") -> None:
        """Under the names of CycleGAN's release: latest_net_G_A.pth, and after some epochs 5_net_G_A.pth."""
        for suffix, net in modules.items():
            checkpoint.save_weights(net, folder / f"{label}_net_{suffix}.pth", meta_of(iteration))

    def show(x_a: Tensor, x_b: Tensor) -> list[Sequence[Tensor]]:
        with run.autocast():
            x_ab, x_ba = nets.g_ab(x_a), nets.g_ba(x_b)
            return [(x_a, x_ab, nets.g_ba(x_ab), x_b, x_ba, nets.g_ab(x_ba))]

    panels = Panels(data, show, ["A", "A to B", "and back", "B", "B to A", "and back"], folder / "pictures", run,
                    args.save_num_images)
    with Session(run, args, folder, modules, list(optimizers.values()), scaler=scaler, meta=meta_of, snapshot=snapshot,
                 validation=panels, extra_state={"pool_a": pools[0], "pool_b": pools[1], "losses": last_losses},
                 free={"checkpoints_dir", "name", "gpu_ids", "epoch", "save_epoch_freq", "model"}) as session:
        session.header({
            "weights": loaded, "networks": f"{args.method}: {args.netG}, {args.ngf} filters, {args.upsample}; D of "
                                           f"{args.n_layers_D} layers, {args.ndf} filters",
            "domain A": f"{len(a)} pictures of {a.name}", "domain B": f"{len(b)} pictures of {b.name}",
            "pictures": ", ".join([args.preprocess, *(f"{name.removesuffix('_size')} {getattr(args, name)}"
                                                      for name in sizes_of(args.preprocess))]),
            "batch": f"{batch} pairs = {args.batch_size} x {run.world} processes",
            "steps": f"{session.iteration} to {total}: epochs {args.epoch_count} to {last_epoch}"})
        first = session.iteration
        batches_a, batches_b = session.batches(a, args.random_seed), session.batches(b, args.random_seed + 1)
        for i in session.steps(total):
            epoch = args.epoch_count + i // epoch_length
            lr = args.lr * (lr_factor(epoch, args.n_epochs, args.n_epochs_decay) if args.lr_policy == "linear" else 1)
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = lr
            batch_a, batch_b = next(batches_a), next(batches_b)
            names = [*batch_a.name, *batch_b.name]
            update.where = f"iteration {i + 1}, {', '.join(names)}"
            schedule = spgan_schedule(epoch - 1, i % epoch_length) if spgan else {}
            last_losses.update(step(
                nets, *pools, run.place(batch_a.image), run.place(batch_b.image), w, run, update, **schedule,
                gan_mode=args.gan_mode, keep=dropout_masks(args.random_seed, i, args.batch_size, run),
                segmenter=segmenter, y_a=batch_a.label.to(run.device) if args.labelled else None))
            scaler.update()
            session.end_step(last_losses, names, lr=lr)
            ends = (i + 1) % epoch_length == 0 and (epoch % args.save_epoch_freq == 0 or i + 1 == total)
            if ends and run.is_main:
                snapshot(i + 1, epoch)
            if i == first:
                run.say(f"peak memory of an iteration: {runtime.peak_memory(run.device):.1f} GiB")
    return session


# --- camera styles ----------------------------------------------------------------------------------------------------


def train_cameras(args: argparse.Namespace) -> int:
    """A translator for every pair of cameras of a re-ID set's training images, in FOLDER/{c}to{c'}; resumable.

    The recipe of CamStyle: CycleGAN with identity loss, 30 + 20 epochs, batch 1.
    """
    persons = open_persons(args.data_dir or "data", args.cameras, ["train"])
    transform = preprocess(args)
    domains = {camera: Pictures([p.path for p in persons.train if p.camera == camera], transform, args.random_seed)
               for camera in persons.cameras}
    for pictures in domains.values():
        pictures.check(args.check_data)
    require_batches(args, domains.values())
    if args.check_data:
        print(f"all pictures of {args.cameras} are fine")
        return 0
    folders = {pair: Path(args.snapshot_dir) / "to".join(str(camera + 1) for camera in pair)
               for pair in combinations(persons.cameras, 2)}
    for folder in folders.values() if args.overwrite else ():  # if this run is interrupted too, none is finished
        for name in ("latest_net_G_A.pth", "resume.pth"):
            remove(folder / name, "Choose another --snapshot-dir")
    for n, (pair, folder) in enumerate(folders.items(), 1):
        print(f"--- cameras {folder.name}, {n} of {len(folders)}", flush=True)
        resume_file = folder / "resume.pth"
        if (folder / "latest_net_G_A.pth").exists() and not resume_file.exists():
            print("finished earlier")
            continue
        found = {f"train_{side}": domains[camera].images for side, camera in zip("ab", pair, strict=True)}
        changes = {"snapshot_dir": str(folder), "resume": resume_file.exists()}
        session = train(argparse.Namespace(**{**vars(args), **changes}),
                        open_domains(found, transform, transform, args.random_seed))
        if session.exit_code:
            return session.exit_code
        if session.run.is_main:  # hundreds of megabytes that a finished translator no longer needs
            resume_file.unlink()
    return 0


def demo(args: argparse.Namespace) -> int:
    """Train on the rendered pair, then a segmenter on original and on translated pictures; print both scores."""
    root = render_demo(Path(f"data/demo/{args.random_seed}"), seed=args.random_seed)
    session = train(args)
    if session.exit_code:
        return session.exit_code
    compare_translations({args.method: session.net.eval()}, root, session.folder / "demo", session.run,
                         seed=args.random_seed)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        return demo(args)
    if args.cameras:
        return train_cameras(args)
    return train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
