"""UNIT and MUNIT: unpaired image translation between two domains.

Liu, Breuel, Kautz: "Unsupervised Image-to-Image Translation Networks", NIPS 2017, https://arxiv.org/abs/1703.00848.
Huang, Liu, Belongie, Kautz: "Multimodal Unsupervised Image-to-Image Translation", ECCV 2018,
https://arxiv.org/abs/1804.04732. Results, settings and what differs: docs/munit.md.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import runtime
from lib.models.translation import ConvBlock, Vgg16Features
from lib.runtime import as_float32

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
    vgg_w: float = 0.0


class Pair(NamedTuple):
    """One thing for each domain: networks, images x, contents c (UNIT: h), styles s."""

    a: object
    b: object


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
             "recon_kl_cyc": "recon_kl_cyc_w", "vgg": "vgg_w"}


def term_of(name: str) -> str:
    """The key of WEIGHT_OF for a loss: "recon_kl_cyc" for "recon_kl_cyc_aba"."""
    return name.rpartition("_")[0]


def loss_gen(trainer: str, gen: Pair, dis: Pair, x: Pair, c: Pair, draw: Draw, w: Weights, gan_type: str,
             vgg: Vgg16Features | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """(the weighted sum, its unweighted terms): UNIT Eq. 1, MUNIT Eq. 5. c: encode(x) of each domain."""
    fake, losses = METHODS[trainer][1](gen, x, c, draw, w)
    losses["adv_a"] = loss_gan(dis.a(fake.a), 1.0, gan_type)
    losses["adv_b"] = loss_gan(dis.b(fake.b), 1.0, gan_type)
    if vgg is not None and w.vgg_w > 0:
        losses["vgg_a"] = loss_vgg(vgg, fake.a, x.b)
        losses["vgg_b"] = loss_vgg(vgg, fake.b, x.a)
    return sum(getattr(w, WEIGHT_OF[term_of(name)]) * loss for name, loss in losses.items()), losses


def step(trainer: str, gen: Pair, dis: Pair, x: Pair, draw: Draw, w: Weights, *, gan_type: str, run: runtime.Run,
         update_d: Callable[[Tensor], object], update_g: Callable[[Tensor], object],
         vgg: Vgg16Features | None = None) -> dict[str, Tensor]:
    """One iteration: D, then G. update_d, update_g: backward pass and optimiser step of a loss."""
    with run.autocast():
        # G does not change in D's turn, so its codes serve both turns
        c = Pair(gen.a.encode(x.a), gen.b.encode(x.b))
        with torch.no_grad():
            fake = METHODS[trainer][0](gen, c, draw)
        losses = {"dis_a": loss_dis(dis.a, fake.a, x.a, gan_type), "dis_b": loss_dis(dis.b, fake.b, x.b, gan_type)}
        losses["dis_total"] = w.gan_w * (losses["dis_a"] + losses["dis_b"])
    update_d(losses["dis_total"])

    for d in dis:
        d.requires_grad_(False)
    with run.autocast():
        losses["gen_total"], terms = loss_gen(trainer, gen, dis, x, c, draw, w, gan_type, vgg)
    update_g(losses["gen_total"])
    for d in dis:
        d.requires_grad_(True)
    losses |= {f"gen_{name}": loss for name, loss in terms.items()}
    return {f"loss_{name}": loss.detach() for name, loss in losses.items()}


def rate(lr: float, i: int, step_size: int, gamma: float) -> float:
    """Of iteration i (from 0): the release's scheduler steps before the update."""
    return lr * gamma ** ((i + 1) // step_size)
