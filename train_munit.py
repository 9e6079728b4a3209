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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, runtime
from lib.config import config_flags
from lib.datasets.description import Domain
from lib.datasets.unpaired import FlipResizeCrop, find_domains, kind_of, open_domains
from lib.demo.streets import render_demo
from lib.demo.translation import compare_translations
from lib.models.segmenter import FrozenSegmenter, load_segmenter, loss_semantic
from lib.models.translation import (
    ACTIVATIONS,
    PADDINGS,
    ConvBlock,
    MunitGenerator,
    UnitGenerator,
    Vgg16Features,
    init_weights,
    load_pair,
    load_vgg16,
    save_pair,
    together,
)
from lib.optim import GuardedStep
from lib.predict_translation import Panels, Translator, show_codes
from lib.runtime import as_float32
from lib.session import Session

# --demo: narrow networks on the rendered pair, which keep twice the usual resolution
DEMO = dict(**flags.DEMO_DATA, new_size=96, crop_image_height=96, crop_image_width=96, gen_dim=16, dis_dim=16,
            n_downsample=1, n_res=3, mlp_dim=64, recon_x_cyc_w=10.0, lr=5e-4, max_iter=800, step_size=400,
            save_pred_every=800, log_every=50)


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
    flags.add_semantic(p)
    net = p.add_argument_group("networks")
    for name, default, text in (("gen-dim", 64, "channels of the first layer of E"), ("n-downsample", 2, "of E"),
                                ("n-res", 4, "residual blocks of E and of G"), ("style-dim", 8, "MUNIT: length of s"),
                                ("mlp-dim", 256, "MUNIT: width of the MLP"),
                                ("dis-dim", 64, "channels of the first layer of D"), ("n-layer", 4, "layers of D"),
                                ("num-scales", 3, "of D")):
        kind = flags.layers if name.startswith("n") else flags.channels
        net.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name, choices, default in (("gen-activ", ACTIVATIONS, "relu"), ("gen-pad-type", PADDINGS, "reflect"),
                                   ("dis-activ", ACTIVATIONS, "lrelu"), ("dis-pad-type", PADDINGS, "reflect")):
        net.add_argument(f"--{name}", choices=list(choices), default=default)
    net.add_argument("--dis-norm", choices=["none", "in", "ln"], default="none")
    net.add_argument("--init", choices=["kaiming", "gaussian", "xavier", "orthogonal", "default"], default="kaiming",
                     help="of the generators; D's is gaussian")
    net.add_argument("--restore-from", metavar="gen_%08d.pt", help="initial weights, of dis_%%08d.pt too")
    net.add_argument("--checkpoint-decoder", action="store_true",
                     help="compute the decoders' activations twice, to save memory")
    data = flags.add_domains(p)
    data.add_argument("--new-size", type=flags.side, default=256, help="pixels of the short side")
    data.add_argument("--new-size-a", type=flags.side, help="in domain A (default: --new-size)")
    data.add_argument("--new-size-b", type=flags.side, help="in domain B (default: --new-size)")
    data.add_argument("--crop-image-height", type=flags.side, default=256, help="pixels of a training crop")
    data.add_argument("--crop-image-width", type=flags.side, default=256)
    opt = p.add_argument_group("optimisation")
    opt.add_argument("--batch-size", type=flags.batch, default=1, help="of each domain and process")
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
    out = flags.add_run(p, folder="outputs/CONFIG or outputs/TRAINER below --output-path")
    out.add_argument("--output-path", "--output_path", default=".",
                     help="where the default --snapshot-dir lies")
    out.add_argument("--image-display-iter", type=flags.count, default=100,
                     help="iterations between two images/current.png")
    p.set_defaults(save_pred_every=10000, save_num_images=4)
    argv = sys.argv[1:] if argv is None else list(argv)
    known = p.parse_args(argv)
    given, config = p.given, known.config
    settings = config_flags(Path(config), p) if config else []
    kinds = {kind_of(name) for name in given} | ({"described"} if known.demo else set())
    if kinds != {""}:  # data of the command line, or the demo's, replace the configuration's
        settings = [s for s in settings if kind_of(s[2:].partition("=")[0].replace("-", "_")) in kinds]
    args = flags.parse(p, [*settings, *argv], DEMO)
    p.given = given  # without those of the configuration, which is one for both trainers
    p.note(f"with --trainer {args.trainer}", *UNUSED[args.trainer])
    if not args.vgg_w:
        p.note("without --vgg-w", "vgg_weights")
    if args.lr_policy == "constant":
        p.note("with --lr-policy constant", "step_size", "gamma")
    if args.snapshot_dir:
        p.note("with --demo or --snapshot-dir", "output_path")
    if not args.demo:
        p.note("without --demo: training runs no kernel of csrc/", "ops")

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
    return args


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


Draw = Callable[[Sequence[int]], Tensor]  # N(0, I) of a shape
Domains = Mapping[str, object]            # "a" and "b": networks, pictures x, styles s

# What follows is written for x_ba, the picture of B in the domain A; called with "b" and "a" it is about x_ab.


def munit_codes(gen: Domains, x: Domains) -> dict[str, Tensor]:
    """Contents c and styles s of both pictures."""
    return {**{f"c_{d}": gen[d].encode(x[d]) for d in "ab"}, **{f"s_{d}": gen[d].style(x[d]) for d in "ab"}}


def munit_noise(codes: Mapping[str, Tensor], draw: Draw) -> dict[str, Tensor]:
    """Random styles of both domains."""
    return {d: draw(codes[f"s_{d}"].shape) for d in "ab"}


def munit_fake(gen: Domains, codes: Mapping[str, Tensor], s: Domains, a: str, b: str) -> Tensor:
    """x_ba = G_a(c_b, s_a)."""
    return gen[a].decode(codes[f"c_{b}"], s[a])


def munit_losses(gen: Domains, x: Domains, codes: Mapping[str, Tensor], s: Domains, w: Weights, a: str,
                 b: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(x_ba, unweighted losses): MUNIT Eq. 1 to 3, and the style-augmented cycle of section 5.1."""
    c_a, c_b, s_a_prime, s_b_prime = (codes[name] for name in (f"c_{a}", f"c_{b}", f"s_{a}", f"s_{b}"))
    x_a_recon, x_ba = together(gen[a].decode, (c_a, s_a_prime), (c_b, s[a]))
    c_b_recon, s_a_recon = gen[a].encode(x_ba), gen[a].style(x_ba)
    losses = {f"recon_x_{a}": loss_recon(x_a_recon, x[a]), f"recon_s_{a}": loss_recon(s_a_recon, s[a]),
              f"recon_c_{b}": loss_recon(c_b_recon, c_b)}
    if w.recon_x_cyc_w > 0:
        losses[f"cycrecon_x_{b}"] = loss_recon(gen[b].decode(c_b_recon, s_b_prime), x[b])
    return x_ba, losses


def unit_codes(gen: Domains, x: Domains) -> dict[str, Tensor]:
    """Means h of the latent codes of both pictures."""
    return {f"h_{d}": gen[d].encode(x[d]) for d in "ab"}


def unit_noise(codes: Mapping[str, Tensor], draw: Draw, recode: bool = True) -> dict[str, Tensor]:
    """n of both codes and, with ``recode``, of those of the translations, x_ba's first."""
    names = ("a", "b", "b_recon", "a_recon") if recode else ("a", "b")
    return {name: draw(codes[f"h_{name[0]}"].shape) for name in names}


def unit_fake(gen: Domains, codes: Mapping[str, Tensor], n: Domains, a: str, b: str) -> Tensor:
    """x_ba = G_a(z_b), z = h + n, n ~ N(0, I)."""
    return gen[a].decode(codes[f"h_{b}"] + n[b])


def unit_losses(gen: Domains, x: Domains, codes: Mapping[str, Tensor], n: Domains, w: Weights, a: str,
                b: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(x_ba, unweighted losses): the VAE's, UNIT Eq. 2, 3, and the cycle's, Eq. 6, 7."""
    h_a, h_b = codes[f"h_{a}"], codes[f"h_{b}"]
    x_a_recon, x_ba = together(gen[a].decode, (h_a + n[a],), (h_b + n[b],))
    h_b_recon = gen[a].encode(x_ba)
    losses = {f"recon_x_{a}": loss_recon(x_a_recon, x[a]), f"recon_kl_{a}": loss_kl(h_a),
              f"recon_kl_cyc_{b}{a}{b}": loss_kl(h_b_recon)}
    if w.recon_x_cyc_w > 0:
        losses[f"cyc_x_{b}"] = loss_recon(gen[b].decode(h_b_recon + n[f"{b}_recon"]), x[b])
    return x_ba, losses


class Method(NamedTuple):
    codes: Callable
    noise_d: Callable   # in D's turn
    noise_g: Callable
    fake: Callable
    losses: Callable


METHODS = {"MUNIT": Method(munit_codes, munit_noise, munit_noise, munit_fake, munit_losses),
           "UNIT": Method(unit_codes, partial(unit_noise, recode=False), unit_noise, unit_fake, unit_losses)}
# the weight of each loss: UNIT Eq. 1, MUNIT Eq. 5
WEIGHT_OF = {"adv": "gan_w", "recon_x": "recon_x_w", "recon_s": "recon_s_w", "recon_c": "recon_c_w",
             "cycrecon_x": "recon_x_cyc_w", "cyc_x": "recon_x_cyc_w", "recon_kl": "recon_kl_w",
             "recon_kl_cyc": "recon_kl_cyc_w", "vgg": "vgg_w", "semantic": "lambda_semantic"}
UNUSED = {"MUNIT": ("recon_kl_w", "recon_kl_cyc_w"), "UNIT": ("recon_s_w", "recon_c_w", "style_dim", "mlp_dim")}


def weight_of(name: str, w: Weights) -> float:
    """Of a loss such as "recon_x_a"."""
    return getattr(w, WEIGHT_OF[name.rpartition("_")[0]])


def loss_gen(trainer: str, gen: Domains, dis: Domains, x: Domains, codes: Mapping[str, Tensor], draw: Draw, w: Weights,
             *, gan_type: str, run: runtime.Run, vgg: Vgg16Features | None = None,
             segmenter: FrozenSegmenter | None = None, y_a: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
    """The unweighted terms of UNIT Eq. 1 or MUNIT Eq. 5: those around x_ba, then those around x_ab.

    No term needs both translations, so that their graphs need not be held together. vgg, segmenter: frozen networks
    of the losses that need them. y_a: labels of x_a.
    """
    noise = METHODS[trainer].noise_g(codes, draw)
    for a, b in ("ab", "ba"):
        with run.autocast():
            x_ba, losses = METHODS[trainer].losses(gen, x, codes, noise, w, a, b)
            losses[f"adv_{a}"] = loss_gan(dis[a](x_ba), 1.0, gan_type)
            if vgg is not None:
                losses[f"vgg_{a}"] = loss_vgg(vgg, x_ba, x[b])
            if segmenter is not None:
                losses[f"semantic_{a}"] = loss_semantic(segmenter, x_ba, x[b], y_a if b == "a" else None)
        yield losses


def step(trainer: str, gen: Domains, dis: Domains, x: Domains, draw: Draw, w: Weights, update: GuardedStep, *,
         gan_type: str, run: runtime.Run, vgg: Vgg16Features | None = None, segmenter: FrozenSegmenter | None = None,
         y_a: Tensor | None = None) -> dict[str, Tensor]:
    """One iteration: D, then G.

    update.backward("dis" | "gen", loss) adds gradients, update.step(..) uses them. Returns the unweighted losses.
    """
    losses: dict[str, Tensor] = {"dis_total": 0.0, "gen_total": 0.0}
    with run.autocast():
        codes = METHODS[trainer].codes(gen, x)  # for both turns: G does not change in D's
    with torch.no_grad():
        noise = METHODS[trainer].noise_d(codes, draw)
    for a, b in ("ab", "ba"):
        with run.autocast():
            with torch.no_grad():
                x_ba = METHODS[trainer].fake(gen, codes, noise, a, b)
            loss = loss_dis(dis[a], x_ba, x[a], gan_type)
        update.backward("dis", w.gan_w * loss)
        losses[f"dis_{a}"] = loss.detach()
        losses["dis_total"] += w.gan_w * loss.detach()
    update.step("dis")

    for d in "ab":
        dis[d].requires_grad_(False)
    # the codes' gradients add up over both directions, and then go back through the encoders once
    leaves = {name: code.detach().requires_grad_() for name, code in codes.items()}
    for terms in loss_gen(trainer, gen, dis, x, leaves, draw, w, gan_type=gan_type, run=run, vgg=vgg,
                          segmenter=segmenter, y_a=y_a):
        total = sum(weight_of(name, w) * loss for name, loss in terms.items())
        update.backward("gen", total)
        losses |= {f"gen_{name}": loss.detach() for name, loss in terms.items()}
        losses["gen_total"] += total.detach()
    torch.autograd.backward(list(codes.values()), [leaf.grad for leaf in leaves.values()])
    update.step("gen")
    for d in "ab":
        dis[d].requires_grad_(True)
    return {f"loss_{name}": loss for name, loss in losses.items()}


def rate(lr: float, i: int, step_size: int, gamma: float) -> float:
    """Of iteration i (from 0): the release's scheduler steps before the update."""
    return lr * gamma ** ((i + 1) // step_size)


# --- the run ----------------------------------------------------------------------------------------------------------


def draws(seed: int, i: int, run: runtime.Run, batch: int) -> Draw:
    """The random numbers of iteration i: of the whole batch of all processes, of which each takes its share."""
    state = np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(run.device).manual_seed(int(state))

    def draw(shape: Sequence[int]) -> Tensor:
        return run.share(torch.randn(batch * run.world, *shape[1:], device=run.device, generator=generator))
    return draw


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
        load_pair(gen, path)
        if (beside := path.with_name(path.name.replace("gen", "dis", 1))).is_file():
            load_pair(dis, beside)
    return {"gen": gen, "dis": dis}


def train(args: argparse.Namespace) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops if args.demo else "reference")  # csrc/ is built for the demo's segmenters only
    folder, w = Path(args.snapshot_dir), Weights(**{name: getattr(args, name) for name in Weights._fields})

    # data
    found = find_domains(**flags.domains(args))
    segmenter = load_segmenter(args.segmenter) if args.segmenter else None
    labelled = None
    if args.labelled:
        source = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
        labelled = segmenter.labels_of(source)
    crop = args.crop_image_width, args.crop_image_height
    data = open_domains(found, FlipResizeCrop(args.new_size_a, crop), FlipResizeCrop(args.new_size_b, crop),
                        args.random_seed, labelled, args.check_data)
    if args.check_data:
        run.say(f"all pictures of {data.train_a.name} and {data.train_b.name} are fine")
        raise SystemExit(0)

    # networks and optimisers
    vgg = run.place_net(load_vgg16(args.vgg_weights)) if w.vgg_w > 0 else None
    segmenter = segmenter and run.place_net(segmenter)
    modules = {name: run.place_net(nets) for name, nets in build(args).items()}
    gen, dis = modules["gen"], modules["dis"]
    if args.compile:
        for net in [*dis.values(), *gen["a"].children(), *gen["b"].children()]:
            net.compile()
    optimizers = {name: torch.optim.Adam(nets.parameters(), args.lr, (args.beta1, args.beta2),
                                         weight_decay=args.weight_decay) for name, nets in modules.items()}
    millions = {name: sum(p.numel() for p in nets["a"].parameters()) / 1e6 for name, nets in modules.items()}
    scaler = run.scaler()
    update = GuardedStep(run, modules, optimizers, scaler, args.max_gradient)
    draw = draws(args.random_seed, 0, runtime.Run(run.device, 0, 1, "off"), 1)
    styles = [draw((1, args.style_dim, 1, 1)) for _ in range(3)] if args.trainer == "MUNIT" else []
    panels = Panels(data, *show_codes(gen, styles), folder / "images", run, args.save_num_images, "gen_{:08d}.png")

    def meta_of(iteration: int) -> dict[str, object]:
        return {"script": "train_munit.py", "method": args.trainer, "iteration": iteration, "activ": args.gen_activ,
                "pad_type": args.gen_pad_type, "new_size": [args.new_size_a, args.new_size_b]}

    def snapshot(iteration: int) -> None:
        """Under the release's names."""
        for name, nets in modules.items():
            save_pair(nets, folder / f"checkpoints/{name}_{iteration:08d}.pt", meta_of(iteration))
        checkpoint.save({name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                        folder / "checkpoints/optimizer.pt")

    with Session(run, args, folder, modules, list(optimizers.values()), scaler=scaler, meta=meta_of, snapshot=snapshot,
                 validation=panels, free={"max_iter", "output_path", "image_display_iter", "config"}) as session:
        session.header({
            "weights": args.restore_from or f"none, random weights ({args.init})",
            "networks": f"{args.trainer}, {millions['gen']:.1f} M weights in each generator, "
                        f"{millions['dis']:.1f} M in each discriminator",
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
            losses = step(args.trainer, gen, dis, {"a": run.place(batch_a.image), "b": run.place(batch_b.image)},
                          draws(args.random_seed, i, run, args.batch_size), w, update, gan_type=args.gan_type, run=run,
                          vgg=vgg, segmenter=segmenter, y_a=batch_a.label.to(run.device) if labelled else None)
            scaler.update()
            session.end_step(losses, names, lr=lr)
            if i == first:
                run.say(f"peak memory of an iteration: {runtime.peak_memory(run.device):.1f} GiB")
            if (i + 1) % args.image_display_iter == 0:
                panels.write("current.png")
    return session


def demo(args: argparse.Namespace) -> int:
    """Train on the rendered pair, translate its source, and train a segmenter on the result."""
    root = render_demo(Path(f"data/demo/{args.random_seed}"), seed=args.random_seed)
    session = train(args)
    if session.exit_code:
        return session.exit_code
    gen, run = session.modules["gen"], session.run
    translator, draw = Translator.of_pair(gen["a"], gen["b"]), draws(args.random_seed, 0, run, 1)

    def translate(x: Tensor) -> Tensor:
        """x_ab, with a random style."""
        return translator(x, draw((1, args.style_dim, 1, 1)) if args.trainer == "MUNIT" else None)

    compare_translations({args.trainer: translate}, root, session.folder / "demo", run, seed=args.random_seed)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return demo(args) if args.demo else train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
