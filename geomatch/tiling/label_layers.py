"""The labels of each year: channels as they are, or layers that are drawn by class."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from geomatch import config
from geomatch.errors import GeomatchError, UsageError
from geomatch.geo import labels, rasters
from geomatch.geo.labels import ClassMap, Layer, RasterLayer
from geomatch.geo.rasters import Raster
from geomatch.progress import ProgressCallback
from geomatch.tiling import bdtopo, imagery
from geomatch.tiling.usable import Unreadable, usable

MOST = 255
"""Classes that a channel can tell apart, beside 0."""
FIRST, LAST = -(2**62), 2**62
"""Beyond the values of any raster."""


@dataclass(frozen=True)
class YearLabels:
    """The labels of one year.

    Attributes:
        rasters: their values are channels as they are.
        layers: drawn into one channel, later ones over earlier ones.
        classes: names of the classes 1, 2, ... that the layers of all years draw; empty if they
            draw greys.
    """

    rasters: tuple[Raster, ...] = ()
    layers: tuple[Layer, ...] = ()
    classes: tuple[str, ...] = ()


def collect(
    settings: config.Config, unreadable: Unreadable, progress: ProgressCallback
) -> dict[str, YearLabels]:
    """Inspect the labels of every year.

    Raises:
        GeomatchError: a file is missing or damaged, or has too many values for classes.
        UsageError: a `[[labels]]` table makes no sense, or some labels have classes and others not.
    """
    years = [source.year for source in settings.source]
    tables, known = list[config.LabelsConfig](), list[str]()
    plain: dict[str, YearLabels] = {}
    paths: dict[str, list[str]] = {}
    for source in settings.source:
        if source.labels.startswith(config.BDTOPO):
            known = [*bdtopo.CLASSES]
            found = bdtopo.tables(source.labels.removeprefix(config.BDTOPO))
            if missing := set(known) - {table.class_ for table in found}:
                progress(f"labels of {source.year}: no layer of {', '.join(sorted(missing))}")
            tables += [replace(table, year=source.year) for table in found]
        elif source.labels:
            named = labels.find(source.labels, f"labels of {source.year}")
            if of_year := imagery.others(source, named):
                paths[source.year] = of_year
                plain[source.year] = _plain(source.year, of_year, unreadable)
    for table in settings.labels:
        _check(table, years)
        tables.append(table)
    if not tables and not any(map(_is_wide, plain.values())):
        return plain
    for year, labelled in plain.items():
        if tables or labelled.layers or labelled.rasters[0].bands > 1:
            raise UsageError(
                f"labels of {year} are greys or colours, but other labels have classes",
                "Give these files a class too, in a [[labels]] table of geomatch.toml.",
            )
    wide = {
        config.LabelsConfig(file=source.labels, year=source.year): paths[source.year]
        for source in settings.source
        if source.year in plain
    }
    return _by_class([*tables, *wide], wide, years, known, unreadable, progress)


def _check(table: config.LabelsConfig, years: Sequence[str]) -> None:
    if not table.file:
        raise UsageError("[[labels]] has a table without file", 'Add: file = "PATH"')
    if table.year and table.year not in years:
        raise UsageError(
            f"[[labels]] {table.file}: there is no source of the year {table.year}",
            f"The years are {', '.join(years)}.",
        )


def _plain(year: str, paths: Sequence[str], unreadable: Unreadable) -> YearLabels:
    """Labels that name no class: rasters as they are, the layers of a vector file in greys."""
    what = f"labels of {year}"
    if labels.is_vector(paths[0]):
        if len(paths) > 1:
            raise GeomatchError(
                f"{what}: {len(paths)} vector files match",
                "Give each a class in a [[labels]] table of geomatch.toml, or merge them as layers "
                "of one GeoPackage: ogr2ogr -update all.gpkg FILE",
            )
        layers = labels.vector_layers(paths[0], 1)
        greys = [round(255 * (i + 1) / len(layers)) for i in range(len(layers))]
        return YearLabels(
            layers=tuple(replace(a, value=v) for a, v in zip(layers, greys, strict=True))
        )
    return YearLabels(rasters=_rasters(paths, what, unreadable))


def _rasters(paths: Sequence[str], what: str, unreadable: Unreadable) -> tuple[Raster, ...]:
    found = usable(paths, labels.read_header, unreadable)
    rasters.common_format(found, what)
    return found


def _is_wide(found: YearLabels) -> bool:
    """Whether values do not fit a channel as they are."""
    return bool(found.rasters) and found.rasters[0].dtype != "uint8"


# By class


def _by_class(
    tables: Sequence[config.LabelsConfig],
    paths: Mapping[config.LabelsConfig, list[str]],
    years: Sequence[str],
    known: Sequence[str],
    unreadable: Unreadable,
    progress: ProgressCallback,
) -> dict[str, YearLabels]:
    """The layers of tables; classes are numbered in the order in which they are named.

    Args:
        paths: the files of tables that take but some of what their `file` matches.
        known: names of the first classes.
    """
    tables = [each for table in tables for each in _by_attribute(table)]
    # A table without a class has those of its values, in their order, over all such tables.
    found = {table: paths.get(table) or labels.find(table.file, _name(table)) for table in tables}
    drawn = {table: labels.is_vector(first) for table, (first, *_) in found.items()}
    images = {
        table: _rasters(matched, _name(table), unreadable)
        for table, matched in found.items()
        if not drawn[table]
    }
    own: set[int] = set()
    for table, matched in images.items():
        if not (table.class_ or table.classes):
            for done, raster in enumerate(matched, 1):
                own.update(labels.values_of([raster]))
                progress("reading the values of label rasters", done, len(matched))
    rules = {table: _rules(table, drawn[table], sorted(own)) for table in tables}
    names = list(dict.fromkeys([*known, *(name for rule in rules.values() for _, _, name in rule)]))
    if not names:
        raise GeomatchError(
            f"the label rasters have no value but 0, which means unknown: {tables[0].file}",
            'Name it as a class in a [[labels]] table: classes = ["0=sea"]',
        )
    if len(names) > MOST:
        raise GeomatchError(
            f"labels have {len(names)} classes, from {names[0]} to {names[-1]}; a tile can tell "
            f"{MOST} apart",
            'Put values together in a [[labels]] table: classes = ["1..9=water", "10..99=forest"]',
        )
    layers: dict[str, list[Layer]] = {year: [] for year in years}
    for table in tables:
        made: list[Layer] = []
        if drawn[table]:
            value = names.index(table.class_) + 1
            for path in found[table]:
                made += labels.vector_layers(path, value, table.layer, table.where, table.buffer)
        else:
            classes = _class_map(table, rules[table], images[table], names)
            made.append(RasterLayer(images[table], classes))
        for year in [table.year] if table.year else years:
            layers[year] += made
    return {year: YearLabels(layers=tuple(layers[year]), classes=tuple(names)) for year in years}


def _by_attribute(table: config.LabelsConfig) -> list[config.LabelsConfig]:
    """A table for each class that an attribute gives, in their order; another table as it is.

    Raises:
        GeomatchError: a file cannot be read, or has no such attribute.
        UsageError: there is a class beside the attribute.
    """
    if not table.attribute:
        return [table]
    what = _name(table)
    if table.class_:
        raise UsageError(f"{what} has both class and attribute", "Remove one.")
    paths = labels.find(table.file, what)
    if not labels.is_vector(paths[0]):
        return [table]
    layers = [
        layer for path in paths for layer in labels.vector_layers(path, 1, table.layer, table.where)
    ]
    known = [labels.fields(layer.path, layer.layer) for layer in layers]
    for layer, of_layer in zip(layers, known, strict=True):
        if table.attribute not in of_layer:
            raise UsageError(
                f"{layer.path} (layer {layer.layer}) has no attribute {table.attribute!r}",
                f"Its attributes: {', '.join(of_layer)}.",
            )
    is_text = known[0][table.attribute] == "object"
    field = f'"{table.attribute}"'
    conditions: dict[str, list[str]] = {}
    if table.classes:
        for text in table.classes:
            condition, name = _condition(field, is_text, text, what)
            conditions.setdefault(name, []).append(condition)
    else:
        values = {v for layer in layers for v in labels.attribute_values(layer, table.attribute)}
        in_order = sorted(values, key=lambda value: (isinstance(value, str), value))
        conditions = {str(v): [f"{field} = {_literal(v)}"] for v in in_order}
    always = f"({table.where}) AND " if table.where else ""
    wheres = {name: f"{always}({' OR '.join(any_of)})" for name, any_of in conditions.items()}
    return [
        replace(table, attribute="", classes=(), class_=name, where=where)
        for name, where in wheres.items()
    ]


def _condition(field: str, is_text: bool, text: str, what: str) -> tuple[str, str]:
    """The condition, in OGR SQL, and the class of a rule about an attribute."""
    if not is_text:
        low, high, name = _rule(text, what)
        return f"{field} BETWEEN {low} AND {high}", name
    value, _, name = (part.strip() for part in text.partition("="))
    if not name:
        raise UsageError(
            f"{what}: {text!r} in classes is not VALUE=CLASS",
            'For example: classes = ["forest=wood", "meadow=grass"]',
        )
    return f"{field} = {_literal(value)}", name


def _literal(value: Any) -> str:
    """A value in SQL."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _name(table: config.LabelsConfig) -> str:
    return f"[[labels]] {table.file}"


Rule = tuple[int, int, str]
"""The first and last value of a class, and its name."""


def _rules(table: config.LabelsConfig, is_vector: bool, own: Sequence[int]) -> list[Rule]:
    """The rules of a table; those of a vector file have no values.

    Args:
        own: values of rasters that have no class.

    Raises:
        UsageError: a key is missing, does not fit the file or contradicts another.
    """
    what = _name(table)
    if table.class_ and table.classes:
        raise UsageError(f"{what} has both class and classes", "Remove one.")
    if is_vector:
        if not table.class_:
            raise UsageError(
                f"{what} has no class",
                'Add: class = "NAME", or attribute = "NAME" for a class of each of its values.',
            )
        return [(0, 0, table.class_)]
    for key in ("layer", "where", "attribute", "buffer"):
        if getattr(table, key):
            raise UsageError(f"{what} is a raster, which has no {key}", f"Remove {key}.")
    if table.class_:
        return [(FIRST, -1, table.class_), (1, LAST, table.class_)]
    if not table.classes:
        return [(value, value, str(value)) for value in own]
    rules = [_rule(text, what) for text in table.classes]
    for before, after in itertools.pairwise(sorted(rules)):
        if before[1] >= after[0]:
            raise UsageError(
                f"{what}: the values of {before[2]} and {after[2]} overlap",
                "Give each value one class.",
            )
    return rules


def _rule(text: str, what: str) -> Rule:
    """The rule "VALUE=CLASS", "FIRST..LAST=CLASS" or "#rrggbb=CLASS"."""
    values, _, name = (part.strip() for part in text.partition("="))
    if name and re.fullmatch(r"#[0-9a-fA-F]{6}", values):
        return int(values[1:], 16), int(values[1:], 16), name
    match = re.fullmatch(r"(-?\d+)(?:\.\.(-?\d+))?", values)
    if not name or match is None:
        raise UsageError(
            f"{what}: {text!r} in classes is not VALUE=CLASS",
            'For example: classes = ["1=water", "2..4=forest"], or "#ff0000=road" for colours.',
        )
    first, last = int(match[1]), int(match[2] or match[1])
    return min(first, last), max(first, last), name


def _class_map(
    table: config.LabelsConfig, rules: Sequence[Rule], files: Sequence[Raster], names: list[str]
) -> ClassMap:
    """The classes of pixel values.

    Raises:
        UsageError: rules for colours are given for one band, or rules for values for three.
    """
    coloured = files[0].bands == 3
    if table.classes and any(text.lstrip().startswith("#") != coloured for text in table.classes):
        wanted = 'colours: "#ff0000=road"' if coloured else 'values: "1=road"'
        raise UsageError(
            f"{files[0].path} has {files[0].bands} bands, which classes does not fit",
            f"Give {wanted}",
        )
    found = sorted((low, high, names.index(name) + 1) for low, high, name in rules)
    low, high, value = zip(*found, strict=True) if found else ((0,), (0,), (0,))
    return ClassMap(low, high, value)
