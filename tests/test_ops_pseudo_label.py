"""Label maps and class-balanced pseudo-labels: compiled operators against the reference, both against the definition."""
import pytest
import torch
import torch.nn.functional as F

from lib import ops

BACKENDS = ["reference", "compiled"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs a test with both implementations."""
    before = ops._state["mode"]
    if request.param == "compiled" and ops._load():
        pytest.skip(f"not compiled: {ops._load()}")
    ops.use(request.param)
    yield request.param
    ops.use(before)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape,size", [((19, 33, 65), (256, 512)), ((5, 33, 33), (100, 130)), ((3, 30, 20), (217, 23)),
                                        ((4, 100, 300), (64, 128)), ((255, 4, 4), (70, 90)), ((1, 5, 5), (100, 100)),
                                        ((7, 20, 30), (20, 130)), ((6, 1, 1), (90, 41)), ((6, 17, 300), (1, 300))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_upsample_argmax_equals_interpolate_then_argmax(backend, shape, size, align_corners, dtype):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.float() if dtype == torch.bfloat16 else x
    expected = F.interpolate(wide, size, mode="bilinear", align_corners=align_corners).argmax(1)
    label = ops.upsample_argmax(x, size, align_corners)
    assert label.dtype == torch.uint8 and torch.equal(label, expected.to(torch.uint8))
    assert torch.equal(ops.upsample_argmax(x[0], size, align_corners), label[0])


def test_upsample_argmax_ties_memory_formats_and_full_size(backend):
    x = torch.randint(0, 3, (2, 19, 40, 100), generator=torch.Generator().manual_seed(0)).float()  # many exact ties
    expected = x.argmax(1).to(torch.uint8)
    assert torch.equal(ops.upsample_argmax(x), expected)
    assert torch.equal(ops.upsample_argmax(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(ops.upsample_argmax(x.transpose(2, 3)).transpose(1, 2), expected)
    assert ops.upsample_argmax(x[:0], (8, 8)).shape == (0, 8, 8)
    assert ops.upsample_argmax(torch.zeros(3, 5, 5), (100, 100)).eq(0).all()


def test_upsample_argmax_rejects_what_it_cannot_do(backend):
    with pytest.raises(ValueError, match="classes"):
        ops.upsample_argmax(torch.zeros(256, 4, 4), (8, 8))
    with pytest.raises(ValueError, match="expected floating"):
        ops.upsample_argmax(torch.zeros(4, 4), (8, 8))
    with pytest.raises(ValueError, match="expected floating"):
        ops.upsample_argmax(torch.zeros(3, 4, 4, dtype=torch.long), (8, 8))
    with pytest.raises(ValueError, match="size"):
        ops.upsample_argmax(torch.zeros(3, 4, 4), (0, 8))
    for bad in (float("nan"), float("inf"), float("-inf")):
        for size in ((4, 400), (16, 400)):
            x = torch.zeros(3, 4, 400)
            x[1, 2, 3] = bad
            with pytest.raises(ValueError, match="NaN or infinite"):
                ops.upsample_argmax(x, size)
