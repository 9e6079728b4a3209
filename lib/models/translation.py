"""Generators of UNIT and MUNIT, and VGG-16's features for their perceptual loss.

Liu, Breuel, Kautz: "Unsupervised Image-to-Image Translation Networks", NIPS 2017, https://arxiv.org/abs/1703.00848.
Huang, Liu, Belongie, Kautz: "Multimodal Unsupervised Image-to-Image Translation", ECCV 2018,
https://arxiv.org/abs/1804.04732, appendix B.2.

Images are RGB [N, 3, H, W] in -1..1. Names in state dicts are those of the released files (gen_%08d.pt).
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from lib import checkpoint
from lib.errors import UserError
from lib.runtime import as_float32

ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "lrelu": lambda: nn.LeakyReLU(0.2, inplace=True),
               "selu": lambda: nn.SELU(inplace=True), "tanh": nn.Tanh, "none": nn.Identity}
PADDINGS = {"reflect": "reflect", "replicate": "replicate", "zero": "zeros"}
# buffers that old PyTorch versions wrote for norms without statistics, and that the release's AdaIN carries unused
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class LayerNorm(nn.Module):
    """Over C, H, W of each sample: (x - mean) / (std + eps) * gamma + beta, std unbiased, gamma and beta a channel.

    Not torch's: that adds eps to the (biased) variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.gamma, self.beta = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        return torch.addcmul(self.beta.view(-1, 1, 1), x - mean, self.gamma.view(-1, 1, 1) / (std + self.eps))


class AdaptiveInstanceNorm(nn.Module):
    """MUNIT, Eq. 7: instance norm whose weight and bias come from the style, one row a sample.

    The buffers are in the released files and have no effect.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        """x [N, C, H, W], row [N, 2C] (bias, then weight) -> [N, C, H, W]."""
        bias, weight = row.chunk(2, dim=1)
        flat = x.reshape(1, -1, *x.shape[2:])  # instances become the channels of one batch norm, which is fused
        out = F.batch_norm(flat, None, None, weight.reshape(-1), bias.reshape(-1), training=True, eps=self.eps)
        return out.view_as(x)


NORMS = {"in": nn.InstanceNorm2d, "adain": AdaptiveInstanceNorm, "ln": LayerNorm}


class ConvBlock(nn.Module):
    """Padding, convolution with bias, norm (at least float32, also under autocast), activation."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, padding: int, norm: str = "none",
                 activ: str = "relu", pad_type: str = "reflect"):
        super().__init__()
        self.norm = None if norm == "none" else NORMS[norm](c_out)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, padding_mode=PADDINGS[pad_type])
        self.activ = ACTIVATIONS[activ]()

    def forward(self, x: Tensor, row: Tensor | None = None, enlarge: bool = False) -> Tensor:
        """row [N, 2 c_out]: of an adaptive norm; None for the others. enlarge: x is enlarged twice before."""
        x = enlarged_conv(x, self.conv) if enlarge else self.conv(x)
        if self.norm is not None:
            rows = () if row is None else (as_float32(row),)
            x = self.norm(as_float32(x), *rows).to(x.dtype)
        return self.activ(x)


def enlarged_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(nearest x2 of x) for a 5x5 convolution, without making the enlarged picture: 9 products a pixel, not 25.

    x [N, C, H, W] -> [N, O, 2H, 2W]. Of the five pixels in a row that an output sees, some are copies of one pixel of
    x, so their weights are added first: three remain, other ones for even and for odd places. Padding x repeats its
    border; where ``conv`` reflects it, the outermost of the five differs, in the first and last row and column alone.
    """
    w = conv.weight

    def fold(w: Tensor) -> Tensor:  # [..., 5] -> [2, ..., 3]
        a, b, c, d, e = w.unbind(-1)
        return torch.stack([torch.stack([a + b, c + d, e], -1), torch.stack([a, b + c, d + e], -1)])

    folded = fold(fold(w.transpose(2, 3)).transpose(3, 4))                   # [x, y, O, C, 3, 3]
    folded = folded.permute(2, 1, 0, 3, 4, 5).reshape(-1, *folded.shape[3:])  # [4 O, C, 3, 3]
    grown = F.pad(x, (1, 1, 1, 1), mode="constant" if conv.padding_mode == "zeros" else "replicate")
    out = F.pixel_shuffle(F.conv2d(grown, folded, conv.bias.repeat_interleave(4)), 2)
    if conv.padding_mode == "reflect":
        def line(values: Tensor, weight: Tensor, mode: str) -> Tensor:  # [N, C, n], [O, C, 5] -> [N, O, 2n]
            return F.conv1d(F.pad(values.repeat_interleave(2, -1), (2, 2), mode=mode), weight)

        out[:, :, 0] += line(x[:, :, 1] - x[:, :, 0], w[:, :, 0], "reflect")
        out[:, :, -1] += line(x[:, :, -2] - x[:, :, -1], w[:, :, 4], "reflect")
        out[..., 0] += line(x[..., 1] - x[..., 0], w[..., 0], "replicate")
        out[..., -1] += line(x[..., -2] - x[..., -1], w[..., 4], "replicate")
    return out


class ResBlock(nn.Module):
    def __init__(self, dim: int, norm: str, activ: str, pad_type: str):
        super().__init__()
        self.model = nn.Sequential(ConvBlock(dim, dim, 3, 1, 1, norm, activ, pad_type),
                                   ConvBlock(dim, dim, 3, 1, 1, norm, "none", pad_type))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """rows [N, 2, 2 dim]: of the block's two adaptive norms."""
        first, second = (None, None) if rows is None else rows.unbind(1)
        return self.model[1](self.model[0](x, first), second) + x


class ResBlocks(nn.Module):
    def __init__(self, n: int, dim: int, norm: str, activ: str, pad_type: str):
        super().__init__()
        self.model = nn.Sequential(*(ResBlock(dim, norm, activ, pad_type) for _ in range(n)))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """rows [N, 4 n dim]: of all adaptive norms in their order."""
        if rows is None:
            return self.model(x)
        for block, r in zip(self.model, rows.unflatten(1, (len(self.model), 2, -1)).unbind(1), strict=True):
            x = block(x, r)
        return x


class ContentEncoder(nn.Module):
    """x [N, C, H, W] -> [N, dim * 2^n_downsample, H / 2^n_downsample, W / 2^n_downsample] (rounded down)."""

    def __init__(self, n_downsample: int, n_res: int, input_dim: int, dim: int, norm: str, activ: str, pad_type: str):
        super().__init__()
        layers = [ConvBlock(input_dim, dim, 7, 1, 3, norm, activ, pad_type)]
        for _ in range(n_downsample):
            layers.append(ConvBlock(dim, 2 * dim, 4, 2, 1, norm, activ, pad_type))
            dim *= 2
        self.model = nn.Sequential(*layers, ResBlocks(n_res, dim, norm, activ, pad_type))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class StyleEncoder(nn.Module):
    """x [N, C, H, W] -> [N, style_dim, 1, 1]; no norm, which would remove the style."""

    def __init__(self, n_downsample: int, input_dim: int, dim: int, style_dim: int, activ: str, pad_type: str):
        super().__init__()
        layers = [ConvBlock(input_dim, dim, 7, 1, 3, "none", activ, pad_type)]
        for i in range(n_downsample):
            wider = dim * 2 if i < 2 else dim
            layers.append(ConvBlock(dim, wider, 4, 2, 1, "none", activ, pad_type))
            dim = wider
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, style_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Decoder(nn.Module):
    def __init__(self, n_upsample: int, n_res: int, dim: int, output_dim: int, res_norm: str, activ: str,
                 pad_type: str):
        super().__init__()
        layers = [ResBlocks(n_res, dim, res_norm, activ, pad_type)]
        for _ in range(n_upsample):
            layers += [nn.Upsample(scale_factor=2), ConvBlock(dim, dim // 2, 5, 1, 2, "ln", activ, pad_type)]
            dim //= 2
        self.model = nn.Sequential(*layers, ConvBlock(dim, output_dim, 7, 1, 3, "none", "tanh", pad_type))

    def forward(self, c: Tensor, rows: Tensor | None = None) -> Tensor:
        blocks, *layers, last = self.model
        x = blocks(c, rows)
        for block in layers[1::2]:  # the layers between enlarge, see enlarged_conv
            x = block(x, enlarge=True)
        return last(x)


class FullyConnected(nn.Module):
    """A linear layer under the name ``fc``, and ReLU unless it is the last."""

    def __init__(self, c_in: int, c_out: int, last: bool):
        super().__init__()
        self.fc, self.last = nn.Linear(c_in, c_out), last

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if self.last else F.relu(self.fc(x), inplace=True)


class MLP(nn.Module):
    """Styles [N, c_in, 1, 1] -> the rows of all adaptive norms, [N, c_out]."""

    def __init__(self, c_in: int, c_out: int, dim: int, layers: int = 3):
        super().__init__()
        sizes = [c_in, *[dim] * (layers - 1), c_out]
        self.model = nn.Sequential(*(FullyConnected(a, b, i == layers - 1)
                                     for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))))

    def forward(self, s: Tensor) -> Tensor:
        return self.model(s.flatten(1))


class UnitGenerator(nn.Module):
    """UNIT's encoder E and decoder G of one domain.

    H and W of the images must be multiples of 2^n_downsample to come back unchanged. checkpointed: the decoder's
    activations are computed again in the backward pass, which saves memory.
    """

    def __init__(self, input_dim: int = 3, dim: int = 64, n_downsample: int = 2, n_res: int = 4, activ: str = "relu",
                 pad_type: str = "reflect", checkpointed: bool = False):
        super().__init__()
        self.enc = ContentEncoder(n_downsample, n_res, input_dim, dim, "in", activ, pad_type)
        self.dec = Decoder(n_downsample, n_res, self.enc.dim, input_dim, "in", activ, pad_type)
        self.checkpointed, self.stride = checkpointed, 2 ** n_downsample

    def encode(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> the mean h of the latent code."""
        return self.enc(x)

    def decode(self, z: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return recompute(self.dec, z, use_reentrant=False)
        return self.dec(z)


class MunitGenerator(nn.Module):
    """MUNIT's encoders E^c and E^s and decoder G of one domain; see UnitGenerator for sizes and ``checkpointed``."""

    def __init__(self, input_dim: int = 3, dim: int = 64, n_downsample: int = 2, n_res: int = 4, activ: str = "relu",
                 pad_type: str = "reflect", style_dim: int = 8, mlp_dim: int = 256, checkpointed: bool = False):
        super().__init__()
        self.enc_style = StyleEncoder(4, input_dim, dim, style_dim, activ, pad_type)
        self.enc_content = ContentEncoder(n_downsample, n_res, input_dim, dim, "in", activ, pad_type)
        self.dec = Decoder(n_downsample, n_res, self.enc_content.dim, input_dim, "adain", activ, pad_type)
        self.mlp = MLP(style_dim, 4 * n_res * self.enc_content.dim, mlp_dim)
        self.style_dim, self.checkpointed, self.stride = style_dim, checkpointed, 2 ** n_downsample

    def encode(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> content c."""
        return self.enc_content(x)

    def style(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> style s [N, style_dim, 1, 1]."""
        return self.enc_style(x)

    def decode(self, c: Tensor, s: Tensor) -> Tensor:
        rows = self.mlp(s)
        if self.checkpointed and torch.is_grad_enabled():
            return recompute(self.dec, c, rows, use_reentrant=False)
        return self.dec(c, rows)


Generator = UnitGenerator | MunitGenerator


def together(net: Callable[..., Tensor], *inputs: Tensor | tuple[Tensor, ...]) -> Sequence[Tensor]:
    """``net`` of each input (a tensor, or a tuple of its arguments), in one batch where the sizes allow.

    Exact where no layer mixes the samples of a batch, as in all networks of image translation here.
    """
    rows = [x if isinstance(x, tuple) else (x,) for x in inputs]
    if len({row[0].shape[1:] for row in rows}) > 1:
        return [net(*row) for row in rows]
    return net(*map(torch.cat, zip(*rows, strict=True))).split([len(row[0]) for row in rows])


def init_weights(net: nn.Module, how: str) -> None:
    """Draw the weights of all convolutions and linear layers of ``net``, and set their biases to 0.

    how: "kaiming" (normal, fan in), "gaussian" (N(0, 0.02)), "xavier", "orthogonal", or "default" (PyTorch's).
    """
    draw = {"kaiming": nn.init.kaiming_normal_, "gaussian": lambda w: nn.init.normal_(w, 0.0, 0.02),
            "xavier": lambda w: nn.init.xavier_normal_(w, 2 ** 0.5),
            "orthogonal": lambda w: nn.init.orthogonal_(w, 2 ** 0.5)}.get(how)
    if draw is None:
        return
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            draw(module.weight)
            nn.init.zeros_(module.bias)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def is_generator(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a generator of UNIT or MUNIT."""
    return "enc.model.0.conv.weight" in weights or "enc_content.model.0.conv.weight" in weights


def build_generator(weights: Mapping[str, Tensor], activ: str = "relu", pad_type: str = "reflect",
                    source: str | Path = "the checkpoint") -> Generator:
    """The generator of a state dict, its sizes read off the weights, with them loaded. Raises UserError.

    activ, pad_type: what cannot be read off (the release's configurations all have these defaults).
    """
    if not is_generator(weights):
        raise UserError(f"{source}: no generator of UNIT or MUNIT (it starts with {', '.join(list(weights)[:3])}): is "
                        "it of another method?")
    munit = "enc_content.model.0.conv.weight" in weights
    stem = "enc_content" if munit else "enc"
    n_downsample = sum(f"{stem}.model.{i}.conv.weight" in weights for i in range(1, 10))
    n_res = sum(f"{stem}.model.{n_downsample + 1}.model.{i}.model.0.conv.weight" in weights for i in range(100))
    dim, input_dim = weights[f"{stem}.model.0.conv.weight"].shape[:2]
    sizes = dict(input_dim=input_dim, dim=dim, n_downsample=n_downsample, n_res=n_res, activ=activ, pad_type=pad_type)
    if munit and "mlp.model.0.fc.weight" in weights:
        sizes["mlp_dim"], sizes["style_dim"] = weights["mlp.model.0.fc.weight"].shape
    net = (MunitGenerator if munit else UnitGenerator)(**sizes)
    load_released(net, weights, source, "Files of UNIT's first release (version_02) are of another network")
    return net


def load_released(net: nn.Module, weights: Mapping[str, Tensor], source: str | Path, hint: str = "") -> None:
    """Load a state dict of any PyTorch version; statistics of norms that have none are dropped. Raises UserError."""
    own = net.state_dict()

    def unused(key: str) -> bool:
        return key.rpartition(".")[2] in STATISTICS

    weights = {k: v for k, v in weights.items() if k in own or not unused(k)}
    wrong = [f"{k} is missing" for k in own if k not in weights and not unused(k)]
    wrong += [f"{k} is unknown" for k in weights if k not in own]
    wrong += [f"{k} is {list(v.shape)}, not {list(own[k].shape)}" for k, v in weights.items()
              if k in own and v.shape != own[k].shape]
    if wrong:
        raise UserError(f"{source} does not fit the network: {'; '.join(wrong[:3])}{'; ...' * (len(wrong) > 3)} "
                        f"({len(wrong)} tensors). {hint}".rstrip())
    net.load_state_dict(weights, strict=False)


def read_pair(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """({"a": state dict, "b": state dict}, meta) of a gen_%08d.pt or dis_%08d.pt, ours or the release's.

    meta is {} for the release's. Raises UserError where the file is of another kind.
    """
    pair = checkpoint.load(path)
    if not isinstance(pair, Mapping) or not all(isinstance(pair.get(d), Mapping) for d in "ab"):
        raise UserError(f"{path} does not hold the two networks a and b of UNIT or MUNIT: is it a gen_%08d.pt?")
    meta = dict(getattr(pair["a"], "segadapt", {}))
    return {d: {k.removeprefix("module."): v for k, v in pair[d].items()} for d in "ab"}, meta


def load_pair(nets: Mapping[str, nn.Module], path: str | Path) -> None:
    """Fill the networks {"a": .., "b": ..} from such a file. Raises UserError where they do not fit."""
    pair, _ = read_pair(path)
    for d, net in nets.items():
        load_released(net, pair[d], f"{path} ({d})", "Is it of another --trainer or other sizes?")


def save_pair(nets: Mapping[str, nn.Module], path: Path, meta: Mapping[str, object]) -> None:
    """Write such a file; ``meta`` travels with the network a."""
    pair = {d: OrderedDict((k, v.detach().cpu()) for k, v in net.state_dict().items()) for d, net in nets.items()}
    pair["a"].segadapt = dict(meta)
    checkpoint.save(pair, path)


# --- perceptual loss --------------------------------------------------------------------------------------------------


class Vgg16Features(nn.Module):
    """Images in -1..1 -> features relu5_3 [N, 512, H / 8, W / 8]: three poolings, none after conv4_3.

    pixels: what the weights expect, "caffe" or "imagenet". The network is frozen and always in eval mode.
    """

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, pixels: str = "caffe"):
        super().__init__()
        c_in = 3
        for stage, widths in enumerate(self.WIDTHS, 1):
            for n, width in enumerate(widths, 1):
                self.add_module(f"conv{stage}_{n}", nn.Conv2d(c_in, width, 3, padding=1))
                c_in = width
        bgr_mean, rgb = (103.939, 116.779, 123.68), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        mean, std = (bgr_mean, (1.0, 1.0, 1.0)) if pixels == "caffe" else rgb
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64).view(3, 1, 1), persistent=False)
        self.pixels = pixels
        self.requires_grad_(False)

    def preprocess(self, x: Tensor) -> Tensor:
        x = (x.flip(1) + 1) * 127.5 if self.pixels == "caffe" else (x + 1) / 2
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.preprocess(x)
        for stage, widths in enumerate(self.WIDTHS, 1):
            for n in range(1, len(widths) + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{n}")(x), inplace=True)
            if stage <= 3:
                x = F.max_pool2d(x, 2, 2)
        return x


def load_vgg16(weights: str) -> Vgg16Features:
    """VGG-16 from "imagenet" (torchvision's weights, fetched once) or a file. Raises UserError.

    A file has torchvision's keys (features.0.weight, ..; its pixel scale) or Caffe's (conv1_1.weight, ..).
    """
    found, _ = checkpoint.initial_weights(weights, "vgg16")
    net = Vgg16Features("caffe" if "conv1_1.weight" in found else "imagenet")
    if "conv1_1.weight" not in found:  # torchvision numbers all layers: the convolutions are in the same order
        numbers = sorted({int(k.split(".")[1]) for k in found if k.startswith("features.")})
        names = [name for name, _ in net.named_children()]
        renamed = zip(numbers, names, strict=False)
        found = {f"{name}.{kind}": found.get(f"features.{number}.{kind}", torch.empty(0))
                 for number, name in renamed for kind in ("weight", "bias")}
    load_released(net, {k: v for k, v in found.items() if k.startswith("conv")}, weights)
    return net
