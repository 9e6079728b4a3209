"""UNIT and MUNIT: unpaired image translation between two domains.

Liu, Breuel, Kautz: "Unsupervised Image-to-Image Translation Networks", NIPS 2017, https://arxiv.org/abs/1703.00848.
Huang, Liu, Belongie, Kautz: "Multimodal Unsupervised Image-to-Image Translation", ECCV 2018,
https://arxiv.org/abs/1804.04732. Results, settings and what differs from papers and release: docs/munit.md.

    python train_munit.py --demo                                                # a miniature pair, minutes on a laptop
    python train_munit.py --trainer MUNIT --config gta2city.yaml --data-root data/gta2city
    python train_munit.py --trainer UNIT --source gta5 --target cityscapes --new-size 512 --vgg-w 1

MUNIT: a picture x is a content c, which both domains share, and a style s of its domain. x_ab is decoded from c_a with
a random style of b, Eq. 1 to 5. UNIT: both domains share one latent code z = h + noise, Eq. 1 to 7.
translate.py uses the result, and any trainer of this repository trains on what it writes.
"""
from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, runtime, visual
from lib.datasets.description import Domain, load_description
from lib.datasets.folder import ImageFolder
from lib.datasets.pictures import read_image
from lib.datasets.unpaired import (
    FlipResizeCrop,
    find_domains,
    from_symmetric,
    open_domains,
    short_side_size,
    to_symmetric,
)
from lib.demo.streets import render_demo
from lib.demo.translation import compare_translations
from lib.errors import UserError
from lib.files import atomic_write
from lib.models.segmenter import FrozenSegmenter, load_segmenter, loss_semantic
from lib.models.translation import (
    ACTIVATIONS,
    PADDINGS,
    ConvBlock,
    Generator,
    MunitGenerator,
    UnitGenerator,
    Vgg16Features,
    init_weights,
    load_released,
    load_vgg16,
    read_pair,
)
from lib.optim import GuardedStep
from lib.runtime import as_float32
from lib.session import Session

# the release's keys of a configuration whose flag is called otherwise; gen: {dim: 64} is --gen-dim, {n_res: 4} --n-res
RENAMED = {"snapshot_save_iter": "save_pred_every", "image_save_iter": "eval_every", "display_size": "save_num_images",
           "log_iter": "log_every"}
# keys that may have this value only: RGB pictures, and a loss that the release does not compute
FIXED = {"input_dim_a": 3, "input_dim_b": 3, "recon_h_w": 0}
# --demo: narrow networks on the rendered pair, which keep twice the usual resolution
DEMO = dict(**flags.DEMO_DATA, new_size=96, crop_image_height=96, crop_image_width=96, gen_dim=16, dis_dim=16,
            n_downsample=1, n_res=3, mlp_dim=64, recon_x_cyc_w=10.0, lr=5e-4, max_iter=800, step_size=400,
            save_pred_every=400, log_every=50)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__)
    method = p.add_argument_group("method")
    method.add_argument("--trainer", choices=list(METHODS), default="MUNIT")
    method.add_argument("--config", metavar="YAML", help="the release's configuration; flags given besides it win")
    weights = p.add_argument_group("weights of the losses")
    for name, default in Weights()._asdict().items():
        if name not in ("recon_x_cyc_w", "lambda_semantic"):
            weights.add_argument(f"--{name.replace('_', '-')}", type=flags.amount, default=default)
    weights.add_argument("--recon-x-cyc-w", type=flags.amount, help="cycle (default: UNIT 10, MUNIT 0)")
    weights.add_argument("--gan-type", choices=["lsgan", "nsgan"], default="lsgan")
    weights.add_argument("--vgg-weights", metavar="FILE|imagenet", default="imagenet",
                         help="VGG-16 for --vgg-w, with torchvision's or Caffe's keys")
    weights.add_argument("--lambda-semantic", type=flags.amount, default=0.0,
                         help="CyCADA's semantic consistency, judged by --segmenter")
    weights.add_argument("--segmenter", metavar="CHECKPOINT", help="of a segmentation network, which stays as it is")
    weights.add_argument("--labelled", action="store_true", help="--lambda-semantic takes the labels of --source")
    net = p.add_argument_group("networks")
    for name, default, text in (("gen-dim", 64, "channels of the first layer of E"), ("n-downsample", 2, "of E"),
                                ("n-res", 4, "residual blocks of E and of G"), ("style-dim", 8, "MUNIT: length of s"),
                                ("mlp-dim", 256, "MUNIT: width of the MLP"),
                                ("dis-dim", 64, "channels of the first layer of D"), ("n-layer", 4, "layers of D"),
                                ("num-scales", 3, "of D")):
        net.add_argument(f"--{name}", type=flags.count, default=default, help=text)
    for name, choices, default in (("gen-activ", ACTIVATIONS, "relu"), ("gen-pad-type", PADDINGS, "reflect"),
                                   ("dis-activ", ACTIVATIONS, "lrelu"), ("dis-pad-type", PADDINGS, "reflect")):
        net.add_argument(f"--{name}", choices=list(choices), default=default)
    net.add_argument("--dis-norm", choices=["none", "in", "ln"], default="none")
    net.add_argument("--init", choices=["kaiming", "gaussian", "xavier", "orthogonal", "default"], default="kaiming",
                     help="of the generators; D's is gaussian")
    net.add_argument("--restore-from", metavar="gen_%%08d.pt", help="initial weights, of dis_%%08d.pt too")
    net.add_argument("--checkpoint-decoder", action="store_true",
                     help="compute the decoders' activations twice, to save memory")
    data = flags.add_domains(p)
    data.add_argument("--new-size", type=flags.count, default=256, help="pixels of the short side")
    data.add_argument("--new-size-a", type=flags.count, help="in domain A (default: --new-size)")
    data.add_argument("--new-size-b", type=flags.count, help="in domain B (default: --new-size)")
    data.add_argument("--crop-image-height", type=flags.count, default=256, help="pixels of a training crop")
    data.add_argument("--crop-image-width", type=flags.count, default=256)
    opt = p.add_argument_group("optimisation")
    opt.add_argument("--batch-size", type=flags.count, default=1, help="of each domain and process")
    opt.add_argument("--max-iter", type=flags.count, default=1000000)
    opt.add_argument("--lr", "--learning-rate", type=flags.amount, default=1e-4)
    opt.add_argument("--lr-policy", choices=["step", "constant"], default="step")
    opt.add_argument("--step-size", type=flags.count, default=100000, help="iterations between two decays")
    opt.add_argument("--gamma", type=flags.positive, default=0.5, help="factor of a decay")
    opt.add_argument("--beta1", type=flags.below_one, default=0.5)
    opt.add_argument("--beta2", type=flags.below_one, default=0.999)
    opt.add_argument("--weight-decay", type=flags.amount, default=1e-4)
    opt.add_argument("--max-gradient", type=flags.positive, default=1e6,
                     help="a step whose gradient has a larger norm is skipped")
    out = flags.add_run(p)
    out.add_argument("--output-path", "--output_path", default=".",
                     help="--snapshot-dir is by default outputs/CONFIG or outputs/TRAINER below it")
    out.add_argument("--image-display-iter", type=flags.count, default=100,
                     help="iterations between two images/current.png")
    p.set_defaults(save_pred_every=10000, save_num_images=4)
    argv = sys.argv[1:] if argv is None else list(argv)
    config = p.parse_known_args(argv)[0].config
    known = {action.dest for action in p._actions}
    args = flags.parse(p, [*(config_flags(Path(config), known) if config else ()), *argv], DEMO)

    args.new_size_a, args.new_size_b = args.new_size_a or args.new_size, args.new_size_b or args.new_size
    if args.recon_x_cyc_w is None:
        args.recon_x_cyc_w = 10.0 if args.trainer == "UNIT" else 0.0
    if args.snapshot_dir is None:
        name = f"demo_{args.trainer}_{args.random_seed}" if args.demo else Path(config).stem if config else args.trainer
        args.snapshot_dir = str(Path(args.output_path) / "outputs" / name)
    least, multiple = 64, 2 ** args.n_downsample
    for name in ("crop_image_height", "crop_image_width"):
        if getattr(args, name) < least or getattr(args, name) % multiple:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: a crop needs sides of at least {least} pixels, "
                    f"multiples of {multiple}")
    for name in ("a", "b"):
        if getattr(args, f"new_size_{name}") < min(args.crop_image_height, args.crop_image_width):
            p.error(f"--new-size-{name} {getattr(args, f'new_size_{name}')} is smaller than the crop")
    if (args.lambda_semantic > 0) != (args.segmenter is not None):
        p.error("--lambda-semantic and --segmenter belong together")
    if args.labelled and not (args.segmenter and args.source):
        p.error("--labelled needs --segmenter and --source")
    return args


def config_flags(path: Path, known: set[str]) -> list[str]:
    """A configuration of the release as flags of this script. Raises UserError for a key that is not known here."""
    try:
        import yaml
    except ImportError:
        raise UserError("--config needs the package PyYAML: pip install pyyaml") from None
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise UserError(f"--config {path}: KEY: VALUE lines are expected")
    values = {}
    for key, value in entries.items():
        values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {str(key): value}

    def flag_of(key: str) -> str | None:
        names = RENAMED.get(key), key.replace(".", "_"), key.partition(".")[2] or key
        return next((name for name in names if name in known - {"config", "trainer"}), None)

    unknown = [f"{key}: {value} (it must be {FIXED[key]})" if key in FIXED else key for key, value in values.items()
               if value != FIXED.get(key, value) or key not in FIXED and flag_of(key) is None]
    if unknown:
        raise UserError(f"--config {path}: {len(unknown)} key{'s' * (len(unknown) > 1)} not known here: "
                        f"{', '.join(unknown)}")
    return [f"--{flag_of(key).replace('_', '-')}={value}" for key, value in values.items()
            if key not in FIXED and value is not None]


# --- networks and losses: images are RGB [N, 3, H, W] in -1..1 --------------------------------------------------------


class Discriminator(nn.Module):
    """D of one domain: a network with weights of its own at each of ``num_scales`` scales (MUNIT, section 5.1)."""

    def __init__(self, input_dim: int = 3, dim: int = 64, n_layer: int = 4, num_scales: int = 3, norm: str = "none",
                 activ: str = "lrelu", pad_type: str = "reflect"):
        super().__init__()
        self.cnns = nn.ModuleList()
        for _ in range(num_scales):
            layers = [ConvBlock(input_dim, dim, 4, 2, 1, "none", activ, pad_type)]
            layers += [ConvBlock(dim * 2 ** i, dim * 2 ** (i + 1), 4, 2, 1, norm, activ, pad_type)
                       for i in range(n_layer - 1)]
            self.cnns.append(nn.Sequential(*layers, nn.Conv2d(dim * 2 ** (n_layer - 1), 1, 1)))

    @staticmethod
    def downsample(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [N, C, H, W] -> scores [N, 1, h, w] at each scale (no sigmoid)."""
        scores = []
        for cnn in self.cnns:
            scores.append(as_float32(cnn(x)))
            x = self.downsample(x)
        return scores


def loss_gan(scores: Sequence[Tensor], truth: float, gan_type: str) -> Tensor:
    """Whether D's scores say real (1) or fake (0), summed over scales.

    lsgan: squared error, as in both releases; nsgan: cross-entropy, MUNIT Eq. 4 and UNIT Eq. 4, 5.
    """
    error = F.mse_loss if gan_type == "lsgan" else F.binary_cross_entropy_with_logits
    return sum(error(score, torch.full_like(score, truth)) for score in scores)


def loss_dis(d: nn.Module, fake: Tensor, real: Tensor, gan_type: str) -> Tensor:
    """D's part of the minimax; no factor 1/2. Fakes and reals pass in one batch, which is exact: no batch norm."""
    scores = d(torch.cat([fake, real]))
    return (loss_gan([score[:len(fake)] for score in scores], 0.0, gan_type)
            + loss_gan([score[len(fake):] for score in scores], 1.0, gan_type))


def loss_recon(ours: Tensor, truth: Tensor) -> Tensor:
    """MUNIT Eq. 1 to 3 and UNIT Eq. 2, 6 (Laplacian likelihood): mean |.|; the truth is not detached."""
    return (as_float32(ours) - as_float32(truth)).abs().mean()


def loss_kl(h: Tensor) -> Tensor:
    """UNIT Eq. 3: KL(N(h, I) || N(0, I)), up to its factor: mean h^2."""
    return as_float32(h).square().mean()


def loss_vgg(vgg: nn.Module, x: Tensor, content: Tensor) -> Tensor:
    """MUNIT section 5.1: distance of instance-normalised relu5_3 features, which leaves the style out."""
    return F.mse_loss(F.instance_norm(as_float32(vgg(x))), F.instance_norm(as_float32(vgg(content))))


class Weights(NamedTuple):
    """Of the generators' losses, under the release's names."""

    gan_w: float = 1.0
    recon_x_w: float = 10.0       # x against its reconstruction within the domain
    recon_s_w: float = 1.0        # MUNIT: style
    recon_c_w: float = 1.0        # MUNIT: content
    recon_x_cyc_w: float = 0.0    # x against x_aba; MUNIT's x_aba keeps the style of x
    recon_kl_w: float = 0.01      # UNIT
    recon_kl_cyc_w: float = 0.01  # UNIT, of the translation's code
    vgg_w: float = 0.0            # x_ab and x_a have the same VGG features
    lambda_semantic: float = 0.0  # CyCADA


class Pair(NamedTuple):
    """One thing for each domain: networks, images x, contents c (UNIT: h), styles s."""

    a: object
    b: object


class Judges(NamedTuple):
    """Frozen networks that some losses need."""

    vgg: Vgg16Features | None = None
    segmenter: FrozenSegmenter | None = None


NO_JUDGES = Judges()

def together(net: Callable[..., Tensor], *inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``net`` on several inputs in one batch, which is exact where no layer mixes the samples of a batch."""
    return net(*(torch.cat(parts) for parts in zip(*inputs, strict=True))).chunk(len(inputs))


Draw = Callable[[Sequence[int]], Tensor]  # N(0, I) of a shape


def munit_fakes(gen: Pair, c: Pair, draw: Draw) -> Pair:
    """(x_ba, x_ab) with random styles."""
    shape = len(c.a), gen.a.style_dim, 1, 1
    s_a, s_b = draw(shape), draw(shape)
    return Pair(gen.a.decode(c.b, s_a), gen.b.decode(c.a, s_b))


def munit_losses(gen: Pair, x: Pair, c: Pair, draw: Draw, w: Weights) -> tuple[Pair, dict[str, Tensor]]:
    """((x_ba, x_ab), unweighted losses of Eq. 1 to 3 and the style-augmented cycle of section 5.1)."""
    shape = len(c.a), gen.a.style_dim, 1, 1
    s_a, s_b = draw(shape), draw(shape)
    s_a_prime, s_b_prime = gen.a.style(x.a), gen.b.style(x.b)
    x_a_recon, x_ba = together(gen.a.decode, (c.a, s_a_prime), (c.b, s_a))
    x_b_recon, x_ab = together(gen.b.decode, (c.b, s_b_prime), (c.a, s_b))
    c_b_recon, c_a_recon = gen.a.encode(x_ba), gen.b.encode(x_ab)
    losses = {"recon_x_a": loss_recon(x_a_recon, x.a), "recon_x_b": loss_recon(x_b_recon, x.b),
              "recon_s_a": loss_recon(gen.a.style(x_ba), s_a), "recon_s_b": loss_recon(gen.b.style(x_ab), s_b),
              "recon_c_a": loss_recon(c_a_recon, c.a), "recon_c_b": loss_recon(c_b_recon, c.b)}
    if w.recon_x_cyc_w > 0:
        losses["cycrecon_x_a"] = loss_recon(gen.a.decode(c_a_recon, s_a_prime), x.a)
        losses["cycrecon_x_b"] = loss_recon(gen.b.decode(c_b_recon, s_b_prime), x.b)
    return Pair(x_ba, x_ab), losses


def unit_fakes(gen: Pair, h: Pair, draw: Draw) -> Pair:
    """(x_ba, x_ab) from noisy codes z = h + n, n ~ N(0, I)."""
    n_a, n_b = draw(h.a.shape), draw(h.b.shape)
    return Pair(gen.a.decode(h.b + n_b), gen.b.decode(h.a + n_a))


def unit_losses(gen: Pair, x: Pair, h: Pair, draw: Draw, w: Weights) -> tuple[Pair, dict[str, Tensor]]:
    """((x_ba, x_ab), unweighted losses of the VAEs, Eq. 2, 3, and of the cycle, Eq. 6, 7)."""
    z_a, z_b = h.a + draw(h.a.shape), h.b + draw(h.b.shape)
    x_a_recon, x_ba = together(gen.a.decode, (z_a,), (z_b,))
    x_b_recon, x_ab = together(gen.b.decode, (z_b,), (z_a,))
    h_b_recon, h_a_recon = gen.a.encode(x_ba), gen.b.encode(x_ab)
    n_b, n_a = draw(h.b.shape), draw(h.a.shape)
    losses = {"recon_x_a": loss_recon(x_a_recon, x.a), "recon_x_b": loss_recon(x_b_recon, x.b),
              "recon_kl_a": loss_kl(h.a), "recon_kl_b": loss_kl(h.b),
              "recon_kl_cyc_aba": loss_kl(h_a_recon), "recon_kl_cyc_bab": loss_kl(h_b_recon)}
    if w.recon_x_cyc_w > 0:
        losses["cyc_x_a"] = loss_recon(gen.a.decode(h_a_recon + n_a), x.a)
        losses["cyc_x_b"] = loss_recon(gen.b.decode(h_b_recon + n_b), x.b)
    return Pair(x_ba, x_ab), losses


METHODS = {"MUNIT": (munit_fakes, munit_losses), "UNIT": (unit_fakes, unit_losses)}
# the weight of each loss: UNIT Eq. 1, MUNIT Eq. 5
WEIGHT_OF = {"adv": "gan_w", "recon_x": "recon_x_w", "recon_s": "recon_s_w", "recon_c": "recon_c_w",
             "cycrecon_x": "recon_x_cyc_w", "cyc_x": "recon_x_cyc_w", "recon_kl": "recon_kl_w",
             "recon_kl_cyc": "recon_kl_cyc_w", "vgg": "vgg_w", "semantic": "lambda_semantic"}

UNUSED = {"MUNIT": ("recon_kl_w", "recon_kl_cyc_w"), "UNIT": ("recon_s_w", "recon_c_w")}


def term_of(name: str) -> str:
    """The key of WEIGHT_OF for a loss: "recon_kl_cyc" for "recon_kl_cyc_aba"."""
    return name.rpartition("_")[0]


def loss_gen(trainer: str, gen: Pair, dis: Pair, x: Pair, c: Pair, draw: Draw, w: Weights, gan_type: str,
             judges: Judges = NO_JUDGES, y_a: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """(the weighted sum, its unweighted terms): UNIT Eq. 1, MUNIT Eq. 5. c: encode(x) of each domain."""
    fake, losses = METHODS[trainer][1](gen, x, c, draw, w)
    losses["adv_a"] = loss_gan(dis.a(fake.a), 1.0, gan_type)
    losses["adv_b"] = loss_gan(dis.b(fake.b), 1.0, gan_type)
    if judges.vgg is not None:
        losses["vgg_a"] = loss_vgg(judges.vgg, fake.a, x.b)
        losses["vgg_b"] = loss_vgg(judges.vgg, fake.b, x.a)
    if judges.segmenter is not None:
        losses["semantic_a"] = loss_semantic(judges.segmenter, fake.a, x.b)
        losses["semantic_b"] = loss_semantic(judges.segmenter, fake.b, x.a, y_a)
    return sum(getattr(w, WEIGHT_OF[term_of(name)]) * loss for name, loss in losses.items()), losses


def step(trainer: str, gen: Pair, dis: Pair, x: Pair, draw: Draw, w: Weights, *, gan_type: str, run: runtime.Run,
         update: Callable[[str, Tensor], object], judges: Judges = NO_JUDGES,
         y_a: Tensor | None = None) -> dict[str, Tensor]:
    """One iteration: D, then G. update("dis" | "gen", loss): backward pass and optimiser step."""
    with run.autocast():
        # G does not change in D's turn, so its codes serve both turns
        c = Pair(gen.a.encode(x.a), gen.b.encode(x.b))
        with torch.no_grad():
            fake = METHODS[trainer][0](gen, c, draw)
        losses = {"dis_a": loss_dis(dis.a, fake.a, x.a, gan_type), "dis_b": loss_dis(dis.b, fake.b, x.b, gan_type)}
    losses["dis_total"] = w.gan_w * (losses["dis_a"] + losses["dis_b"])
    update("dis", losses["dis_total"])

    for d in dis:
        d.requires_grad_(False)
    with run.autocast():
        losses["gen_total"], terms = loss_gen(trainer, gen, dis, x, c, draw, w, gan_type, judges, y_a)
    update("gen", losses["gen_total"])
    for d in dis:
        d.requires_grad_(True)
    losses |= {f"gen_{name}": loss for name, loss in terms.items()}
    return {f"loss_{name}": loss.detach() for name, loss in losses.items()}


def rate(lr: float, i: int, step_size: int, gamma: float) -> float:
    """Of iteration i (from 0): the release's scheduler steps before the update."""
    return lr * gamma ** ((i + 1) // step_size)


# --- the run ----------------------------------------------------------------------------------------------------------


def draws(seed: int, i: int, run: runtime.Run, batch: int) -> Draw:
    """The random numbers of iteration i: of the whole batch of all processes, of which each takes its share."""
    state = np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(run.device).manual_seed(int(state))

    def draw(shape: Sequence[int]) -> Tensor:
        whole = torch.randn(batch * run.world, *shape[1:], device=run.device, generator=generator)
        return whole[batch * run.rank:batch * (run.rank + 1)]
    return draw


def padded(x: Tensor, multiple: int) -> Tensor:
    """x [N, C, H, W] continued by reflection to the right and below, to sides that are multiples."""
    return F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple), mode="reflect")


class Panels:
    """Pictures of what the networks do, in the place of a Session's validation.

    Each row: x, its translations (MUNIT: with random styles, the same at every validation, then with the style of a
    picture of the other domain), the reconstruction, and the way there and back. Rows of A and B alternate.
    """

    RANDOM = 3  # styles

    def __init__(self, trainer: str, images: Pair, sizes: Pair, folder: Path, run: runtime.Run, count: int, seed: int):
        self.trainer, self.sizes, self.folder, self.run = trainer, sizes, folder, run
        self.images = Pair(*(self.spread(paths, count) for paths in images))
        self.seed, self.iteration = seed, None

    @staticmethod
    def spread(paths: Sequence[Path], count: int) -> list[Path]:
        """``count`` of a list, from its beginning to its end."""
        return [paths[i] for i in np.linspace(0, len(paths) - 1, count).round().astype(int)]

    def state_dict(self) -> dict[str, object]:
        return {"iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.iteration = state["iteration"]

    def __call__(self, gen: nn.ModuleDict, iteration: int, meta: Mapping[str, object], log: object) -> None:
        self.iteration = iteration
        self.write(gen, f"gen_{iteration:08d}.png")

    def report(self) -> None:
        if self.images.a:
            self.run.say(f"pictures: {self.folder}")

    @torch.no_grad()
    def write(self, gen: nn.ModuleDict, name: str) -> None:
        if not self.run.is_main or not self.images.a:
            return
        draw, rows = draws(self.seed, 0, runtime.Run(self.run.device, 0, 1, "off"), 1), []
        styles = [draw((1, gen["a"].style_dim, 1, 1)) for _ in range(self.RANDOM)] if self.trainer == "MUNIT" else []
        for paths in zip(*self.images, strict=True):
            x = Pair(*(self.read(path, size) for path, size in zip(paths, self.sizes, strict=True)))
            for here, there in (("a", "b"), ("b", "a")):
                cells = self.row(gen[here], gen[there], getattr(x, here), getattr(x, there), styles)
                height, width = getattr(x, here).shape[2:]
                rows.append([from_symmetric(cell[0, :, :height, :width]) for cell in cells])
        titles = ["x", *(f"style {n + 1}" for n in range(self.RANDOM)), "style of a picture"] if styles \
            else ["x", "translated"]
        picture = visual.panel(rows, [*titles, "reconstructed", "there and back"], min(rows[0][0].width, 320))
        with atomic_write(self.folder / name) as path:
            picture.save(path)

    def read(self, path: Path, short: int) -> Tensor:
        image = read_image(path)
        image = image.resize(short_side_size(image.size, short), Image.Resampling.BILINEAR)  # as in training
        return to_symmetric(image)[None].to(self.run.device)

    def row(self, here: Generator, there: Generator, x: Tensor, other: Tensor,
            styles: Sequence[Tensor]) -> list[Tensor]:
        x, other = padded(x, here.stride), padded(other, there.stride)
        code = here.encode(x)
        if self.trainer == "UNIT":
            fake = there.decode(code)
            return [x, fake, here.decode(code), here.decode(there.encode(fake))]
        own, example = here.style(x), there.style(other)
        fakes = [there.decode(code, s) for s in (*styles, example)]
        return [x, *fakes, here.decode(code, own), here.decode(there.encode(fakes[0]), own)]


def save_pair(modules: nn.ModuleDict, path: Path, meta: Mapping[str, object]) -> None:
    """Under the release's names; ``meta`` travels with the network a."""
    pair = {d: OrderedDict((k, v.detach().cpu()) for k, v in net.state_dict().items()) for d, net in modules.items()}
    pair["a"].segadapt = dict(meta)
    checkpoint.save(pair, path)


class ReleasedNames(Session):
    """Snapshots as the release writes them: gen_%08d.pt, dis_%08d.pt, and the last optimizer.pt."""

    def save_snapshot(self) -> None:
        if self.run.is_main:
            folder, meta = self.folder / "checkpoints", self.meta(self.iteration)
            for name, module in self.modules.items():
                save_pair(module, folder / f"{name}_{self.iteration:08d}.pt", meta)
            checkpoint.save({name: optimizer.state_dict() for name, optimizer
                             in zip(self.modules, self.optimizers, strict=True)}, folder / "optimizer.pt")


def build(args: argparse.Namespace) -> dict[str, nn.ModuleDict]:
    """{"gen": generators a and b, "dis": discriminators}, from --restore-from or drawn."""
    sizes = dict(dim=args.gen_dim, n_downsample=args.n_downsample, n_res=args.n_res, activ=args.gen_activ,
                 pad_type=args.gen_pad_type, checkpointed=args.checkpoint_decoder)
    if args.trainer == "MUNIT":
        sizes |= dict(style_dim=args.style_dim, mlp_dim=args.mlp_dim)
    make = MunitGenerator if args.trainer == "MUNIT" else UnitGenerator
    gen = nn.ModuleDict({d: make(**sizes) for d in "ab"})
    dis = nn.ModuleDict({d: Discriminator(3, args.dis_dim, args.n_layer, args.num_scales, args.dis_norm,
                                          args.dis_activ, args.dis_pad_type) for d in "ab"})
    init_weights(gen, args.init)
    init_weights(dis, "gaussian")
    if args.restore_from:
        path = Path(args.restore_from)
        files = {"gen": path, "dis": path.with_name(path.name.replace("gen", "dis", 1))}
        for name, nets in (("gen", gen), ("dis", dis)):
            if name == "gen" or files[name].is_file():
                pair, _ = read_pair(files[name])
                for d, net in nets.items():
                    load_released(net, pair[d], f"{files[name]} ({d})", "Is it of another --trainer or other sizes?")
    return {"gen": gen, "dis": dis}


def train(args: argparse.Namespace) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    folder, w = Path(args.snapshot_dir), Weights(**{name: getattr(args, name) for name in Weights._fields})

    # data
    parts = [f"{part}_{domain}" for part in ("train", "test") for domain in "ab"]
    found = find_domains(
        dataroot=args.data_root, folders={part: getattr(args, f"data_folder_{part}") for part in parts},
        lists={part: getattr(args, f"data_list_{part}") for part in parts},
        source=(args.source, args.data_dir, args.source_set, args.data_list),
        target=(args.target, args.data_dir_target, args.set, args.data_list_target))
    segmenter = load_segmenter(args.segmenter) if args.segmenter else None
    labelled = None
    if args.labelled:
        source = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
        labelled = ImageFolder(source, segmenter.classes, None, task=load_description(segmenter.task))
    crop = args.crop_image_width, args.crop_image_height
    data = open_domains(found, FlipResizeCrop(args.new_size_a, crop), FlipResizeCrop(args.new_size_b, crop),
                        args.random_seed, labelled, args.check_data)
    if args.check_data:
        run.say(f"all pictures of {data.train_a.name} and {data.train_b.name} are fine")
        raise SystemExit(0)

    # networks and optimisers
    vgg = load_vgg16(args.vgg_weights) if w.vgg_w > 0 else None
    judges = Judges(*(None if net is None else run.place_net(net) for net in (vgg, segmenter)))
    modules = {name: run.place_net(nets) for name, nets in build(args).items()}
    if args.compile:
        for net in [*modules["dis"].values(), *(part for gen in modules["gen"].values() for part in gen.children())]:
            net.compile()
    gen, dis = (Pair(nets["a"], nets["b"]) for nets in modules.values())
    optimizers = {name: torch.optim.Adam(nets.parameters(), args.lr, (args.beta1, args.beta2),
                                         weight_decay=args.weight_decay) for name, nets in modules.items()}
    scaler = run.scaler()
    update = GuardedStep(run, modules, optimizers, scaler, args.max_gradient)
    panels = Panels(args.trainer, Pair(data.test_a, data.test_b), Pair(args.new_size_a, args.new_size_b),
                    folder / "images", run, args.save_num_images, args.random_seed)

    def meta_of(iteration: int) -> dict[str, object]:
        return {"script": "train_munit.py", "method": args.trainer, "iteration": iteration, "activ": args.gen_activ,
                "pad_type": args.gen_pad_type, "new_size": [args.new_size_a, args.new_size_b]}

    with ReleasedNames(run, args, folder, modules, list(optimizers.values()), scaler=scaler, meta=meta_of, prefix="",
                       validation=panels, free={"max_iter", "output_path", "image_display_iter", "config"}) as session:
        session.header({
            "weights": args.restore_from or f"none, random weights ({args.init})",
            "networks": f"{args.trainer}, {sum(p.numel() for p in gen.a.parameters()) / 1e6:.1f} M weights in each "
                        f"generator, {sum(p.numel() for p in dis.a.parameters()) / 1e6:.1f} M in each discriminator",
            "losses": ", ".join(f"{name} {value:g}" for name, value in w._asdict().items()
                                if value and name not in UNUSED[args.trainer])
                      + f", {args.gan_type}" + (f", VGG-16 {args.vgg_weights}" if vgg else ""),
            "domain A": f"{len(data.train_a)} pictures of {data.train_a.name}, short side {args.new_size_a}",
            "domain B": f"{len(data.train_b)} pictures of {data.train_b.name}, short side {args.new_size_b}",
            "batch": f"{args.batch_size} x {run.world} crops of {crop[0]}x{crop[1]}",
            "steps": f"{session.iteration} to {args.max_iter}"})
        first = session.iteration
        batches_a = session.batches(data.train_a, args.random_seed)
        batches_b = session.batches(data.train_b, args.random_seed + 1)
        for i in session.steps(args.max_iter):
            lr = rate(args.lr, i, args.step_size, args.gamma) if args.lr_policy == "step" else args.lr
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = lr
            batch_a, batch_b = next(batches_a), next(batches_b)
            names = [*batch_a.name, *batch_b.name]
            update.where = f"iteration {i + 1}, {', '.join(names)}"
            losses = step(args.trainer, gen, dis, Pair(run.place(batch_a.image), run.place(batch_b.image)),
                          draws(args.random_seed, i, run, args.batch_size), w, gan_type=args.gan_type, run=run,
                          update=update, judges=judges, y_a=batch_a.label.to(run.device) if labelled else None)
            scaler.update()
            session.end_step(losses, names, lr=lr)
            if i == first:
                run.say(f"peak memory of an iteration: {runtime.peak_memory(run.device):.1f} GiB")
            if (i + 1) % args.image_display_iter == 0:
                panels.write(modules["gen"], "current.png")
    return session


def demo(args: argparse.Namespace) -> int:
    """Train on the rendered pair, translate its source, and train a segmenter on the result."""
    root = render_demo(Path(f"data/demo/{args.random_seed}"), seed=args.random_seed)
    session = train(args)
    if session.exit_code:
        return session.exit_code
    gen, run = session.modules["gen"], session.run
    draw = draws(args.random_seed, 0, run, 1)

    def translate(x: Tensor) -> Tensor:
        """x_ab, with a random style."""
        code = gen["a"].encode(padded(x, gen["a"].stride))
        styles = [draw((1, gen["b"].style_dim, 1, 1))] if args.trainer == "MUNIT" else []
        return gen["b"].decode(code, *styles)[:, :, :x.shape[2], :x.shape[3]]

    compare_translations({args.trainer: translate}, root, session.folder / "demo", run, seed=args.random_seed)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return demo(args) if args.demo else train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
