"""train_ecn.py: its memory, its runs, going on, mistakes."""
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import execute, logged, message, same

import train_ecn as script
from lib import checkpoint, predict_reid
from lib.datasets.persons import Person, PersonSet, TestTransform, open_persons
from lib.demo.persons import render_persons
from lib.errors import UserError
from lib.metrics_reid import reranked
from lib.models import reid
from lib.runtime import Run

SCRIPT = "train_ecn.py"
ONE = Run(torch.device("cpu"), 0, 1, "off")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A tiny rendered pair, to be read only: 12 training images of 3 people in each domain."""
    return render_persons(tmp_path_factory.mktemp("people") / "pair", seed=1, people=3, cameras=2, images=2)


def arguments(people, folder, *more: str) -> list[str]:
    return ["-s", "plaza", "-t", "campus", "--data-dir", str(people), "--logs-dir", str(folder), "-a", "resnet18",
            "--features", "16", "--height", "32", "--width", "16", "-b", "4", "-j", "0", "--restore-from", "none",
            "--cpu", "--ops", "reference", "--print-freq", "1", "--num-steps", "4", "--lr", "0.01",
            "--neighbour-epoch", "1", *more]


def scoring(people, folder, *more: str) -> list[str]:
    return ["-s", "plaza", "-t", "campus", "--data-dir", str(people), "--logs-dir", str(folder), "-j", "0", "--cpu",
            "--ops", "reference", "--evaluate", *more]


# --- the memory -------------------------------------------------------------------------------------------------------


def test_an_image_twice_in_a_batch_is_updated_twice():
    torch.manual_seed(0)
    f, memory = torch.randn(3, 4, dtype=torch.float64), script.ExemplarMemory(5, 4).double()
    memory.update(f, torch.tensor([2, 0, 2]), 0.4)
    once = 0.6 * f[0] / (0.6 * f[0]).norm()
    twice = 0.4 * once + 0.6 * f[2]
    assert torch.allclose(memory.em[2], twice / twice.norm())
    assert torch.allclose(memory.em[0], f[1] / f[1].norm()) and not memory.em[[1, 3, 4]].any()


def test_a_feature_that_dropout_emptied():
    memory = script.ExemplarMemory(3, 4)
    memory.update(torch.zeros(1, 4), torch.tensor([1]), 0.0)
    assert not memory.em.any()


def test_more_neighbours_than_images():
    w = script.neighbours(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([1]), 6)
    assert torch.allclose(w, torch.tensor([[1 / 6, 1.0, 1 / 6]]))


def test_the_gradient_uses_the_memory_before_its_update():
    """step() against the same loss with the update left out."""
    torch.manual_seed(0)
    net = reid.IDNet(3, "resnet18", 8, dropout=0.0)
    x, y, index = torch.randn(4, 3, 32, 16), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 3, 1])
    memory = script.ExemplarMemory(5, 8)
    memory.em.copy_(torch.nn.functional.normalize(torch.randn(5, 8)))
    before = memory.em.clone()
    script.step(net, x, y, ONE, memory=memory, x_t=x.flip(3), index_t=index, alpha=0.5)
    ours = net.feat.weight.grad.clone()
    assert not torch.equal(memory.em, before)
    net.zero_grad()
    loss = 0.7 * script.loss_exemplar(net(x), y) + 0.3 * script.loss_exemplar(
        net(x.flip(3), "target") @ before.T / 0.05, index)
    loss.backward()
    assert torch.allclose(ours, net.feat.weight.grad, atol=1e-6)


# --- runs -------------------------------------------------------------------------------------------------------------

RUNS = {"ecn": ([], {"loss_src", "loss_tgt"}), "ecn without styles": (["--no-camstyle"], {"loss_src", "loss_tgt"}),
        "ide": (["--method", "ide"], {"loss_src"}),
        "camstyle": (["--method", "camstyle", "--camstyle", "2"], {"loss_src", "loss_style"}),
        "spgan": (["--method", "ide", "--preset", "spgan"], {"loss_src"}),
        "spgan-caffe": (["--method", "ide", "--preset", "spgan-caffe", "--features", "0"], {"loss_src"}),
        # at 32 x 16 the last maps are 1 x 1, of which PyTorch's bf16 convolutions on CPUs give random gradients
        "bf16": (["--amp", "bf16", "--height", "64", "--width", "32"], {"loss_src", "loss_tgt"})}


@pytest.mark.parametrize("flags, losses", RUNS.values(), ids=list(RUNS))
def test_a_run(people, folder, in_this_process, flags, losses, capsys):
    """What it logs and writes; the checkpoint has the release's layout and is scored by --evaluate."""
    assert script.main(arguments(people, folder, *flags)) == 0
    lines = logged(folder, "loss_src")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert all(line.keys() == {"iteration", "lr", "epoch", *losses} for line in lines)
    assert {p.name for p in folder.iterdir()} == {"checkpoint.pth.tar", "log.jsonl", "ranks", "resume.pth"}
    state = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
    root = "model" if flags[-1:] == ["spgan"] else "base"
    assert f"{root}.layer4.1.bn2.running_var" in state["state_dict"]
    assert state["epoch"] == 1  # 12 images of the source in batches of 4
    assert ("state_dict_inv" in state) == ("loss_tgt" in losses)
    if "loss_tgt" in losses:
        assert state["state_dict_inv"]["em"].shape == (12, 16)
    trained = re.search(r"iteration 4, (.*)", capsys.readouterr().out)[1]
    assert script.main(arguments(people, folder, *flags, "--evaluate")) == 0
    assert capsys.readouterr().out.strip().endswith(trained)
    assert logged(folder, "mAP")[-1]["mAP"] <= logged(folder, "mAP")[-1]["mAP_precision"] + 100


def test_each_choice_of_features_acts(people, monkeypatch):
    torch.manual_seed(0)
    source, data = (open_persons(people, name) for name in ("plaza", "campus"))
    net = reid.IDNet(3, "resnet18", 16).train()
    net(torch.randn(8, 3, 64, 32))
    seen = []
    monkeypatch.setattr(predict_reid, "scores_of", lambda query, *_, **named: seen.append((query, named)) or {})

    def query(**choice) -> torch.Tensor:
        predict_reid.PersonValidation(data, TestTransform((64, 32)), ONE, **choice).score(net)
        return seen[-1][0]

    plain = query()
    for choice in ({"output": "fc"}, {"lmp": 2}, {"mirrored": True}, {"bn_stats": "target"},
                   {"metric_from": source.train}):
        f = query(**choice)
        assert f.shape != plain.shape or not torch.allclose(f, plain, atol=1e-4), choice
    assert torch.equal(query(rerank=True), plain) and seen[-1][1] == {"rerank": True}
    assert net.training


def test_reranked_scores(in_this_process):
    """Against re-ranked distances as one matrix."""
    made = [Person(Path("x"), 1 + n % 10, n // 10 % 3) for n in range(140)]
    data = PersonSet("made up", Path("."), [], made[:20], made[20:], [])
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(len(part), 8, generator=generator) for part in (data.query, data.gallery))
    distance = torch.cat([d for _, d in reranked(torch.cat([query, gallery]), len(query))])
    ids, cams = (np.array([getattr(p, key) for p in data.gallery]) for key in ("identity", "camera"))
    precisions = []
    for row, person in zip(distance.numpy(), data.query, strict=True):
        keep = (ids != person.identity) | (cams != person.camera)
        right = (ids[keep] == person.identity)[np.argsort(row[keep], kind="stable")]
        precisions.append(np.mean(np.arange(1, right.sum() + 1) / (1 + np.flatnonzero(right))))
    found = predict_reid.scores_of(query, gallery, data, rerank=True)
    assert found["mAP_precision"] == pytest.approx(100 * np.mean(precisions))
    assert found["mAP_precision"] != pytest.approx(predict_reid.scores_of(query, gallery, data)["mAP_precision"])


def test_kissme_weighs_what_differs_between_people():
    """One direction tells people apart, the other varies within each: only the first counts."""
    generator = np.random.default_rng(0)
    people = np.repeat(np.arange(40), 5)
    features = np.stack([generator.normal(size=40)[people] + 0.1 * generator.normal(size=200),
                         0.05 * generator.normal(size=40)[people] + generator.normal(size=200)], 1)
    metric = predict_reid.kissme(torch.from_numpy(features), people)
    assert metric.shape == (2, 2)
    first, second = (torch.eye(2, dtype=torch.float64) @ metric).norm(dim=1)
    assert first > 20 * second


def test_rank_panel(people, in_this_process):
    """Green frames round the same person, red ones round others."""
    data = open_persons(people, "campus")
    who = {n: i for i, n in enumerate(sorted({p.identity for p in (*data.query, *data.gallery)}))}
    query, gallery = (torch.eye(len(who))[[who[p.identity] for p in part]] for part in (data.query, data.gallery))
    image = predict_reid.rank_panel(query, gallery, data, 2, nearest=2)
    frames = [image.getpixel((76 * column + 1, 90)) for column in range(3)]
    assert image.width == 3 * 76 - 4 and frames == [(60, 60, 60), (30, 150, 60), (200, 40, 40)]


def test_rates_fall_at_epochs(people, folder, in_this_process):
    """3 steps an epoch."""
    script.main(arguments(people, folder, "--method", "ide", "--epochs_decay", "1", "--num-steps", "7"))
    assert [line["lr"] for line in logged(folder, "lr")] == pytest.approx([1e-2] * 3 + [1e-3] * 3 + [1e-4])


def test_presets_give_way_to_flags():
    caffe = ["--method", "ide", "--preset", "spgan-caffe"]
    args = script.parse_args(caffe)
    assert (args.num_steps, args.steps_decay, args.learning_rate, args.bn) == (50000, 20000, 0.002, "fixed")
    args = script.parse_args([*caffe, "--epochs", "9", "--lr", "0.1"])
    assert (args.num_steps, args.steps_decay, args.epochs, args.learning_rate) == (None, None, 9, 0.1)


def test_each_run_of_the_demo_is_of_its_method(folder, monkeypatch):
    seen, scores = [], dict.fromkeys(("R1", "R5", "R10", "mAP"), 0.0)
    validation = SimpleNamespace(scores=scores, panels="", score=lambda net: scores)
    session = SimpleNamespace(exit_code=0, net=None, validation=validation)
    monkeypatch.setattr(script, "train", lambda args: seen.append(args) or session)
    assert script.demo(script.parse_args(["--demo", "--logs-dir", str(folder)])) == 0
    assert [(a.method, a.camstyle, a.no_camstyle, a.knn) for a in seen] == [
        ("ide", 0, False, 6), ("camstyle", 11, False, 6), ("ecn", 0, True, 0), ("ecn", 0, False, 0),
        ("ecn", 0, False, 6)]


@pytest.mark.parametrize("name", ["--resume", "--restore-from"])
@pytest.mark.parametrize("flags, size", [([], (48, 24)), (["--height", "32"], (32, 24)),
                                         (["--width", "16", "--height", "32"], (32, 16))])
def test_evaluate_scores_the_file_at_its_size(people, folder, in_this_process, capsys, name, flags, size):
    state = reid.IDNet(3, "resnet18", 16).state_dict()
    state.segadapt = {"size": [48, 24], "pixels": "caffe"}
    folder.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": state, "epoch": 1}, folder.parent / "x.tar")
    assert script.main(scoring(people, folder, name, str(folder.parent / "x.tar"), *flags)) == 0
    text = capsys.readouterr().out
    assert "{} x {} (height x width), caffe".format(*size) in text and "x.tar" in text


def test_what_is_frozen(people, folder, in_this_process):
    """From random weights all of the network trains; from weights, ECN leaves conv1 to layer2 as they are."""
    script.main(arguments(people, folder, "--method", "ide"))
    first = folder / "checkpoint.pth.tar"
    start = torch.load(first, weights_only=True)["state_dict"]
    script.main(arguments(people, folder / "ecn", "--restore-from", str(first)))
    end = torch.load(folder / "ecn/checkpoint.pth.tar", weights_only=True)["state_dict"]
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    assert not any(key.startswith(("base.conv1", "base.bn1", "base.layer1", "base.layer2.1")) for key in moved)
    assert "base.layer2.0.downsample.1.running_mean" in moved and "base.layer3.0.conv1.weight" in moved
    assert "base.fc.weight" not in moved


def test_a_target_without_queries_is_trained_on(people, folder, in_this_process):
    """Own images: no query and gallery, one camera, and so no camera styles."""
    own = folder.parent / "own/yard/bounding_box_train"
    own.mkdir(parents=True)
    shutil.copytree(people / "plaza", own.parent.parent / "plaza")
    for path in (people / "campus/bounding_box_train").glob("*_c1*"):
        shutil.copy(path, own)
    assert script.main(arguments(own.parent.parent, folder, "-t", "yard")) == 0
    assert not logged(folder, "mAP") and len(logged(folder, "loss_tgt")) == 4


# --- going on (more in test_trainers.py) ------------------------------------------------------------------------------


def test_resume_is_exact(people, folder, in_this_process):
    """Networks, memory, optimiser and log as those of a run that was not interrupted."""
    whole, parts = folder / "whole", folder / "parts"
    script.main(arguments(people, whole))
    script.main(arguments(people, parts, "--num-steps", "2"))
    script.main(arguments(people, parts, "--resume"))
    assert logged(parts, "loss_tgt") == logged(whole, "loss_tgt")
    ours, theirs = (checkpoint.load(f / "resume.pth") for f in (parts, whole))
    assert ours["others"][0]["em"].any()
    for key in theirs.keys() - {"arguments", "validation"}:
        assert same(ours[key], theirs[key]), key


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["-s", "nowhere"], "no data set nowhere"),
    (["--camstyle-dir", "none"], "there are no camera styles"),
    (["--restore-from", "nowhere.pth"], "nowhere.pth does not exist"),
    (["--evaluate", "--resume", "nowhere.pth"], "nowhere.pth does not exist"),
    (["--inv-alpha", "2"], "--inv-alpha 2.0: alpha of Eq. 2 .* would exceed 1 in 4 steps of 3"),
    (["--lr", "1e8"], "is nan|is inf"),
])
def test_mistakes(people, folder, in_this_process, flags, words):
    with pytest.raises(UserError, match=words):
        script.main(arguments(people, folder, *flags))


@pytest.mark.parametrize("flags", [["--preset", "spgan"], ["--method", "camstyle", "--camstyle", "0"],
                                   ["--lmp", "2", "--output_feature", "fc"],
                                   ["--method", "ide", "--preset", "spgan", "--features", "0"], ["--knn", "-1"],
                                   ["--re", "2"], ["-b", "1"], ["--method", "camstyle", "--camstyle", "1"]])
def test_flags_that_do_not_fit(people, folder, flags, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(arguments(people, folder, *flags))
    assert left.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--method", "ide"], ["--preset", "spgan", "--method", "ide"], ["--camstyle", "5"],
                                  ["--no-camstyle"], ["--evaluate"]])
def test_the_demo_runs_all_methods(more, capsys):
    with pytest.raises(SystemExit) as left:
        script.parse_args(["--demo", *more])
    assert left.value.code == 2 and "has no effect with --demo, which runs all methods" in capsys.readouterr().err


OF_ECN = "--inv-alpha 0.1 --inv-beta 0.1 --knn 3 --neighbour-epoch 3 --lmd 0.1 --no-camstyle"


@pytest.mark.parametrize("command, more", [
    ("--method ide", f"{OF_ECN} --camstyle-dir x"), ("--method camstyle", OF_ECN),
    ("--num-steps 5", "--epochs 5"), ("--steps-decay 5", "--epochs-decay 5")])
def test_flags_without_effect_are_named(command, more, capsys):
    script.parse_args([*command.split(), *more.split()])
    notes = capsys.readouterr().out
    assert notes.count(f"has no effect with {command.removesuffix(' 5')}") == more.count("--")


def test_help_shows_the_default(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    assert "iterations between snapshots (default: 1000)" in " ".join(capsys.readouterr().out.split())


def test_resuming_on_other_data(people, folder, in_this_process):
    """The target lost an image, so the memory has another number of rows."""
    data = folder.parent / "data"
    shutil.copytree(people, data)
    script.main(arguments(data, folder, "--num-steps", "2"))
    next((data / "campus/bounding_box_train").iterdir()).unlink()
    with pytest.raises(UserError, match="does not hold a whole run|another run"):
        script.main(arguments(data, folder, "--resume"))


def test_a_checkpoint_with_another_number_of_identities(people, folder, in_this_process, capsys):
    """As initial weights it gives its trunk, and the header says what did not fit; scoring needs no classifier."""
    torch.save({"state_dict": reid.IDNet(9, "resnet18", 16).state_dict(), "epoch": 1}, folder.parent / "other.tar")
    flags = arguments(people, folder, "--restore-from", str(folder.parent / "other.tar"))
    assert script.main(flags) == 0
    assert "other shape: classifier" in capsys.readouterr().out
    assert script.main([*flags, "--evaluate", "--resume", str(folder.parent / "other.tar")]) == 0


def test_queries_without_any_match(people, folder, in_this_process):
    data = folder.parent / "data"
    shutil.copytree(people, data)
    shutil.rmtree(data / "campus/query")
    shutil.copytree(data / "campus/bounding_box_train", data / "campus/query")
    for path in (data / "campus/query").iterdir():
        path.rename(path.with_name(f"5{path.name}"))
    with pytest.raises(UserError, match="no query has an image of the same person by another camera"):
        script.main(arguments(data, folder))


def test_target_statistics_without_target_images(people, folder, in_this_process):
    data = folder.parent / "data"
    shutil.copytree(people, data)
    shutil.rmtree(data / "campus/bounding_box_train")
    with pytest.raises(UserError, match="--bn-stats target: .* has no training images"):
        script.main(arguments(data, folder, "--method", "ide", "--bn-stats", "target"))


def test_one_message_and_exit_code_2(people, folder):
    done = execute(SCRIPT, *arguments(people, folder, "-t", "nowhere"), code=2)
    assert "no data set nowhere: there is no folder" in message(done, SCRIPT)


def test_check_data(people, folder, in_this_process, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(arguments(people, folder, "--check-data"))
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "train: 12 images of 3 identities, 2 cameras" in text and "3 of junk dropped" in text
