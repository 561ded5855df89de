"""What is wrong with the tiles of a few places, so that no network could learn from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geomatch.data.ground_truth import by_place
from geomatch.data.registration import LARGE, YearPair
from geomatch.data.store import TileStore
from geomatch.data.tiles import TileTable
from geomatch.errors import listed
from geomatch.geo.phase_correlation import DISTINCT, shift, spectrum
from geomatch.nn.encoder import TileForm
from geomatch.records import Record

FLAT = 4.0
"""Standard deviation in grey levels up to which a tile counts as flat."""
MOST = 0.9
"""Share of places from which on labels give them away."""
COMPARED = 100
"""Largest number of places whose years are compared."""
NAMED = 3
"""Tiles that are named."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Problem(Record):
    """Something wrong, and what to do about it."""

    what: str
    remedy: str


def suspects(
    tiles: TileTable, training: TileTable, store: TileStore, form: TileForm
) -> list[Problem]:
    """What is wrong with tiles; places are alike, labels give them away, or years do not align.

    Args:
        tiles: of the places that are to be learnt.
        training: all training tiles, of which some show how the years lie on each other.
    """
    pixels = store.read(tiles.store_row)
    images, labels = pixels[..., : form.image_channels], pixels[..., form.image_channels :]
    found = [*_alike(tiles, images)]
    if form.label_channels and tiles.dated:
        found += _given_away(tiles, labels)
    if tiles.dated:
        found += _misaligned(training, store, form)
    return found


def _alike(tiles: TileTable, images: Pixels) -> Iterator[Problem]:
    """Tiles without content, and tiles of different places that have the same pixels."""
    flat = np.flatnonzero(images.mean(axis=-1).std(axis=(1, 2)) <= FLAT)
    if len(flat):
        yield Problem(
            f"{len(flat)} of {len(tiles)} tiles are flat, as water, clouds or missing data are: "
            f"{listed(tiles.select(flat).ids(), NAMED)}",
            "Leave such imagery out: grid.nodata, grid.collar or a higher grid.min_valid.",
        )
    place, seen, twice = tiles.places(), dict[bytes, int](), []
    for row in np.setdiff1d(np.arange(len(tiles)), flat):
        first = seen.setdefault(images[row].tobytes(), int(row))
        if place[first] != place[row]:
            twice += [first, int(row)]
    if twice:
        yield Problem(
            "tiles of different places have the same pixels: "
            f"{listed(tiles.select(np.array(twice)).ids(), NAMED)}",
            "Look at them with geomatch tile --preview; an image may have been copied twice.",
        )


def _given_away(tiles: TileTable, labels: Pixels) -> Iterator[Problem]:
    """Labels that are the same raster in two years, or whose values are of one place each."""
    table = by_place(tiles)
    for a, b in itertools.combinations(range(len(tiles.years)), 2):
        both = table[(table[:, [a, b]] >= 0).all(axis=1)]
        first, second = labels[both[:, a]], labels[both[:, b]]
        # A label of one value is the same in all years where nothing changes.
        varied = (first != first[:, :1, :1]).any(axis=(1, 2, 3))
        same = (first == second).all(axis=(1, 2, 3))[varied]
        if len(same) > 1 and same.mean() >= MOST:
            yield Problem(
                f"labels give places away: those of {tiles.years[a]} and {tiles.years[b]} are the "
                f"same, pixel for pixel, in {same.sum()} of {len(same)} places",
                "Give each year labels of its own, or tile without labels.",
            )
    if labels.shape[-1] > 1:
        return
    place = tiles.places()
    values = [set(np.unique(labels[place == code]).tolist()) - {0} for code in np.unique(place)]
    named = [each for each in values if each]
    own = [
        each.isdisjoint(set().union(*(other for other in named if other is not each)))
        for each in named
    ]
    if len(named) > 1 and np.mean(own) >= MOST:
        yield Problem(
            f"labels give places away: {sum(own)} of {len(named)} places have label values that no "
            "other has, as numbers of parcels are, not classes",
            "Give labels whose values are classes; see geomatch tile --preview.",
        )


def _misaligned(training: TileTable, store: TileStore, form: TileForm) -> Iterator[Problem]:
    """Years that are shifted against each other, or do not show the same ground."""
    side = max((side for side in DISTINCT if side <= form.size), default=0)
    if not side:
        return  # too little ground for a shift to be sure
    table, start = by_place(training), (form.size - side) // 2
    look = "geomatch tile --check" if training.grid else "geomatch tile --preview 8"
    for a, b in itertools.combinations(range(len(training.years)), 2):
        both = table[(table[:, [a, b]] >= 0).all(axis=1)]
        both = np.random.default_rng(0).permutation(both)[:COMPARED]
        moved, flat = np.full((len(both), 2), np.nan), np.zeros(len(both), bool)
        for i, rows in enumerate(both[:, [a, b]]):
            pixels = store.read(training.store_row[rows])[..., : form.image_channels]
            grey = pixels[:, start : start + side, start : start + side].mean(axis=-1)
            answer = shift(*map(spectrum, grey))
            if answer is not None:
                moved[i] = answer[1], -answer[0]
            flat[i] = answer is None and grey.std(axis=(1, 2)).min() <= FLAT
        years = training.years[a], training.years[b]
        unknown = np.full((len(both), 2), np.nan)
        pair = YearPair(years, side, unknown, unknown, moved, flat, None)
        found = pair.shift()
        if found is not None and found[0] > LARGE:
            yield Problem(
                f"the years {years[0]} and {years[1]} do not align: they are shifted by "
                f"{found[0]:.1f} px (median of {pair.answered.sum()} places)",
                f"Measure it on the imagery, and correct that: {look}",
            )
        elif found is None and pair.changed.sum() > len(pair) / 2:
            yield Problem(
                f"the years {years[0]} and {years[1]} may not align: of {len(pair)} places, only "
                f"{pair.answered.sum()} have a pattern in common",
                f"See whether they show the same ground: {look}",
            )
