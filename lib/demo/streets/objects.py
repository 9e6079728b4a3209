"""What stands in a street: ground, buildings, trees, vehicles, people, poles and signs; `compose` draws one street."""
import math
from collections.abc import Callable
from functools import partial
from random import Random

from lib.demo.streets.look import (
    BUILDING,
    BUS,
    CAR,
    FENCE,
    LIGHT,
    PERSON,
    POLE,
    ROAD,
    SIDEWALK,
    SIGN,
    TERRAIN,
    VEGETATION,
    VOID,
    WALL,
    Colour,
    Look,
    scale,
    tone,
)
from lib.demo.streets.scene import (
    ASPHALT,
    BARS,
    BRICK,
    COACH,
    FACADE,
    FAR,
    FLAT,
    GRASS,
    LEAVES,
    NEAR,
    PAVING,
    WHEEL,
    Point,
    Scene,
)


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
    s = Scene(rng, look, width, height)
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
