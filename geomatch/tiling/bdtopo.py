"""The layers of BD TOPO, IGN's topographic database of France, as label classes.

Names are those of the Shapefile and GeoPackage deliveries, of version 3 and of version 2 before it:
https://geoservices.ign.fr/documentation/donnees/vecteur/bdtopo
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from geomatch import config
from geomatch.errors import GeomatchError
from geomatch.geo import labels

CLASSES = (
    "vegetation",
    "aerodrome",
    "cemetery",
    "sport ground",
    "water",
    "railway",
    "road",
    "building",
)
"""The classes, each drawn over those before it."""

LAYERS = {
    "zone_de_vegetation": ("vegetation", 0.0),
    "zone_vegetation": ("vegetation", 0.0),
    "aerodrome": ("aerodrome", 0.0),
    "piste_d_aerodrome": ("aerodrome", 0.0),
    "piste_aerodrome": ("aerodrome", 0.0),
    "cimetiere": ("cemetery", 0.0),
    "terrain_de_sport": ("sport ground", 0.0),
    "terrain_sport": ("sport ground", 0.0),
    "troncon_hydrographique": ("water", 1.5),
    "troncon_cours_eau": ("water", 1.5),
    "surface_hydrographique": ("water", 0.0),
    "surface_eau": ("water", 0.0),
    "plan_d_eau": ("water", 0.0),
    "troncon_de_voie_ferree": ("railway", 2.5),
    "troncon_voie_ferree": ("railway", 2.5),
    "troncon_de_route": ("road", 3.0),
    "troncon_route": ("road", 3.0),
    "route": ("road", 3.0),
    "batiment": ("building", 0.0),
    "bati_indifferencie": ("building", 0.0),
    "bati_industriel": ("building", 0.0),
    "bati_remarquable": ("building", 0.0),
}
"""Class and buffer in metres of each layer; lines are the axes of roads, tracks and streams."""

UNSEEN = {
    ("pos_sol", "position_par_rapport_au_sol"): ("-1", "-2", "-3", "-4"),
    ("etat", "etat_de_l_objet"): ("En projet",),
    ("nature",): ("Sentier", "Escalier", "Bac ou liaison maritime", "Bac auto", "Bac piéton"),
}
"""What an aerial image does not show of a line, by the attributes that say so: what is underground
or planned, paths, and ferries. Attributes have other names in a Shapefile than in a GeoPackage."""


def tables(path: str) -> list[config.LabelsConfig]:
    """The `[[labels]]` tables of a delivery, in the order in which they are drawn.

    Args:
        path: a file that GDAL opens, or a folder with GeoPackages or shapefiles in any of its
            folders.

    Raises:
        GeomatchError: no layer of BD TOPO is there.
    """
    found = []
    for file in _files(path):
        for name in labels.layer_names(file):
            if name.lower() in LAYERS:
                group, buffer = LAYERS[name.lower()]
                where = _seen(labels.fields(file, name)) if buffer else ""
                found.append(
                    config.LabelsConfig(
                        file=file, class_=group, layer=name, where=where, buffer=buffer
                    )
                )
    if not found:
        raise GeomatchError(
            f"{path} has no layer of BD TOPO, such as troncon_de_route or batiment",
            "Give the GeoPackage, or the folder that its shapefiles were unpacked into.",
        )
    return sorted(found, key=lambda table: CLASSES.index(table.class_))


def _files(path: str) -> list[str]:
    if not Path(path).is_dir():
        return [path]
    inner = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in (".gpkg", ".shp"))
    return [str(p) for p in inner if p.suffix.lower() == ".gpkg" or p.stem.lower() in LAYERS]


def _seen(fields: dict[str, str]) -> str:
    """The condition, in OGR SQL, that leaves out what `UNSEEN` lists."""
    return " AND ".join(_conditions(fields))


def _conditions(fields: dict[str, str]) -> Iterator[str]:
    for names, values in UNSEEN.items():
        for field, dtype in fields.items():
            if field.lower() in names:
                quoted = ", ".join(f"'{value}'" if dtype == "object" else value for value in values)
                yield f'("{field}" IS NULL OR "{field}" NOT IN ({quoted}))'
