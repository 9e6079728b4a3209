"""evaluate_reid.py: checkpoints, features on disk, rank pictures, both mAPs, mistakes."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import load_reference  # noqa: F401  (puts the repository on the path)
from PIL import Image
from scripts import execute, message

import evaluate_reid as script
from lib import checkpoint
from lib.demo.persons import render_persons
from lib.errors import UserError
from lib.models.reid import IDNet, SPGANNet

SCRIPT = "evaluate_reid.py"


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A tiny rendered pair, to be read only."""
    return render_persons(tmp_path_factory.mktemp("people") / "pair", seed=1, people=4, cameras=2, images=2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One of our layout, named as the release does, and one of eSPGAN's; 3 identities, whatever the data holds."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, layout in (("ecn", IDNet), ("spgan", SPGANNet)):
        net = layout(3, "resnet18", 16)
        state = net.state_dict() if name == "ecn" else {f"module.{k}": v for k, v in net.state_dict().items()}
        checkpoint.save({"state_dict": state, "epoch": 1, "best_top1": 0.0}, folder / f"{name}.pth.tar")
    return folder


def arguments(people, checkpoints, *more: str, name: str = "ecn") -> list[str]:
    return ["--restore-from", str(checkpoints / f"{name}.pth.tar"), "-t", "campus", "--data-dir", str(people),
            "--height", "64", "--width", "32", "-j", "0", "--cpu", "--ops", "reference", *more]


@pytest.fixture(scope="module")
def saved(people, checkpoints, tmp_path_factory):
    """(output, JSON, feature file, folder of pictures) of one full run."""
    folder = tmp_path_factory.mktemp("scores")
    done = execute(SCRIPT, *arguments(
        people, checkpoints, "--rerank", "--k1", "5", "--k2", "2", "--save-ranks", "3", "--save", str(folder / "ranks"),
        "--save-features", str(folder / "f.npz"), "--json", str(folder / "s.json")))
    return done.stdout, json.loads((folder / "s.json").read_text()), folder / "f.npz", folder / "ranks"


def test_both_maps_are_printed_and_named(saved):
    printed, scores, *_ = saved
    row = scores["features"]
    for text in ("mAP is the area by trapezoids", "mean of precisions", "of junk dropped", "re-ranked"):
        assert text in printed
    line = re.search(r"^features .*$", printed, re.M)[0].split()
    assert [float(v) for v in line[1:]] == [round(row[key], 2) for key in (
        "R1", "R5", "R10", "R20", "mAP_trapezoid", "mAP_precision")]
    assert row["mAP"] == row["mAP_trapezoid"] != row["mAP_precision"]


def test_saved_features_give_the_same_scores(saved, tmp_path, in_this_process):
    _, scores, features, _ = saved
    script.main(["--features", str(features), "--rerank", "--k1", "5", "--k2", "2", "--ap", "precision", "--json",
                 str(tmp_path / "s.json"), "--cpu"])
    again = json.loads((tmp_path / "s.json").read_text())
    for way in ("features", "re-ranked"):
        assert again[way].pop("mAP") == scores[way]["mAP_precision"]
        assert again[way].items() <= scores[way].items()


def test_features_have_length_one_and_carry_their_names(saved, people):
    with np.load(saved[2]) as f:
        np.testing.assert_allclose(np.linalg.norm(f["gallery_features"], axis=1), 1, rtol=1e-6)
        assert (f["gallery_ids"] != -1).all() and f["gallery_cams"].min() == 0
        for part in ("query", "gallery"):
            names = [re.search(r"(-?\d+)_c(\d+)", name) for name in f[f"{part}_files"].tolist()]
            assert f[f"{part}_ids"].tolist() == [int(m[1]) for m in names]
            assert f[f"{part}_cams"].tolist() == [int(m[2]) - 1 for m in names]
            assert all((people / "campus" / name).is_file() for name in f[f"{part}_files"].tolist())


def test_rank_pictures(saved):
    """Three queries, two rows each (before and after re-ranking), frames as the identities say."""
    pictures = sorted(saved[3].iterdir())
    assert len(pictures) == 3
    with np.load(saved[2]) as f:
        files = f["query_files"].tolist()
        for path in pictures:
            i = next(n for n, name in enumerate(files) if path.stem in name)
            d = ((f["query_features"][i] - f["gallery_features"]) ** 2).sum(1)
            same = f["gallery_ids"] == f["query_ids"][i]
            d[same & (f["gallery_cams"] == f["query_cams"][i])] = np.inf
            image = Image.open(path)
            assert image.height > 2 * 150
            for place, j in enumerate(np.argsort(d)[:10], 1):
                frame = image.getpixel((place * 76 + 1, 24 + 60))
                assert frame == (script.visual.PAPER if d[j] == np.inf else (30, 150, 60) if same[j] else (200, 40, 40))


def test_the_releases_layouts_and_parts(people, checkpoints, tmp_path, in_this_process):
    script.main(arguments(people, checkpoints, "--lmp", "2", "--mirrored", "--save-features", str(tmp_path / "f.npz"),
                          name="spgan"))
    with np.load(tmp_path / "f.npz") as f:
        assert f["query_features"].shape[1] == 2 * 512
    script.main(arguments(people, checkpoints, "--output_feature", "fc", "--bn-stats", "target", "--save-features",
                          str(tmp_path / "f.npz")))
    with np.load(tmp_path / "f.npz") as f:
        assert f["query_features"].shape[1] == 16


# ---- mistakes ------------------------------------------------------------------------------------------------------

def changed(saved, path, **arrays):
    with np.load(saved[2]) as f:
        held = {key: f[key] for key in f.files}
    np.savez(path, **{key: value for key, value in {**held, **arrays}.items() if value is not None})
    return path


def test_wrong_feature_files(saved, tmp_path):
    with np.load(saved[2]) as f:
        held = {key: f[key] for key in f.files}
    spoilt, files = held["query_features"].copy(), held["gallery_files"].copy()
    spoilt[1, 2], files[1] = np.nan, files[0]
    for arrays, text in (
            ({"gallery_features": held["gallery_features"][:, 1:]}, "queries have 512 numbers each, the gallery 511"),
            ({"gallery_files": files}, "1 files stand in it twice"),
            ({"query_features": spoilt}, "query_features hold NaN"),
            ({"query_ids": None}, "no array query_ids"),
            ({"gallery_cams": held["gallery_cams"][1:]}, "expected floats"),
            ({"query_features": held["query_features"].astype(int)}, "expected floats")):
        with pytest.raises(UserError, match=text):
            script.read_features(str(changed(saved, tmp_path / "f.npz", **arrays)))
    (tmp_path / "text.npz").write_text("no features")
    for path in (tmp_path / "text.npz", tmp_path / "absent.npz"):
        with pytest.raises(UserError, match="not a file that --save-features wrote"):
            script.read_features(str(path))


def test_queries_without_a_match(saved, tmp_path, in_this_process, capsys):
    with np.load(saved[2]) as f:
        ids = f["query_ids"].copy()
    ids[0] = 7777
    for protocol, text in (("release", "are left out"), ("matlab", "count as 0")):
        script.main(["--features", str(changed(saved, tmp_path / "f.npz", query_ids=ids)), "--protocol", protocol])
        assert f"1 queries have no match and {text}" in capsys.readouterr().out
    done = execute(SCRIPT, "--features", str(changed(saved, tmp_path / "f.npz", query_ids=np.full_like(ids, 7777))),
                   "--ops", "reference", code=2)
    assert "no query has a match" in message(done, SCRIPT)


def test_junk_in_a_feature_file_is_dropped(saved, tmp_path):
    with np.load(saved[2]) as f:
        ids = f["gallery_ids"].copy()
        ids[::3] = -1
        count = (ids != -1).sum()
    features, data = script.read_features(str(changed(saved, tmp_path / "f.npz", gallery_ids=ids)))
    assert len(data.gallery) == count == len(features) - len(data.query)
    assert data.junk["gallery"] == len(ids) - count


@pytest.mark.parametrize("more, text", [
    (["--restore-from", "absent.pth"], "does not exist"),
    (["-t", "nowhere"], "no data set nowhere"),
    (["--json", "absent/folder/s.json"], "its folder does not exist")])
def test_one_message(people, checkpoints, in_this_process, more, text):
    with pytest.raises(UserError, match=text):
        script.main(arguments(people, checkpoints, *more))


def test_two_names_for_one_file(people, checkpoints, tmp_path, in_this_process):
    shutil.copytree(people / "campus", tmp_path / "campus")
    queries = sorted((tmp_path / "campus" / "query").iterdir())
    twin = tmp_path / "campus" / "bounding_box_test" / f"9{queries[0].name}"
    twin.symlink_to(queries[0])
    with pytest.raises(UserError, match=f"{queries[0].name} and .*{twin.name} are one file"):
        script.main(arguments(tmp_path, checkpoints))


def test_flags_that_exclude_each_other(capsys):
    for argv in (["--features", "f.npz", "--lmp", "2"], ["--features", "f", "--restore-from", "w"], [],
                 ["--restore-from", "w", "--lmp", "2", "--output_feature", "fc"]):
        with pytest.raises(SystemExit) as stop:
            script.parse_args(argv)
        assert stop.value.code == 2 and capsys.readouterr().err


@pytest.mark.parametrize("beside, more, when", [
    (["--features", "f"], ["--data-dir", "d", "--height", "8", "--pixels", "caffe", "-b", "2"], "with --features"),
    (["--restore-from", "f"], ["--k1", "3", "--k2", "3", "--lambda", "0.1", "--rerank-power", "2"], "without --rerank"),
    (["--restore-from", "f"], ["--save", "x"], "without --save-ranks"),
    (["--restore-from", "f", "--cpu"], ["--gpu", "0"], "with --cpu")])
def test_flags_without_effect_are_named(beside, more, when, capsys):
    script.parse_args([*beside, *more])
    assert capsys.readouterr().out.count(f"has no effect {when}") == len(more) // 2
