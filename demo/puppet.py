"""Paper puppets: 2-D people whose every pose has an exact true frame and exact keypoints.

A `Puppet` says who it is (seeded by `random_puppet`), a `State` says how it stands (a moment of `motion`), and
`render` draws the one in the other. Any puppet can take any state, so every edited pose has a true frame to
compare with. Puppets face the camera and show it their palms; `demo/motion.py` says what units they have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_origin

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageColor import getrgb

from demo.motion import SIDES, Build, Head, Skeleton, State, eye_outline, motion, skeleton
from demo.scenery import RGB, Background, draw_background, mix, random_background, shade
from poses.pose import Pose

SUPERSAMPLE = 4  # frames are drawn this many times larger, then reduced, for smooth edges
LINE = 0.0035  # width of the darker outline that keeps crossing limbs apart


def _palette(words: str) -> dict[str, RGB]:
    """Colours by the words that a caption says for them, from "red #cd2d30 orange #f08728 ..."."""
    return {name: getrgb(code) for name, code in zip(words.split()[::2], words.split()[1::2])}


CLOTH_COLOURS = _palette(
    "red #cd2d30 orange #f08728 yellow #f5d446 green #3e9b4e teal #2da5aa blue #345fc8 "
    "purple #8048ac pink #f291b9 white #f0f0ec grey #8c8e94 black #28282e brown #7a4e30"
)
HAIR = "black #262022 brown #684228 blond #e8c46c red #c0421e grey #a0a0a4 blue #3c69cd pink #ee82b4"
HAIR_COLOURS, HAIR_ODDS = _palette(HAIR), (0.24, 0.22, 0.18, 0.18, 0.08, 0.05, 0.05)
SKIN_TONES = tuple(map(getrgb, "#ffe0c4 #f6ceac #eabc96 #deaa80 #c68e66 #a6704c #84563a #66422e".split()))
EYE_COLOURS = tuple(map(getrgb, "#523422 #325aa0 #347850 #5a6068".split()))
HAIR_SHAPES = ("short", "long", "bob", "bun", "ponytail", "curly", "spiky", "bald")
HAIR_SHAPE_ODDS = (0.22, 0.16, 0.12, 0.11, 0.11, 0.11, 0.11, 0.06)
EAR_COVERING = ("long", "bob", "curly")


class Paint(NamedTuple):
    """A colour and the word a caption says for it."""

    name: str
    rgb: RGB


@dataclass(frozen=True)
class Puppet(Build):
    """One identity, with the ranges or the options and their odds that `random_puppet` draws from."""

    skin: RGB
    hair: Paint
    hair_shape: str  # one of HAIR_SHAPES
    shirt: Paint
    lower: Paint
    shoes: RGB
    parting: Annotated[float, -1, 1]  # slope of the fringe
    fringe: Annotated[float, 0.42, 0.62]  # height of the hairline above the head's centre, in half-heights
    eyes: Annotated[RGB, EYE_COLOURS]
    brow_width: Annotated[float, 0.07, 0.12]
    jaw: Annotated[float, 0, 1]  # 0: pointed, 1: square
    glasses: Annotated[bool, (True, False), (0.2, 0.8)]
    beard: Annotated[bool, (True, False), (0.5, 0.5)]  # never below long hair
    shirt_pattern: Annotated[str, ("plain", "striped", "emblem"), (0.45, 0.3, 0.25)]
    shirt_accent: RGB  # of the stripes or the emblem
    # Length of the sleeve as a share of the whole arm: 0.16 a cap, 0.97 long.
    sleeve: Annotated[float, (0.16, 0.30, 0.52, 0.97), (0.12, 0.40, 0.13, 0.35)]
    lower_garment: Annotated[str, ("trousers", "shorts", "skirt"), (0.55, 0.25, 0.2)]
    background: Background


def random_puppet(seed: int) -> Puppet:
    """The puppet number `seed`: same seed, same person."""
    rng = np.random.default_rng(seed)

    def choose(options: Sequence, odds: Sequence[float] | None = None):
        return options[rng.choice(len(options), p=odds)]

    def jittered(rgb: RGB) -> RGB:
        # Little enough for the jittered colour to stay nearest to the word it is called by.
        return tuple(int(c) for c in np.clip(np.add(rgb, rng.integers(-11, 12, 3)), 0, 255))

    def paint(colours: dict[str, RGB], odds: Sequence[float] | None = None) -> Paint:
        name = choose(list(colours), odds)
        return Paint(name, jittered(colours[name]))

    who = {"skin": jittered(choose(SKIN_TONES)), "hair": paint(HAIR_COLOURS, HAIR_ODDS)}
    who["hair_shape"] = choose(HAIR_SHAPES, HAIR_SHAPE_ODDS)
    who["shirt"] = shirt = paint(CLOTH_COLOURS)
    who["lower"] = paint({name: rgb for name, rgb in CLOTH_COLOURS.items() if name != shirt.name})
    who["shoes"] = jittered(choose(list(CLOTH_COLOURS.values())))
    worn = [who["skin"], who["hair"].rgb, shirt.rgb, who["lower"].rgb, who["shoes"]]
    size = rng.uniform(0.95, 1.05)
    legs = size * rng.uniform(0.94, 1.06)
    head_height = rng.uniform(0.091, 0.100)
    for name, kind in (Puppet.__annotations__ | Build.__annotations__).items():
        if get_origin(kind) is Annotated:
            draw = choose if isinstance(kind.__metadata__[0], tuple) else rng.uniform
            who[name] = draw(*kind.__metadata__)
        elif name == "shirt_accent":
            accents = sorted(CLOTH_COLOURS.values(), key=lambda rgb: math.dist(rgb, shirt.rgb))
            who[name] = jittered(choose(accents[6:]))
        elif name == "head":
            who[name] = (head_height * rng.uniform(0.84, 0.96), head_height)
    who["beard"] &= who["hair_shape"] in ("short", "bald", "spiky")
    for part, length in (("torso", 0.225), ("upper_arm", 0.128), ("forearm", 0.116)):
        who[part] *= length * size
    return Puppet(**who, thigh=0.168 * legs, shin=0.165 * legs, background=random_background(rng, worn))


def caption(puppet: Puppet) -> str:
    """What a prompt would say of this puppet: 'a person, red hair, blue striped shirt, ...'."""
    hair = "bald" if puppet.hair_shape == "bald" else f"{puppet.hair.name} hair"
    shirt = f"{puppet.shirt.name} {'striped ' * (puppet.shirt_pattern == 'striped')}shirt"
    return f"a person, {hair}, {shirt}, {puppet.lower.name} {puppet.lower_garment}"


def pose_of(puppet: Puppet, state: State, bones: Skeleton | None = None) -> Pose:
    """The pose that `render` gives, without the picture. Only ears can have score 0."""
    bones = bones or skeleton(puppet, puppet.jaw, state)
    parts = (part.astype(np.float32) for part in (bones.body, bones.face, *bones.hands[::-1]))
    pose = Pose(*(np.pad(part, ((0, 0), (0, 1)), constant_values=1) for part in parts))
    pose.body[16:, 2] = (SIDES * state.turn < 0.25) & (puppet.hair_shape not in EAR_COVERING)
    return pose


def render(puppet: Puppet, state: State, size: int = 128) -> tuple[np.ndarray, Pose, np.ndarray]:
    """A puppet in a state: the frame, uint8 (size, size, 3), its pose, and its own pixels, bool (size, size).
    Outside this mask and its soft edge the frame is the puppet's background, the same in every state."""
    bones = skeleton(puppet, puppet.jaw, state)
    # The background is transparent and everything drawn is opaque: the alpha channel is the mask.
    canvas = draw_background(puppet.background, size * SUPERSAMPLE).copy()
    brush = _Brush(canvas)
    far_to_near = (1, 0) if state.body_turn > 0 else (0, 1)
    hidden = abs(state.body_turn) > 0.4  # then the body hides the far arm
    _draw_back_hair(brush, puppet, bones.head)
    _draw_arms(brush, puppet, bones, far_to_near[:hidden])
    _draw_legs(brush, puppet, bones, far_to_near)
    _draw_torso(brush, puppet, bones, state.body_turn)
    _draw_head(brush, puppet, state, bones)
    _draw_arms(brush, puppet, bones, far_to_near[hidden:])
    frame = np.asarray(canvas.convert("RGB").reduce(SUPERSAMPLE))
    mask = np.asarray(canvas.getchannel("A").reduce(SUPERSAMPLE)) >= 128
    return frame, pose_of(puppet, state, bones), mask


Clip = tuple[np.ndarray, list[Pose], np.ndarray]


def clip(identity_seed: int, motion_seed: int, frames: int, size: int = 128, dance: str = "facing") -> Clip:
    """A dancing puppet: frames uint8 (F, size, size, 3), F poses, masks bool (F, size, size)."""
    puppet = random_puppet(identity_seed)
    drawn = (render(puppet, state, size) for state in motion(motion_seed, frames, dance=dance))
    images, poses, masks = zip(*drawn)
    return np.stack(images), list(poses), np.stack(masks)


class _Brush:
    """Draws opaque shapes, given in canvas units, on an image."""

    def __init__(self, image: Image.Image):
        self.draw, self.scale = ImageDraw.Draw(image), image.width

    def polygon(self, points, rgb: RGB, centre: np.ndarray | None = None) -> None:
        """A filled shape; given its centre, with a darker outline."""
        if centre is not None:
            self.polygon(points + LINE * np.sign(points - centre), shade(rgb, 0.68))
        self.draw.polygon((np.asarray(points) * self.scale).ravel().tolist(), fill=rgb)

    def dots(self, centres, radii, rgb: RGB) -> None:
        """Discs around the centres (N, 2), with one radius for all or one for each."""
        radii = np.broadcast_to(radii, len(centres)) * self.scale
        for (x, y), r in zip(np.asarray(centres) * self.scale, radii):
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=rgb)

    def stroke(self, points, width: float, rgb: RGB) -> None:
        pixels, width = (points * self.scale).ravel().tolist(), max(1, round(width * self.scale))
        self.draw.line(pixels, fill=rgb, width=width, joint="curve")

    def limb(self, points, radii, rgb: RGB, outline: float = 0.0) -> None:
        """A round-ended limb through `points`, as thick at each as its radius says."""
        if outline:
            self.limb(points, np.add(radii, outline), shade(rgb, 0.68))
        for a, b, ra, rb in zip(points, points[1:], radii, radii[1:]):
            along = (b - a) / (np.hypot(*(b - a)) + 1e-9)
            normal = np.array([-along[1], along[0]])
            self.polygon([a + ra * normal, b + rb * normal, b - rb * normal, a - ra * normal], rgb)
        self.dots(points, radii, rgb)


def _between(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    return a + share * (b - a)


def _arc(start: float, stop: float, points: int) -> np.ndarray:
    """(points, 2) on the unit circle, from one angle to another."""
    angles = np.linspace(start, stop, points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


CIRCLE = _arc(0, 2 * np.pi, 33)


def _draw_legs(brush: _Brush, puppet: Puppet, bones: Skeleton, far_to_near: tuple[int, int]) -> None:
    legs, garment, cloth = bones.body[8:14].reshape(2, 3, 2), puppet.lower_garment, puppet.lower.rgb
    radii = thigh, _, shin = np.array((0.037, 0.027, 0.019)) * puppet.build
    for i in far_to_near:
        (_, knee, ankle), toe = legs[i], bones.toes[i]
        brush.limb([ankle, toe], (0.018, 0.019), puppet.shoes, LINE)
        if garment == "trousers":
            brush.limb(legs[i], radii * (1, 1, 1.15), cloth, LINE)
        else:
            brush.limb(legs[i], radii, puppet.skin, LINE)
            sock = mix(puppet.shoes, (255, 255, 255), 0.6)
            brush.limb([_between(knee, ankle, 0.80), ankle], (shin * 1.1, shin), sock)
        brush.limb([_between(ankle, toe, 0.45), toe], (0.018, 0.019), puppet.shoes)
    hips, hems = legs[:, 0], _between(legs[:, 0], legs[:, 1], 0.72)
    if garment == "shorts":
        for hip_and_hem in zip(hips, hems):
            brush.limb(hip_and_hem, (thigh * 1.05, thigh * 1.08), cloth, LINE)
    if garment == "skirt":
        flare, waist = np.array([0.052 * puppet.build, 0]), np.array([0.030 * puppet.build, 0.03])
        top, fold = (hips[0] - waist, hips[1] + waist * (1, -1)), hems.mean(axis=0) + (0, 0.018)
        skirt = np.array([*top, hems[1] + flare, fold, hems[0] - flare])
        brush.polygon(skirt, cloth, skirt.mean(axis=0))
    brush.limb(hips, (thigh, thigh), cloth)


def _draw_torso(brush: _Brush, puppet: Puppet, bones: Skeleton, body_turn: float) -> None:
    shirt, thick, (neck, right, left) = puppet.shirt.rgb, puppet.build, bones.body[[1, 2, 5]]
    down = (bones.pelvis - neck) / puppet.torso
    across, slim = np.array([down[1], -down[0]]), np.cos(body_turn)
    depth = np.hypot(slim, 0.5 * np.sin(body_turn)) / slim  # a body is half as deep as it is wide

    def edges(share: float) -> tuple[np.ndarray, np.ndarray]:
        """The right and left edge of the shirt, `share` of the way from shoulders to hem."""
        top, hem = puppet.shoulders + 0.012 * thick, puppet.hips + 0.032 * thick
        half = top + (hem - top) * share - 0.012 * np.sin(np.pi * share)
        half -= 0.004 * (puppet.lower_garment == "skirt")
        tilt = ((left - right) / (2 * puppet.shoulders) * (1 - share) + across * share * slim) * depth
        middle = neck + (0.008 + share * (puppet.torso + 0.002)) * down
        return middle - half * tilt, middle + half * tilt

    right_edge, left_edge = zip(*map(edges, np.linspace(0, 1, 6)))
    collar, aside = neck - 0.018 * down, 0.028 * slim * depth * across
    outline = np.array([collar - aside, collar + aside, *left_edge, *right_edge[::-1]])
    brush.polygon(outline, shirt, bones.pelvis - 0.5 * puppet.torso * down)
    if puppet.shirt_pattern == "striped":
        for share in np.arange(0.10, 0.98, 0.21):
            brush.polygon([*edges(share), *edges(share + 0.095)[::-1]], puppet.shirt_accent)
    if puppet.shirt_pattern == "emblem":
        emblem = neck + 0.36 * puppet.torso * down + 0.5 * puppet.shoulders * np.sin(body_turn) * across
        for radius, rgb in ((0.034, puppet.shirt_accent), (0.016, shirt)):
            brush.dots([emblem], radius, rgb)
    # The neck and the neckline.
    brush.limb([collar + 0.006 * down, collar + 0.022 * down], (0.030, 0.024), puppet.skin)
    brush.limb([bones.head.centre, collar + 0.016 * down], (0.022, 0.022), shade(puppet.skin, 0.82))


def _draw_head(brush: _Brush, puppet: Puppet, state: State, bones: Skeleton) -> None:
    head, face, skin, hair = bones.head, bones.face, puppet.skin, puppet.hair.rgb
    unit = puppet.head[0]  # head units to canvas units, for widths and radii
    inside_line = ((LINE, shade(skin, 0.68)), (0, skin))  # the outline first, then what it goes around
    if puppet.hair_shape not in EAR_COVERING:
        # The far ear of a turned head vanishes behind the skull by itself.
        for line, rgb in inside_line:
            brush.dots(bones.body[16:], 0.20 * unit + line, rgb)
    for line, rgb in inside_line:
        brush.polygon(face[:17] + (0, line), rgb)
        brush.polygon(head.flat(((0, -0.12) + (0.97, 0.88) * CIRCLE) * (1 + line / unit)), rgb)
    if puppet.beard:
        lip = head.solid([(0.45, 0.42), (0.2, 0.37), (-0.2, 0.37), (-0.45, 0.42)])
        brush.polygon(np.concatenate([face[2:15], lip]), shade(hair, 0.9))
    else:
        brush.dots(head.solid([(-0.55, 0.27), (0.55, 0.27)]), 0.13 * unit, mix(skin, (225, 90, 80), 0.22))

    for side, pupil in zip(SIDES, face[68:]):
        eye = head.solid(eye_outline(side, state.blink, 16))
        brush.polygon(eye, (252, 252, 250))
        if state.blink < 0.8:
            for radius, rgb in ((0.125, puppet.eyes), (0.065, (15, 12, 14))):
                brush.polygon(pupil + radius * unit * CIRCLE * (1, min(1, 1.25 * (1 - state.blink))), rgb)
        brush.stroke(eye[:9], 0.065 * unit, (46, 32, 30))  # the lid
    brow = (70, 50, 40) if puppet.hair_shape == "bald" else shade(hair, 0.72)
    for start in (17, 22):
        brush.stroke(face[start : start + 5], puppet.brow_width * unit * 1.3, brow)
    brush.stroke(face[28:31], 0.05 * unit, shade(skin, 0.85))  # the nose
    brush.stroke(face[31:36], 0.08 * unit, shade(skin, 0.66))

    brush.polygon(face[48:60], mix(shade(skin, 0.8), (190, 50, 60), 0.6))  # lips
    brush.polygon(face[60:68], (92, 22, 30))
    if state.mouth > 0.15:  # upper teeth
        biting_edge = _between(face[[63, 62, 61]], face[[65, 66, 67]], 0.35)
        brush.polygon(np.concatenate([face[60:65], biting_edge]), (250, 248, 242))
    if puppet.glasses:
        rims = [(side * 0.40, -0.06) + 0.30 * CIRCLE for side in SIDES]
        for course in (*rims, [(-0.12, -0.10), (0.12, -0.10)]):
            brush.stroke(head.solid(course), 0.075 * unit, (38, 38, 46))
    if puppet.hair_shape != "bald":
        _draw_front_hair(brush, puppet, head)


def _draw_front_hair(brush: _Brush, puppet: Puppet, head: Head) -> None:
    """The cap of hair between the crown's silhouette and the hairline."""
    shape, hair, unit = puppet.hair_shape, puppet.hair.rgb, puppet.head[0]
    crown = _arc(np.pi + 0.12, 2 * np.pi - 0.12, 24)  # picture left over the top to right
    crown = (0, -0.05) + (1.12 if shape in EAR_COVERING else 1.07) * crown
    if shape == "spiky":
        crown[1:-1:2] *= 1.16
    x = np.linspace(0.92, -0.92, 9)
    hairline = -puppet.fringe + 0.22 * puppet.parting * x + 0.38 * np.abs(x) ** 3
    brush.polygon(np.concatenate([head.flat(crown), head.solid(np.stack([x, hairline], axis=1))]), hair)
    if shape == "curly":
        curls = (0, -0.10) + 1.02 * _arc(np.pi - 0.35, 2 * np.pi + 0.35, 11)
        brush.dots(head.flat(curls), 0.27 * unit, hair)
    shine = (0, -0.05) + (0.82, 0.88) * _arc(np.pi * 1.25, np.pi * 1.5, 7)
    brush.stroke(head.flat(shine), 0.07 * unit, mix(hair, (255, 255, 255), 0.25))


def _draw_back_hair(brush: _Brush, puppet: Puppet, head: Head) -> None:
    """What hangs behind head and shoulders, or stands above them."""
    shape, dark, unit = puppet.hair_shape, shade(puppet.hair.rgb, 0.78), puppet.head[0]
    if shape in ("long", "bob"):
        length = 2.1 if shape == "long" else 0.95
        for side in SIDES:
            strand = head.flat([(side * 0.62, -0.1), (side * 0.78, length)])
            brush.limb(strand, (0.62 * unit, 0.46 * unit), dark)
        brush.polygon(head.flat([(-0.9, 0), (0.9, 0), (0.9, length), (-0.9, length)]), dark)
    if shape == "bun":
        for radius, rgb in ((0.44, dark), (0.36, puppet.hair.rgb)):
            brush.dots(head.flat([(-0.15 * np.sin(head.turn), -1.22)]), radius * unit, rgb)
    if shape == "ponytail":
        # It is tied at the back, so it comes out on the side that the face turns away from.
        side = -np.sin(head.turn) * 0.9 + (0.55 if puppet.parting > 0 else -0.55)
        tail = head.flat([(side * 0.6, -0.75), (side * 2.0, -0.65), (side * 2.7, 0.2), (side * 2.5, 1.1)])
        brush.limb(tail, [r * unit for r in (0.26, 0.34, 0.32, 0.10)], dark)


def _draw_arms(brush: _Brush, puppet: Puppet, bones: Skeleton, sides: Sequence[int]) -> None:
    radii = np.array((0.026, 0.020, 0.0145)) * puppet.build
    # The sleeve covers a share of the way from shoulder to wrist.
    upper = puppet.upper_arm / (puppet.upper_arm + puppet.forearm)
    for arm, hand in ((bones.body[2 + 3 * i : 5 + 3 * i], bones.hands[i]) for i in sides):
        shoulder, elbow, wrist = arm
        brush.limb(arm, radii, puppet.skin, LINE)
        _draw_hand(brush, hand, puppet.skin)
        if puppet.sleeve <= upper:
            course = [shoulder, _between(shoulder, elbow, puppet.sleeve / upper)]
            brush.limb(course, radii[[0, 0]] * (1.1, 1.08), puppet.shirt.rgb, LINE)
        else:
            cuff = _between(elbow, wrist, (puppet.sleeve - upper) / (1 - upper))
            brush.limb([shoulder, elbow, cuff], radii * (1.1, 1.15, 1.25), puppet.shirt.rgb, LINE)


def _draw_hand(brush: _Brush, hand: np.ndarray, skin: RGB) -> None:
    knuckles = hand[[5, 9, 13, 17]]
    palm = [_between(hand[0], hand[1], 0.6), hand[1], *knuckles]
    outline, inside = (0.0096, 0.0094, 0.0091, 0.0086), (0.0073, 0.0071, 0.0068, 0.0063)
    for radii, palm_radius, rgb in ((outline, 0.0125, shade(skin, 0.68)), (inside, 0.0100, skin)):
        for finger in (*hand[5:].reshape(4, 4, 2), hand[1:5]):
            brush.limb(finger, radii, rgb)
        brush.dots(palm, palm_radius, rgb)
    brush.polygon([*hand[:2], *knuckles], skin)
