"""train_gan_da.py as its user runs it: every variant, what it writes, and every way it can be stopped."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import (
    ROOT,
    execute,
    logged,
    message,
    training,
)

import evaluate
import train_gan_da as script
from lib import checkpoint
from lib.errors import UserError
from lib.models.fcn8s import CONVOLUTIONS, FCN8s, from_vgg16
from lib.runtime import Run

SCRIPT = "train_gan_da.py"
LOSSES = ["loss_D", "loss_G", "loss_F", "loss_seg", "loss_l1"]
RUN = Run(torch.device("cpu"), 0, 1, "off")


def gan(pair: Path, folder: Path, *more: str) -> list[str]:
    """Arguments for a few steps of networks a 32nd as wide as the published ones."""
    return training(pair, folder, "--width", "0.03125", "--padding", "same", "--lr", "1e-3", *more)


@pytest.fixture
def here(pair, folder, in_this_process):
    """Runs the script in this process: a start of Python costs more than a few steps."""
    def run(*more: str, to: Path = folder) -> dict[str, torch.Tensor]:
        assert script.main(gan(pair, to, *more)) == 0
        return checkpoint.read_weights(to / "resume.pth")[0]

    return run


# --- variants -----------------------------------------------------------------------------------------------------

VARIANTS = {
    "released padding": (["--padding", "released"], LOSSES),
    "means, all gradients before the steps": (["--reduction", "mean", "--order", "gradients_before_steps"], LOSSES),
    "the release's order, SGD": (["--order", "released", "--optimizer", "SGD", "--lr", "1e-6"], LOSSES),
    "low memory, batch, augmentation": (["--low-memory", "--batchSize", "2", "--random-scale", "--random-mirror"],
                                        LOSSES),
    "source only": (["--method", "sourceonly"], ["loss_seg"]),
    "DeepLab": (["--base", "deeplab"], LOSSES),
    "bf16": (["--amp", "bf16"], LOSSES),
    "fp16": (["--amp", "fp16"], LOSSES),
    "other choices": (["--pixels", "imagenet", "--deterministic", "--ignore-label", "30", "--num-classes", "14",
                       "--lr-epochs", "0"], LOSSES),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps(here, folder, variant):
    flags, losses = VARIANTS[variant]
    here(*flags)
    lines = logged(folder, "loss_seg")
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert list(line) == ["iteration", *losses, "lr"]
        assert all(0 < line[k] < 1e5 for k in losses)
    scores, = logged(folder, "mIoU")
    assert scores.keys() - {"warnings"} == {"iteration", "mIoU", "best_mIoU", "layout_distance"}
    networks = {"GTA5_2.pth", "GTA5_2_G.pth", "GTA5_2_D.pth"} if len(losses) > 1 else {"GTA5_2.pth"}
    assert {p.name for p in folder.iterdir()} == {*networks, "best.pth", "resume.pth", "log.jsonl"}


def test_what_a_run_writes_and_prints(pair, folder):
    done = execute(SCRIPT, *gan(pair, folder, "--num_iters", "3", "--save-pred-every", "2", "--interval_validate", "1",
                                "--save-num-images", "2", "--log-every", "2", "--crop-size", "40,24"))
    assert {p.name for p in folder.iterdir()} == {
        "best.pth", "resume.pth", "log.jsonl", "pictures", "reconstructions",
        *(f"GTA5_{i}{suffix}.pth" for i in (2, 3) for suffix in ("", "_D", "_G"))}
    for kind in ("pictures", "reconstructions"):
        assert sorted(p.name for p in (folder / kind).iterdir()) == ["1.png", "2.png", "3.png"]
    assert Image.open(folder / "reconstructions/3.png").size[0] == 4 * 196 - 4
    scores = logged(folder, "mIoU")
    assert [line["iteration"] for line in scores] == [1, 2, 3]
    best = max(scores, key=lambda line: line["mIoU"])
    assert scores[-1]["best_mIoU"] == best["mIoU"]
    assert checkpoint.read_weights(folder / "best.pth")[1]["mIoU"] == best["mIoU"]
    weights, meta = checkpoint.read_weights(folder / "GTA5_3.pth")
    assert (meta["iteration"], meta["pixels"], meta["width"], len(meta["classes"])) == (3, "caffe", 1 / 32, 14)
    FCN8s(14, 1 / 32).load_state_dict(weights)
    script.Discriminator(14, 1 / 32).load_state_dict(torch.load(folder / "GTA5_3_D.pth"))
    for fact in ("device      cpu, 1 thread", "precision   float32", "kernels     reference", "none, random weights",
                 "fcn8s vgg16, 14 classes", "width 0.03125, padding same",
                 "LSD, order recomputed, sum, weights l1 1, adv 0.1, c 0.1",
                 "5 images of gta5 at (64, 48), crops (40, 24)", "4 images of demo", "2 images of demo",
                 "1 pairs a step = 1 x 1 processes", "iter =        2/       3, loss_D = ", "it/s", "GiB",
                 f"last {scores[-1]['mIoU']:.2f}, best {best['mIoU']:.2f} (iteration {best['iteration']}"):
        assert fact in done.stdout, fact


@pytest.mark.parametrize("padding", ["released", "same"])
@pytest.mark.parametrize("size", ["97,131", "131,97", "75,33", "33,18", "5,3"])
def test_any_size_trains_and_evaluates(here, folder, size, padding, capsys):
    """Sizes that are no multiples of anything, portrait, and smaller than D's field of view."""
    here("--padding", padding, "--input-size", size, "--input-size-target", size, "--num-steps", "1",
         "--save-num-images", "1")
    line, = logged(folder, "loss_seg")
    assert all(np.isfinite(line[k]) for k in LOSSES)
    assert (folder / "reconstructions/1.png").exists()


@pytest.mark.parametrize("base", ["released", "same", "deeplab"])
def test_g_draws_images_of_the_input_s_size(base):
    """Every height from 17 to 82, a period of the strides and more."""
    net, make = script.build("deeplab" if base == "deeplab" else "fcn8s", 3, "resnet18", 1 / 64, base, 0.5, "caffe",
                             "1x1")
    gen, dis = make(), script.Discriminator(3, 1 / 64)
    with torch.no_grad():
        for height in range(17, 83):
            size = (height, 99 - height)
            *embedding, logits = net.eval()(torch.randn(1, 3, *size), return_features=True)
            assert base == "deeplab" or logits.shape == (1, 3, *size)
            fake = gen(embedding, size)
            assert fake.shape == (1, 3, *size) and fake.min() >= 0 and fake.max() <= 1
            assert [list(s.shape[2:]) for s in dis(fake)] == 2 * [dis.patches(size)]


# --- places: networks that let one channel through unchanged, and blocks of light at every phase of a cell ------------


@torch.no_grad()
def one_channel(net: torch.nn.Module) -> torch.nn.Module:
    """Convolutions of the first channel that keep every pixel in its place, transposed ones that spread it evenly."""
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)) and module.weight.requires_grad:
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
            if isinstance(module, torch.nn.ConvTranspose2d):
                module.weight[0, 0] = 1
            elif "conv_layer" not in name:  # of a residual block, which adds 0
                module.weight[0, 0, module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
    return net.eval()


def blocks(cell: int, size: tuple[int, int] = (160, 192), side: int = 8):
    """Images with a bright block off the centre, moved over a whole cell, and its centre in pixels."""
    for phase in range(0, cell, cell // 8):
        x, top, left = torch.zeros(1, 3, *size), size[0] // 4 + phase, size[1] // 2 + phase
        x[:, :, top:top + side, left:left + side] = 1000
        yield x, torch.tensor([top + side / 2, left + side / 2])


def centroid(image: torch.Tensor) -> torch.Tensor:
    """Of what is brighter than the background, (y, x)."""
    light = (image - image.median()).double().clamp(min=0)
    return torch.stack([(light.sum(1 - d) * (torch.arange(n) + 0.5)).sum() for d, n in enumerate(light.shape)]) \
        / light.sum()


@pytest.mark.parametrize("head, cell, tolerance", [("score_pool3", 8, 0.1), ("score_pool4", 16, 0.1),
                                                   ("score_fr", 32, 1.1)])
@pytest.mark.parametrize("padding", ["released", "same"])
@torch.no_grad()
def test_labels_lie_where_the_input_did(padding, head, cell, tolerance):
    """On average over the places in a cell; a crop that is off by some pixels moves all of them."""
    net = one_channel(FCN8s(2, 1 / 64, padding))
    for name in ("score_pool3", "score_pool4", "score_fr"):
        getattr(net, name).weight[:] = 0
    getattr(net, head).weight[1, 0] = 1
    moved = torch.stack([centroid(net(x)[0, 1]) - place for x, place in blocks(cell)])
    assert moved.abs().max() < cell / 2 and moved.mean(0).abs().max() < tolerance


@pytest.mark.parametrize("skip, cell", [(1, 16), (2, 8)])
@pytest.mark.parametrize("padding", ["released", "same"])
@torch.no_grad()
def test_drawings_lie_where_the_input_did(padding, skip, cell):
    """What G draws from pool4 or pool3 alone; the release's arithmetic moves it by less than half a cell."""
    net, make = script.build("fcn8s", 3, "", 1 / 64, padding, 0.0, "caffe", "1x1")
    net, gen = one_channel(net), one_channel(make())
    for number, stage in ((1, gen.stage2_upsample), (2, gen.stage3_upsample)):
        stage[0].weight.zero_()
        stage[0].weight[-net.channels[number] if number == skip else 0, 0] = 1
    moved = torch.stack([centroid(gen(net(x, return_features=True)[:3], x.shape[2:])[0, 0]) - place
                         for x, place in blocks(cell)])
    assert moved.mean(0).abs().max() < cell / 2


@pytest.mark.parametrize("part", range(3))
@torch.no_grad()
def test_drawings_of_the_deeplab_base_lie_where_the_input_did(part):
    """Cell (i, j) of each of its maps, which are all an eighth of the image, is around pixel (8 i, 8 j)."""
    net, make = script.build("deeplab", 3, "resnet18", 1 / 64, "same", 0.0, "caffe", "1x1")
    gen, empty = one_channel(make()), [0 * x for x in net.eval()(torch.zeros(1, 3, 160, 192), return_features=True)[:3]]
    for number, stage in ((1, gen.stage2_upsample), (2, gen.stage3_upsample)):
        stage[0].weight.zero_()
        stage[0].weight[-empty[number].shape[1] if number == part else 0, 0] = 1
    for i, j in ((6, 9), (9, 15), (13, 4)):
        embedding = [x.clone() for x in empty]
        embedding[part][0, 0, i, j] = 1000
        moved = centroid(gen(embedding, (160, 192))[0, 0]) - torch.tensor([8 * i + 0.5, 8 * j + 0.5])
        assert moved.abs().max() < 1


def test_same_padding_computes_the_released_network(pair):
    """Far from the border, the features of a large image are those of the released padding, where the grids meet."""
    torch.manual_seed(0)
    released, same = FCN8s(3, 1 / 32, "released").eval(), FCN8s(3, 1 / 32, "same").eval()
    same.load_state_dict(released.state_dict())
    x = torch.randn(1, 3, 196, 260) * 50
    with torch.no_grad():
        # conv1_1 moves the image by 99 = 13 * 8 - 5 pixels: 5 more, and it stands on the grid of pool3 as x does
        a = released.features(torch.nn.functional.pad(x, (5, 0, 5, 0)))[2]
        b = same.features(x)[2]
    torch.testing.assert_close(a[:, :, 13 + 4:13 + 20, 13 + 4:13 + 28], b[:, :, 4:20, 4:28], rtol=1e-4, atol=1e-4)


# --- the mathematics ----------------------------------------------------------------------------------------------


def tiny(dtype=torch.float64, n: int = 1):
    torch.manual_seed(0)
    net, make = script.build("fcn8s", 3, "", 1 / 64, "same", 0.0, "caffe", "1x1")
    for name in net.head_names[:3]:
        torch.nn.init.normal_(getattr(net, name).weight, 0, 0.1)
    modules = [m.to(dtype) for m in (net, make(), script.Discriminator(3, 1 / 64))]
    x_s, x_t = (torch.rand(2, n, 3, 40, 56, dtype=dtype) - 0.5) * 255
    return modules, x_s, torch.randint(0, 3, (n, 40, 56)), x_t


PUBLISHED = script.Objective(1.0, 0.1, 0.1)


def gradients(modules, x_s, y_s, x_t, o=PUBLISHED, **options):
    """(losses, gradients at each step) of an iteration that moves nothing."""
    found = {}

    def step(module):
        found.update({(id(module), k): p.grad.clone() for k, p in module.named_parameters() if p.grad is not None})
        module.zero_grad()

    losses = script.step(script.Networks(*modules, RUN), x_s, y_s, x_t, o, pixels="caffe", apply=step, **options)
    return {k: v.item() for k, v in losses.items()}, found


@pytest.mark.parametrize("options", [dict(low_memory=True), dict(order="gradients_before_steps"),
                                     dict(order="released")])
def test_without_steps_all_orders_agree(options):
    modules, *batch = tiny()
    batch[1][:, :10] = 255
    (losses, grads), (other_losses, other_grads) = gradients(modules, *batch), gradients(modules, *batch, **options)
    assert losses == pytest.approx(other_losses, rel=1e-12) and grads.keys() == other_grads.keys()
    frozen = sum(not p.requires_grad for p in modules[0].parameters())
    assert frozen == 3 and len(grads) == sum(len(list(m.parameters())) for m in modules) - frozen
    for key, grad in grads.items():
        torch.testing.assert_close(other_grads[key], grad, rtol=1e-9, atol=1e-12)


def test_mean_and_sum_differ_by_the_counts():
    """Sums over 40 x 56 pixels and 5 x 7 patches; L1 is a mean in both."""
    modules, x_s, y_s, x_t = tiny()
    y_s[:, :8] = 255
    pixels, patches = (y_s != 255).sum().item(), 5 * 7
    labelled = (script.label_for_d(y_s, (5, 7)) != 255).sum().item()
    assert labelled == 28 and script.Discriminator.patches((40, 56)) == [5, 7]
    with torch.no_grad():
        *embedding, logits = modules[0](x_s, return_features=True)
        out_s, out_c = modules[2](modules[1](embedding, (40, 56)))
        o_sum, o_mean = script.Objective(1, 1, 1), script.Objective(1, 1, 1, "mean")
        y_d = script.label_for_d(y_s, (5, 7))
        for count, name, arguments in ((pixels, "loss_seg", (logits, y_s)), (patches, "loss_domain", (out_s, 2)),
                                       (labelled, "loss_label", (out_c, y_d))):
            loss = getattr(script, name)
            assert loss(*arguments, o_sum).item() == pytest.approx(count * loss(*arguments, o_mean).item(), rel=1e-12)


def test_losses_are_divided_by_the_batch():
    """Twice the same pair is the same problem, but for L1 with sums: a mean, which the release divides once more."""
    modules, *batch = tiny()
    for reduction, l1 in (("sum", 2.0), ("mean", 1.0)):
        once = gradients(modules, *batch, script.Objective(1.0, 0.1, 0.1, reduction))
        twice = gradients(modules, *(torch.cat([b, b]) for b in batch), script.Objective(l1, 0.1, 0.1, reduction))
        assert once[0] == pytest.approx(twice[0], rel=1e-12)
        for key, grad in once[1].items():
            torch.testing.assert_close(twice[1][key], grad, rtol=1e-8, atol=1e-12)


def test_a_source_batch_without_labels():
    modules, x_s, y_s, x_t = tiny()
    for reduction in ("sum", "mean"):
        losses, grads = gradients(modules, x_s, torch.full_like(y_s, 255), x_t,
                                  script.Objective(1.0, 0.1, 0.1, reduction))
        assert losses["loss_seg"] == 0 and losses["loss_D"] > 0
        assert all(torch.isfinite(g).all() for g in grads.values())


def test_vgg16_of_torchvision_fills_fcn8s(tmp_path):
    """By shape, at full width on the meta device; by value, read from a file, for a narrow one."""
    with torch.device("meta"):
        full_width = FCN8s(2)
    shapes = {k: v.shape for k, v in full_width.state_dict().items() if k.split(".")[0] not in FCN8s.head_names}
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of torchvision's features
    state, inplanes = {}, 3
    for number, (_, channels, _) in zip(numbers, CONVOLUTIONS, strict=True):
        state[f"features.{number}.weight"] = torch.empty(channels, inplanes, 3, 3, device="meta")
        state[f"features.{number}.bias"] = torch.empty(channels, device="meta")
        inplanes = channels
    for number, shape in ((0, (4096, 25088)), (3, (4096, 4096)), (6, (1000, 4096))):
        state[f"classifier.{number}.weight"] = torch.empty(shape, device="meta")
        state[f"classifier.{number}.bias"] = torch.empty(shape[0], device="meta")
    assert {k: v.shape for k, v in from_vgg16(state).items()} == shapes

    torch.manual_seed(0)
    net = FCN8s(2, 1 / 64)
    narrow = {}
    for number, (name, *_) in zip(numbers, CONVOLUTIONS, strict=True):
        conv = getattr(net, name)
        narrow |= {f"features.{number}.weight": conv.weight.data.clone(), f"features.{number}.bias": conv.bias.data}
    for number, name in ((0, "fc6"), (3, "fc7")):
        conv = getattr(net, name)
        narrow |= {f"classifier.{number}.weight": conv.weight.data.flatten(1).clone(),
                   f"classifier.{number}.bias": conv.bias.data}
    torch.save({**narrow, "classifier.6.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(2)},
               tmp_path / "vgg16.pth")
    weights, meta = checkpoint.initial_weights(str(tmp_path / "vgg16.pth"), "vgg16", fcn=True)
    assert meta == {"pixels": "imagenet"}
    other = FCN8s(2, 1 / 64)
    report = checkpoint.load_into(other, weights)
    assert report.backbone_share == 1 and not report.unused
    for name in ("conv1_1", "conv5_3", "fc6", "fc7"):
        assert torch.equal(getattr(other, name).weight, getattr(net, name).weight)


# --- stopping and going on ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(pair, folder):
    done = execute(SCRIPT, *gan(pair, folder, "--num-steps", "9", "--save-pred-every", "1", "--lr", "1e10",
                                "--eval-every", "9"), code=2)
    text = message(done, SCRIPT)
    stopped = int(text.split("iteration ")[1].split(":")[0])
    assert 2 <= stopped <= 4 and "loss_" in text and "--learning-rate" in text
    assert f"Last good checkpoint: {folder / 'resume.pth'}" in text
    assert checkpoint.load(folder / "resume.pth")["iteration"] == stopped - 1
    assert any(p.stem in text for p in (pair / "gta5/images").iterdir())


# --- several processes --------------------------------------------------------------------------------------------


# --- files, flags and mistakes ------------------------------------------------------------------------------------


def test_evaluate_reads_what_the_run_and_the_release_write(here, pair, folder, capsys):
    """Ours by what it carries, the release's model_state_dict (no width, no padding, no classes) by its keys."""
    here("--input-size", "97,131", "--input-size-target", "97,131", "--crop-size", "75,33")
    miou = logged(folder, "mIoU")[-1]["mIoU"]
    data = ["--data-dir", str(pair / "cityscapes"), "--num-workers", "0", "--save", "none", "--cpu"]
    for name in ("GTA5_2.pth", "best.pth", "resume.pth"):
        evaluate.main(["--restore-from", str(folder / name), *data, "--json", str(folder / "scores.json")])
        assert "FCN8s vgg16, 14 classes\n" in capsys.readouterr().out
        assert 100 * json.loads((folder / "scores.json").read_text())["miou"] == pytest.approx(miou, abs=1e-9)
    torch.manual_seed(0)
    state = FCN8s(19, 1 / 32).state_dict()
    torch.save({"epoch": 3, "model_state_dict": state, "optim_state_dict": {}}, folder / "released.pth")
    evaluate.main(["--restore-from", str(folder / "released.pth"), *data, "--data", "cityscapes", "--size", "64,48"])
    out = capsys.readouterr().out
    assert "FCN8s vgg16, 19 classes" in out and "pixels     caffe" in out and "mean" in out
    known = checkpoint.recognise(state)
    assert known == {"model": "FCN8s", "arch": "vgg16", "num_classes": 19, "width": 1 / 32}


def test_dataroot_takes_the_place_of_data(here, pair, folder, monkeypatch):
    root = folder.parent / "root"
    for name in ("GTA5", "demo/cityscapes"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(pair / {"GTA5": "gta5"}.get(name, "cityscapes"), root / name)
    arguments = gan(pair, folder)
    for flag in ("--data-dir", "--data-dir-target"):
        at = arguments.index(flag)
        del arguments[at:at + 2]
    assert script.main([*arguments, "--dataroot", str(root), "--method", "sourceonly"]) == 0
    with pytest.raises(UserError, match="nowhere/GTA5: no such folder"):
        script.main([*arguments, "--dataroot", str(folder / "nowhere")])
    description = json.loads((ROOT / "lib/datasets/demo.json").read_text())
    (root / "mine.json").write_text(json.dumps({**description, "root": "/mine"}))
    with pytest.raises(UserError, match="mine.json lies in /mine: name its folder by --data-dir-target"):
        script.main([*arguments, "--target", str(root / "mine.json"), "--dataroot", str(root)])


FLAGS = ["--lr 2e-3", "--lr-g 2e-4", "--lr-d 2e-4", "--beta1 0.5", "--beta1-gan 0.5", "--weight_decay 0.1",
         "--l1_weight 5", "--adv_weight 5", "--c_weight 5", "--dropout 0.2", "--lr-epochs 1", "--crop-size 40,24",
         "--random-mirror", "--random-scale", "--random-seed 7", "--batchSize 2", "--reduction mean",
         "--padding released", "--order gradients_before_steps", "--order released",
         "--optimizer SGD --lr 1e-7", "--width 0.0625", "--pixels imagenet", "--method sourceonly"]


def test_every_flag_acts(here, folder):
    """Each one changes F within three steps; beside them, --momentum with SGD."""
    def trained(text: str) -> list[torch.Tensor]:
        to = folder / text.replace(" ", "")
        weights = here("--num-steps", "6" if "epochs" in text else "3", "--eval-every", "99", *text.split(), to=to)
        shutil.rmtree(to)
        return list(weights.values())

    def equal(a, b) -> bool:
        return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))

    base, longer, sgd = trained(""), trained("--lr-epochs 9"), trained("--optimizer SGD --lr 1e-7")
    assert equal(base, trained("--log-every 2")), "the same run twice gives the same bits"
    for flag in FLAGS:
        assert not equal(longer if "epochs" in flag else base, trained(flag)), flag
    assert not equal(sgd, trained("--optimizer SGD --lr 1e-7 --momentum 0.5"))


def test_flags_of_the_release_are_accepted():
    flags = ("--dataroot a --batchSize 2 --num_iters 7 --optimizer SGD --lr 1e-5 --momentum 0.99 --beta1 0.5 "
             "--weight_decay 0.0005 --interval_validate 500 --resume b --logdir c --method sourceonly --l1_weight 1 "
             "--adv_weight 0.1 --c_weight 0.1 --gpu 1")
    args = script.parse_args(flags.split())
    assert (args.batch_size, args.num_steps, args.resume, args.snapshot_dir, args.method, args.eval_every) == \
        (2, 7, "b", "c", "sourceonly", 500)
    flags = ("--source-only --batch-size 2 --num-steps 7 --learning-rate 1e-5 --snapshot-dir c --eval-every 500 "
             "--weight-decay 0.0005 --resume")
    house = script.parse_args(flags.split())
    assert all(getattr(house, k) == getattr(args, k) for k in ("method", "batch_size", "num_steps", "snapshot_dir",
                                                                 "learning_rate", "weight_decay"))
    assert house.resume == "" and script.parse_args([]).resume is None


def test_weights_of_the_losses_follow_the_reduction():
    for flags, weights in (([], (1.0, 0.1, 0.1)), (["--reduction", "mean"], script.WEIGHTS["mean"]),
                           (["--reduction", "mean", "--l1_weight", "0"], (0.0, *script.WEIGHTS["mean"][1:]))):
        args = script.parse_args(flags)
        assert (args.l1_weight, args.adv_weight, args.c_weight) == weights


@pytest.mark.parametrize("flags", [["--crop-size", "0,5"], ["--batchSize", "0"], ["--width", "0"], ["--dropout", "1"],
                                   ["--random-seed", "-1"], ["--ignore-label", "300"], ["--method", "lsd"],
                                   ["--low-memory", "--order", "released"]])
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        script.parse_args(flags)
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    *((["--method", "sourceonly", *more], f"{more[0]} has no effect with --method sourceonly") for more in (
        ["--l1_weight", "1"], ["--adv_weight", "1"], ["--c_weight", "1"], ["--order", "released"], ["--low-memory"],
        ["--lr-g", "1"], ["--lr-d", "1"], ["--beta1-gan", "0"])),
    (["--arch", "resnet50"], "--arch has no effect with --base fcn8s"),
    *((["--base", "deeplab", *more], f"{more[0]} has no effect with --base deeplab") for more in (
        ["--padding", "same"], ["--dropout", "0"])),
    (["--momentum", "0"], "--momentum has no effect with --optimizer Adam"),
    (["--optimizer", "SGD", "--beta1", "0"], "--beta1 has no effect with --optimizer SGD"),
    (["--demo", "--dataroot", "a"], "--dataroot has no effect"),
])
def test_flags_without_effect_are_named(flags, words, capsys):
    script.parse_args(flags)
    assert words in capsys.readouterr().out


def test_help_has_one_default_for_the_evaluations(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "iterations between evaluations (default: 500)" in text and "as snapshots" not in text


# what is done to the pair, giving more flags or None; what the message says (tests/test_bad_input.py has all kinds)
MISTAKES = {
    "missing folder": (lambda p: ["--data-dir", str(p / "nowhere")], ["nowhere: no such folder"]),
    "missing label": (lambda p: (p / "gta5/labels/00002.png").unlink(), ["00002.png does not exist"]),
    "not an image": (lambda p: (p / "gta5/images/00002.png").write_text("x"), ["00002.png: not an image"]),
    "overlap": (lambda p: ["--set", "val"], ["2 images belong to both the training set", "choose another --set"]),
    "missing weights": (lambda p: ["--restore-from", str(p / "no.pth")], ["no.pth does not exist"]),
    "small for DeepLab": (lambda p: ["--base", "deeplab", "--crop-size", "16,40"], ["at least 17x17", "--crop-size"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_message_before_training(here, pair, folder, mistake):
    copy = shutil.copytree(pair, folder.parent / "pair")
    spoil, facts = MISTAKES[mistake]
    more = spoil(copy)
    with pytest.raises(UserError) as caught:
        script.main(gan(copy, folder, *(more if isinstance(more, list) else [])))
    for fact in facts:
        assert fact in str(caught.value), str(caught.value)
    assert not folder.exists(), "nothing was written"


def test_weights_of_another_width(pair, folder):
    """A real run: exit code 2, one message, no traceback."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.save(FCN8s(14, 1 / 16).state_dict(), folder.parent / "w.pth")
    done = execute(SCRIPT, *gan(pair, folder, "--restore-from", str(folder.parent / "w.pth")), code=2)
    text = message(done, SCRIPT)
    assert "w.pth fits only 0.0 %" in text and text.count("\n") == 1 and not folder.exists()


def test_check_data(here, pair, folder, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(gan(pair, folder, "--check-data"))
    assert left.value.code == 0
    assert "fine" in capsys.readouterr().out and not folder.exists()


def test_the_demo_compares_source_only_and_adapted(pair, folder, monkeypatch, here, capsys):
    rendered = []
    monkeypatch.setattr(script, "render_demo", lambda root, seed: rendered.append((str(root), seed)))
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert script.main(["--demo", "--random-seed", "7", *gan(pair, Path("out"))]) == 0
    out = capsys.readouterr().out
    assert rendered == [("data/demo/7", 7)] and "source only" in out and "adapted" in out and "target BN" not in out
    assert {p.name for p in (folder / "out").iterdir()} == {"source_only", "adapted"}
    assert (folder / "result/demo_gan/report.png").exists()
