"""lib/predict.py: folded batch norm, averages over flips and scales, label maps at the size of the file, scores."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lib import ops, predict
from lib.datasets.description import Domain, load_description
from lib.datasets.folder import ImageFolder
from lib.datasets.transforms import Augment, to_tensor
from lib.demo.streets import render_demo
from lib.errors import UserError
from lib.metrics import confusion_matrix
from lib.models.deeplab import build, logits_of
from lib.runtime import Run

RUN = Run(torch.device("cpu"), 0, 1, "off")
SIZE = (48, 32)  # width, height


@pytest.fixture(autouse=True)
def reference_kernels():
    mode = ops.use("reference")
    yield
    ops.use(mode)


def network(model: str = "Deeplab", arch: str = "resnet18", classes: int = 5, dtype=torch.float64):
    """A network whose BN statistics and affine parameters are none of the defaults, with logits of order 1."""
    torch.manual_seed(3)
    net = build(model, classes, arch).to(dtype)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return net.eval()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("predict") / "demo"
    return render_demo(root, seed=2, size=(64, 48), n_source=1, n_target=3, n_val=3)


@pytest.fixture(scope="module")
def images(demo) -> list[Path]:
    return sorted((demo / "cityscapes/leftImg8bit/val").rglob("*.png"))


@pytest.mark.parametrize("model, arch", [("DeeplabMulti", "resnet18"), ("Deeplab", "resnet50")])
@torch.no_grad()
def test_folding_batch_norm_changes_nothing(model, arch):
    net = network(model, arch)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    folded = predict.fold_bn(net.train())
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)], "every layer has its convolution"
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the network itself stays as it was"
    assert net.training and not folded.training
    x = torch.randn(2, 3, 33, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net.eval()
    ours, theirs = folded(x), net(x)
    for a, b in zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]:
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_a_network_without_batch_norm_folds_too():
    with torch.device("meta"):
        vgg = build("DeeplabVGG", 3)
    assert predict.fold_bn(vgg).state_dict().keys() == vgg.state_dict().keys()
    with pytest.raises(UserError, match="no batch normalisation"):
        predict.reestimate_bn(vgg, [], SIZE, "caffe", RUN)


def test_prepared_networks_predict_the_same(images):
    net = network(dtype=torch.float32)
    x = to_tensor(Image.open(images[0]), "caffe") / 50
    plain = predict.predict(net, [x], (64, 48), RUN)
    assert torch.equal(predict.predict(predict.prepare(net), [x], (64, 48), RUN), plain)
    half = predict.predict(predict.prepare(net, torch.bfloat16), [x], (64, 48), RUN)
    assert (half == plain).float().mean() > 0.9 and half.dtype == torch.uint8
    assert len(plain.unique()) > 1, "the test would see a difference"


@torch.no_grad()
def test_reestimated_statistics_are_plain_averages(images):
    """Of each batch-norm layer's input, image by image: mean of the means, mean of the unbiased variances."""
    net = network("DeeplabMulti", dtype=torch.float32)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    estimated = predict.reestimate_bn(net, images, SIZE, "imagenet", RUN)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the network itself stays as it was"
    assert not any(m.training for m in estimated.modules())

    inputs: dict[str, list[torch.Tensor]] = {}
    plain = network("DeeplabMulti", dtype=torch.float32).train()  # in train mode layers see batch statistics
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].double()))
    for path in images:
        plain(to_tensor(Image.open(path).resize(SIZE, Image.BICUBIC), "imagenet")[None])
    assert inputs
    state = estimated.state_dict()
    for name, xs in inputs.items():
        mean = torch.stack([x.mean((0, 2, 3)) for x in xs]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in xs]).mean(0)
        torch.testing.assert_close(state[f"{name}.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state[f"{name}.running_var"].double(), var, rtol=1e-4, atol=1e-6)
    changed = {k for k, v in state.items() if not torch.equal(v, before[k])}
    assert changed and all(k.endswith(("running_mean", "running_var", "num_batches_tracked")) for k in changed)


def upsampled(net, x, size, flip=False):
    x = x[None]
    scores = logits_of(net(x))
    if flip:
        scores = (scores + logits_of(net(x.flip(3))).flip(3)) / 2
    return F.interpolate(scores, size[::-1], mode="bilinear", align_corners=True)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [[1.0], [0.75, 1.0, 1.25]])
@torch.no_grad()
def test_logits_are_averaged_over_scales_and_mirrored_images(images, flip, scales):
    net, size = network("DeeplabMulti", dtype=torch.float32), (64, 48)
    views = predict.ViewSet(images, SIZE, "imagenet", scales)[1]
    assert [t.shape[1:] for t in views.tensors] == [(round(32 * s), round(48 * s)) for s in scales]
    logits = torch.stack([upsampled(net, x, size, flip) for x in views.tensors]).mean(0)
    expected = logits.argmax(1)[0].to(torch.uint8)
    ours = predict.predict(net, views.tensors, size, RUN, flip=flip)
    assert ours.shape == (48, 64) and ours.dtype == torch.uint8
    top = logits[0].topk(2, dim=0).values
    assert torch.equal(ours[top[0] - top[1] > 1e-5], expected[top[0] - top[1] > 1e-5])
    if flip:
        assert not torch.equal(ours, predict.predict(net, views.tensors, size, RUN)), "the mirrored image counts"
    if len(scales) > 1:
        assert not torch.equal(ours, predict.predict(net, views.tensors[1:2], size, RUN)), "the other scales count"


def test_views():
    path = Path(__file__).parent / "no_such.png"
    with pytest.raises(UserError, match=r"no_such\.png: no such file"):
        predict.ViewSet([path], SIZE, "caffe")[0]


def test_a_height_alone_keeps_the_proportions(tmp_path):
    Image.new("RGB", (81, 37)).save(tmp_path / "a.png")
    assert predict.ViewSet([tmp_path / "a.png"], 48, "caffe")[0].tensors[0].shape == (3, 48, round(81 * 48 / 37))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*worker processes.*")
def test_predictions_have_the_size_of_their_file(tmp_path, workers):
    sizes = [(64, 48), (31, 77), (1, 1), (200, 9)]
    paths = [tmp_path / f"{n}.png" for n in range(len(sizes))]
    for n, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        rng = np.random.default_rng(n)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    net = predict.prepare(network(dtype=torch.float32))
    results = list(predict.predictions(net, predict.ViewSet(paths, SIZE, "caffe"), RUN, workers=workers))
    assert [r[0] for r in results] == [0, 1, 2, 3]
    for (_, image, label), path, size in zip(results, paths, sizes, strict=True):
        assert np.array_equal(image, Image.open(path)) and label.shape == size[::-1] and label.dtype == np.uint8


def test_processes_share_the_images(images):
    net, views = network(dtype=torch.float32), predict.ViewSet(images, SIZE, "caffe")
    shares = [[r[0] for r in predict.predictions(net, views, Run(torch.device("cpu"), rank, 2, "off"), share=True)]
              for rank in range(2)]
    assert shares == [[0, 2], [1]]


def test_the_score_is_that_of_the_saved_predictions(demo, images, tmp_path):
    description = load_description("demo")
    net = network("DeeplabMulti", classes=len(description.classes), dtype=torch.float32).train()
    dataset = ImageFolder(Domain.open(description, demo / "cityscapes", "val"), description.classes,
                          Augment(SIZE, "imagenet"))
    for n, _, label in predict.predictions(predict.prepare(net), predict.ViewSet(images, SIZE, "imagenet"), RUN):
        Image.fromarray(label).save(tmp_path / f"{n}.png")
    expected = np.zeros((14, 14), np.int64)
    for n in range(len(images)):
        predicted = np.asarray(Image.open(tmp_path / f"{n}.png"))
        expected += confusion_matrix(dataset.truth(n), predicted, 14, 255)
    ours = predict.score(net, dataset, SIZE, "imagenet", RUN)
    assert np.array_equal(ours, expected) and ours.dtype == np.int64
    labelled = sum(int((dataset.truth(n) != 255).sum()) for n in range(len(images)))
    assert ours.sum() == labelled and (ours.sum(0) > 0).sum() > 1
    assert net.training, "scoring leaves the network in the mode it was"
