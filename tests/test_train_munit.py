"""train_munit.py from its flags to its files; its mathematics is in test_reference_translation.py."""
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load_reference
from PIL import Image
from scripts import logged, render, same
from torch import nn

import train_munit as script
from lib import checkpoint, runtime
from lib.datasets.description import load_description, select_classes
from lib.datasets.unpaired import FlipResizeCrop, from_symmetric, is_uniform, to_symmetric
from lib.errors import UserError
from lib.models.deeplab import build
from lib.models.segmenter import load_segmenter
from lib.models.translation import (
    AdaptiveInstanceNorm,
    LayerNorm,
    MunitGenerator,
    UnitGenerator,
    build_generator,
    enlarged_conv,
    load_vgg16,
    read_pair,
    save_pair,
)
from lib.optim import MAX_SKIPPED

RUN = runtime.Run(torch.device("cpu"), 0, 1, "off")
CONFIG = """
# logger options
image_save_iter: 2
image_display_iter: 3
display_size: 1
snapshot_save_iter: 2
log_iter: 1
# optimization options
max_iter: 4
batch_size: 1
weight_decay: 0.0001
beta1: 0.5
beta2: 0.999
init: kaiming
lr: 0.0001
lr_policy: step
step_size: 2
gamma: 0.5
gan_w: 1
recon_x_w: 10
recon_s_w: 1
recon_c_w: 1
recon_x_cyc_w: 10
vgg_w: 0
gen:
  dim: 4
  mlp_dim: 8
  style_dim: 8
  activ: relu
  n_downsample: 2
  n_res: 1
  pad_type: reflect
dis:
  dim: 4
  norm: none
  activ: lrelu
  n_layer: 4
  gan_type: lsgan
  num_scales: 2
  pad_type: reflect
input_dim_a: 3
input_dim_b: 3
num_workers: 0
new_size: 64
crop_image_height: 64
crop_image_width: 64
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def data(pair) -> list[str]:
    return ["--source", "gta5", "--data-dir", str(pair / "gta5"), "--target", "demo", "--data-dir-target",
            str(pair / "cityscapes")]


def networks(trainer: str, dim: int = 4, dtype: torch.dtype = torch.float32):
    """Narrow networks: {"gen": .., "dis": ..}, each with a and b."""
    torch.manual_seed(0)
    args = script.parse_args(["--trainer", trainer, "--gen-dim", str(dim), "--dis-dim", str(dim), "--n-res", "1",
                              "--mlp-dim", "8", "--data-root", "."])
    modules = {name: nets.to(dtype) for name, nets in script.build(args).items()}
    return modules


def run_step(modules, trainer, x, run=RUN, limit=1e6):
    """One guarded iteration from fresh optimisers; (losses, optimisers)."""
    optimizers = {name: torch.optim.Adam(nets.parameters(), 1e-4) for name, nets in modules.items()}
    update = script.GuardedStep(run, modules, optimizers, run.scaler(), limit)
    update.where = "iteration 7, white.png"
    losses = script.step(trainer, modules["gen"], modules["dis"], x, script.draws(0, 0, run, len(x["a"])),
                         script.Weights(), update, gan_type="lsgan", run=run)
    return losses, optimizers


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["MUNIT", "UNIT"])
def test_run_and_resume(trainer, pair, config, tmp_path, in_this_process, capsys):
    """The release's files under the release's names; a resumed run ends with the same bits as an undisturbed one."""
    common = ["--trainer", trainer, "--config", str(config), "--output_path", str(tmp_path / "whole"), "--cpu",
              *data(pair)]
    assert script.main(common) == 0
    folder = tmp_path / "whole/outputs/tiny"
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "gen_00000002.pt", "gen_00000004.pt", "dis_00000002.pt", "dis_00000004.pt", "optimizer.pt"}
    assert {p.name for p in (folder / "images").iterdir()} == {"gen_00000002.png", "gen_00000004.png", "current.png"}
    assert [line["lr"] for line in logged(folder, "loss_gen_total")] == [1e-4, 5e-5, 5e-5, 2.5e-5]
    expected = {"cycrecon_x_a" if trainer == "MUNIT" else "cyc_x_a", "recon_x_a", "adv_b"}
    assert {f"loss_gen_{name}" for name in expected} <= logged(folder)[0].keys()
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("iter ="))
    assert "loss_gen_total = " in shown and "lr = " in shown and "recon_x_a" not in shown

    keys, _ = load_reference("translation")
    pair_of, meta = read_pair(folder / "checkpoints/gen_00000004.pt")
    narrow = {k for k, _ in keys[trainer.lower()]["keys_gen"] if ".model.3.model.1" not in k}
    assert set(pair_of["a"]) <= {k for k, _ in keys[trainer.lower()]["keys_gen"]} and narrow & set(pair_of["a"])
    net = build_generator(pair_of["a"])
    assert isinstance(net, MunitGenerator if trainer == "MUNIT" else UnitGenerator) and meta["method"] == trainer
    optimizer = checkpoint.load(folder / "checkpoints/optimizer.pt")
    assert optimizer.keys() == {"gen", "dis"}

    halves = [*common[:5], str(tmp_path / "halves"), *common[6:]]
    assert script.main([*halves, "--max-iter", "2"]) == 0
    assert script.main([*halves, "--resume"]) == 0
    ours, theirs = (checkpoint.load(tmp_path / name / "outputs/tiny/resume.pth") for name in ("halves", "whole"))
    for key in theirs.keys() - {"arguments"}:
        assert same(ours[key], theirs[key]), key
    assert logged(tmp_path / "halves/outputs/tiny") == logged(folder)


def test_restore_from(pair, config, tmp_path, in_this_process):
    common = ["--config", str(config), "--cpu", "--save-num-images", "0", *data(pair)]
    assert script.main([*common, "--max-iter", "2", "--snapshot-dir", str(tmp_path / "first")]) == 0
    file = tmp_path / "first/checkpoints/gen_00000002.pt"
    args = script.parse_args([*common, "--restore-from", str(file)])
    built = script.build(args)
    for name in ("gen", "dis"):
        saved, _ = read_pair(file.with_name(f"{name}_00000002.pt"))
        assert all(same(dict(built[name][d].state_dict()), saved[d]) for d in "ab")


@pytest.mark.parametrize("trainer", ["MUNIT", "UNIT"])
def test_amp_keeps_norms_in_float32(trainer, monkeypatch):
    run, seen = runtime.Run(torch.device("cpu"), 0, 1, "bf16"), []
    modules = networks(trainer)
    for net in modules["gen"].values():
        for module in net.modules():
            if isinstance(module, (nn.InstanceNorm2d, LayerNorm, AdaptiveInstanceNorm)):
                module.register_forward_hook(lambda _, inputs, out: seen.extend(x.dtype for x in (out, *inputs)))
    convolved = []
    modules["gen"]["a"].dec.model[-1].conv.register_forward_hook(lambda _, inputs, out: convolved.append(out.dtype))
    x = {d: torch.rand(1, 3, 64, 64) * 2 - 1 for d in "ab"}
    losses, _ = run_step(modules, trainer, x, run)
    assert seen and set(seen) == {torch.float32} and set(convolved) == {torch.bfloat16}
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())


def test_checkpointed_decoder_gives_the_same_gradients():
    x, s = torch.rand(1, 3, 64, 64, dtype=torch.float64), torch.rand(1, 8, 1, 1, dtype=torch.float64)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = MunitGenerator(dim=4, n_res=1, mlp_dim=8, checkpointed=checkpointed).double()
        calls = []
        net.dec.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        net.decode(net.encode(x), s).square().sum().backward()
        assert len(calls) == 1 + checkpointed
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    assert same(*grads)


@pytest.mark.parametrize("pad", ["reflect", "replicate", "zeros"])
@pytest.mark.parametrize("size", [(2, 2), (2, 3), (7, 6)])
def test_enlarged_convolution(pad, size):
    """Equal to the convolution of the enlarged picture, with its gradients."""
    conv = nn.Conv2d(3, 4, 5, padding=2, padding_mode=pad).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = enlarged_conv(x, conv), conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(ours)
    for mine, expected in zip(*(torch.autograd.grad(out, [x, *conv.parameters()], g) for out in (ours, theirs)),
                              strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


# --- uniform crops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["MUNIT", "UNIT"])
def test_a_white_crop_is_skipped(trainer, capsys):
    """Its losses are finite, its gradient is not sane: neither weights nor Adam's moments may see it. How large it is
    depends on how a constant is rounded, on each processor; here it is what it has been at its worst."""
    modules = networks(trainer, dim=8)
    before = {k: v.clone() for k, v in modules["gen"].state_dict().items()}
    torch.manual_seed(1)
    x = {"a": torch.ones(1, 3, 64, 64), "b": torch.rand(1, 3, 64, 64) * 2 - 1}
    spoilt = next(modules["gen"].parameters()).register_hook(lambda gradient: torch.full_like(gradient, 1e9))
    losses, optimizers = run_step(modules, trainer, x)
    spoilt.remove()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert "iteration 7, white.png: the gradient of gen has the norm" in capsys.readouterr().out
    assert not optimizers["gen"].state and same(dict(modules["gen"].state_dict()), before)
    fine = {**x, "a": torch.rand(1, 3, 64, 64) * 2 - 1}
    _, optimizers = run_step(modules, trainer, fine)
    assert optimizers["gen"].state and "skipped" not in capsys.readouterr().out


def test_many_skipped_steps_end_the_run():
    modules = networks("UNIT")
    optimizers = {name: torch.optim.Adam(nets.parameters(), 1e-4) for name, nets in modules.items()}
    update = script.GuardedStep(RUN, modules, optimizers, RUN.scaler(), 1e-30)
    with pytest.raises(UserError, match=f"{MAX_SKIPPED} steps in a row"):
        for _ in range(MAX_SKIPPED):
            update("dis", sum(p.sum() for p in modules["dis"].parameters()))


def test_uniform_crops_are_redrawn():
    """Of a picture that is white but for its right edge, crops show the edge."""
    picture = np.full((64, 640, 3), 255, np.uint8)
    picture[:, 560:] = np.random.default_rng(0).integers(0, 255, (64, 80, 3))
    crop = FlipResizeCrop(None, (64, 64))
    rngs = [np.random.default_rng(n) for n in range(30)]
    crops = [crop(Image.fromarray(picture), None, rng)[0] for rng in rngs]
    uniform = sum(is_uniform(from_symmetric(x)) for x in crops)
    assert uniform <= 4  # 0.79 ** 20 of them; without redrawing 24


def test_transform():
    """Label and image stay together through mirror, resize and crop."""
    label = np.random.default_rng(0).integers(0, 200, (20, 30), np.uint8).repeat(4, 0).repeat(4, 1)
    image = Image.fromarray(np.stack([label] * 3, -1))
    for n in range(8):
        x, y = FlipResizeCrop(None, (64, 64))(image, label, np.random.default_rng(n))
        assert x.dtype == torch.float32 and torch.equal(((x[0] + 1) * 127.5).round().long(), y)
    whole = [FlipResizeCrop(None, image.size)(image, label, np.random.default_rng(n))[1].numpy() for n in range(8)]
    mirrored = [np.array_equal(y, label[:, ::-1]) for y in whole]
    assert any(mirrored) and all(m != np.array_equal(y, label) for m, y in zip(mirrored, whole, strict=True))
    x, y = FlipResizeCrop(160, (64, 64))(image, label, np.random.default_rng(0))
    assert x.shape == (3, 64, 64) and ((x[0] + 1) * 127.5 - y).abs().median() <= 1
    assert np.array_equal(from_symmetric(to_symmetric(image)), image)


# --- judges -----------------------------------------------------------------------------------------------------------


def test_semantic_loss():
    """CE(f(x_ab), argmax f(x_a)), or of labels; f does not learn."""
    f = nn.Conv2d(3, 4, 1).requires_grad_(False)
    x, fake = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8, requires_grad=True)
    expected = nn.functional.cross_entropy(f(fake), f(x).argmax(1))
    loss = script.loss_semantic(f, fake, x)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert fake.grad.abs().sum() > 0 and f.weight.grad is None
    y = torch.randint(4, (2, 8, 8))
    y[0] = 255
    torch.testing.assert_close(script.loss_semantic(f, fake, x, y), nn.functional.cross_entropy(
        f(fake[1:]), y[1:]))
    assert script.loss_semantic(f, fake, x, torch.full_like(y, 255)) == 0


def test_semantic_loss_in_a_run(pair, config, tmp_path, in_this_process):
    """A trained segmenter of this project judges both directions; the labels of A are those of its pictures."""
    classes = select_classes(load_description("demo"), load_description("gta5"))
    torch.manual_seed(0)
    checkpoint.save_weights(build("Deeplab", len(classes), "resnet18"), tmp_path / "f.pth",
                            {"task": "demo", "classes": list(classes), "pixels": "imagenet"})
    common = ["--config", str(config), "--cpu", "--save-num-images", "0", "--max-iter", "1", "--lambda-semantic", "2",
              "--segmenter", str(tmp_path / "f.pth"), *data(pair)]
    lines = {}
    for name, more in (("own", []), ("labels", ["--labelled"])):
        assert script.main([*common, *more, "--snapshot-dir", str(tmp_path / name)]) == 0
        lines[name], = logged(tmp_path / name)
    own, labels = lines["own"], lines["labels"]
    assert own["loss_gen_semantic_a"] == labels["loss_gen_semantic_a"] > 0
    assert own["loss_gen_semantic_b"] != labels["loss_gen_semantic_b"] > 0
    assert labels["loss_gen_total"] - own["loss_gen_total"] == pytest.approx(
        2 * (labels["loss_gen_semantic_b"] - own["loss_gen_semantic_b"]), rel=1e-3)


def test_demo(tmp_path, monkeypatch, in_this_process, capsys):
    """The table has the originals, what statistics alone do, and the translations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "render_demo", lambda root, seed: render(root))
    monkeypatch.setattr(script, "compare_translations", partial(script.compare_translations, steps=1))
    assert script.main(["--demo", "--max-iter", "1", "--gen-dim", "4", "--dis-dim", "4", "--cpu"]) == 0
    table = capsys.readouterr().out
    for column in ("original", "original, target BN", "mean, deviation", "MUNIT", "MUNIT, target BN"):
        assert column in table
    folder = tmp_path / "outputs/demo_MUNIT_1234/demo"
    assert len(list((folder / "MUNIT").iterdir())) == len(list((folder / "matched").iterdir())) == 5
    assert {"translations.png", "label_maps.png"} <= {p.name for p in folder.iterdir()}


def test_vgg16_from_torchvision():
    """torchvision's weights, under its numbers, up to relu5_3 and without the fourth pooling."""
    from torchvision.models import vgg16

    theirs = vgg16(weights=None, init_weights=False).features
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    file = {f"features.{k}": v for k, v in theirs.state_dict().items()}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    out = ((x + 1) / 2 - mean) / std
    for number, layer in enumerate(theirs[:30]):
        out = out if number == 23 else layer(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda _: file)
        net = load_vgg16("file")
    torch.testing.assert_close(net(x), out)


# --- configurations and bad input -------------------------------------------------------------------------------------


def test_config(config):
    args = script.parse_args(["--config", str(config), "--gan-w", "3", "--trainer", "UNIT"])
    assert (args.gen_dim, args.mlp_dim, args.num_scales, args.step_size, args.save_num_images) == (4, 8, 2, 2, 1)
    assert (args.eval_every, args.save_pred_every, args.log_every, args.gan_w) == (2, 2, 1, 3)
    assert args.recon_kl_w == 0.01  # UNIT with a configuration of MUNIT: defaults
    assert args.snapshot_dir == "outputs/tiny"


@pytest.mark.parametrize("line, complaint", [
    ("spectral: true", "1 key not known here: spectral"), ("dis: {norm: sn}", "argument --dis-norm"),
    ("gen: {depth: 3}", "gen.depth"), ("lr: fast", "argument --lr"),
    ("input_dim_a: 1", "input_dim_a: 1 (it must be 3)"), ("recon_h_w: 1", "recon_h_w: 1 (it must be 0)"),
    ("- 3", "KEY: VALUE"), ("a: [", "cannot be read"),
    ("trainer: UNIT", "1 key not known here: trainer")])
def test_bad_config(line, complaint, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(line)
    with pytest.raises((UserError, SystemExit)) as caught:
        script.parse_args(["--config", str(path)])
    assert complaint in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("flag, complaint", [
    (["--crop-image-width", "60"], "at least 64"), (["--crop-image-height", "66"], "multiples of 4"),
    (["--new-size-b", "128"], "--new-size-b 128 is smaller than the crop"),
    (["--lambda-semantic", "1"], "belong together"), (["--labelled"], "--labelled needs")])
def test_bad_flags(flag, complaint, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(flag)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("flag, note", [
    *((["--trainer", "UNIT", name, "1"], f"{name} has no effect with --trainer UNIT")
      for name in ("--style-dim", "--mlp-dim", "--recon-s-w", "--recon-c-w")),
    *((["--trainer", "MUNIT", name, "1"], f"{name} has no effect with --trainer MUNIT")
      for name in ("--recon-kl-w", "--recon-kl-cyc-w")),
    (["--vgg-weights", "vgg.pth"], "--vgg-weights has no effect without --vgg-w"),
    (["--lr-policy", "constant", "--step-size", "9"], "--step-size has no effect"),
    (["--lr-policy", "constant", "--gamma", "1"], "--gamma has no effect"),
    (["--snapshot-dir", "d", "--output-path", "d"], "--output-path has no effect"),
    (["--ops", "reference"], "--ops has no effect without --demo")])
def test_flags_without_effect_are_named(flag, note, capsys):
    script.parse_args(flag)
    assert note in capsys.readouterr().out


@pytest.fixture
def root(tmp_path):
    """Two folders of pictures."""
    rng = np.random.default_rng(0)
    for domain in "AB":
        for n in range(3):
            path = tmp_path / f"data/train{domain}/{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)).save(path)
    return tmp_path / "data"


TINY = ["--cpu", "--crop-image-width", "64", "--crop-image-height", "64", "--new-size", "64", "--gen-dim", "4",
        "--dis-dim", "4", "--num-workers", "0", "--max-iter", "1"]


def complain(root, *more, match: str) -> None:
    with pytest.raises(UserError, match=match):
        script.main(["--data-root", str(root), *TINY, "--snapshot-dir", str(root.parent / "run"), *more])


def test_bad_data(root):
    complain(root.parent, match="no folder trainA and no folder trainB")
    complain(root, "--source", "gta5", match="one kind of data only")
    (root / "trainA/3.png").write_text("no picture")
    complain(root, match=r"(?s)trainA has 1 bad file:.*3.png: not an image that can be read")
    (root / "trainA/3.png").unlink()
    for n in (1, 2):
        (root / f"trainB/{n}.png").rename(root / f"{n}.png")
    complain(root, match="trainB holds one picture")
    shutil.rmtree(root / "trainB")
    shutil.copytree(root / "trainA", root / "trainB")
    shutil.rmtree(root / "trainA")
    (root / "trainA").symlink_to(root / "trainB")
    complain(root, match="3 pictures are in both domains")


ROOT = ["--data-root", "d"]
FOLDERS = ["--data-folder-train-a", "d", "--data-folder-train-b", "d"]
DESCRIBED = ["--source", "gta5", "--target", "demo"]


@pytest.mark.parametrize("kind, more", [
    *((kind, [f"--{name}", "x"]) for kind in (ROOT, FOLDERS) for name in (
        "data-dir", "data-list", "source-set", "data-dir-target", "data-list-target", "set", "data-list-test-b")),
    *((kind, ["--data-list-train-a", "x"]) for kind in (ROOT, DESCRIBED))])
def test_data_flags_of_another_kind(kind, more):
    args = script.parse_args([*kind, *more])
    with pytest.raises(UserError, match=f"{more[0]} has no effect without"):
        script.find_domains(**script.flags.domains(args))


@pytest.mark.parametrize("written", ["data_root: other", "data_folder_train_a: other\ndata_list_train_a: other.txt"])
@pytest.mark.parametrize("more", [ROOT, DESCRIBED, ["--demo"]])
def test_data_of_the_command_line_replace_the_configuration_s(written, more, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(written)
    chosen, asked = (script.flags.domains(script.parse_args(argv)) for argv in ([*more, "--config", str(path)], more))
    assert chosen == asked
    args = script.parse_args(["--config", str(path)])
    assert "other" in (args.data_root, args.data_folder_train_a)


def test_unreadable_picture_among_many(root):
    """Not seen by the first check, which reads some, it ends the run with its name."""
    for n in range(3, 120):
        shutil.copy(root / "trainA/0.png", root / f"trainA/{n:03}.png")
    files = sorted((root / "trainA").iterdir())
    seen = set(np.linspace(0, len(files) - 1, 50).astype(int))
    for n in set(range(len(files))) - seen:
        files[n].write_bytes(files[n].read_bytes()[:500])
    complain(root, "--max-iter", "20", match=r"trainA/\d+.png: the image is broken or truncated")
    complain(root, "--check-data", match="trainA has 70 bad files")


def test_grey_palette_16_bit_and_transparent_pictures_train(root, in_this_process):
    image = Image.open(root / "trainA/0.png")
    for n, mode in enumerate(("L", "P", "1", "RGBA", "LA")):
        image.convert(mode).save(root / f"trainA/more_{n}.png")
    Image.fromarray(np.asarray(image.convert("L"), np.uint16) << 8).save(root / "trainB/more.png")
    with pytest.raises(SystemExit) as end:
        script.main(["--data-root", str(root), "--check-data", *TINY])
    assert end.value.code == 0


def test_checkpoints_of_other_methods(root, tmp_path):
    other = tmp_path / "net_G_A.pth"
    torch.save({"model.1.weight": torch.zeros(3)}, other)
    complain(root, "--restore-from", str(other), match="does not hold the two networks a and b")
    modules = networks("UNIT")
    save_pair(modules["gen"], tmp_path / "gen_1.pt", {})
    complain(root, "--restore-from", str(tmp_path / "gen_1.pt"), match="Is it of another --trainer")
    with pytest.raises(UserError, match="no generator of UNIT or MUNIT"):
        build_generator({"model.1.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="does not say which classes|recognised"):
        load_segmenter(tmp_path / "net_G_A.pth")


def test_files_of_old_versions():
    """Statistics of norms that have none are dropped, those of AdaIN may be missing."""
    net = MunitGenerator(dim=4, n_res=1, mlp_dim=8)
    state = dict(net.state_dict())
    old = {k: v for k, v in state.items() if "running" not in k}
    for k in ("running_mean", "running_var", "num_batches_tracked"):
        old[f"enc_content.model.0.norm.{k}"] = torch.ones(4)
    assert same(dict(build_generator(old).state_dict()), state)
    with pytest.raises(UserError, match="mlp.model.2.fc.bias is missing"):
        build_generator({k: v for k, v in old.items() if k != "mlp.model.2.fc.bias"})
