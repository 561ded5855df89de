"""A procedural landscape photographed in two years, for `geomatch demo`.

The layout (parcels, roads, houses, trees, water) is generated once, in metres; each year is then
rendered from it under its own sun, season and sensor. Only the layout persists: crop colours are
drawn again, so that tiles of the two years agree in structure but hardly in colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize
from rasterio.transform import Affine, from_origin
from scipy import ndimage
from scipy.spatial import cKDTree
from shapely.ops import split

Array = NDArray[Any]
Rng = np.random.Generator

CLASSES = {
    "unknown": 0, "field": 42, "road": 85, "house": 127, "woods": 170, "water": 212, "garden": 255,
}  # fmt: skip
CRS = "EPSG:32631"
ORIGIN = (418_000.0, 5_290_000.0)  # easting, northing of the first year's corner: the Sologne
MARGIN = 48  # pixels generated beyond the first year's extent, for offsets and shadows
FIELD, ORCHARD, WOOD, FELLED = range(4)  # what covers a parcel
ROAD_WIDTHS = {1: 8.0, 2: 5.0, 3: 3.0}  # metres: main road, minor road, track
ROOFS = np.array(
    [[176, 92, 66], [150, 84, 66], [122, 78, 64], [96, 98, 106], [128, 128, 130], [196, 190, 180]]
)


@dataclass(frozen=True)
class Landscape:
    """Paths of the four GeoTIFFs of a landscape, and their CRS."""

    images_before: Path
    labels_before: Path
    images_after: Path
    labels_after: Path
    crs: str = CRS


@dataclass(frozen=True)
class Year:
    """Light, season and sensor of one year; colours are RGB in 0..255."""

    crops: tuple[tuple[int, int, int, float], ...]  # colour and contrast of the rows
    leaves: tuple[tuple[int, int, int], ...]  # one colour for each of the four tree species
    grass: tuple[int, int, int]
    roads: tuple[tuple[int, int, int], ...]  # main road, minor road, track
    water: tuple[int, int, int]
    sun: tuple[float, float]  # azimuth clockwise from north and elevation, in degrees
    gamma: float
    cast: tuple[float, float, float]
    blur: float  # standard deviation in pixels
    noise: float  # standard deviation in grey levels
    offset: tuple[float, float]  # rows, columns of its corner from ORIGIN
    growth: tuple[int, int]  # rows, columns added to the requested size
    misregistration: float  # largest displacement along each axis, in pixels
    is_later: bool


BEFORE = Year(
    crops=(
        (92, 128, 62, 0.10), (122, 150, 76, 0.08), (74, 110, 58, 0.12), (200, 186, 86, 0.05),
        (156, 128, 98, 0.16), (128, 102, 78, 0.20), (148, 164, 104, 0.06), (184, 168, 120, 0.12),
    ),
    leaves=((52, 84, 40), (66, 98, 46), (82, 108, 56), (38, 64, 42)),
    grass=(112, 142, 74), roads=((158, 156, 152), (172, 168, 160), (200, 184, 150)),
    water=(44, 66, 70), sun=(140.0, 50.0), gamma=1.0, cast=(1.0, 1.0, 1.0),
    blur=0.45, noise=3.0, offset=(0.0, 0.0), growth=(0, 0), misregistration=0.0,
    is_later=False,
)  # fmt: skip
AFTER = Year(
    crops=(
        (206, 184, 132, 0.12), (186, 160, 108, 0.16), (104, 82, 64, 0.18), (136, 106, 80, 0.20),
        (70, 96, 50, 0.14), (96, 124, 66, 0.08), (158, 150, 96, 0.06), (220, 206, 160, 0.08),
    ),
    leaves=((144, 108, 66), (138, 126, 74), (116, 96, 72), (56, 76, 56)),
    grass=(170, 156, 104), roads=((112, 112, 118), (134, 132, 132), (148, 138, 108)),
    water=(100, 116, 104), sun=(222.0, 38.0), gamma=0.88, cast=(1.05, 0.97, 0.88),
    blur=0.8, noise=6.0, offset=(12.62, -17.37), growth=(8, -24), misregistration=1.8,
    is_later=True,
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What the two years share. Rasters are (rows, columns); tables have one row per item."""

    gsd: float
    parcel: Array  # int32, index into the parcel tables
    merged: Array  # parcel table: the parcel each belongs to in the second year
    angle: Array  # parcel table: direction of the longest side, in radians
    cover: Array  # parcel table: FIELD, ORCHARD, WOOD, or FELLED by the second year
    road: Array  # int32, key of ROAD_WIDTHS, else 0
    water: Array  # bool
    garden: Array  # bool
    roof: Array  # int32, half a roof: twice its house + 1, or + 2 for the far side; 0 outside
    houses: Array  # house table: x, y away from the road, height (m), roof, is new
    crown: Array  # int32, the tree nearest to the pixel
    crown_height: Array  # float32 metres, 0 outside crowns
    trees: Array  # tree table: x, y, crown radius (metres), species, is absent in the second year


def _noise(rng: Rng, shape: tuple[int, int], cell: float) -> Array:
    """Smooth float32 noise in -1..1 with features about `cell` pixels wide."""
    weights = []
    for length in shape:
        knots = np.arange(int(length / cell) + 2, dtype=np.float32)
        hat = 1 - np.abs(np.arange(length, dtype=np.float32)[:, None] / cell - knots)
        weights.append(np.clip(hat, 0, 1) ** 2 * (3 - 2 * hat))
    rows, columns = weights
    coarse = rng.uniform(-1, 1, (rows.shape[1], columns.shape[1])).astype(np.float32)
    return np.asarray(rows @ coarse @ columns.T)


def _burn(geometries: Any, values: Any, shape: tuple[int, int], gsd: float) -> Array:
    """Rasterise geometries in metres to int32: later ones cover earlier ones, 0 elsewhere."""
    pairs = list(zip(geometries, np.broadcast_to(values, len(geometries)), strict=True))
    if not pairs:
        return np.zeros(shape, np.int32)
    return np.asarray(rasterize(pairs, shape, transform=Affine.scale(gsd), dtype="int32"))


def _at(raster: Array, points: Array, gsd: float) -> Array:
    """Values of a raster at points (n, 2) x, y in metres, clamped to its edges."""
    index = np.clip((points[:, ::-1] / gsd).astype(int), 0, np.array(raster.shape) - 1)
    return np.asarray(raster[index[:, 0], index[:, 1]])


def _parcels(rng: Rng, extent: Array) -> tuple[list[Any], Array, list[Any], Array]:
    """Split the extent (width, height in metres) into fields, as inheritance splits land.

    Returns:
        The polygons, the direction of each one's longest side, the cuts as lines, and the area
        that each cut divided: roads run along the cuts of large areas.
    """
    stack = [shapely.box(-80, -80, *(extent + 80))]  # so that bent edges uncover nothing
    parcels, angles, cuts, areas = [], [], [], []
    while stack:
        polygon = stack.pop()
        corners = shapely.get_coordinates(polygon)
        longest = max(np.diff(corners, axis=0), key=lambda edge: float(np.hypot(*edge)))
        angle = float(np.arctan2(longest[1], longest[0]))
        if polygon.area < (4000 if rng.random() < 0.12 else 2300):
            parcels.append(polygon)
            angles.append(angle)
            continue
        axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        span = np.ptp(corners @ axes.T, axis=0)
        across = int(span[1] > span[0] * rng.uniform(0.8, 1.3))
        turn = rng.normal(0, 0.2 if polygon.area > 60_000 else 0.06)
        normal = axes[across] * np.cos(turn) + axes[1 - across] * np.sin(turn)
        share = rng.uniform(0.36, 0.64)
        foot = normal * (np.quantile(corners @ normal, (0, 1)) @ (share, 1 - share))
        way = 1e5 * np.array([-normal[1], normal[0]])
        line = shapely.LineString([foot - way, foot + way])
        cuts.append(line.intersection(polygon))
        areas.append(polygon.area)
        stack += split(polygon, line).geoms
    return parcels, np.array(angles), cuts, np.array(areas)


def _roads(cuts: Array, areas: Array) -> tuple[Array, Array]:
    """The cuts that are roads and the key of each in ROAD_WIDTHS, widest last."""
    kinds = 4 - np.digitize(areas, (18_000, 110_000, 1_100_000))
    order = np.argsort(-kinds, kind="stable")
    order = order[kinds[order] < 4]
    return cuts[order], kinds[order]


def _water(rng: Rng, extent: Array) -> Array:
    """Polygons, in metres, of a river that winds from north to south, and of ponds."""
    y = np.arange(-60, extent[1] + 60, 12.0)
    a, b, c = rng.uniform(0, 2 * np.pi, 3)
    x = extent[0] * rng.uniform(0.35, 0.65) + 150 * np.sin(y / 240 + a)
    x += 45 * np.sin(y / 67 + b) + 14 * np.sin(y / 21 + c)
    half = 8 + 2.5 * np.sin(y / 70 + a)
    bank = np.vstack([np.stack([x - half, y], 1), np.stack([x + half, y], 1)[::-1]])
    bodies = [shapely.Polygon(bank).buffer(0)]  # sharp bends can make the banks cross
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for _ in range(int(np.prod(extent) / 110_000)):
        radius = rng.uniform(7, 24) * (1 + 0.2 * np.sin(2 * turn + rng.uniform(0, 6)))
        radius *= 1 + 0.12 * np.sin(3 * turn + rng.uniform(0, 6))
        ring = np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)
        bodies.append(shapely.Polygon(ring + rng.uniform(0, extent)))
    return np.array(bodies)


def _houses(
    rng: Rng, roads: Array, kinds: Array, blocked: Array, extent: Array, gsd: float
) -> tuple[Array, Array, Array]:
    """Houses along the roads: dense in villages, few elsewhere, none on `blocked` ground.

    Returns:
        Two roof halves per house, one garden per house, and the house table of `Layout`.
    """
    sites = []
    for road, kind in zip(roads[kinds < 3], kinds[kinds < 3], strict=True):
        station = np.arange(rng.uniform(6, 16), road.length - 4, 18.0)
        here = shapely.get_coordinates(shapely.line_interpolate_point(road, station))
        ahead = shapely.get_coordinates(shapely.line_interpolate_point(road, station + 4))
        for side in (-1, 1):
            verge = np.tile([ROAD_WIDTHS[kind] / 2, side], (len(here), 1))
            sites.append(np.hstack([here, (ahead - here) / 4, verge]))
    site = rng.permutation(np.vstack(sites))
    count = len(site)
    tangent, normal = site[:, 2:4], site[:, 3:1:-1] * (-1, 1) * site[:, 5:]
    size = rng.uniform((9, 7), (15, 10), (count, 2)) * rng.choice([1, 1, 1, 1, 1, 1.7], (count, 1))
    setback = site[:, 4:5] + size[:, 1:] / 2 + rng.uniform(4, 12, (count, 1))
    centre = site[:, :2] + normal * setback
    along, over = tangent * size[:, :1] / 2, normal * size[:, 1:] / 2

    villages = rng.uniform(0.05, 0.95, (int(np.prod(extent) / 350_000) + 1, 2)) * extent
    remote = cKDTree(villages).query(centre)[0]
    kept = rng.random(count) < 0.04 + 0.9 * np.exp(-((remote / 160) ** 2))
    for a, b in np.ndindex(3, 3):
        kept &= _at(blocked, centre + (a - 1) * along + (b - 1) * over, gsd) == 0
    for first, second in sorted(cKDTree(centre).query_pairs(19)):
        kept[second] &= not kept[first]

    def rectangles(near: float, far: float, wide: float) -> Array:
        ends = ((-wide, near), (wide, near), (wide, far), (-wide, far))
        corners = np.stack([centre + a * along + b * over for a, b in ends], 1)
        return np.asarray(shapely.polygons(corners[kept]))

    halves = np.stack([rectangles(-1, 0, 1), rectangles(0, 1, 1)], 1).ravel()
    height, roof = rng.uniform(5, 8, count), rng.integers(len(ROOFS), size=count)
    table = np.column_stack([normal, height, roof, rng.random(count) < 0.15])
    return halves, rectangles(-1.6, 3, 1.6), table[kept]


def _woods(
    rng: Rng, chance: Array, cover: Array, boundaries: Any, blocked: Array, gsd: float
) -> Array:
    """The tree table of `Layout`: woods, orchards, gardens, banks, and hedges along boundaries.

    Args:
        chance: raster of the probability that a tree stands at a pixel.
        cover: raster of what covers the parcels.
        boundaries: lines around the parcels.
        blocked: raster of ground without trees.
    """
    extent = np.array(chance.shape[::-1]) * gsd
    steps = np.arange(-extent.sum(), extent.sum(), 6.5)
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    grid = grid @ np.array([[0.92, -0.39], [0.39, 0.92]])  # orchards are not parallel to the axes
    orchard = _at(cover, grid, gsd) == ORCHARD
    grid[~orchard] += rng.uniform(-2.4, 2.4, grid.shape)[~orchard]
    grid = grid[orchard | (rng.random(len(grid)) < _at(chance, grid, gsd))]
    hedges = []
    for line in boundaries[rng.random(len(boundaries)) < 0.55]:
        part = np.arange(0, rng.uniform(0.1, 0.45), rng.choice([3.5, 4.5, 9, 14]) / line.length)
        part = (part + rng.random()) % 1
        hedges.append(shapely.line_interpolate_point(line, part, normalized=True))
    hedge = shapely.get_coordinates(np.concatenate(hedges))
    points = np.vstack([grid, hedge + rng.normal(0, 0.5, hedge.shape)])
    points = points[np.all((points > 0) & (points < extent), axis=1)]
    points = points[_at(blocked, points, gsd) == 0]
    cover = _at(cover, points, gsd)
    radius = rng.uniform(1.8, 2.6 + 2.2 * (cover != ORCHARD))
    stand = _at(_noise(rng, chance.shape, 70 / gsd), points, gsd) + rng.normal(0, 0.4, len(points))
    absent = (cover == FELLED) | (rng.random(len(points)) < 0.06)
    return np.column_stack([points, radius, np.digitize(stand, (-0.35, 0.05, 0.45)), absent])


def _layout(seed: int, shape: tuple[int, int], gsd: float) -> Layout:
    """Generate the layout of a (rows, columns) raster."""
    rng = np.random.default_rng([seed, 0])
    extent = np.array(shape[::-1]) * gsd
    # Straight cuts look artificial: one smooth displacement bends all, so parcels still adjoin.
    bend = [25 * _noise(rng, shape, 420 / gsd) + 4 * _noise(rng, shape, 90 / gsd) for _ in "xy"]

    def bent(geometries: list[Any]) -> Any:
        return shapely.transform(
            shapely.segmentize(np.array(geometries), 8.0),
            lambda at: at + np.stack([_at(axis, at, gsd) for axis in bend], 1),
        )

    polygons, angle, cuts, areas = _parcels(rng, extent)
    fields, count = bent(polygons), len(polygons)
    parcel = _burn(fields, np.arange(1, count + 1), shape, gsd)
    # Bent edges of neighbours may leave gaps of a pixel.
    parcel = np.maximum(np.where(parcel == 0, ndimage.maximum_filter(parcel, 3), parcel) - 1, 0)
    roads, kinds = _roads(bent(cuts), areas)
    road = _burn(shapely.buffer(roads, [ROAD_WIDTHS[k] / 2 for k in kinds]), kinds, shape, gsd)
    bodies = _water(rng, extent)
    water = _burn(bodies, 1, shape, gsd) > 0
    road[water & (road == 3)] = 0  # tracks have no bridges
    banks = _burn(shapely.buffer(bodies, 7), 1, shape, gsd) > 0

    centres = shapely.get_coordinates(shapely.centroid(fields))
    wild = _at(_noise(rng, shape, 130 / gsd), centres, gsd) + rng.normal(0, 0.25, count)
    cover = np.where(rng.random(count) < 0.04, ORCHARD, FIELD)
    cover[wild > np.quantile(wild, 0.87)] = WOOD
    cover[(cover == WOOD) & (rng.random(count) < 0.2)] = FELLED
    merged, free = np.arange(count), cover == FIELD
    pairs = np.unique(np.stack([parcel[::7, :-3].ravel(), parcel[::7, 3:].ravel()], 1), axis=0)
    for a, b in rng.permutation(pairs):
        if a != b and free[a] and free[b] and rng.random() < 0.12:
            merged[b] = a
            free[[a, b]] = False  # pairs only: chains would merge into large empty fields

    woods = cover[parcel] >= WOOD
    halves, plots, houses = _houses(rng, roads, kinds, (road > 0) | banks | woods, extent, gsd)
    roof = _burn(halves, np.arange(1, len(halves) + 1), shape, gsd)
    garden = (_burn(plots, 1, shape, gsd) > 0) & ~woods
    chance = np.select([woods, banks, garden], [1.0, 0.5, 0.2], 0.006)
    blocked = ndimage.binary_dilation((road > 0) | water | (roof > 0))
    boundaries = shapely.get_exterior_ring(fields)
    trees = _woods(rng, chance, cover[parcel], boundaries, blocked, gsd)
    seeds = np.full(shape, -1, np.int32)
    seeds[tuple((trees[:, 1::-1] / gsd).astype(int).T)] = np.arange(len(trees))
    distance, nearest = ndimage.distance_transform_edt(seeds < 0, return_indices=True)
    crown = seeds[tuple(nearest)]
    radius = trees[:, 2].astype(np.float32)[crown]
    ragged = distance.astype(np.float32) * gsd * (1 + 0.3 * _noise(rng, shape, 2.5 / gsd)) / radius
    height = 2.2 * radius * np.sqrt(np.clip(1 - ragged**2, 0, 1))
    return Layout(
        gsd, parcel, merged, angle, cover, road, water, garden, roof, houses, crown, height, trees
    )


def render(year: Year, layout: Layout, rng: Rng) -> tuple[Array, Array]:
    """The layout in one year: a uint8 image (rows, columns, 3) and uint8 labels (rows, columns)."""
    shape, gsd = layout.parcel.shape, layout.gsd
    count = len(layout.merged)
    owner = layout.merged[layout.parcel] if year.is_later else layout.parcel
    wooded = layout.cover == WOOD if year.is_later else layout.cover >= WOOD
    fine, patchy = _noise(rng, shape, 3 / gsd), _noise(rng, shape, 22 / gsd)

    # Fields: one crop per parcel, its rows along the longest side, sometimes across it.
    crops = np.array(year.crops)[rng.integers(len(year.crops), size=count)]
    crops[:, :3] *= rng.uniform(0.85, 1.15, (count, 1)) * rng.uniform(0.94, 1.06, (count, 3))
    crops[layout.cover >= WOOD, :3] = 0.6 * np.array(year.grass)  # forest floor, or felled
    across = layout.angle + np.pi / 2 * (1 + (rng.random(count) < 0.2))
    y, x = np.ogrid[: shape[0], : shape[1]]
    cosine, sine = np.cos(across).astype(np.float32), np.sin(across).astype(np.float32)
    offset = (x * gsd * cosine[owner] + y * gsd * sine[owner]).astype(np.float32)
    period = rng.uniform(3.0, 8.0, count).astype(np.float32)[owner]
    texture = np.sin(2 * np.pi * offset / np.maximum(period, 2.5 * gsd))
    texture *= crops[:, 3].astype(np.float32)[owner]
    texture -= 0.16 * (np.mod(offset, 18) < 1.5) * (rng.random(count) < 0.4)[owner]  # tramlines
    texture += 0.05 * fine + (rng.uniform(0.02, 0.12, count).astype(np.float32))[owner] * patchy
    image: Array = crops[:, :3].astype(np.float32)[owner]

    edge = np.zeros(shape, bool)
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[1:] |= owner[1:] != owner[:-1]
    margins = ndimage.binary_dilation(edge, iterations=max(1, round(1 / gsd)))
    verge = ndimage.binary_dilation(layout.road > 0, iterations=max(1, round(2 / gsd)))
    grassy = (margins & (rng.random(count) < 0.6)[owner]) | verge | layout.garden
    image[grassy] = np.array(year.grass) * rng.uniform(0.85, 1.0)
    texture[grassy] = 0.10 * fine[grassy] + 0.12 * patchy[grassy]

    for kind, colour in enumerate(year.roads, 1):
        image[layout.road == kind] = colour
    wet = layout.water & (layout.road == 0)
    image[wet] = year.water
    hard = wet | (layout.road > 0)
    texture[hard] = 0.05 * fine[hard]

    # Houses and trees have a height: their slope shades them, and they cast a shadow.
    height = layout.crown_height * ~(layout.trees[:, 4].astype(bool)[layout.crown] & year.is_later)
    treed = height > 0
    tint = np.array(year.leaves)[layout.trees[:, 3].astype(int)]
    tint = tint * rng.uniform(0.8, 1.2, (len(tint), 1))
    image[treed] = tint.astype(np.float32)[layout.crown[treed]]
    azimuth, elevation = np.radians(year.sun)
    sun = np.array([np.sin(azimuth), -np.cos(azimuth)])  # x, y towards the sun; y points down
    slope_y, slope_x = np.gradient(height, gsd)
    facing = -(slope_x * sun[0] + slope_y * sun[1])
    texture[treed] = np.clip(0.22 * facing[treed], -0.4, 0.35) + 0.2 * fine[treed]

    # A new house has no roof in the first year; row 0 of the padded table means no house.
    houses = np.vstack([np.zeros((1, 5)), layout.houses])
    house = (layout.roof + 1) // 2
    built = (house > 0) & (year.is_later | ~houses[:, 4].astype(bool)[house])
    house = house[built]
    side = np.where(layout.roof[built] % 2, -1, 1)
    worn = rng.uniform(0.85, 1.1, (len(houses), 1))
    image[built] = (worn * ROOFS[houses[:, 3].astype(int)])[house]
    texture[built] = 0.28 * side * (houses[:, :2] @ sun)[house] + 0.05 * fine[built]
    height[built] = houses[house, 2]

    shadow = np.zeros(shape, bool)
    steps = float(height.max()) / np.tan(elevation) / gsd
    for step in range(1, int(steps) + 1):
        moved = np.roll(height, tuple(np.rint(-step * sun[::-1]).astype(int)), (0, 1))
        shadow |= moved - step * gsd * np.tan(elevation) > height
    dark = ndimage.gaussian_filter(shadow.astype(np.float32), 0.6)[..., None]
    light = 1 - dark * np.array([0.52, 0.48, 0.40], np.float32)  # skylight makes shadows blue
    haze = 1 + 0.10 * _noise(rng, shape, 500 / gsd)
    image *= light * ((1 + texture) * haze)[..., None]
    image = 255 * np.clip(image / 255, 0, 1) ** year.gamma * np.array(year.cast, np.float32)
    image = ndimage.gaussian_filter(image, (year.blur, year.blur, 0))
    image += year.noise * rng.standard_normal(image.shape, np.float32)

    labels = np.full(shape, CLASSES["field"], np.uint8)
    labels[(rng.random(count) < 0.01)[owner]] = CLASSES["unknown"]  # surveys have gaps
    labels[layout.garden] = CLASSES["garden"]
    labels[wooded[layout.parcel] | treed] = CLASSES["woods"]
    labels[wet] = CLASSES["water"]
    labels[layout.road > 0] = CLASSES["road"]
    labels[built] = CLASSES["house"]
    return np.clip(image, 0, 255).astype(np.uint8), labels


def _write(path: Path, bands: Array, gsd: float, offset: tuple[float, float]) -> Path:
    """Write uint8 bands (bands, rows, columns) whose corner is `offset` rows, columns from ORIGIN.

    Raises:
        rasterio.errors.RasterioIOError: the file cannot be written.
    """
    corner = (ORIGIN[0] + offset[1] * gsd, ORIGIN[1] - offset[0] * gsd)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2],
        dtype="uint8", crs=CRS, transform=from_origin(*corner, gsd, gsd), tiled=True,
        blockxsize=256, blockysize=256, compress="deflate",
        photometric="RGB" if len(bands) == 3 else "MINISBLACK",
    ) as target:  # fmt: skip
        target.write(bands)
    return path


def write_landscape(
    folder: Path, *, width: int = 2304, height: int = 1920, gsd: float = 1.0, seed: int = 0
) -> Landscape:
    """Write a landscape of two years; the same seed gives the same landscape.

    Images are RGB and labels one band of CLASSES, both uint8. The second year has its own extent,
    shifted by a fraction of a pixel against the first, and a smooth misregistration.

    Args:
        folder: created if absent.
        width, height: of the first year's rasters, in pixels.
        gsd: metres per pixel.

    Raises:
        ValueError: gsd is outside 0.5..2, a side is below 256 metres, or the seed is negative.
        OSError, rasterio.errors.RasterioIOError: the folder cannot be written.
    """
    if not 0.5 <= gsd <= 2:
        raise ValueError(f"gsd must lie within 0.5..2 metres, not {gsd}")
    if min(width, height) * gsd < 256:
        raise ValueError(
            f"a landscape needs sides of at least 256 metres, not {width} x {height} pixels"
        )
    layout = _layout(seed, (height + 2 * MARGIN, width + 2 * MARGIN), gsd)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for year, name in ((BEFORE, "before"), (AFTER, "after")):
        rng = np.random.default_rng([seed, 1 + year.is_later])
        image, labels = render(year, layout, rng)
        shape = (height + year.growth[0], width + year.growth[1])
        rows, columns = (
            axis + MARGIN + shift + year.misregistration * _noise(rng, shape, 350 / gsd)
            for axis, shift in zip(np.ogrid[: shape[0], : shape[1]], year.offset, strict=True)
        )
        for kind, raster, order in (("images", image, 1), ("labels", labels[..., None], 0)):
            bands = [
                ndimage.map_coordinates(band, [rows, columns], order=order)
                for band in np.moveaxis(raster, 2, 0)
            ]
            path = folder / f"{kind}_{name}.tif"
            paths.append(_write(path, np.stack(bands), gsd, year.offset))
    return Landscape(paths[0], paths[1], paths[2], paths[3])
