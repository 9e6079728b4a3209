"""Renders a miniature pair of camera networks with people in them, under Market-1501's names.

    python -m lib.demo.persons OUT --seed 1

OUT/plaza (source) and OUT/campus (target) each hold bounding_box_train, query, bounding_box_test and camera styles.
A person is a drawn figure of 64 x 128 pixels. Clothes, hair, skin, bag and build belong to the identity; light, white
balance, sharpness, direction of view and background to the camera; palettes, scale and the range of what cameras do
to the domain. Training and test people are disjoint.
"""
import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lib import flags
from lib.errors import UserError
from lib.files import replaced_folder

VERSION = 1  # raise it when the pictures change: demos rendered before are then rendered again
WIDTH, HEIGHT, SCALE = 64, 128, 3  # drawn at three times the size
SCENE = 12                          # width of what a camera overlooks, in pictures
Colour = tuple[float, float, float]  # red, green, blue in 0..1


@dataclass(frozen=True)
class Look:
    """What separates the domains. Ranges are (least, most)."""

    tops: Sequence[Colour]
    trousers: Sequence[Colour]
    ground: Sequence[Colour]            # of the backgrounds
    clutter: int                        # things behind a person
    figure: tuple[float, float]         # height of a person as a share of the picture
    gain: float                         # spread of the cameras' exposures, in stops
    balance: float                      # spread of their white balances
    blur: tuple[float, float]           # pixels
    noise: float


@dataclass(frozen=True)
class Identity:
    top: Colour
    trousers: Colour
    hair: Colour
    skin: Colour
    shoes: Colour
    bag: str                            # "none", "backpack", "shoulder", "hand"
    bag_colour: Colour
    pattern: str                        # of the top: "plain", "stripes", "block"
    second: Colour
    sleeves: float                      # covered share of the arm
    legs: float                         # covered share of the leg: 1 trousers, 0.5 shorts
    long_hair: bool
    build: float                        # width
    height: float


@dataclass(frozen=True)
class Camera:
    gain: np.ndarray                    # [3], of linear light: exposure times white balance
    gamma: float
    blur: float
    heading: float                      # of most people in front of it, radians: 0 is towards the camera
    scene: Image.Image                  # several pictures wide: people walk through it
    vignette: float


GREYS = [(.08, .08, .09), (.25, .25, .27), (.5, .5, .5), (.8, .8, .8), (.93, .92, .90)]
HAIR = [(.06, .05, .05), (.22, .13, .08), (.45, .28, .14), (.75, .60, .34), (.55, .53, .52)]
SKIN = [(.95, .80, .70), (.87, .67, .53), (.68, .47, .34), (.45, .30, .21)]
DENIM = [(.13, .18, .33), (.25, .34, .52), (.42, .50, .63)]
SOURCE = Look(tops=[(.80, .16, .14), (.16, .30, .66), (.14, .48, .26), (.88, .74, .20), (.52, .22, .56), *GREYS],
              trousers=[*DENIM, *GREYS[:3], (.50, .42, .30)],
              ground=[(.62, .60, .56), (.70, .66, .58), (.56, .58, .60)], clutter=3, figure=(.80, .92), gain=.15,
              balance=.04, blur=(.0, .5), noise=.010)
TARGET = Look(tops=[(.66, .24, .20), (.20, .44, .58), (.40, .52, .20), (.80, .52, .22), (.70, .44, .56),
                    (.30, .24, .48), *GREYS],
              trousers=[*DENIM, *GREYS[:3], (.36, .30, .24), (.52, .50, .40)],
              ground=[(.38, .46, .30), (.46, .42, .36), (.34, .36, .40), (.56, .50, .44)], clutter=5,
              figure=(.72, .88), gain=.85, balance=.34, blur=(.3, 1.3), noise=.022)


def draw_identity(look: Look, rng: np.random.Generator, top: Colour | None = None) -> Identity:
    def pick(colours: Sequence[Colour]) -> Colour:
        colour = np.asarray(colours[rng.integers(len(colours))]) + rng.normal(0, .025, 3)
        return tuple(colour.clip(.02, .98))

    return Identity(
        top=top or pick(look.tops), trousers=pick(look.trousers), hair=pick(HAIR), skin=pick(SKIN),
        shoes=pick(GREYS), bag=str(rng.choice(["none", "backpack", "shoulder", "hand"])), bag_colour=pick(look.tops),
        pattern=str(rng.choice(["plain", "plain", "stripes", "block"])), second=pick(look.tops),
        sleeves=float(rng.choice([.35, 1.0])), legs=float(rng.choice([.5, 1.0, 1.0])),
        long_hair=bool(rng.integers(2)), build=float(rng.uniform(.85, 1.2)), height=float(rng.uniform(.92, 1.0)))


def draw_camera(look: Look, rng: np.random.Generator, number: int, count: int) -> Camera:
    """Cameras are spread over the range of the look, so that each set has warm and cold, light and dark ones."""
    place = (number + rng.uniform(.2, .8)) / count * 2 - 1                    # -1 .. 1
    other = ((number * 2 + 1) % count + rng.uniform(.2, .8)) / count * 2 - 1
    balance = np.array([1 + look.balance * place, 1 + look.balance * rng.uniform(-.25, .25), 1 - look.balance * place])
    return Camera(balance * 2 ** (look.gain * other), float(rng.uniform(.9, 1.1)), float(rng.uniform(*look.blur)),
                  number * 2 * np.pi / count + rng.uniform(-.3, .3), _scene(look, rng), float(rng.uniform(0, .25)))


def _scene(look: Look, rng: np.random.Generator) -> Image.Image:
    """Walls, ground and clutter, SCENE pictures wide."""
    w, h = WIDTH * SCALE, HEIGHT * SCALE
    scene = Image.new("RGB", (SCENE * w, h))
    d = ImageDraw.Draw(scene)

    def colour(spread: float) -> tuple[int, int, int]:
        base = np.asarray(look.ground[rng.integers(len(look.ground))])
        return _rgb((base * rng.uniform(1 - spread, 1 + spread)).clip(0, 1))

    horizon = h * rng.uniform(.42, .55)
    for top, bottom in ((0, horizon), (horizon, h)):
        x = 0.0
        while x < scene.width:
            step = w * rng.uniform(.4, 1.6)
            d.rectangle((x, top, x + step, bottom), fill=colour(.35))
            x += step
    for _ in range(look.clutter * SCENE):
        x, y = rng.uniform(0, scene.width), rng.uniform(0, .8) * h
        a, b = rng.uniform(.08, .4, 2) * (w, h) / 2
        d.rectangle((x - a, y - b, x + a, y + b), fill=colour(.5))
    return scene


def render(who: Identity, camera: Camera, look: Look, rng: np.random.Generator, aside: float = 0.0) -> Image.Image:
    """One detection of 64 x 128 pixels; ``aside`` moves the person out of it by that share of the width (junk)."""
    w, h = WIDTH * SCALE, HEIGHT * SCALE
    left = int(rng.integers(0, (SCENE - 1) * w))
    picture = camera.scene.crop((left, 0, left + w, h))
    d = ImageDraw.Draw(picture)

    size = h * rng.uniform(*look.figure) * who.height
    foot = h * .5 + size / 2 + h * rng.uniform(-.03, .03)
    x = w / 2 + w * (rng.uniform(-.07, .07) + aside)
    heading = camera.heading + rng.normal(0, .35)
    _figure(d, who, x, foot, size, heading, rng)

    pixels = picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    blur = camera.blur + rng.uniform(0, .2)
    pixels = pixels.filter(ImageFilter.GaussianBlur(blur))
    light = (np.asarray(pixels, np.float64) / 255) ** 2.2 * camera.gain * 2 ** rng.normal(0, .12)
    across = np.linspace(-1, 1, WIDTH)[None] ** 2 + np.linspace(-1, 1, HEIGHT)[:, None] ** 2
    light *= (1 - camera.vignette * across / 2)[..., None]
    shown = light.clip(0, None) ** (camera.gamma / 2.2)
    shown = shown / (1 + np.maximum(shown - .8, 0))                            # highlights roll off
    shown += rng.normal(0, look.noise, shown.shape)
    return Image.fromarray((shown.clip(0, 1) * 255).round().astype(np.uint8))


def _figure(d: ImageDraw.ImageDraw, who: Identity, x: float, foot: float, size: float, heading: float,
            rng: np.random.Generator) -> None:
    """Legs, torso, arms, head and bag; heading 0 looks at the camera, pi away from it."""
    side, front = np.sin(heading), np.cos(heading)
    wide = size * .125 * who.build * (1 - .3 * abs(side))                     # half the shoulders
    stride = size * .10 * rng.uniform(-1, 1) * (.4 + .6 * abs(side))
    hip, shoulder, chin = foot - size * .47, foot - size * .81, foot - size * .85
    thick = size * .055 * who.build

    def limb(ax, ay, bx, by, covered, colour, bare, width):
        mx, my = ax + (bx - ax) * covered, ay + (by - ay) * covered
        for (x0, y0, x1, y1), c in (((ax, ay, bx, by), bare), ((ax, ay, mx, my), colour)):
            d.line((x0, y0, x1, y1), fill=_rgb(c), width=max(1, round(width)))

    if who.bag == "backpack" and front > -.2:
        middle = x - side * wide
        d.rounded_rectangle((middle - wide * .9, shoulder + size * .01, middle + wide * .9, hip - size * .06),
                            size * .03, fill=_rgb(who.bag_colour))
    for sign in (-1, 1):
        limb(x + sign * wide * .45, hip, x + sign * wide * .4 + sign * stride, foot - size * .02, who.legs,
             who.trousers, who.skin, thick * 1.5)
        d.ellipse((x + sign * wide * .4 + sign * stride - thick, foot - size * .035,
                   x + sign * wide * .4 + sign * stride + thick + side * thick, foot), fill=_rgb(who.shoes))
    d.rounded_rectangle((x - wide * .8, hip - size * .05, x + wide * .8, hip + size * .05), size * .02,
                        fill=_rgb(who.trousers))
    swing = size * .06 * rng.uniform(-1, 1)
    for sign in (-1, 1):
        limb(x + sign * wide * .95, shoulder + size * .03, x + sign * wide * 1.15 + sign * swing, hip + size * .02,
             who.sleeves, who.top, who.skin, thick)
    torso = (x - wide, shoulder, x + wide, hip)
    d.rounded_rectangle(torso, size * .04, fill=_rgb(who.top))
    if who.pattern == "stripes":
        for n in range(1, 6, 2):
            y = shoulder + (hip - shoulder) * n / 6
            d.rectangle((x - wide, y, x + wide, y + (hip - shoulder) / 7), fill=_rgb(who.second))
    elif who.pattern == "block":
        d.rectangle((x - wide, shoulder + (hip - shoulder) * .55, x + wide, hip), fill=_rgb(who.second))
    if who.bag == "backpack":
        if front < -.2:
            d.rounded_rectangle((x - wide * .8, shoulder + size * .03, x + wide * .8, hip - size * .05), size * .03,
                                fill=_rgb(who.bag_colour))
        else:
            for sign in (-1, 1):
                d.line((x + sign * wide * .6, shoulder, x + sign * wide * .6, hip - size * .12),
                       fill=_rgb(who.bag_colour), width=round(size * .018))
    elif who.bag == "shoulder":
        d.line((x - wide * .8, shoulder, x + wide * .8, hip), fill=_rgb(who.bag_colour), width=round(size * .02))
        d.rounded_rectangle((x + wide * .45, hip - size * .06, x + wide * 1.35, hip + size * .09), size * .01,
                            fill=_rgb(who.bag_colour))
    elif who.bag == "hand":
        d.rectangle((x - wide * 1.7, hip + size * .02, x - wide * .9, hip + size * .15), fill=_rgb(who.bag_colour))
    r = size * .055
    d.ellipse((x - r, chin - 2.2 * r, x + r, chin + .2 * r), fill=_rgb(who.skin))
    if front < -.2:                                                           # from behind: hair only
        d.ellipse((x - r * 1.1, chin - 2.4 * r, x + r * 1.1, chin - .1 * r), fill=_rgb(who.hair))
    else:
        d.pieslice((x - r * 1.1, chin - 2.4 * r, x + r * 1.1, chin), 180, 360, fill=_rgb(who.hair))
    if who.long_hair:
        back = r * (1.15 if front < -.2 else .5)
        centre = x - side * r * .8
        d.rectangle((centre - back, chin - 1.4 * r, centre + back, chin + 1.1 * r), fill=_rgb(who.hair)) if front < .2 \
            else [d.rectangle((x + s * r * .9 - r * .3, chin - 1.4 * r, x + s * r * .9 + r * .3, chin + r),
                              fill=_rgb(who.hair)) for s in (-1, 1)]


def _rgb(colour: Colour) -> tuple[int, int, int]:
    return tuple(round(255 * float(c)) for c in colour)


# --- a pair on disk ------------------------------------------------------------------------------------------------


def render_persons(root: str | Path, seed: int = 0, people: int = 24, cameras: int = 4, images: int = 3) -> Path:
    """Render the pair into root/plaza (source) and root/campus (target); the same seed gives the same bytes.

    people: identities of each of a domain's two splits; images: of each before each camera. A pair rendered before with
    the same settings is kept, one with other settings is replaced as a whole. Raises UserError where root holds
    anything else or cannot be written.
    """
    root = Path(root)
    settings = json.dumps({"version": VERSION, "seed": seed, "people": people, "cameras": cameras, "images": images})
    marker = root / "persons.json"

    def rendered() -> bool:
        return marker.is_file() and marker.read_text() == settings

    if rendered():
        return root
    if root.exists() and not (root.is_dir() and {p.name for p in root.iterdir()} <= {"plaza", "campus", marker.name}):
        raise UserError(f"{root}: holds other files than a demo; name a new or empty folder")
    with replaced_folder(root, rendered) as draft:
        for number, (name, look) in enumerate((("plaza", SOURCE), ("campus", TARGET))):
            _render_domain(draft / name, look, np.random.default_rng([seed, number]), people, cameras, images)
        transfer_colours(draft / "plaza", draft / "campus")
        transfer_colours(draft / "campus", draft / "campus")
        (draft / marker.name).write_text(settings)
    return root


def _render_domain(folder: Path, look: Look, rng: np.random.Generator, people: int, cameras: int, images: int) -> None:
    """Training people are 2, 4, ..; test people 1, 3, ..; 0 are distractors; -1 is junk."""
    views = [draw_camera(look, rng, n, cameras) for n in range(cameras)]
    frame = 0

    def shoot(part: str, number: int, who: Identity, n: int, aside: float = 0.0) -> None:
        nonlocal frame
        frame += 1
        label = "-1" if number < 0 else f"{number:04}"
        path = folder / part / f"{label}_c{n + 1}s1_{frame:06}_00.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(who, views[n], look, rng, aside).save(path, quality=92)

    for first, parts in ((2, ["bounding_box_train"] * images), (1, ["query"] + ["bounding_box_test"] * (images - 1))):
        top = None
        for k in range(people):
            who = draw_identity(look, rng, top)
            top = who.top if k % 4 == 0 else None  # every fourth person shares the top's colour with the next
            for n in range(cameras):
                for part in parts:
                    shoot(part, first + 2 * k, who, n)
    for k in range(people):
        who = draw_identity(look, rng)
        shoot("bounding_box_test", 0, who, k % cameras)
        shoot("bounding_box_test", -1, who, k % cameras, aside=rng.choice([-1, 1]) * rng.uniform(.3, .5))


def transfer_colours(content: Path, style: Path) -> None:
    """Give each training image of ``content`` the colours of each camera of ``style``: its camera styles.

    Per channel, the mean and deviation over all training images of the one camera become those of the other. That is
    no CycleGAN: it moves light and white balance, and neither sharpness nor background.
    """
    def by_camera(folder: Path) -> dict[int, list[Path]]:
        found: dict[int, list[Path]] = {}
        for path in sorted((folder / "bounding_box_train").glob("*.jpg")):
            found.setdefault(int(path.name.partition("_c")[2].partition("s")[0]), []).append(path)
        return found

    def statistics(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.stack([np.asarray(Image.open(p), np.float64) for p in paths]).reshape(-1, 3)
        return pixels.mean(0), pixels.std(0)

    ours = by_camera(content)
    wanted = {c: statistics(paths) for c, paths in by_camera(style).items()}
    out = content / "bounding_box_train_camstyle"
    out.mkdir()
    for own, paths in ours.items():
        mean, deviation = statistics(paths)
        for path in paths:
            pixels = (np.asarray(Image.open(path), np.float64) - mean) / deviation
            for other, (new_mean, new_deviation) in wanted.items():
                if content != style or other != own:
                    styled = (pixels * new_deviation + new_mean).round().clip(0, 255).astype(np.uint8)
                    Image.fromarray(styled).save(out / f"{path.stem}_fake_{own}to{other}.jpg", quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description="Renders the pair of train_ecn.py --demo.")
    parser.add_argument("out", type=Path, help="folder to render into")
    parser.add_argument("--seed", type=flags.natural, default=0)
    args = parser.parse_args()
    try:
        print(render_persons(args.out, args.seed))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
