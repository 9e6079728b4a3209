"""Renders a miniature adaptation pair: street views that look like a game (source) and like a camera (target).

    python -m lib.datasets.demo OUT --seed 1

The source lies in the GTA5 layout and the target in the Cityscapes layout, both with Cityscapes' label ids (CLASSES, VOID).
A view is a list of planar faces in world metres, painted far to near into one image of face numbers. Labels are those
faces' classes, so they are exact; colours come from shading the same faces per pixel (position, texture, light, haze).
Both domains draw their scenes from the same distribution of layouts; what separates them is one `Look` each.
"""
import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from lib.errors import UserError

VERSION = 1  # raise it when the pictures change: demos rendered before are then rendered again
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN = 7, 8, 11, 12, 13, 17, 19, 20
VEGETATION, TERRAIN, SKY, PERSON, CAR, BUS, VOID = 21, 22, 23, 24, 26, 28, 0
CLASSES = {ROAD: (128, 64, 128), SIDEWALK: (244, 35, 232), BUILDING: (70, 70, 70), WALL: (102, 102, 156),
           FENCE: (190, 153, 153), POLE: (153, 153, 153), LIGHT: (250, 170, 30), SIGN: (220, 220, 0),
           VEGETATION: (107, 142, 35), TERRAIN: (152, 251, 152), SKY: (70, 130, 180), PERSON: (220, 20, 60),
           CAR: (0, 0, 142), BUS: (0, 60, 100)}

FLAT, ASPHALT, PAVING, GRASS, FACADE, LEAVES, BRICK, BARS, COACH, HEAVENS = range(10)  # materials
NEAR, FAR = 1.0, 140.0  # metres: clipping plane and the end of the street
SUPERSAMPLING = 2

Colour = tuple[float, float, float]  # red, green, blue in 0..1
Point = tuple[float, float, float]  # X right of the camera, Y above the ground, Z ahead; metres


@dataclass(frozen=True)
class Look:
    """Everything that separates the domains; strengths are fractions of the full range unless they say otherwise."""
    # surfaces
    asphalt: Sequence[Colour]
    paving: Sequence[Colour]
    facades: Sequence[Colour]
    windows: Sequence[Colour]
    walls: Sequence[Colour]
    fences: Sequence[Colour]
    leaves: Sequence[Colour]
    grass: Sequence[Colour]
    poles: Sequence[Colour]
    cars: Sequence[Colour]
    clothes: Sequence[Colour]
    sky: tuple[Colour, Colour]  # zenith, horizon
    clouds: float
    texture: float  # multi-octave noise on every surface
    dirt: float  # large stains and repairs
    # light and camera
    illumination: Colour
    ambient: float  # the share of light that does not come from the sun
    shadow: float  # how much light a cast shadow takes away
    haze: float  # per metre
    haze_colour: Colour
    gamma: float
    contrast: float
    saturation: float
    brightness: float
    exposure: float  # spread of brightness from picture to picture
    vignette: float
    blur: float  # pixels at the height BLUR_HEIGHT
    noise: float
    # shares of what stands in the street
    traffic: float  # mean number of moving cars
    parked: float  # how likely a kerb is full of parked cars
    people: float  # mean number of people
    buses: float  # mean number of buses
    trees: float  # how likely a side has a row of trees
    frontage: tuple[float, float, float, float, float]  # weights of building, wall, fence, hedge, open ground
    bonnet: float  # how likely the camera car's bonnet shows (void)


BLUR_HEIGHT = 96
SOURCE = Look(
    asphalt=[(.36, .36, .40), (.31, .31, .36), (.40, .40, .43)],
    paving=[(.72, .68, .60), (.66, .64, .60), (.76, .70, .62)],
    facades=[(.86, .74, .56), (.80, .52, .42), (.90, .86, .76), (.62, .70, .78), (.74, .64, .50), (.84, .66, .62)],
    windows=[(.22, .34, .50), (.16, .26, .42), (.30, .44, .58)],
    walls=[(.74, .68, .60), (.66, .50, .42)], fences=[(.52, .38, .26), (.40, .44, .50)],
    leaves=[(.30, .54, .16), (.38, .58, .20), (.24, .48, .18)], grass=[(.48, .62, .24), (.56, .60, .28)],
    poles=[(.34, .36, .38), (.26, .28, .30)],
    cars=[(.80, .12, .10), (.14, .26, .66), (.92, .92, .92), (.12, .12, .14), (.86, .66, .12), (.16, .46, .30)],
    clothes=[(.80, .22, .20), (.20, .36, .72), (.88, .84, .78), (.24, .52, .34), (.82, .62, .20)],
    sky=((.30, .54, .90), (.70, .84, .97)), clouds=.35, texture=.05, dirt=.03,
    illumination=(1.06, 1.0, .92), ambient=.52, shadow=.0, haze=.001, haze_colour=(.74, .84, .95),
    gamma=1.0, contrast=1.0, saturation=1.1, brightness=.0, exposure=.05, vignette=.0, blur=.0, noise=.004,
    traffic=2.2, parked=.35, people=2.5, buses=.18, trees=.45, frontage=(.46, .20, .14, .12, .08), bonnet=.0)
TARGET = Look(
    asphalt=[(.44, .43, .41), (.50, .48, .45), (.38, .38, .38)],
    paving=[(.54, .52, .50), (.60, .57, .54), (.50, .46, .44)],
    facades=[(.60, .55, .46), (.50, .34, .28), (.68, .66, .60), (.46, .47, .48), (.62, .52, .38), (.56, .46, .42)],
    windows=[(.24, .26, .28), (.38, .41, .43), (.17, .18, .19)],
    walls=[(.52, .49, .45), (.46, .40, .36)], fences=[(.34, .33, .30), (.30, .36, .32)],
    leaves=[(.19, .27, .14), (.25, .30, .16), (.15, .23, .15)], grass=[(.36, .40, .22), (.42, .41, .26)],
    poles=[(.42, .43, .43), (.33, .34, .34)],
    cars=[(.12, .12, .13), (.52, .53, .55), (.74, .74, .74), (.30, .31, .34), (.20, .24, .36), (.44, .12, .12)],
    clothes=[(.14, .15, .19), (.22, .24, .32), (.40, .36, .32), (.46, .16, .16), (.55, .55, .55)],
    sky=((.74, .78, .82), (.90, .91, .91)), clouds=.8, texture=.20, dirt=.14,
    illumination=(.94, 1.0, .98), ambient=.66, shadow=.42, haze=.008, haze_colour=(.82, .85, .86),
    gamma=1.15, contrast=.82, saturation=.80, brightness=.02, exposure=.14, vignette=.35, blur=.55, noise=.022,
    traffic=3.4, parked=.65, people=4.5, buses=.14, trees=.60, frontage=(.62, .09, .09, .12, .08), bonnet=.5)


class Scene:
    """One street view: camera, image of face numbers, mask of cast shadows, and one record per face."""

    def __init__(self, rng: Random, width: int, height: int):
        self.width, self.height = width * SUPERSAMPLING, height * SUPERSAMPLING
        self.eye = rng.uniform(1.3, 2.1)  # metres above the road
        self.focal = rng.uniform(.72, .92) * self.width
        self.u0 = self.width * rng.uniform(.40, .60)  # vanishing point of the straight road
        self.v0 = self.height * rng.uniform(.38, .50)
        self.curve = rng.uniform(-.0016, .0016)  # the road's middle is at X = middle + curve Z^2
        self.lanes, self.lane = rng.choice((2, 2, 3, 4)), rng.uniform(3.0, 3.6)
        self.half = self.lanes * self.lane / 2
        self.middle = -self.half * rng.uniform(.15, .6)
        azimuth, elevation = rng.uniform(0, 2 * math.pi), rng.uniform(.45, 1.1)
        self.sun = (math.cos(elevation) * math.sin(azimuth), math.sin(elevation), math.cos(elevation) * math.cos(azimuth))
        self.ids = Image.new("I", (self.width, self.height), 0)
        self.draw = ImageDraw.Draw(self.ids)
        self.shade = Image.new("L", (self.width, self.height), 0)
        self.draw_shade = ImageDraw.Draw(self.shade)
        self.faces = [(0, 0, 1 / 400, SKY, HEAVENS, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0)]

    def at(self, lateral: float, z: float) -> float:
        """X of the point `lateral` metres right of the road's middle at distance z."""
        return self.middle + lateral + self.curve * z * z

    def project(self, points: Sequence[Point]) -> list[tuple[float, float]]:
        """Pixel positions of a polygon, cut at the near plane."""
        if min(p[2] for p in points) < NEAR:
            kept = []
            for a, b in zip(points, [*points[1:], points[0]], strict=True):
                if a[2] >= NEAR:
                    kept.append(a)
                if (a[2] >= NEAR) != (b[2] >= NEAR):
                    t = (NEAR - a[2]) / (b[2] - a[2])
                    kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), NEAR))
            points = kept
        return [(self.u0 + self.focal * x / z, self.v0 - self.focal * (y - self.eye) / z) for x, y, z in points]

    def face(self, points: Sequence[Point], label: int, colour: Colour, material: int = FLAT,
             second: Colour = (0, 0, 0), p: float = 0, q: float = 0) -> None:
        """Paints a planar polygon; `second`, p and q are the material's other colour and its two sizes in metres."""
        (x0, y0, z0), (x1, y1, z1), (x2, y2, z2) = points[:3]
        ax, ay, az, bx, by, bz = x1 - x0, y1 - y0, z1 - z0, x2 - x0, y2 - y0, z2 - z0
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        d = nx * x0 + ny * (y0 - self.eye) + nz * z0
        size = math.sqrt(nx * nx + ny * ny + nz * nz)
        pixels = self.project(points)
        if abs(d) < 1e-6 * size or len(pixels) < 3:
            return  # seen edge-on, or behind the camera
        # On a plane n.P = d, 1/z is linear in the pixel position: the face needs three numbers for exact depth.
        a, b = nx / (self.focal * d), -ny / (self.focal * d)
        c = nz / d - a * self.u0 - b * self.v0
        sun = max(0.0, (nx * self.sun[0] + ny * self.sun[1] + nz * self.sun[2]) / (size if d < 0 else -size))
        along = math.hypot(nx, nz)
        tx, tz = (nz / along, -nx / along) if along > 1e-3 * size else (1.0, 0.0)
        self.faces.append((a, b, c, label, material, sun, *colour, *second, tx, tz, x0 * tx + z0 * tz, p, q))
        self.draw.polygon(pixels, fill=len(self.faces) - 1)

    def disc(self, x: float, y: float, z: float, rx: float, ry: float, label: int, colour: Colour,
             material: int = FLAT) -> None:
        """Paints an upright ellipse that faces the camera."""
        (left, top), (right, bottom) = self.project([(x - rx, y + ry, z), (x + rx, y - ry, z)])
        sun = .5 + .5 * self.sun[1] * (1 if material == LEAVES else 0)
        self.faces.append((0, 0, 1 / z, label, material, sun, *colour, 0, 0, 0, 1, 0, x, rx, 0))
        self.draw.ellipse((left, top, right, bottom), fill=len(self.faces) - 1)

    def upright(self, x0: float, x1: float, y0: float, y1: float, z: float, label: int, colour: Colour, *more) -> None:
        """Paints an upright rectangle that faces the camera."""
        self.face([(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)], label, colour, *more)

    def cast(self, points: Sequence[Point]) -> None:
        """Darkens the ground where the sun's rays through a polygon meet it."""
        k = [y / self.sun[1] for _, y, _ in points]
        flat = [(x - self.sun[0] * t, 0.0, z - self.sun[2] * t) for (x, _, z), t in zip(points, k, strict=True)]
        pixels = self.project(flat)
        if len(pixels) > 2:
            self.draw_shade.polygon(pixels, fill=255)


def tone(rng: Random, colours: Sequence[Colour], spread: float = .12) -> Colour:
    """One of the colours, a little lighter or darker."""
    gain = 1 + rng.uniform(-spread, spread)
    return tuple(c * gain for c in rng.choice(colours))


def scale(colour: Colour, gain: float) -> Colour:
    return tuple(c * gain for c in colour)


# ---- what stands in a street ------------------------------------------------------------------------------------------


def ground(s: Scene, rng: Random, look: Look) -> list[dict]:
    """Terrain, road and the strips beside it; returns each side's measures (metres from the road's middle)."""
    depths = [1.0, 2, 3, 4, 6, 8, 11, 15, 20, 28, 40, 60, 90, FAR]

    def strip(inner: float, outer: float, label: int, colour: Colour, material: int, *more) -> None:
        s.face([(s.at(inner, z), 0, z) for z in depths] + [(s.at(outer, z), 0, z) for z in reversed(depths)],
               label, colour, material, *more)

    grass = tone(rng, look.grass)
    s.face([(-400, 0, 1), (-400, 0, 380), (400, 0, 380), (400, 0, 1)], TERRAIN, grass, GRASS)
    sides = []
    paving, asphalt = tone(rng, look.paving), tone(rng, look.asphalt)
    for sign in (-1, 1):
        pavement = rng.uniform(1.6, 4.2)
        verge = rng.uniform(1.0, 2.6) if rng.random() < .4 else 0.0
        garden = rng.uniform(1.0, 5.0) if rng.random() < .45 else 0.0
        kerb = s.half + .25
        strip(sign * s.half, sign * (kerb + verge + pavement), SIDEWALK, paving, PAVING)
        if verge:
            strip(sign * (kerb + .1), sign * (kerb + verge), TERRAIN, scale(grass, .95), GRASS)
        strip(sign * s.half, sign * kerb, SIDEWALK, scale(paving, 1.14), FLAT)
        sides.append({"sign": sign, "kerb": kerb, "verge": verge, "walk": (kerb + verge + .4, kerb + verge + pavement - .4),
                      "front": kerb + verge + pavement + garden, "parked": rng.random() < look.parked})
    crossing = rng.uniform(7, 30) if rng.random() < .3 else -9.0
    strip(-s.half, s.half, ROAD, asphalt, ASPHALT, (.86, .86, .82), crossing, 0.0)
    return sides


def building(s: Scene, rng: Random, look: Look, sign: int, front: float, z0: float, z1: float, tall: float) -> None:
    floor, bay = rng.uniform(2.8, 3.6), rng.uniform(2.0, 3.6)
    height = floor * max(1, round(tall * rng.uniform(.6, 1.4))) + rng.uniform(.5, 1.0)
    colour, glass = tone(rng, look.facades), tone(rng, look.windows)
    near, far = s.at(sign * front, z0), s.at(sign * front, z1)
    deep = near + sign * rng.uniform(8, 14)
    s.cast([(near, 0, z0), (near, height, z0), (far, height, z1), (far, 0, z1)])
    s.cast([(near, 0, z0), (near, height, z0), (deep, height, z0), (deep, 0, z0)])
    if rng.random() < .35:  # a pitched roof along the street
        ridge, roof = near + sign * 4, scale(tone(rng, look.walls), .75)
        s.face([(near, height, z0), (far, height, z1), (ridge + far - near, height + 2.6, z1), (ridge, height + 2.6, z0)],
               BUILDING, roof, BRICK)
        s.face([(near, height - .1, z0), (ridge, height + 2.6, z0), (ridge + sign * 4, height - .1, z0)], BUILDING, colour)
    s.face([(near, 0, z0), (near, height, z0), (deep, height, z0), (deep, 0, z0)], BUILDING, scale(colour, .94), FACADE,
           glass, floor, bay)
    s.face([(near, 0, z0), (near, height, z0), (far, height, z1), (far, 0, z1)], BUILDING, colour, FACADE, glass, floor, bay)


def barrier(s: Scene, rng: Random, look: Look, label: int, sign: int, front: float, z0: float, z1: float) -> None:
    """A wall, a fence or a hedge along the street."""
    height = {WALL: rng.uniform(1.6, 3.2), FENCE: rng.uniform(1.2, 2.2), VEGETATION: rng.uniform(1.0, 2.4)}[label]
    colours, material = {WALL: (look.walls, BRICK), FENCE: (look.fences, BARS), VEGETATION: (look.leaves, LEAVES)}[label]
    colour = tone(rng, colours)
    near, far = s.at(sign * front, z0), s.at(sign * front, z1)
    more = (tone(rng, look.grass), .32, height) if label == FENCE else (scale(colour, .7), .6, height)
    s.cast([(near, 0, z0), (near, height, z0), (far, height, z1), (far, 0, z1)])
    if label != FENCE:
        end = near + sign * (.4 if label == WALL else 1.2)
        s.face([(near, 0, z0), (near, height, z0), (end, height, z0), (end, 0, z0)], label, scale(colour, .9), material, *more)
    s.face([(near, 0, z0), (near, height, z0), (far, height, z1), (far, 0, z1)], label, colour, material, *more)


def tree(s: Scene, rng: Random, look: Look, x: float, z: float) -> None:
    height, radius = rng.uniform(4.5, 8.5), rng.uniform(1.3, 2.6)
    colour = tone(rng, look.leaves)
    stem = rng.uniform(.09, .17)
    s.cast([(x - stem, 0, z), (x - stem, height, z), (x + stem, height, z), (x + stem, 0, z)])
    ring = [(x + radius * math.cos(a), height + .8 * radius * math.sin(a), z) for a in np.linspace(0, 5.5, 8).tolist()]
    s.cast(ring)
    s.upright(x - stem, x + stem, 0, height, z, VEGETATION, scale((.40, .31, .24), colour[0] * 2.2 + .25), LEAVES)
    for _ in range(5 if z > 45 else 9):
        angle, r = rng.uniform(0, 2 * math.pi), radius * rng.uniform(.2, .75)
        dy = .9 * r * math.sin(angle)
        s.disc(x + r * math.cos(angle), height + dy, z, radius * rng.uniform(.4, .62), radius * rng.uniform(.36, .55),
               VEGETATION, scale(colour, .92 + .25 * dy / radius), LEAVES)


def car(s: Scene, rng: Random, look: Look, lateral: float, z: float, towards: bool) -> None:
    """A car whose near end is at z; `towards`: its front faces the camera."""
    paint, glass = tone(rng, look.cars), scale(tone(rng, look.windows), .6)
    long, wide, tall = rng.choice(((3.7, 1.66, 1.5), (4.4, 1.78, 1.45), (4.6, 1.85, 1.75), (5.0, 1.95, 2.1)))
    belt, sill = tall * .58, .28
    x = s.at(lateral, z)
    lean = s.at(lateral, z + long) - x  # follows the road
    left, right = x - wide / 2, x + wide / 2
    near_cabin, far_cabin = (1.2, long - .5) if towards else (.35, long - 1.2)
    if tall > 2:
        near_cabin, far_cabin = (.9, long - .1) if towards else (.1, long - .9)
    slope, inset = .4, .16
    for dx, dz in ((0, 0), (-s.sun[0], -s.sun[2])):
        k = tall / s.sun[1] * .8
        s.cast([(left + dx * k, 0, z + dz * k), (left + lean + dx * k, 0, z + long + dz * k),
                (right + lean + dx * k, 0, z + long + dz * k), (right + dx * k, 0, z + dz * k)])

    def point(side: float, y: float, dz: float) -> Point:
        return side + lean * dz / long, y, z + dz

    # The underside's darkness belongs to the road, wheels and body to the car.
    s.face([point(left, .02, -.1), point(left, .02, long), point(right, .02, long), point(right, .02, -.1)], ROAD,
           scale(look.asphalt[0], .35))
    seen, inner = (right, right - inset) if x < 0 else (left, left + inset)
    if min(abs(left), abs(right)) > .1:
        for dz in (long * .82, long * .2):
            rim = [(point(seen, .34 + .34 * math.sin(a), dz + .34 * math.cos(a))) for a in (0, .8, 1.6, 2.4, 3.1, 3.9, 4.7, 5.5)]
            s.face(rim, CAR, (.10, .10, .10))
        s.face([point(seen, sill, 0), point(seen, belt, 0), point(seen, belt, long), point(seen, sill, long)], CAR, paint)
        for dz in (long * .82, long * .2):
            s.face([point(seen, .32 + .30 * math.sin(a), dz + .30 * math.cos(a)) for a in (0, 1.05, 2.1, 3.14, 4.2, 5.2)], CAR,
                   (.09, .09, .10))
        s.face([point(seen, belt, near_cabin), point(inner, tall, near_cabin + slope), point(inner, tall, far_cabin - slope),
                point(seen, belt, far_cabin)], CAR, scale(paint, .96))
        s.face([point(seen, belt + .05, near_cabin + .22), point(inner, tall - .1, near_cabin + slope + .1),
                point(inner, tall - .1, far_cabin - slope - .1), point(seen, belt + .05, far_cabin - .22)], CAR, glass)
    s.face([point(left, belt, 0), point(left, belt, long), point(right, belt, long), point(right, belt, 0)], CAR, paint)
    roof = [point(left + inset, tall, near_cabin + slope), point(left + inset, tall, far_cabin - slope),
            point(right - inset, tall, far_cabin - slope), point(right - inset, tall, near_cabin + slope)]
    s.face([point(left, belt, near_cabin), roof[0], roof[3], point(right, belt, near_cabin)], CAR, scale(paint, .96))
    s.face([point(left + .12, belt + .05, near_cabin + .02), point(left + inset + .1, tall - .08, near_cabin + slope - .02),
            point(right - inset - .1, tall - .08, near_cabin + slope - .02), point(right - .12, belt + .05, near_cabin + .02)],
           CAR, glass)
    s.face(roof, CAR, paint)
    for edge in (left + .05, right - .3):
        s.upright(edge, edge + .25, 0, sill + .1, z, CAR, (.08, .08, .09))
    s.upright(left, right, sill, belt, z, CAR, paint)
    lamp = (.95, .93, .80) if towards else (.75, .08, .06)
    for edge in (left + .06, right - .36):
        s.upright(edge, edge + .30, belt - .26, belt - .10, z, CAR, lamp)
    s.upright(x - .26, x + .26, sill + .12, sill + .24, z, CAR, (.85, .85, .80))
    s.upright(left, right, sill, sill + .08, z, CAR, (.14, .14, .15))


def bus(s: Scene, rng: Random, look: Look, lateral: float, z: float) -> None:
    paint, glass = tone(rng, [(.82, .22, .16), (.86, .74, .22), (.88, .88, .86), (.22, .44, .62)]), tone(rng, look.windows)
    paint = tuple(.5 * (c + sum(paint) / 3) + .5 * look.saturation * (c - sum(paint) / 3) for c in paint)
    long, wide, tall, sill = rng.uniform(9, 13), 2.5, 3.1, .35
    x = s.at(lateral, z)
    lean = s.at(lateral, z + long) - x
    left, right = x - wide / 2, x + wide / 2
    for dx, dz in ((0, 0), (-s.sun[0], -s.sun[2])):
        k = tall / s.sun[1]
        s.cast([(left + dx * k, 0, z + dz * k), (left + lean + dx * k, 0, z + long + dz * k),
                (right + lean + dx * k, 0, z + long + dz * k), (right + dx * k, 0, z + dz * k)])
    s.face([(left, .02, z - .1), (left + lean, .02, z + long), (right + lean, .02, z + long), (right, .02, z - .1)], ROAD,
           scale(look.asphalt[0], .35))
    seen = right if x < 0 else left
    if min(abs(left), abs(right)) > .1:
        s.face([(seen, sill, z), (seen, tall, z), (seen + lean, tall, z + long), (seen + lean, sill, z + long)], BUS, paint, COACH,
               scale(glass, .6), 1.5, 1.4)
        for dz in (long * .75, long * .2):
            s.face([(seen + lean * dz / long, .48 + .46 * math.sin(a), z + dz + .46 * math.cos(a))
                    for a in (0, .8, 1.6, 2.4, 3.1, 3.9, 4.7, 5.5)], BUS, (.09, .09, .10))
    for edge in (left + .1, right - .45):
        s.upright(edge, edge + .35, 0, sill, z, BUS, (.08, .08, .09))
    s.upright(left, right, sill, tall, z, BUS, paint)
    s.upright(left + .15, right - .15, 1.4, tall - .5, z, BUS, scale(glass, .6))
    s.upright(left + .5, right - .5, tall - .4, tall - .12, z, BUS, (.95, .72, .20))
    for edge in (left + .1, right - .4):
        s.upright(edge, edge + .3, .7, .95, z, BUS, (.80, .12, .08))


def person(s: Scene, rng: Random, look: Look, x: float, z: float) -> None:
    tall = rng.uniform(1.55, 1.9)
    coat, trousers = tone(rng, look.clothes), scale(tone(rng, look.clothes), .6)
    skin = tone(rng, [(.80, .60, .48), (.55, .38, .28), (.88, .70, .58)])
    step, lean = rng.uniform(.03, .22), rng.uniform(-.05, .05)
    hip, neck = tall * .50, tall * .84
    s.cast([(x - .22, 0, z), (x - .2, tall, z), (x + .2, tall, z), (x + .22, 0, z)])
    for foot, edge in ((-step, -.19), (step, .01)):
        s.face([(x + foot - .09, 0, z), (x + edge, hip, z), (x + edge + .18, hip, z), (x + foot + .09, 0, z)], PERSON, trousers)
    s.face([(x - .20, hip - .08, z), (x - .26 + lean, neck, z), (x + .26 + lean, neck, z), (x + .20, hip - .08, z)], PERSON, coat)
    for sign in (-1, 1):
        s.face([(x + sign * .26 + lean, neck, z), (x + sign * (.3 + step * .5), hip, z), (x + sign * (.2 + step * .5), hip, z),
                (x + sign * .16 + lean, neck, z)], PERSON, scale(coat, .8))
    s.disc(x + lean, tall - .12, z, .12, .15, PERSON, skin)
    s.disc(x + lean, tall - .05, z, .12, .08, PERSON, (.18, .14, .11))


def pole(s: Scene, rng: Random, look: Look, x: float, z: float, height: float, radius: float = .10) -> Colour:
    colour = tone(rng, look.poles)
    s.cast([(x - radius, 0, z), (x - radius, height, z), (x + radius, height, z), (x + radius, 0, z)])
    s.upright(x - radius, x, 0, height, z, POLE, scale(colour, 1.15))
    s.upright(x, x + radius, 0, height, z, POLE, scale(colour, .85))
    return colour


def street_lamp(s: Scene, rng: Random, look: Look, x: float, z: float, sign: int) -> None:
    height = rng.uniform(6, 9)
    colour = pole(s, rng, look, x, z, height)
    s.face([(x, height - .1, z), (x, height + .1, z), (x - sign * 1.8, height + .45, z), (x - sign * 1.8, height + .25, z)], POLE, colour)


def traffic_light(s: Scene, rng: Random, look: Look, x: float, z: float, sign: int) -> None:
    arm = rng.random() < .35
    top = rng.uniform(4.8, 5.6) if arm else rng.uniform(2.9, 3.6)
    colour = pole(s, rng, look, x, z, top + .2, .11)
    heads = [(x, rng.uniform(2.6, 3.2) if arm else top)]
    if arm:
        end = x - sign * rng.uniform(2.5, 4)
        s.face([(x, top, z), (x, top + .16, z), (end, top + .16, z), (end, top, z)], POLE, colour)
        heads.append((end, top + .1))
    lit = rng.randrange(3)
    for hx, hy in heads:
        s.upright(hx - .26, hx + .26, hy - 1.05, hy + .25, z - .05, LIGHT, (.09, .10, .10))
        for i, lamp in enumerate(((.95, .12, .08), (.98, .70, .10), (.15, .85, .45))):
            s.disc(hx, hy - i * .40, z - .06, .15, .15, LIGHT, lamp if i == lit else scale(lamp, .28))


def traffic_sign(s: Scene, rng: Random, look: Look, x: float, z: float) -> None:
    y, r = rng.uniform(2.2, 2.9), rng.uniform(.38, .52)
    pole(s, rng, look, x, z, y + r, .07)
    z -= .05
    vivid = .55 + .45 * look.saturation
    red, blue, white, yellow = (.80 * vivid, .10, .10), (.10, .28, .72 * vivid), (.92, .92, .90), (.95 * vivid, .78 * vivid, .12)
    kind = rng.randrange(5)
    if kind == 0:
        s.disc(x, y, z, r, r, SIGN, red)
        s.disc(x, y, z - .01, r * .70, r * .70, SIGN, white)
    elif kind == 1:
        s.disc(x, y, z, r, r, SIGN, blue)
        s.upright(x - .08, x + .08, y - r * .6, y + r * .6, z - .01, SIGN, white)
    elif kind == 2:
        for k, colour in ((1.1, red), (.65, white)):
            s.face([(x - r * k, y - r * .7 * k, z), (x, y + r * k, z), (x + r * k, y - r * .7 * k, z)], SIGN, colour)
    elif kind == 3:
        for k, colour in ((1.15, white), (.8, yellow)):
            s.face([(x - r * k, y, z), (x, y + r * k, z), (x + r * k, y, z), (x, y - r * k, z)], SIGN, colour)
    else:
        s.upright(x - r * 1.5, x + r * 1.5, y - r * .7, y + r * .9, z, SIGN, white)
        s.upright(x - r * 1.4, x + r * 1.4, y - r * .6, y + r * .8, z, SIGN, blue)


def compose(rng: Random, look: Look, width: int, height: int) -> Scene:
    """Draws one street from the look's distribution and paints it far to near."""
    s = Scene(rng, width, height)
    sides = ground(s, rng, look)
    things = []  # (distance, function of no arguments that paints)
    # What lines the street is sorted by its far end: whatever stands in the street before that end hides it.

    def put(z: float, paint, *args) -> None:
        things.append((z, lambda: paint(s, rng, look, *args)))

    for side in sides:
        sign, kerb, front = side["sign"], side["kerb"], side["front"]
        tall = rng.choice((1.6, 2.5, 3.5, 5.0))
        z = rng.uniform(-9, 1)
        while z < FAR:
            end = z + rng.uniform(8, 24)
            kind = rng.choices((BUILDING, WALL, FENCE, VEGETATION, TERRAIN), look.frontage)[0]
            start = max(z, NEAR)
            if kind == BUILDING:
                put(end, building, sign, front, start, end, tall)
            elif end > start + 2:
                if rng.random() < .6:
                    put(end + 20, building, sign, front + rng.uniform(7, 14), start, end, tall)
                for _ in range(rng.randrange(1, 3)):
                    far = rng.uniform(start + 4, end + 4)
                    put(far + 10, tree, s.at(sign * (front + rng.uniform(2.5, 7)), far), far)
                if kind != TERRAIN:
                    put(end, barrier, kind, sign, front, start, end)
            z = end + (rng.uniform(0, 3) if rng.random() < .3 else 0)
        if rng.random() < look.trees:
            z, gap, where = rng.uniform(6, 14), rng.uniform(8, 16), sign * (kerb + max(.7, side["verge"] / 2))
            while z < 80:
                put(z, tree, s.at(where, z), z)
                z += gap * rng.uniform(.8, 1.3)
        z, gap = rng.uniform(7, 18), rng.uniform(16, 30)
        while z < 70:
            put(z, street_lamp, s.at(sign * (kerb + .35), z), z, sign)
            z += gap
        for _ in range(rng.choice((0, 1, 1, 2))):
            z = rng.uniform(7, 26)
            put(z, traffic_sign, s.at(sign * (kerb + rng.uniform(.3, .8)), z), z)
        if rng.random() < .55:
            z = rng.uniform(8, 24)
            put(z, traffic_light, s.at(sign * (kerb + .3), z), z, sign)
        if side["parked"]:
            z = rng.uniform(4, 9)
            while z < 60:
                if rng.random() < .75:
                    put(z, car, sign * (s.half - .95), z, sign < 0)
                z += rng.uniform(5.6, 7)
        for _ in range(round(rng.expovariate(2 / look.people))):
            z = 5.5 + 26 * rng.random() ** 1.3
            x = s.at(sign * rng.uniform(*side["walk"]), z)
            put(z, person, x, z)
            if rng.random() < .4:
                put(z + .2, person, x + rng.choice((-.6, .6)), z + .2)
        if rng.random() < .12:
            z = rng.uniform(9, 25)
            put(z, person, s.at(sign * rng.uniform(0, s.half), z), z)
    taken = []
    for count, kind, length in ((look.buses, bus, 13), (look.traffic, car, 6)):
        for _ in range(round(rng.expovariate(1 / count))):
            lane = rng.randrange(s.lanes)
            lateral = (lane + .5) * s.lane - s.half
            z = rng.uniform(7 if kind is car else 10, 55)
            if (lane, side["parked"]) in ((s.lanes - 1, True), (0, sides[0]["parked"])) and s.lanes == 2:
                lateral *= .55  # beside parked cars
            if all(lane != other or z + length < a or z > b for other, a, b in taken):
                taken.append((lane, z, z + length))
                put(z, kind, lateral, z, lateral < 0) if kind is car else put(z, kind, lateral, z)
    for z in (FAR + 1, FAR + 2):  # what closes the street at the horizon
        for i in range(-3, 4):
            x = s.at(i * 22 + rng.uniform(-8, 8), FAR)
            put(z + rng.random(), skyline, x, z)
    for _, paint in sorted(things, key=lambda t: -t[0]):
        paint()
    if rng.random() < look.bonnet:
        top, w, h = s.height * rng.uniform(.945, .975), s.width, s.height
        s.faces.append((0, 0, 1, VOID, FLAT, .3, .10, .10, .11, 0, 0, 0, 1, 0, 0, 0, 0))
        s.draw.ellipse((-.1 * w, top, 1.1 * w, top + .5 * h), fill=len(s.faces) - 1)
    return s


def skyline(s: Scene, rng: Random, look: Look, x: float, z: float) -> None:
    if rng.random() < .5:
        wide, tall = rng.uniform(6, 14), rng.uniform(6, 22)
        s.upright(x - wide, x + wide, 0, tall, z, BUILDING, tone(rng, look.facades), FACADE, tone(rng, look.windows), 3.2, 3.0)
    else:
        s.disc(x, 2, z, rng.uniform(9, 16), rng.uniform(4, 10), VEGETATION, tone(rng, look.leaves), LEAVES)


# ---- from faces to a picture --------------------------------------------------------------------------------------------


@cache
def fractal_noise(seed: int, size: int = 256, slope: float = 1.1) -> np.ndarray:
    """Tileable multi-octave noise, float32 [size, size], mean 0 and standard deviation 1."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    f[0, 0] = np.inf
    spectrum = np.fft.rfft2(np.random.default_rng(seed).standard_normal((size, size))) / f ** slope
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return (noise / noise.std()).astype(np.float32)


def shade(s: Scene, rng: np.random.Generator, look: Look, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [H, W, 3], and its label ids, uint8 [H, W], of a painted scene."""
    ids = np.asarray(s.ids).ravel()
    faces = np.array(s.faces, np.float32)
    v, u = np.divmod(np.arange(ids.size, dtype=np.float32), np.float32(s.width))
    a, b, c = faces[:, :3].T
    z = 1 / np.maximum(a[ids] * u + b[ids] * v + c[ids], 1 / 400)
    x, y = (u - s.u0) / s.focal * z, s.eye - (v - s.v0) / s.focal * z
    along = faces[:, 12][ids] * x + faces[:, 13][ids] * z - faces[:, 14][ids]
    material = faces[:, 4].astype(np.uint8)[ids]
    flat = (material >= ASPHALT) & (material <= GRASS)
    along, up = np.where(flat, x, along), np.where(flat, z, y)
    rgb = faces[:, 6:9][ids]

    def grain(per_metre: float, k=slice(None)) -> np.ndarray:
        return noise[(up[k] * per_metre).astype(np.int64) & 255, (along[k] * per_metre).astype(np.int64) & 255]

    light = 1 + look.texture * grain(23) * .6 + look.dirt * grain(3.1)
    for kind, pattern in PATTERNS.items():
        k = np.flatnonzero(material == kind)
        if k.size:
            pattern(s, look, noise, faces[ids[k]], k, x[k], up[k], z[k], along[k], rgb, light)
    sun = faces[:, 5][ids]
    shadow = np.asarray(s.shade).ravel()
    sun = np.where(flat, s.sun[1] * (1 - look.shadow * (shadow > 0)), sun)
    light *= look.ambient * (1 - .45 * look.shadow * (flat & (shadow > 0))) + (1 - look.ambient) * 1.45 * sun
    sky = material == HEAVENS
    light[sky] = 1
    rgb *= light[:, None] * np.asarray(look.illumination, np.float32)
    clear = np.exp(-look.haze * np.minimum(z, 200))[:, None]
    clear[sky] = 1
    rgb = rgb * clear + (1 - clear) * np.asarray(look.haze_colour, np.float32)
    n = SUPERSAMPLING
    h, w = s.height // n, s.width // n
    rgb = rgb.reshape(h, n, w, n, 3)
    rgb = sum(rgb[:, i, :, j] for i in range(n) for j in range(n)) / n ** 2
    labels = np.sort(faces[:, 3].astype(np.uint8)[ids].reshape(h, n, w, n).swapaxes(1, 2).reshape(h, w, n * n), 2)[:, :, ::-1]
    # The commonest of the four samples, the larger id (poles, signs, people before surfaces) when two tie.
    label = np.where(labels[..., 0] == labels[..., 1], labels[..., 0], labels[..., 2])
    label = np.where((labels[..., 1] == labels[..., 2]), labels[..., 1], label)
    return develop(rgb, rng, look), label


def sky_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    height = np.clip((s.v0 - k // s.width) / s.v0, 0, 1)[:, None]
    top, bottom = (np.asarray(c, np.float32) for c in look.sky)
    row, column = k // s.width, k % s.width
    shift = int(abs(s.u0 * 7 + s.v0 * 13))
    cloud = noise[(row * 2 // SUPERSAMPLING + shift) & 255, (column // SUPERSAMPLING + shift) & 255]
    cloud = np.clip(cloud * .5 + look.clouds - .3, 0, 1)[:, None] * .8
    rgb[k] = (top * height + bottom * (1 - height)) * (1 - cloud) + cloud * .93


def asphalt_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    lateral = x - s.middle - s.curve * z * z
    lane = lateral + s.half
    beside = np.abs(lane - np.round(lane / s.lane) * s.lane)
    inner = (np.round(lane / s.lane) > 0) & (np.round(lane / s.lane) < s.lanes)
    mark = inner & (beside < .09) & ((z % 7 < 3.2) | ((s.lanes == 4) & (np.abs(lateral) < .5)))
    mark |= np.abs(np.abs(lateral) - s.half + .35) < .07
    crossing = f[0, 15]
    mark |= (z > crossing) & (z < crossing + 3) & (lane % 1.0 < .5) & (np.abs(lateral) < s.half - .3)
    tracks = np.cos(lane / s.lane * 4 * np.pi) * .03
    light[k] += np.where(mark, 0, tracks)
    rgb[k] = np.where(mark[:, None], f[:, 9:12], rgb[k])


def paving_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    joint = ((z % 1.2 < .10) | ((x - s.curve * z * z) % 1.2 < .10)) & (z < 16)
    light[k] -= .16 * joint


def grass_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    light[k] += (.05 + look.texture * .8) * noise[(z * 9).astype(np.int64) & 255, (x * 9).astype(np.int64) & 255]


def facade_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    floor, bay = f[:, 15], f[:, 16]
    i, j = np.floor(up / floor), np.floor(along / bay)
    across, above = along / bay - j, up / floor - i
    window = (across > .25) & (across < .75) & (above > .28) & (above < .80)
    shop = (i < 1) & (f[:, 6] > f[:, 8] * 1.08)  # the warmer half of the facades has shops
    window = np.where(shop, (across > .08) & (across < .92) & (above > .12) & (above < .78), window)
    frame = (across > .2) & (across < .8) & (above > .22) & (above < .86) & ~window & ~shop
    pane = noise[(i * 37).astype(np.int64) & 255, (j * 91 + bay * 1000).astype(np.int64) & 255][:, None]
    rgb[k] = np.where(window[:, None], f[:, 9:12] * (1 + .35 * np.clip(pane, -1.5, 2)), rgb[k])
    light[k] += .14 * frame - .10 * ((above < .05) & (i > 0))


def leaves_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    i, j = (up * 21).astype(np.int64), (along * 21).astype(np.int64)
    light[k] += (.10 + look.texture * .8) * noise[i & 255, j & 255]


def brick_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    course = np.floor(up / .3)
    joint = (up / .3 - course < .16) | ((along / .8 + .5 * (course % 2)) % 1 < .08)
    light[k] -= .14 * joint * (z < 14) + .12 * (along % 3 < .12)
    light[k] += .12 * ((f[:, 16] > 0) & (up > f[:, 16] - .22))


def bars_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    bar = (along % f[:, 15] < .15) | (up > f[:, 16] - .16) | ((up > .2) & (up < .34))
    rgb[k] = np.where(bar[:, None], rgb[k], f[:, 9:12] * .55)


def coach_pattern(s, look, noise, f, k, x, up, z, along, rgb, light):
    pane = (up > 1.35) & (up < 2.5) & (along % f[:, 15] > .14)
    rgb[k] = np.where(pane[:, None], f[:, 9:12], rgb[k])
    light[k] -= .25 * ((up > .8) & (up < .95))


PATTERNS = {HEAVENS: sky_pattern, ASPHALT: asphalt_pattern, PAVING: paving_pattern, GRASS: grass_pattern,
            FACADE: facade_pattern, LEAVES: leaves_pattern, BRICK: brick_pattern, BARS: bars_pattern, COACH: coach_pattern}


def develop(rgb: np.ndarray, rng: np.random.Generator, look: Look) -> np.ndarray:
    """The camera: exposure, colour, blur, vignette and noise; float32 [H, W, 3] to uint8."""
    h, w = rgb.shape[:2]
    rgb = np.clip(rgb * (1 + look.exposure * rng.uniform(-1, 1)), 0, 1.2) ** look.gamma
    grey = rgb.mean(2, keepdims=True)
    rgb = grey + (rgb - grey) * look.saturation
    rgb = (rgb - .5) * look.contrast + .5 + look.brightness
    if look.blur:
        rgb = gaussian_filter(rgb, (look.blur * h / BLUR_HEIGHT,) * 2 + (0,), truncate=2.5)
    if look.vignette:
        y, x = np.linspace(-1, 1, h, dtype=np.float32)[:, None], np.linspace(-1, 1, w, dtype=np.float32)
        rgb *= (1 - look.vignette * (x * x + y * y) / 2)[..., None]
    rgb += look.noise * rng.standard_normal(rgb.shape, dtype=np.float32)
    return (np.clip(rgb, 0, 1) * 255 + .5).astype(np.uint8)


# ---- files --------------------------------------------------------------------------------------------------------------


def render_view(domain: str, seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """View number `index` of "source", "train" or "val": uint8 [H, W, 3] and label ids, uint8 [H, W]; size is (width, height)."""
    look = SOURCE if domain == "source" else TARGET
    name = f"{domain}/{seed}/{index}"
    scene = compose(Random(name), look, *size)
    return shade(scene, np.random.default_rng(list(name.encode())), look, fractal_noise(seed))


def render_demo(root: Path, seed: int = 0, size: tuple[int, int] = (192, 96), n_source: int = 240, n_target: int = 160,
                n_val: int = 40) -> Path:
    """Renders the pair into root/gta5 and root/cityscapes and returns root; the same seed gives the same bytes.

    size is (width, height) in pixels, the counts are pictures. A pair rendered before with the same settings is kept, one
    with other settings is replaced as a whole. Raises UserError where root holds anything else.
    """
    root = Path(root)
    settings = {"version": VERSION, "seed": seed, "size": list(size), "source": n_source, "target": n_target, "val": n_val}
    marker = root / "demo.json"
    if root.exists():
        if marker.is_file() and marker.read_text() == json.dumps(settings):
            return root
        if not root.is_dir() or {p.name for p in root.iterdir()} - {"gta5", "cityscapes", "demo.json"}:
            raise UserError(f"{root}: holds other files than a demo; name a new or empty folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        palette = bytes(c for i in range(256) for c in CLASSES.get(i, (0, 0, 0)))
        for domain, count in (("source", n_source), ("train", n_target), ("val", n_val)):
            for index in range(count):
                picture, label = render_view(domain, seed, index, size)
                label = Image.fromarray(label)
                if domain == "source":
                    label.putpalette(palette)
                    paths = [draft / "gta5" / kind / f"{index + 1:05}.png" for kind in ("images", "labels")]
                else:
                    city = "lakeside" if domain == "val" else ("millbrook", "northgate", "riverton")[index % 3]
                    stem = f"{domain}/{city}/{city}_{index:06}_000019"
                    paths = [draft / "cityscapes" / "leftImg8bit" / f"{stem}_leftImg8bit.png",
                             draft / "cityscapes" / "gtFine" / f"{stem}_gtFine_labelIds.png"]
                for image, path in zip((Image.fromarray(picture), label), paths, strict=True):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path, compress_level=1)
        (draft / "demo.json").write_text(json.dumps(settings))
        os.chmod(draft, 0o755)  # mkdtemp's folder is private
        if root.exists():
            shutil.rmtree(root)
        os.replace(draft, root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description="Renders the miniature pair of --demo.")
    parser.add_argument("out", type=Path, help="folder to render into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(192, 96), metavar=("W", "H"), help="pixels")
    args = parser.parse_args()
    print(render_demo(args.out, args.seed, tuple(args.size)))


if __name__ == "__main__":
    main()
