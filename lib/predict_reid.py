"""Features of people for evaluate_reid.py, and for the scores that train_ecn.py ends with."""
from __future__ import annotations

import copy
import os
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from lib import ops, visual
from lib.datasets.folder import outlive_stop
from lib.datasets.persons import JUNK, Person, PersonImages, PersonSet, TestTransform
from lib.datasets.pictures import read_image, spread
from lib.errors import UserError
from lib.files import atomic_write
from lib.metrics_reid import Scores, match_lists, reranked_scores, scores
from lib.models.reid import IDNet, SPGANNet, retrieval_features
from lib.runtime import NOT_FINITE, Run
from lib.session import Log

RANKS = (1, 5, 10, 20)  # of the CMC curve, as in the tables of papers


def _load(people: Sequence[Person], transform: TestTransform, order: Sequence[int], batch: int,
          workers: int) -> DataLoader:
    return DataLoader(PersonImages(people, transform), batch, sampler=order, num_workers=workers,
                      worker_init_fn=outlive_stop, generator=torch.Generator())


@torch.inference_mode()
def extract(net: IDNet | SPGANNet, people: Sequence[Person], transform: TestTransform, run: Run, *,
            output: str = "pool5", lmp: int = 0, mirrored: bool = False, batch: int = 64, workers: int = 0) -> Tensor:
    """float32 [N, D] on the run's device: the feature of each image in order, of length 1, shared by all processes.

    output, lmp, mirrored: see lib.models.reid.retrieval_features. ``net`` is left in the mode it has.
    """
    net = copy.deepcopy(net).eval()
    features = None
    for item in _load(people, transform, range(run.rank, len(people), run.world), batch, workers):
        with run.autocast():
            f = retrieval_features(net, run.place(item.image), output, lmp=lmp, mirrored=mirrored).float()
        if features is None:
            features = f.new_zeros(len(people), f.shape[1])
        features[item.index.to(run.device)] = f
    return run.sum(features) if run.world > 1 else features


@torch.no_grad()
def reestimate_bn(net: IDNet | SPGANNet, people: Sequence[Person], transform: TestTransform, run: Run, *,
                  batch: int = 64, workers: int = 0) -> IDNet | SPGANNet:
    """A copy of ``net`` whose BN statistics are averages over batches of the given images (labels play no part).

    Li et al., "Revisiting Batch Normalization for Practical Domain Adaptation" (AdaBN, 2016).
    """
    net = copy.deepcopy(net).eval()
    for layer in net.modules():
        if isinstance(layer, _BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
            layer.train()
    order = np.random.default_rng(0).permutation(len(people)).tolist()  # files are sorted by person
    for item in _load(people, transform, order, batch, workers):
        if len(item.image) > 1:
            with run.autocast():
                net(run.place(item.image))
    return net.eval()


def kissme(features: Tensor, identities: np.ndarray) -> Tensor:
    """KISSME (Koestinger et al., CVPR 2012): L [D, D], so that |x L - y L| is the learned distance.

    features: [N, D] of labelled images; identities: [N]. M = cov(x - y, same person)^-1 - cov(x - y, two people)^-1,
    with a thousandth of the mean variance added to both, and without its negative part; L L^T = M.
    """
    x = features.double() - features.double().mean(0)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(np.unique(identities, return_inverse=True)[1]))
    one_hot = one_hot.to(x)                                          # [N, people]
    count = one_hot.sum(0)
    weight = one_hot @ count                                         # how many images a person has
    centred = x - one_hot @ ((one_hot.t() @ x) / count[:, None])
    same = centred.t() @ (weight[:, None] * centred)                 # sums over all pairs of (x - y)(x - y)^T
    every = len(x) * x.t() @ x
    pairs = (count * (count - 1)).sum() / 2
    ridge = torch.eye(x.shape[1]).to(x) * x.var(0).mean() / 1000
    inverse = [torch.linalg.inv(total / n + ridge)
               for total, n in ((same, pairs), (every - same, len(x) * (len(x) - 1) / 2 - pairs))]
    value, vector = torch.linalg.eigh(inverse[0] - inverse[1])
    return (vector * value.clamp(min=0).sqrt()).to(features.dtype)


def names_of(people: Sequence[Person]) -> tuple[np.ndarray, np.ndarray]:
    """(identities, cameras), int64 [N] each."""
    return tuple(np.array([getattr(p, key) for p in people], np.int64) for key in ("identity", "camera"))


def scores_of(query: Tensor, gallery: Tensor, data: PersonSet, rerank: bool = False) -> dict[str, float]:
    """CMC at 1, 5, 10 and 20 and both mAPs in per cent, and how many queries have no match and are left out.

    query [Q, D], gallery [N, D]: features of the images of ``data`` in order. rerank: by k-reciprocal re-ranking.
    """
    matches, own = match_lists(*names_of(data.query), *names_of(data.gallery))
    if rerank:
        found = reranked_scores(torch.cat([query, gallery]).cpu(), len(query), matches, own)[0]
    else:
        found = scores(matches, ops.rank_counts(query, gallery, matches, own))
    return in_percent(found)


def in_percent(found: Scores) -> dict[str, float]:
    """What is printed and logged of ``found``."""
    return {**{f"R{k}": 100 * float(found.cmc[k - 1]) for k in RANKS}, "mAP": 100 * found.mean_ap("trapezoid"),
            "mAP_precision": 100 * found.mean_ap("precision"), "unmatched": len(found.unmatched)}


# --- features on disk -------------------------------------------------------------------------------------------------


def write_features(path: Path, features: Tensor, data: PersonSet) -> None:
    """An .npz: for query and gallery features [N, D], ids, cams (from 0) and files [N]; root, their common folder."""
    arrays, begin = {"root": str(data.root.absolute())}, 0
    for part, people in (("query", data.query), ("gallery", data.gallery)):
        arrays[f"{part}_features"] = features[begin:begin + len(people)].numpy()
        arrays[f"{part}_ids"], arrays[f"{part}_cams"] = names_of(people)
        arrays[f"{part}_files"] = np.array([os.path.relpath(p.path, data.root) for p in people])
        begin += len(people)
    with atomic_write(path, "Choose another --save-features") as new, open(new, "wb") as file:
        np.savez(file, **arrays)


def read_features(path: str | Path) -> tuple[Tensor, PersonSet]:
    """What write_features wrote, without junk. Raises UserError that says what is wrong with the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"--features {path}: not a file that --save-features wrote ({error})") from None
    root, parts, features, junk = Path(str(arrays.get("root", "."))), {}, [], {}
    for part in ("query", "gallery"):
        names = [f"{part}_{what}" for what in ("features", "ids", "cams", "files")]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise UserError(f"--features {path}: there is no array {missing[0]}; found {', '.join(arrays)}")
        x, ids, cams, files = (arrays[name] for name in names)
        if [a.ndim for a in (ids, cams, files)] != [1, 1, 1] or {ids.dtype.kind, cams.dtype.kind} - {"i", "u"}:
            raise UserError(f"--features {path}: {part}_ids, {part}_cams must be whole numbers [N], {part}_files [N]")
        if x.ndim != 2 or x.dtype.kind != "f" or not len(x) or {len(ids), len(cams), len(files)} != {len(x)}:
            raise UserError(f"--features {path}: {part} has features {x.shape} {x.dtype}, {len(ids)} ids, {len(cams)} "
                            f"cams and {len(files)} files; expected floats [N, D] and N of the others")
        if not np.isfinite(x.sum(0, np.float64)).all():
            raise UserError(f"--features {path}: {part}_features {NOT_FINITE}")
        real = ids != JUNK
        junk[part] = int((~real).sum())
        parts[part] = [Person(root / str(f), int(i), int(c)) for f, i, c in zip(
            files[real], ids[real], cams[real], strict=True)]
        features.append(torch.from_numpy(x if real.all() else x[real]))
    widths = [x.shape[1] for x in features]
    if widths[0] != widths[1]:
        raise UserError(f"--features {path}: queries have {widths[0]} numbers each, the gallery {widths[1]}. They come "
                        "from two networks, or from two settings of one")
    twice = [str(p) for p, n in Counter(p.path for part in parts.values() for p in part).items() if n > 1]
    if twice:
        raise UserError(f"--features {path}: {len(twice)} files stand in it twice, the first is {twice[0]}")
    return torch.cat(features), PersonSet(Path(path).stem, root, [], **parts, identities=[], junk=junk)


# --- pictures and scores in training ----------------------------------------------------------------------------------

RIGHT, WRONG, NEITHER = (30, 150, 60), (200, 40, 40), (60, 60, 60)  # frames of rank_row


def rank_row(data: PersonSet, query: int, nearest: Sequence[int]) -> list[Image.Image]:
    """A query and its nearest gallery images: a green frame is the same person, a red one another.

    Below each stand the identity and the camera of its name. -1 in ``nearest``, where nothing is left: an empty place.
    """
    def cell(person: Person, colour: tuple[int, int, int]) -> Image.Image:
        picture = read_image(person.path).resize((64, 128), Image.Resampling.BICUBIC)
        image = ImageOps.expand(ImageOps.expand(picture, 4, colour), (0, 0, 0, 16), visual.PAPER)
        ImageDraw.Draw(image).text((36, 144), f"{person.identity} c{person.camera + 1}", visual.INK,
                                   ImageFont.load_default(12), anchor="mm")
        return image

    who = data.query[query].identity
    return [cell(data.query[query], NEITHER), *(
        cell(data.gallery[j], RIGHT if data.gallery[j].identity == who else WRONG) if j >= 0
        else Image.new("RGB", (72, 152), visual.PAPER) for j in nearest)]


def rank_panel(query: Tensor, gallery: Tensor, data: PersonSet, count: int, nearest: int = 10) -> Image.Image:
    """``count`` queries, spread over the set, each followed by its ``nearest`` gallery images (see rank_row).

    query, gallery: as for scores_of. Images of the same person by the query's own camera are left out, as in scores.
    """
    rows, nearest = spread(len(query), count), min(nearest, len(gallery))
    _, own = match_lists(*names_of([data.query[i] for i in rows]), *names_of(data.gallery))
    found = ops.topk_pairs(query[rows], gallery, nearest, own)[0].tolist()
    return visual.panel([rank_row(data, i, near) for i, near in zip(rows, found, strict=True)],
                        ["query", *map(str, range(1, nearest + 1))])


class PersonValidation:
    """Scores a network on the queries and gallery of ``data`` during training, for lib.session.Session.

    No best is kept: choosing a snapshot by these scores would need the target's labels. bn_stats "target": BN
    statistics are re-estimated on the target's training images first. rerank: a second line of scores, after
    re-ranking. metric_from: labelled images (the source's) that KISSME learns a distance from. panels: folder for
    ``max_panels`` rank lists at each evaluation. features: arguments of ``extract``. Raises UserError where no query
    has a match, or where there are no images for the target's statistics.
    """

    def __init__(self, data: PersonSet, transform: TestTransform, run: Run, *, bn_stats: str = "running",
                 rerank: bool = False, metric_from: Sequence[Person] = (), panels: Path | None = None,
                 max_panels: int = 0, workers: int = 0, **features):
        self.data, self.transform, self.run, self.bn_stats = data, transform, run, bn_stats
        self.metric_from, self.panels, self.max_panels = metric_from, panels, max_panels
        self.rerank, self.workers, self.features = rerank, workers, features
        if not len(match_lists(*names_of(data.query), *names_of(data.gallery))[0].item):
            raise UserError(f"{data.root}: no query has an image of the same person by another camera in the gallery, "
                            "so nothing can be scored. Are identities and cameras right in the names?")
        if bn_stats == "target" and not data.train:
            raise UserError(f"--bn-stats target: {data.root} has no training images (bounding_box_train)")
        self.iteration: int | None = None   # of the last call
        self.scores: dict[str, float] = {}

    def state_dict(self) -> dict[str, object]:
        return {"iteration": self.iteration, "scores": self.scores}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.iteration, self.scores = state["iteration"], dict(state["scores"])

    def __call__(self, net: IDNet | SPGANNet, iteration: int, meta: Mapping[str, object], log: Log) -> None:
        self.score(net, f"{iteration}.png")
        self.iteration = iteration
        log.scores(iteration, self.scores)
        self.run.say(f"iteration {iteration}, {self.lines()}")

    def score(self, net: IDNet | SPGANNet, panel: str = "ranks.png") -> dict[str, float]:
        """The scores of ``net``, which is left as it is. panel: file name of the rank lists."""
        if self.bn_stats == "target":
            net = reestimate_bn(net, self.data.train, self.transform, self.run, workers=self.workers)
        query, gallery, learnt = (
            extract(net, people, self.transform, self.run, workers=self.workers, **self.features) if people else None
            for people in (self.data.query, self.data.gallery, self.metric_from))
        if learnt is not None:
            metric = kissme(learnt, names_of(self.metric_from)[0])
            query, gallery = query @ metric, gallery @ metric
        self.scores = scores_of(query, gallery, self.data)
        if self.panels is not None and self.max_panels and self.run.is_main:
            visual.save(rank_panel(query, gallery, self.data, self.max_panels), self.panels / panel)
        if self.rerank:
            again = scores_of(query, gallery, self.data, rerank=True)
            self.scores = self.scores | {f"reranked_{key}": value for key, value in again.items() if key != "unmatched"}
        return self.scores

    def lines(self) -> str:
        def line(title: str, s: Mapping[str, float]) -> str:
            return (f"{title}: " + ", ".join(f"R{k} {s[f'R{k}']:.1f}" for k in RANKS) + f", mAP {s['mAP']:.1f} "
                    f"(trapezoidal; mean of precisions {s['mAP_precision']:.1f})")

        text = line("target", self.scores)
        if self.scores["unmatched"]:
            text += f"; {self.scores['unmatched']} queries without a match left out"
        again = {k.removeprefix("reranked_"): v for k, v in self.scores.items() if k.startswith("reranked_")}
        return text + ("\n" + line("re-ranked", again) if again else "")

    def report(self) -> None:
        """Print the scores of the last evaluation."""
        self.run.say(self.lines())
