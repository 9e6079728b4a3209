"""Renders a miniature adaptation pair: street views that look like a game (source) and like a camera (target).

    python -m lib.datasets.demo OUT --seed 1

The source lies in the GTA5 layout and the target in the Cityscapes layout, both with Cityscapes' label ids (CLASSES).
A view is a list of planar faces in world metres, painted far to near into one image of face numbers. Labels are those
faces' classes, so they are exact; colours come from shading the same faces per pixel (position, texture, light, haze).
Both domains draw their streets from the same distribution; what separates them is one `Look` each.
"""
import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from lib import flags
from lib.errors import UserError

VERSION = 6  # raise it when the pictures change: demos rendered before are then rendered again
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN = 7, 8, 11, 12, 13, 17, 19, 20
VEGETATION, TERRAIN, SKY, PERSON, CAR, BUS, VOID = 21, 22, 23, 24, 26, 28, 0
CLASSES = {ROAD: (128, 64, 128), SIDEWALK: (244, 35, 232), BUILDING: (70, 70, 70), WALL: (102, 102, 156),
           FENCE: (190, 153, 153), POLE: (153, 153, 153), LIGHT: (250, 170, 30), SIGN: (220, 220, 0),
           VEGETATION: (107, 142, 35), TERRAIN: (152, 251, 152), SKY: (70, 130, 180), PERSON: (220, 20, 60),
           CAR: (0, 0, 142), BUS: (0, 60, 100)}

FLAT, ASPHALT, PAVING, GRASS, FACADE, LEAVES, BRICK, BARS, COACH, HEAVENS = range(10)  # materials
PLANE, LABEL, MATERIAL, SUN, COLOUR, SECOND, AXIS, SIZES = 0, 3, 4, 5, 6, 9, 12, 15  # first columns of a face record
WHEEL = [(math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)]
NEAR, FAR = 1.0, 140.0  # metres: clipping plane and the end of the street
SUPERSAMPLING = 2  # four samples vote on a pixel's label

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
    traffic=1.6, parked=.33, people=6.0, buses=.7, trees=.45, frontage=(.36, .23, .24, .10, .07), bonnet=.0)
TARGET = Look(
    asphalt=[(.44, .43, .41), (.50, .48, .45), (.38, .38, .38)],
    paving=[(.60, .57, .54), (.66, .62, .58), (.56, .52, .49)],
    facades=[(.66, .60, .50), (.54, .37, .30), (.74, .72, .66), (.52, .53, .54), (.68, .57, .42), (.62, .50, .45)],
    windows=[(.24, .26, .28), (.38, .41, .43), (.17, .18, .19)],
    walls=[(.58, .54, .49), (.52, .44, .38)], fences=[(.38, .34, .29), (.32, .38, .36)],
    leaves=[(.25, .36, .17), (.32, .40, .19), (.20, .31, .18)], grass=[(.40, .48, .23), (.47, .48, .28)],
    poles=[(.42, .43, .43), (.33, .34, .34)],
    cars=[(.12, .12, .13), (.56, .57, .59), (.78, .78, .78), (.30, .31, .34), (.20, .26, .42), (.52, .13, .12)],
    clothes=[(.14, .15, .19), (.22, .25, .36), (.46, .40, .35), (.54, .17, .16), (.60, .60, .60)],
    sky=((.74, .79, .84), (.90, .91, .91)), clouds=.8, texture=.13, dirt=.08,
    illumination=(.90, 1.0, 1.02), ambient=.66, shadow=.40, haze=.006, haze_colour=(.82, .85, .86),
    gamma=1.25, contrast=.78, saturation=.80, brightness=.04, exposure=.10, vignette=.30, blur=.45, noise=.016,
    traffic=2.4, parked=.50, people=7.5, buses=.6, trees=.60, frontage=(.44, .17, .22, .10, .07), bonnet=.5)


class Scene:
    """One street view: camera, image of face numbers, mask of cast shadows, and one record per face."""

    def __init__(self, rng: Random, width: int, height: int):
        self.width, self.height = width * SUPERSAMPLING, height * SUPERSAMPLING
        self.eye = rng.uniform(1.5, 2.4)  # metres above the road
        self.focal = rng.uniform(.78, .98) * self.width
        self.u0 = self.width * rng.uniform(.40, .60)  # vanishing point of the straight road
        self.v0 = self.height * rng.uniform(.38, .50)
        self.curve = rng.uniform(-.0016, .0016)  # the road's middle is at X = middle + curve Z^2
        self.lanes, self.lane = rng.choice((2, 2, 2, 3, 4)), rng.uniform(2.8, 3.4)
        self.half = self.lanes * self.lane / 2  # of the road without its parking strips
        self.middle = -self.half * rng.uniform(.15, .6)
        azimuth, elevation = rng.uniform(0, 2 * math.pi), rng.uniform(.45, 1.1)
        level = math.cos(elevation)
        self.sun = (level * math.sin(azimuth), math.sin(elevation), level * math.cos(azimuth))  # unit vector towards it
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


# ---- what stands in a street -----------------------------------------------------------------------------------------


def ground(s: Scene, rng: Random, look: Look) -> list[dict]:
    """Terrain, road and the strips beside it; returns both sides' measures (metres from the road's middle)."""
    depths = [1.0, 2, 3, 4, 6, 8, 11, 15, 20, 28, 40, 60, 90, FAR]

    def strip(inner: float, outer: float, label: int, colour: Colour, material: int, *more) -> None:
        s.face([(s.at(inner, z), 0, z) for z in depths] + [(s.at(outer, z), 0, z) for z in reversed(depths)],
               label, colour, material, *more)

    grass, paving, asphalt = tone(rng, look.grass), tone(rng, look.paving), tone(rng, look.asphalt)
    s.face([(-400, 0, 1), (-400, 0, 380), (400, 0, 380), (400, 0, 1)], TERRAIN, grass, GRASS)
    sides = []
    for sign in (-1, 1):
        parked = rng.random() < look.parked
        edge = s.half + (2.0 if parked else .3)
        kerb = edge + .25
        verge = rng.uniform(1.4, 3.2) if rng.random() < .45 else 0.0
        front = kerb + verge + rng.uniform(2.2, 4.8)
        strip(sign * edge, sign * front, SIDEWALK, paving, PAVING)
        if verge:
            strip(sign * (kerb + .1), sign * (kerb + verge), TERRAIN, scale(grass, .95), GRASS)
        strip(sign * edge, sign * kerb, SIDEWALK, scale(paving, 1.14), FLAT)
        sides.append({"sign": sign, "edge": edge, "kerb": kerb, "trees": kerb + max(.7, verge / 2), "parked": parked,
                      "walk": (kerb + verge + .4, front - .4),
                      "front": front + (rng.uniform(1.5, 6.0) if rng.random() < .5 else 0.0)})
    crossing = rng.uniform(7, 30) if rng.random() < .3 else -9.0
    strip(-sides[0]["edge"], sides[1]["edge"], ROAD, asphalt, ASPHALT, (.86, .86, .82), crossing)
    return sides


def building(s: Scene, rng: Random, look: Look, sign: int, front: float, z0: float, z1: float, tall: float) -> None:
    floor, bay = rng.uniform(2.8, 3.6), rng.uniform(2.0, 3.6)
    height = floor * max(1, round(tall * rng.uniform(.6, 1.4))) + rng.uniform(.3, .7)
    colour, glass = tone(rng, look.facades), tone(rng, look.windows)
    near, far = s.at(sign * front, z0), s.at(sign * front, z1)
    deep = near + sign * rng.uniform(8, 14)
    s.cast([(near, 0, z0), (near, height, z0), (far, height, z1), (far, 0, z1)])
    s.cast([(near, 0, z0), (near, height, z0), (deep, height, z0), (deep, 0, z0)])
    if rng.random() < .35:  # a pitched roof along the street
        ridge, roof, top = near + sign * 4, scale(tone(rng, look.walls), .75), height + 2.6
        slope = [(near, height, z0), (far, height, z1), (ridge + far - near, top, z1), (ridge, top, z0)]
        s.face(slope, BUILDING, roof, BRICK)
        s.face([(near, height - .1, z0), (ridge, top, z0), (ridge + sign * 4, height - .1, z0)], BUILDING, colour)
    for (x, z), gain in (((deep, z0), .94), ((far, z1), 1)):  # the end towards the camera, then the front
        s.face([(near, 0, z0), (near, height, z0), (x, height, z), (x, 0, z)], BUILDING, scale(colour, gain), FACADE,
               glass, floor, bay)


def barrier(s: Scene, rng: Random, look: Look, label: int, sign: int, front: float, z0: float, z1: float) -> None:
    """A wall, a fence or a hedge along the street."""
    colours, material, height = {WALL: (look.walls, BRICK, rng.uniform(1.9, 3.4)),
                                 FENCE: (look.fences, BARS, rng.uniform(1.4, 2.6)),
                                 VEGETATION: (look.leaves, LEAVES, rng.uniform(1.0, 2.4))}[label]
    colour = tone(rng, colours)
    near, far = s.at(sign * front, z0), s.at(sign * front, z1)
    more = (scale(tone(rng, look.grass), .4), .27, height) if label == FENCE else (colour, .6, height)
    s.cast([(near, 0, z0), (near, height, z0), (far, height, z1), (far, 0, z1)])
    if label != FENCE:
        end = near + sign * (.4 if label == WALL else 1.2)
        s.face([(near, 0, z0), (near, height, z0), (end, height, z0), (end, 0, z0)], label, colour, material, *more)
    s.face([(near, 0, z0), (near, height, z0), (far, height, z1), (far, 0, z1)], label, colour, material, *more)


def tree(s: Scene, rng: Random, look: Look, x: float, z: float) -> None:
    height, radius = rng.uniform(3.6, 6.6), rng.uniform(1.3, 2.5)
    colour = tone(rng, look.leaves)
    stem = rng.uniform(.09, .17)
    s.cast([(x - stem, 0, z), (x - stem, height, z), (x + stem, height, z), (x + stem, 0, z)])
    s.cast([(x + radius * dx, height + .8 * radius * dy, z) for dx, dy in WHEEL])
    s.upright(x - stem, x + stem, 0, height, z, VEGETATION, scale((.40, .31, .24), colour[0] * 2.2 + .25), LEAVES)
    for _ in range(5 if z > 45 else 9):
        angle, r = rng.uniform(0, 2 * math.pi), radius * rng.uniform(.2, .75)
        dy = .9 * r * math.sin(angle)
        s.disc(x + r * math.cos(angle), height + dy, z, radius * rng.uniform(.4, .62), radius * rng.uniform(.36, .55),
               VEGETATION, scale(colour, .92 + .25 * dy / radius), LEAVES)


def underside(s: Scene, look: Look, x: float, lean: float, z: float, long: float, wide: float, tall: float) -> None:
    """A vehicle's shadow, and the darkness below it, which belongs to the road."""
    left, right = x - wide / 2, x + wide / 2
    base = [(left, .02, z - .1), (left + lean, .02, z + long), (right + lean, .02, z + long), (right, .02, z - .1)]
    k = .8 * tall / s.sun[1]
    s.cast(base)
    s.cast([(bx - k * s.sun[0], 0, bz - k * s.sun[2]) for bx, _, bz in base])
    s.face(base, ROAD, scale(look.asphalt[0], .35))


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

    def point(side: float, y: float, dz: float) -> Point:
        return side + lean * dz / long, y, z + dz

    underside(s, look, x, lean, z, long, wide, tall)
    seen, inner = (right, right - inset) if x < 0 else (left, left + inset)
    if right < 0 or left > 0:
        s.face([point(seen, y, dz) for y, dz in ((sill, 0), (belt, 0), (belt, long), (sill, long))], CAR, paint)
        for dz in (long * .82, long * .2):
            s.face([point(seen, .33 + .33 * dy, dz + .33 * dx) for dx, dy in WHEEL], CAR, (.09, .09, .10))
        s.face([point(seen, belt, near_cabin), point(inner, tall, near_cabin + slope),
                point(inner, tall, far_cabin - slope), point(seen, belt, far_cabin)], CAR, scale(paint, .96))
        s.face([point(seen, belt + .05, near_cabin + .22), point(inner, tall - .1, near_cabin + slope + .1),
                point(inner, tall - .1, far_cabin - slope - .1), point(seen, belt + .05, far_cabin - .22)], CAR, glass)
    s.face([point(left, belt, 0), point(left, belt, long), point(right, belt, long), point(right, belt, 0)], CAR, paint)
    front, back = near_cabin + slope, far_cabin - slope
    for trim, lift, colour in ((0, 0, scale(paint, .96)), (.1, .06, glass)):
        s.face([point(left + trim, belt + lift, near_cabin), point(left + inset + trim, tall - lift, front),
                point(right - inset - trim, tall - lift, front), point(right - trim, belt + lift, near_cabin)],
               CAR, colour)
    s.face([point(left + inset, tall, front), point(left + inset, tall, back), point(right - inset, tall, back),
            point(right - inset, tall, front)], CAR, paint)
    for edge in (left + .05, right - .3):
        s.upright(edge, edge + .25, 0, sill + .1, z, CAR, (.08, .08, .09))
    s.upright(left, right, sill, belt, z, CAR, paint)
    lamp = (.95, .93, .80) if towards else (.75, .08, .06)
    for edge in (left + .06, right - .36):
        s.upright(edge, edge + .30, belt - .26, belt - .10, z, CAR, lamp)
    s.upright(x - .26, x + .26, sill + .12, sill + .24, z, CAR, (.85, .85, .80))
    s.upright(left, right, sill, sill + .08, z, CAR, (.14, .14, .15))


def bus(s: Scene, rng: Random, look: Look, lateral: float, z: float, towards: bool) -> None:
    paint = tone(rng, [(.80, .24, .18), (.84, .72, .26), (.86, .86, .84), (.24, .44, .60)])
    glass = scale(tone(rng, look.windows), .6)
    long, wide, tall, sill = rng.uniform(9, 13), 2.5, 3.1, .35
    x = s.at(lateral, z)
    lean = s.at(lateral, z + long) - x
    left, right = x - wide / 2, x + wide / 2
    underside(s, look, x, lean, z, long, wide, tall)
    seen = right if x < 0 else left
    if right < 0 or left > 0:
        s.face([(seen, sill, z), (seen, tall, z), (seen + lean, tall, z + long), (seen + lean, sill, z + long)], BUS,
               paint, COACH, glass, 1.5)
        for dz in (long * .75, long * .2):
            s.face([(seen + lean * dz / long, .48 + .48 * dy, z + dz + .48 * dx) for dx, dy in WHEEL], BUS,
                   (.09, .09, .10))
    for edge in (left + .1, right - .45):
        s.upright(edge, edge + .35, 0, sill, z, BUS, (.08, .08, .09))
    s.upright(left, right, sill, tall, z, BUS, paint)
    s.upright(left + .15, right - .15, 1.4, tall - .5, z, BUS, glass)
    s.upright(left + .5, right - .5, tall - .4, tall - .12, z, BUS, (.95, .72, .20))
    for edge in (left + .1, right - .4):
        s.upright(edge, edge + .3, .7, .95, z, BUS, (.95, .93, .80) if towards else (.80, .12, .08))


def person(s: Scene, rng: Random, look: Look, x: float, z: float) -> None:
    tall = rng.uniform(1.55, 1.9)
    coat, trousers = tone(rng, look.clothes), scale(tone(rng, look.clothes), .6)
    skin = tone(rng, [(.80, .60, .48), (.55, .38, .28), (.88, .70, .58)])
    step, lean = rng.uniform(.05, .26), rng.uniform(-.05, .05)
    hip, neck = tall * .50, tall * .84
    s.cast([(x - .22, 0, z), (x - .2, tall, z), (x + .2, tall, z), (x + .22, 0, z)])

    def quad(bottom: float, top: float, colour: Colour, *x4: float) -> None:
        s.face([(x + dx, y, z) for dx, y in zip(x4, (bottom, top, top, bottom), strict=True)], PERSON, colour)

    quad(0, hip, trousers, -step - .11, -.23, -.01, -step + .11)
    quad(0, hip, trousers, step - .11, .01, .23, step + .11)
    quad(hip - .08, neck, coat, -.25, -.31 + lean, .31 + lean, .25)
    for sign in (-1, 1):
        hand = sign * (.30 + step / 2)
        quad(hip, neck, scale(coat, .8), hand - .05, sign * .26 + lean - .05, sign * .26 + lean + .05, hand + .05)
    s.disc(x + lean, tall - .12, z, .15, .17, PERSON, skin)
    s.disc(x + lean, tall - .05, z, .15, .09, PERSON, (.18, .14, .11))


def pole(s: Scene, rng: Random, look: Look, x: float, z: float, height: float, radius: float = .13) -> Colour:
    colour = tone(rng, look.poles)
    s.cast([(x - radius, 0, z), (x - radius, height, z), (x + radius, height, z), (x + radius, 0, z)])
    s.upright(x - radius, x, 0, height, z, POLE, scale(colour, 1.15))
    s.upright(x, x + radius, 0, height, z, POLE, scale(colour, .85))
    return colour


def street_lamp(s: Scene, rng: Random, look: Look, x: float, z: float, sign: int) -> None:
    height = rng.uniform(6, 9)
    colour = pole(s, rng, look, x, z, height)
    end = x - sign * 1.8
    s.face([(x, height - .1, z), (x, height + .1, z), (end, height + .45, z), (end, height + .25, z)], POLE, colour)


def traffic_light(s: Scene, rng: Random, look: Look, x: float, z: float, sign: int) -> None:
    arm = rng.random() < .35
    top = rng.uniform(5.0, 5.8) if arm else rng.uniform(3.1, 3.8)
    colour = pole(s, rng, look, x, z, top + .2, .15)
    heads = [(x, rng.uniform(2.6, 3.2) if arm else top)]
    if arm:
        end = x - sign * rng.uniform(2.5, 4)
        s.face([(x, top, z), (x, top + .16, z), (end, top + .16, z), (end, top, z)], POLE, colour)
        heads.append((end, top + .1))
    lit = rng.randrange(3)
    for hx, hy in heads:
        s.upright(hx - .36, hx + .36, hy - 1.42, hy + .36, z - .05, LIGHT, (.09, .10, .10))
        for i, lamp in enumerate(((.95, .12, .08), (.98, .70, .10), (.15, .85, .45))):
            s.disc(hx, hy - i * .53, z - .06, .22, .22, LIGHT, lamp if i == lit else scale(lamp, .28))


def traffic_sign(s: Scene, rng: Random, look: Look, x: float, z: float) -> None:
    y, r = rng.uniform(2.3, 3.0), rng.uniform(.50, .72)
    pole(s, rng, look, x, z, y + r, .11)
    z -= .05
    red, blue, white, yellow = (.78, .10, .10), (.10, .28, .70), (.92, .92, .90), (.92, .76, .14)
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
    things = []  # (distance, what paints it)

    def put(z: float, paint: Callable, *args) -> None:
        things.append((z, partial(paint, s, rng, look, *args)))

    for side in sides:
        sign, kerb, front = side["sign"], side["kerb"], side["front"]
        tall = rng.choice((1.6, 2.5, 3.5, 5.0))  # floors in this street
        z = rng.uniform(-9, 1)
        # What lines the street is sorted by its far end: whatever stands in the street before that end hides it.
        while z < FAR:
            start, end = max(z, NEAR), z + rng.uniform(8, 24)
            kind = rng.choices((BUILDING, WALL, FENCE, VEGETATION, TERRAIN), look.frontage)[0]
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
            z, gap = rng.uniform(6, 14), rng.uniform(8, 16)
            while z < 80:
                put(z, tree, s.at(sign * side["trees"], z), z)
                z += gap * rng.uniform(.8, 1.3)
        z, gap = rng.uniform(7, 18), rng.uniform(16, 30)
        while z < 70:
            put(z, street_lamp, s.at(sign * (kerb + .35), z), z, sign)
            z += gap
        for _ in range(rng.choice((0, 1, 2, 2))):
            z = rng.uniform(6, 20)
            put(z, traffic_sign, s.at(sign * (kerb + rng.uniform(.3, .8)), z), z)
        if rng.random() < .6:
            z = rng.uniform(7, 20)
            put(z, traffic_light, s.at(sign * (kerb + .3), z), z, sign)
        if side["parked"]:
            z = rng.uniform(4, 9)
            while z < 60:
                if rng.random() < .75:
                    put(z, car, sign * (side["edge"] - 1.0), z, sign < 0)
                z += rng.uniform(5.6, 7)
        for _ in range(round(rng.expovariate(2 / look.people))):
            z = 5 + 22 * rng.random() ** 1.4
            x = s.at(sign * rng.uniform(*side["walk"]), z)
            put(z, person, x, z)
            if rng.random() < .4:
                put(z + .2, person, x + rng.choice((-.6, .6)), z + .2)
        if rng.random() < .15:  # on the road
            z = rng.uniform(7, 20)
            put(z, person, s.at(sign * rng.uniform(0, s.half), z), z)
    taken = []
    for mean, kind, length in ((look.buses, bus, 13), (look.traffic, car, 6)):
        for _ in range(round(rng.expovariate(1 / mean))):
            lane, z = rng.randrange(s.lanes), rng.uniform(8, 50)
            lateral = (lane + .5) * s.lane - s.half
            if all(lane != other or z + length < a or z > b for other, a, b in taken):
                taken.append((lane, z, z + length))
                put(z, kind, lateral, z, lateral < 0)
    for i in range(-3, 4):  # what closes the street
        for _ in range(2):
            z = FAR + 2 * rng.random()
            put(z, skyline, s.at(i * 22 + rng.uniform(-8, 8), FAR), z)
    for _, paint in sorted(things, key=lambda t: -t[0]):
        paint()
    if rng.random() < look.bonnet:
        top, w, h = s.height * rng.uniform(.945, .975), s.width, s.height
        s.faces.append((0, 0, 1, VOID, FLAT, .3, .10, .10, .11, 0, 0, 0, 1, 0, 0, 0, 0))
        s.draw.ellipse((-.1 * w, top, 1.1 * w, top + .5 * h), fill=len(s.faces) - 1)
    return s


def skyline(s: Scene, rng: Random, look: Look, x: float, z: float) -> None:
    if rng.random() < .5:
        wide, tall = rng.uniform(6, 14), 3.2 * rng.randrange(2, 8) + .5
        glass = tone(rng, look.windows)
        s.upright(x - wide, x + wide, 0, tall, z, BUILDING, tone(rng, look.facades), FACADE, glass, 3.2, 3.0)
    else:
        wide, tall = rng.uniform(9, 16), rng.uniform(6, 12)
        hill = [(x + wide * dx, max(0.0, tall * dy), z) for dx, dy in WHEEL]
        s.face(hill, VEGETATION, tone(rng, look.leaves), LEAVES)


# ---- from faces to a picture -----------------------------------------------------------------------------------------


@cache
def fractal_noise(seed: int, slope: float, size: int = 256) -> np.ndarray:
    """Tileable multi-octave noise, float32 [size, size], mean 0, standard deviation 1; a larger slope is smoother."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    f[0, 0] = np.inf
    spectrum = np.fft.rfft2(np.random.default_rng(list(str(seed).encode())).standard_normal((size, size))) / f ** slope
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return (noise / noise.std()).astype(np.float32)


def shade(s: Scene, rng: np.random.Generator, look: Look, grain: np.ndarray,
          stains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [H, W, 3], and its label ids, uint8 [H, W], of a painted scene."""
    n = SUPERSAMPLING
    h, w = s.height // n, s.width // n

    def by_pixel(samples: np.ndarray) -> np.ndarray:  # [pixels, n * n]
        return samples.reshape(h, n, w, n).swapaxes(1, 2).reshape(h * w, n * n)

    ids = by_pixel(np.asarray(s.ids))
    edge = (ids != ids[:, :1]).any(1)  # shaded from all their samples, the pixels inside one face from the first
    where = by_pixel(np.arange(s.height * s.width))
    ids, where = (np.concatenate([a[~edge, 0], a[edge].ravel()]).astype(np.intp) for a in (ids, where))
    inside = h * w - np.count_nonzero(edge)
    faces = np.array(s.faces, np.float32).T.copy()  # [17, faces]

    def column(i: int, k: np.ndarray | slice = slice(None)) -> np.ndarray:
        return faces[i].take(ids[k])

    u, v = (where % s.width).astype(np.float32), (where // s.width).astype(np.float32)
    z = 1 / np.maximum(column(PLANE) * u + column(PLANE + 1) * v + column(PLANE + 2), 1 / 400)
    x, y = (u - s.u0) / s.focal * z, s.eye - (v - s.v0) / s.focal * z
    material = faces[MATERIAL].astype(np.uint8).take(ids)
    flat = (material >= ASPHALT) & (material <= GRASS)
    along = np.where(flat, x, column(AXIS) * x + column(AXIS + 1) * z - column(AXIS + 2))
    up = np.where(flat, z, y)
    rgb = np.stack([column(COLOUR + i) for i in range(3)])  # [3, pixels]

    light = 1 + look.texture * .6 * lookup(grain, up * 23, along * 23) + look.dirt * lookup(stains, up * 7, along * 7)
    for kind, pattern in PATTERNS.items():
        k = np.flatnonzero(material == kind)
        if k.size:
            surface = Surface(x[k], z[k], along[k], up[k], column(SIZES, k), column(SIZES + 1, k))
            mask, gain = pattern(s, look, grain, surface)
            light[k] += gain
            painted = k[mask]
            for i in range(3):
                rgb[i, painted] = column(SECOND + i, painted)
    lit = 1 - look.shadow * ((np.asarray(s.shade).ravel().take(where) > 0) & flat)
    sun = np.where(flat, s.sun[1] * lit, column(SUN))
    light *= look.ambient * (.55 + .45 * lit) + (1 - look.ambient) * 1.45 * sun
    clear = np.exp(-look.haze * np.minimum(z, 200))
    sky = material == HEAVENS
    light[sky], clear[sky] = 1, 1
    height = np.clip(1 - v[sky] / s.v0, 0, 1)
    cloud = lookup(stains, v[sky] * (120 / s.height) + s.v0 * 7, u[sky] * (90 / s.width) + s.u0 * 7)
    cloud = np.clip(cloud * .5 + look.clouds - .3, 0, 1) * .8
    for i in range(3):
        rgb[i, sky] = (look.sky[0][i] * height + look.sky[1][i] * (1 - height)) * (1 - cloud) + cloud * .93
        rgb[i] = rgb[i] * light * (look.illumination[i] * clear) + look.haze_colour[i] * (1 - clear)
    picture, label = np.empty((h * w, 3), np.float32), np.empty(h * w, np.uint8)
    picture[~edge], picture[edge] = rgb[:, :inside].T, rgb[:, inside:].reshape(3, -1, n * n).mean(2).T
    known = faces[LABEL].astype(np.uint8).take(ids)
    # On an edge the commonest of the four samples; of two and two the larger id (poles, people before surfaces).
    a, b, c, d = np.sort(known[inside:].reshape(-1, n * n), 1).T
    label[~edge], label[edge] = known[:inside], np.where(c == d, d, np.where(b == c, c, np.where(a == b, a, d)))
    return develop(picture.reshape(h, w, 3), rng, look), label.reshape(h, w)


def lookup(noise: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The tileable noise at whole-numbered positions."""
    return noise.ravel().take(((row.astype(np.int32) & 255) << 8) + (column.astype(np.int32) & 255))


def wrap(x: np.ndarray, period: float | np.ndarray) -> np.ndarray:
    """x modulo period (numpy's own operator is many times slower)."""
    return x - np.floor(x / period) * period


class Surface(NamedTuple):
    """What a pattern sees of its pixels, each float32 [pixels], in metres."""
    x: np.ndarray  # in the world
    z: np.ndarray
    along: np.ndarray  # on the face
    up: np.ndarray
    p: np.ndarray  # the face's sizes
    q: np.ndarray


Pattern = tuple[np.ndarray, np.ndarray]  # which pixels show the face's second colour; what is added to the light


def asphalt_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    lateral = f.x - s.middle - s.curve * f.z * f.z
    lane = lateral + s.half
    nearest = np.round(lane / s.lane)
    dashes = (wrap(f.z, 7) < 3.2) | (np.abs(lateral) < .5) if s.lanes == 4 else wrap(f.z, 7) < 3.2
    mark = (nearest > 0) & (nearest < s.lanes) & (np.abs(lane - nearest * s.lane) < .09) & dashes
    mark |= np.abs(np.abs(lateral) - s.half) < .07
    mark |= (f.z > f.p) & (f.z < f.p + 3) & (wrap(lane, 1.0) < .5)  # pedestrian crossing
    return mark, np.where(mark, 0, .03 * np.cos(lane * (4 * np.pi / s.lane)))


def paving_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    joint = ((wrap(f.z, 1.2) < .10) | (wrap(f.x - s.curve * f.z * f.z, 1.2) < .10)) & (f.z < 16)
    return np.zeros(f.z.shape, bool), -.16 * joint


def grass_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    return np.zeros(f.z.shape, bool), (.05 + look.texture * .8) * lookup(grain, f.z * 9, f.x * 9)


def facade_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    i, j = np.floor(f.up / f.p), np.floor(f.along / f.q)
    across, above = f.along / f.q - j, f.up / f.p - i
    shop = (i < 1) & (f.p > 3.2)
    window = (across > .25) & (across < .75) & (above > .28) & (above < .80)
    frame = (across > .20) & (across < .80) & (above > .22) & (above < .86) & ~window & ~shop
    window = np.where(shop, (across > .08) & (across < .92) & (above > .12) & (above < .78), window)
    pane = .35 * np.clip(lookup(grain, i * 37, j * 91 + f.q * 1000), -1.5, 2)
    return window, np.where(window, pane, .14 * frame - .10 * ((above < .05) & (i > 0)))


def leaves_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    return np.zeros(f.z.shape, bool), (.10 + look.texture * .8) * lookup(grain, f.up * 21, f.along * 21)


def brick_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    course = np.floor(f.up / .3)
    joint = (f.up / .3 - course < .16) | (wrap(f.along / .8 + .5 * course, 1) < .08)
    cap = (f.q > 0) & (f.up > f.q - .22)
    return np.zeros(f.z.shape, bool), .12 * cap - .14 * joint * (f.z < 14) - .12 * (wrap(f.along, 3) < .12)


def bars_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    bar = (wrap(f.along, f.p) < .15) | (f.up > f.q - .16) | ((f.up > .2) & (f.up < .34))
    return ~bar, np.zeros(f.z.shape)


def coach_pattern(s: Scene, look: Look, grain: np.ndarray, f: Surface) -> Pattern:
    pane = (f.up > 1.35) & (f.up < 2.5) & (wrap(f.along, f.p) > .14)
    return pane, -.25 * ((f.up > .8) & (f.up < .95))


PATTERNS = {ASPHALT: asphalt_pattern, PAVING: paving_pattern, GRASS: grass_pattern, FACADE: facade_pattern,
            LEAVES: leaves_pattern, BRICK: brick_pattern, BARS: bars_pattern, COACH: coach_pattern}


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


# ---- files -----------------------------------------------------------------------------------------------------------


def render_view(domain: str, seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """View `index` of "source", "train" or "val", size (width, height): uint8 [H, W, 3] and label ids, uint8 [H, W]."""
    look = SOURCE if domain == "source" else TARGET
    name = f"{domain}/{seed}/{index}"
    scene = compose(Random(name), look, *size)
    grain, stains = fractal_noise(seed, 1.1), fractal_noise(seed, 1.9)
    return shade(scene, np.random.default_rng(list(name.encode())), look, grain, stains)


def render_demo(root: Path, seed: int = 0, size: tuple[int, int] = (192, 96), n_source: int = 240, n_target: int = 160,
                n_val: int = 40) -> Path:
    """Renders the pair into root/gta5 and root/cityscapes and returns root; the same seed gives the same bytes.

    size is (width, height) in pixels, the counts are pictures. A pair rendered before with the same settings is kept,
    one with other settings is replaced as a whole; an interrupted rendering leaves what was there. Raises UserError
    where root holds anything else or cannot be written.
    """
    root = Path(root)
    counts = {"source": n_source, "train": n_target, "val": n_val}
    settings = json.dumps({"version": VERSION, "seed": seed, "size": list(size), **counts})

    def rendered() -> bool:
        return (root / "demo.json").is_file() and (root / "demo.json").read_text() == settings

    if rendered():
        return root
    ours = {"gta5", "cityscapes", "demo.json"}
    if root.exists() and not (root.is_dir() and {p.name for p in root.iterdir()} <= ours):
        raise UserError(f"{root}: holds other files than a demo; name a new or empty folder")
    palette = bytes(c for i in range(256) for c in CLASSES.get(i, (0, 0, 0)))
    draft = None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        for domain, count in counts.items():
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
        (draft / "demo.json").write_text(settings)
        draft.chmod(0o755)  # mkdtemp's folders are private
        if not rendered():  # unless another process was faster
            if root.exists():
                shutil.rmtree(root)
            draft.replace(root)
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror}); name a folder that can") from error
    finally:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description="Renders the miniature pair of --demo.")
    parser.add_argument("out", type=Path, help="folder to render into")
    parser.add_argument("--seed", type=flags.natural, default=0)
    parser.add_argument("--size", type=flags.count, nargs=2, default=(192, 96), metavar=("W", "H"), help="pixels")
    parser.add_argument("--counts", type=flags.count, nargs=3, default=(240, 160, 40),
                        metavar=("SOURCE", "TARGET", "VAL"), help="pictures")
    args = parser.parse_args()
    try:
        print(render_demo(args.out, args.seed, tuple(args.size), *args.counts))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
