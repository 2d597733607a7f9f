"""How the axes of somebody's files lie: nothing published says which way ALICE's fibres count.

Networks are given the point at which a particle would hit, and flips or transposes of the responses that they
are trained on would mislead them: with swapped axes, W of unseen particles was four times as high. So files
are turned to the axes of the open data when they are read, and generated responses are turned back. Which of
the eight symmetries a file has, and how far and by which scale its fibres are off, is found from the training
rows: impact points and centres of light have to fall together.
"""
from typing import NamedTuple

import numpy as np

BRIGHT = 50       # photons: the centre of light of fewer is uncertain
SOUGHT = 20_000   # rows at most to look at
INSIDE = 0.6      # of the half widths: showers near the edge are cut off there, which moves their centres
CORRELATED = 0.3  # a smaller correlation of both axes says nothing
SAME = 0.5, 0.1   # fibres and share: a smaller offset and a scale closer to 1 are statistics, and halos


class Axes(NamedTuple):
    """The axes of a file. `word` says along what its fibres count, first axis first: "xy" as the open data, a
    capital letter against the axis, "yX": along y, then against x. Its straight lines meet the fibres at
    (x - offset) / scale cm."""
    word: str = "xy"
    offset: tuple = (0.0, 0.0)
    scale: float = 1.0

    def read(self, responses):
        """Responses (..., H, W) of the file as those of the open data."""
        turned = responses.swapaxes(-1, -2) if self.word[0] in "yY" else responses
        across, along = "X" in self.word, "Y" in self.word
        return turned[..., ::-1 if across else 1, ::-1 if along else 1]

    def write(self, responses):
        """The inverse of `read`."""
        across, along = "X" in self.word, "Y" in self.word
        turned = responses[..., ::-1 if across else 1, ::-1 if along else 1]
        return turned.swapaxes(-1, -2) if self.word[0] in "yY" else turned

    def move(self, particles):
        """Particles (N, 9) of the file, moved and with slopes such that their straight lines meet the fibres
        of the open data."""
        if not any(self.offset) and self.scale == 1:
            return particles
        shift, scale = np.zeros(9, np.float32), np.ones(9, np.float32)
        shift[1:3], scale[[1, 2, 4, 5]] = self.offset, self.scale
        return (particles - shift) / scale


def centres(responses, detector):
    """Centres of light (N, 2) in cm from the middle, along the axes of the responses (N, H, W)."""
    total = responses.sum((1, 2))
    sums = responses.sum(2), responses.sum(1)                                  # (N, H), (N, W)
    places = [(np.arange(side.shape[1]) - (side.shape[1] - 1) / 2) * detector.pitch for side in sums]
    return np.stack([side @ place / np.maximum(total, 1) for side, place in zip(sums, places)], axis=1)


def words(detector):
    """The symmetries of a detector's matrix."""
    pairs = ("xy", "yx") if detector.shape[0] == detector.shape[1] else ("xy",)
    return [first + second for pair in pairs for first in (pair[0], pair[0].upper())
            for second in (pair[1], pair[1].upper())]


def correlations(points, light):
    """Rank correlations of both coordinates (N, 2)."""
    ranks = [np.argsort(np.argsort(values, axis=0), axis=0) for values in (points, light)]
    return [np.corrcoef(ranks[0][:, k], ranks[1][:, k])[0, 1] for k in (0, 1)]


def line(light, point, rounds=10):
    """Offset and scale of point = offset + scale light, by least squares without the rows that lie more than
    three median deviations off."""
    kept = np.ones(len(light), bool)
    for _ in range(rounds):
        scale, offset = np.polyfit(light[kept], point[kept], 1)
        rest = np.abs(point - offset - scale * light)
        kept = rest <= 3 * np.median(rest[kept]) + 1e-9
    return offset, scale


def find(points, responses, detector, word=None):
    """The Axes of responses (N, H, W) of particles that would hit at `points` (N, 2) in cm from the middle of
    the detector, and a sentence about them. `word`, if given, is taken for granted."""
    light = centres(responses, detector)
    half = np.array(detector.half)
    inside = (responses.sum((1, 2)) >= BRIGHT) & (np.abs(points) < 1.5 * half.max()).all(1)
    found = {}
    for name in [word] if word else words(detector):
        turned = light[:, ::-1] if name[0] in "yY" else light
        turned = turned * [-1 if "X" in name else 1, -1 if "Y" in name else 1]
        rows = inside & (np.abs(turned) < INSIDE * half).all(1)
        if rows.sum() > 20:
            found[name] = correlations(points[rows], turned[rows]), points[rows], turned[rows]
    best = max(found, key=lambda name: sum(found[name][0]), default=None)
    if best is None or min(found[best][0]) < CORRELATED:
        word = word or "xy"
        return Axes(word), f"axes: impact points and light do not correlate, taken as --axes {word}"
    known, x, u = found[best]
    (across, _), (along, scale) = (line(u[:, k], x[:, k]) for k in (0, 1))     # no magnet bends y
    offset = across, along
    offset = offset if max(np.abs(offset)) > SAME[0] * detector.pitch else (0.0, 0.0)
    scale = scale if abs(scale - 1) > SAME[1] else 1.0
    sides = " and ".join(("against " if letter.isupper() else "along ") + letter.lower() for letter in best)
    sentence = (f"axes: fibres count {sides} (correlation {known[0]:.2f} and {known[1]:.2f}), offset "
                f"{offset[0]:.2f} and {offset[1]:.2f} cm, scale {scale:.2f}; --axes {best}")
    return Axes(best, tuple(map(float, offset)), float(scale)), sentence
