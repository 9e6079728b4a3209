"""lib/tiling.py: the translators over tiles equal the whole image."""
import pytest
import torch

from lib import tiling
from lib.models.cyclegan import ResnetGenerator
from lib.models.translation import MunitGenerator, UnitGenerator


def cyclegan(**named):
    net = ResnetGenerator(8, 2, **named)
    return net, lambda: tiling.layers_of(net.model)


def munit(pad_type: str):
    net = MunitGenerator(dim=8, n_res=2, mlp_dim=16, pad_type=pad_type)
    style = torch.randn(1, 8, 1, 1)
    return (lambda x: net.decode(net.encode(x), style)), lambda: [
        *tiling.layers_of(net.enc_content.model), *tiling.layers_of(net.dec.model, net.mlp(style))]


def unit():
    net = UnitGenerator(dim=8, n_res=2)
    return (lambda x: net.decode(net.encode(x))), lambda: [*tiling.layers_of(net.enc.model),
                                                           *tiling.layers_of(net.dec.model)]


NETWORKS = {"CycleGAN": cyclegan, "SPGAN": lambda: cyclegan(bias=False),
            "resize": lambda: cyclegan(upsample="resize"), "MUNIT": lambda: munit("reflect"),
            "zero padding": lambda: munit("zero"), "replicate": lambda: munit("replicate"), "UNIT": unit}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_tiles_equal_the_whole_image(name):
    torch.manual_seed(0)
    net, layers = NETWORKS[name]()
    for height, width in ((64, 64), (72, 132), (100, 68)):
        x = torch.rand(1, 3, height, width) * 2 - 1
        whole = net(x)
        for tile in (16, 24, 50, 200):
            tiled = tiling.apply(layers(), x.clone(), tile)
            assert tiled.shape == whole.shape
            assert (tiled - whole).abs().max() <= 1e-5, (height, width, tile)


@torch.no_grad()
def test_single_tiles_would_differ():
    """What the statistics over all tiles are for: a tile translated alone has other colours."""
    torch.manual_seed(0)
    net, _ = cyclegan()
    x = torch.rand(1, 3, 64, 128) * 2 - 1
    x[..., 64:] *= 0.2
    assert (net(x)[..., :32] - net(x[..., :64])[..., :32]).abs().max() > 0.05


@torch.no_grad()
def test_only_the_bottleneck_is_kept_whole(monkeypatch):
    """No tensor is larger than the bottleneck's activation or the image, which is what the first layer's never is."""
    net, layers = cyclegan()
    x = torch.rand(1, 3, 256, 256)
    largest = 0

    def watched(module):
        original = module.__call__

        def call(self, y, *rest):
            nonlocal largest
            out = original(self, y, *rest)
            largest = max(largest, out.numel())
            return out
        monkeypatch.setattr(module, "__call__", call)

    for kind in (tiling.Convolution, tiling.TransposedConvolution, tiling.Norm, tiling.Pointwise):
        watched(kind)
    tiling.apply(layers(), x, 64)
    assert largest <= max(32 * 64 * 64, 3 * 256 * 256) < 8 * 256 * 256


def test_a_module_that_has_no_tiled_form():
    with pytest.raises(TypeError, match="no tiled form of Linear"):
        tiling.layers_of(torch.nn.Linear(2, 2))
