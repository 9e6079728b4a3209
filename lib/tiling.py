"""Translators over tiles of an image, with the result of the whole image and a fraction of its memory.

The networks of lib.models.cyclegan and lib.models.translation are convolutions, norms over the whole image and
pointwise functions. A tile is computed from its neighbourhood (the halo that its convolutions reach into); every norm
takes its mean and variance over all tiles. What is too large to keep, the activations at full and half resolution, is
computed again for each norm that follows; what is kept is never larger than the bottleneck's activation.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.models.cyclegan import InstanceNorm, ResizeConv, ResnetBlock
from lib.models.translation import AdaptiveInstanceNorm, ConvBlock, LayerNorm, ResBlock, ResBlocks
from lib.runtime import as_float32

Span = tuple[int, int]  # first and one past the last row, or column

# --- layers: what input an output span needs, and the output of a tile ----------------------------------------------


class Convolution:
    """A convolution with its padding, by zeros, reflection or repetition, which acts at the image's border only."""

    def __init__(self, conv: nn.Conv2d, padding: int | None = None, mode: str | None = None):
        self.weight, self.bias, self.channels = conv.weight, conv.bias, conv.out_channels
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.padding = conv.padding[0] if padding is None else padding
        self.mode = {"zeros": "constant"}.get(mode := mode or conv.padding_mode, mode)

    def size(self, n: int) -> int:
        return (n + 2 * self.padding - self.kernel) // self.stride + 1

    def _reach(self, span: Span) -> Span:
        """The input span in coordinates that may leave the image."""
        return span[0] * self.stride - self.padding, (span[1] - 1) * self.stride - self.padding + self.kernel

    def needs(self, span: Span, n: int) -> Span:
        first, last = self._reach(span)
        first, last = max(first, 0), min(last, n)
        if self.mode == "reflect":  # what is reflected at the border must be there
            first, last = min(first, max(0, n - self.padding - 1)), max(last, min(n, self.padding + 1))
        return first, last

    def __call__(self, x: Tensor, spans: Sequence[Span], inputs: Sequence[Span], sizes: Sequence[int]) -> Tensor:
        pads, cuts = [], []
        for span, (first, _), n in zip(spans, inputs, sizes, strict=True):
            low, high = self._reach(span)
            pads.insert(0, (max(0, -low), max(0, high - n)))
            cuts.append(slice(max(low, 0) - first, min(high, n) - first))
        grown = F.pad(x, [p for pair in pads for p in pair], mode=self.mode)
        # reflection may have taken more of the input than the convolution reads
        extent = [slice(cut.start, cut.stop + sum(pad)) for cut, pad in zip(cuts, reversed(pads), strict=True)]
        return F.conv2d(grown[:, :, extent[0], extent[1]], self.weight, self.bias, self.stride)


class TransposedConvolution:
    """3x3, stride 2, padding 1, output padding 1: output 2 i - 1 + k takes input i through the kernel's place k."""

    def __init__(self, conv: nn.ConvTranspose2d):
        self.weight, self.bias, self.channels = conv.weight, conv.bias, conv.out_channels

    def size(self, n: int) -> int:
        return 2 * n

    def needs(self, span: Span, n: int) -> Span:
        return span[0] // 2, min(span[1] // 2 + 1, n)

    def __call__(self, x: Tensor, spans: Sequence[Span], inputs: Sequence[Span], sizes: Sequence[int]) -> Tensor:
        y = F.conv_transpose2d(x, self.weight, self.bias, stride=2)
        (top, left), (h, w) = ([s[0] - (2 * i[0] - 1) for s, i in zip(spans, inputs, strict=True)],
                               [s[1] - s[0] for s in spans])
        return y[:, :, top:top + h, left:left + w]


class Upsample:
    """Twice the size by nearest neighbours."""

    channels = None

    def size(self, n: int) -> int:
        return 2 * n

    def needs(self, span: Span, n: int) -> Span:
        return span[0] // 2, (span[1] + 1) // 2

    def __call__(self, x: Tensor, spans: Sequence[Span], inputs: Sequence[Span], sizes: Sequence[int]) -> Tensor:
        (a, b), (c, d) = ((s[0] - 2 * i[0], s[1] - 2 * i[0]) for s, i in zip(spans, inputs, strict=True))
        return F.interpolate(x, scale_factor=2, mode="nearest")[:, :, a:b, c:d]


class Pointwise:
    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


class Norm:
    """x * scale + shift a channel; both follow from the sums of x and x^2 over the whole image."""

    def __init__(self, kind: str, eps: float, weight: Tensor | None = None, bias: Tensor | None = None):
        self.kind, self.eps, self.weight, self.bias = kind, eps, weight, bias
        self.scale = self.shift = None

    def learn(self, sums: Tensor, squares: Tensor, count: int) -> None:
        """sums, squares: float64 [C]; count: pixels."""
        if self.kind == "layer":  # over C, H, W, unbiased, eps beside the deviation
            n = count * len(sums)
            mean = sums.sum() / n
            scale = 1 / (((squares.sum() - n * mean ** 2) / (n - 1)).clamp(min=0).sqrt() + self.eps)
        else:
            mean = sums / count
            scale = 1 / ((squares / count - mean ** 2).clamp(min=0) + self.eps).sqrt()
        scale = scale * (1 if self.weight is None else self.weight.double())
        shift = (0 if self.bias is None else self.bias.double()) - mean * scale
        self.scale, self.shift = (v.expand(len(sums)).view(-1, 1, 1) for v in (scale, shift))

    def __call__(self, x: Tensor) -> Tensor:
        """In float32 at least, and in place where x is."""
        y = as_float32(x)
        return y.mul_(self.scale.to(y.dtype)).add_(self.shift.to(y.dtype)).to(x.dtype)


class Residual:
    """x + layers(x)"""

    def __init__(self, layers: list):
        self.layers = layers


Layers = list[Convolution | TransposedConvolution | Upsample | Pointwise | Norm | Residual]


def layers_of(module: nn.Module, row: Tensor | None = None) -> Layers:
    """A module's layers in order. row: [1, 2 C, ...], bias then weight of the adaptive norms in it."""
    if isinstance(module, ResnetBlock):
        return [Residual(layers_of(module.conv_block))]
    if isinstance(module, ResBlock):
        rows = (None, None) if row is None else row.chunk(2, dim=1)
        return [Residual([x for m, r in zip(module.model, rows, strict=True) for x in layers_of(m, r)])]
    if isinstance(module, ResBlocks):
        rows = [None] * len(module.model) if row is None else row.chunk(len(module.model), dim=1)
        return [x for m, r in zip(module.model, rows, strict=True) for x in layers_of(m, r)]
    if isinstance(module, ConvBlock):
        norm = [] if module.norm is None else layers_of(module.norm, row)
        return [Convolution(module.conv), *norm, *layers_of(module.activ)]
    if isinstance(module, nn.Sequential):
        found, padding = [], None
        for child in module:
            if isinstance(child, nn.ReflectionPad2d):
                padding = child.padding[0]
            elif padding is not None:
                found.append(Convolution(child, padding, "reflect"))
                padding = None
            else:
                found += layers_of(child, row)
        return found
    if isinstance(module, ResizeConv):
        return [Upsample(), Convolution(module)]
    if isinstance(module, nn.Upsample):
        return [Upsample()]
    if isinstance(module, nn.ConvTranspose2d):
        return [TransposedConvolution(module)]
    if isinstance(module, nn.Conv2d):
        return [Convolution(module)]
    if isinstance(module, (InstanceNorm, nn.InstanceNorm2d)):
        return [Norm("instance", 1e-5)]
    if isinstance(module, AdaptiveInstanceNorm):
        bias, weight = row[0].chunk(2)
        return [Norm("instance", module.eps, weight, bias)]
    if isinstance(module, LayerNorm):
        return [Norm("layer", module.eps, module.gamma, module.beta)]
    if isinstance(module, (nn.ReLU, nn.LeakyReLU, nn.SELU, nn.Tanh, nn.Identity)):
        return [Pointwise(module)]
    raise TypeError(f"no tiled form of {type(module).__name__}")


# --- running them ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def apply(layers: Layers, x: Tensor, tile: int) -> Tensor:
    """layers(x) for one image [1, C, H, W]; tile: the side of a tile, in pixels of the image.

    x is overwritten where it is no longer needed.
    """
    bottleneck = _smallest_kept(layers, x)
    return _apply(layers, x, tile / max(x.shape[2:]), bottleneck)


def _smallest_kept(layers: Layers, x: Tensor) -> int:
    """Numbers in the input of the first residual block, or in the last layer's output where there is none."""
    channels, (h, w) = x.shape[1], x.shape[2:]
    for layer in layers:
        if isinstance(layer, Residual):
            break
        if _moves(layer):
            channels, h, w = layer.channels or channels, layer.size(h), layer.size(w)
    return channels * h * w


def _moves(layer: object) -> bool:
    return not isinstance(layer, (Pointwise, Norm, Residual))


def _apply(layers: Layers, x: Tensor, share: float, keep: int) -> Tensor:
    """share: of the image's longer side that a tile has; keep: how many numbers may be kept at once."""
    layers = list(layers)
    while layers:
        if isinstance(layers[0], Residual):
            x = _apply(layers.pop(0).layers, x, share, keep).add_(x)
        elif isinstance(layers[0], Norm):
            norm = layers.pop(0)
            norm.learn(*_sums(x), x[0, 0].numel())
            x = norm(x)
        elif isinstance(layers[0], Pointwise):
            x = layers.pop(0)(x)
        else:
            count = _segment(layers, x, keep)
            x = _run_segment(layers[:count], x, share)
            layers = layers[count:]
    return x


def _segment(layers: Layers, x: Tensor, keep: int) -> int:
    """How many layers follow until an output that is kept."""
    channels, (h, w) = x.shape[1], x.shape[2:]
    last = 0
    for count, layer in enumerate(layers, 1):
        if isinstance(layer, Residual):
            break
        if _moves(layer):
            channels, h, w = layer.channels or channels, layer.size(h), layer.size(w)
            last = count
            if channels * h * w <= keep and not isinstance(layer, Upsample):
                break
    return last


def _run_segment(layers: Layers, x: Tensor, share: float) -> Tensor:
    """The last layer's output, kept whole. Before, one pass over all tiles for each norm inside."""
    for count, layer in enumerate(layers):
        if isinstance(layer, Norm):
            totals, pixels = 0, 0
            for _, y in _tiles(layers[:count], x, share):
                totals = totals + torch.stack(_sums(y))
                pixels += y[0, 0].numel()
            layer.learn(*totals, pixels)
    out = None
    for (rows, cols, size), y in _tiles(layers, x, share):
        if out is None:
            out = y.new_empty(1, y.shape[1], *size)
        out[:, :, slice(*rows), slice(*cols)] = y
    return out


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x and x^2 over the pixels, float64 [C]; a channel at a time, which needs no large copy."""
    return (torch.stack([c.sum(dtype=torch.float64) for c in x[0]]),
            torch.stack([c.double().square_().sum() for c in x[0]]))


def _tiles(layers: Layers, x: Tensor, share: float) -> Iterator[tuple[tuple[Span, Span, tuple[int, int]], Tensor]]:
    """((rows, columns, (height, width) of the whole), output) of each tile of the last layer's output."""
    moving = [layer for layer in layers if _moves(layer)]
    sizes = [tuple(x.shape[2:])]
    for layer in moving:
        sizes.append(tuple(layer.size(n) for n in sizes[-1]))
    height, width = sizes[-1]
    side = max(8, round(share * max(height, width)))
    for top in range(0, height, side):
        for left in range(0, width, side):
            spans = [((top, min(top + side, height)), (left, min(left + side, width)))]
            for layer, size in zip(reversed(moving), reversed(sizes[:-1]), strict=True):
                spans.insert(0, tuple(layer.needs(s, n) for s, n in zip(spans[0], size, strict=True)))
            y = x[:, :, slice(*spans[0][0]), slice(*spans[0][1])]
            at = 0
            for layer in layers:
                if _moves(layer):
                    y = layer(y, spans[at + 1], spans[at], sizes[at])
                    at += 1
                else:
                    y = layer(y)
            yield (*spans[-1], sizes[-1]), y
