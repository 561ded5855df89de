"""TensorBoard: events of a run, and descriptors for the Embedding Projector."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.proto.attr_value_pb2 import AttrValue
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.node_def_pb2 import NodeDef
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

from geomatch.report.contact_sheet import Thumbnail, picture, sheet

SPRITE, THUMBNAIL = 4096, 64
"""Largest sides in pixels of the projector's sprite (a texture) and of a thumbnail in it."""

FAR = 1e20
"""Largest magnitude in a histogram."""


class Board:
    """Writes the TensorBoard events of a run.

    Args:
        start: events of earlier sessions from this step on are hidden.
    """

    def __init__(self, folder: Path, start: int) -> None:
        # A killed run loses the events of one second at most.
        self._events = SummaryWriter(str(folder), purge_step=start, flush_secs=1)

    def close(self) -> None:
        self._events.close()

    def scalars(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Metrics by name; None is left out."""
        for name, value in metrics.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def histograms(self, step: int, values: Mapping[str, NDArray[np.floating]]) -> None:
        """Distributions by name; NaN and magnitudes from `FAR` on are left out."""
        for name, array in values.items():
            kept = array[np.abs(array) < FAR]
            if len(kept):
                self._events.add_histogram(name, kept, step)

    def pictures(self, step: int, name: str, rows: Sequence[Sequence[Thumbnail]]) -> None:
        """Rows of thumbnails as one image."""
        png = io.BytesIO()
        sheet(rows, png)
        with Image.open(png) as image:
            self._events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def graph(self, nodes: Iterable[tuple[str, str, Sequence[str], Sequence[int]]]) -> None:
        """A network of nodes (name, operation, input names, shape); see `module_graph.trace`."""
        defs = [
            NodeDef(name=name, op=operation, input=inputs, attr={"_output_shapes": _shape(shape)})
            for name, operation, inputs, shape in nodes
        ]
        graph = GraphDef(node=defs).SerializeToString()
        self._events.file_writer.add_event(Event(graph_def=graph))


def _shape(shape: Sequence[int]) -> AttrValue:
    sides = TensorShapeProto(dim=[TensorShapeProto.Dim(size=side) for side in shape])
    return AttrValue(list=AttrValue.ListValue(shape=[sides]))


def write_projector(
    folder: Path,
    name: str,
    vectors: NDArray[np.floating],
    metadata: Mapping[str, Sequence[str]],
    pictures: Iterable[NDArray[np.uint8]],
) -> None:
    """Write descriptors for TensorBoard's Embedding Projector.

    Args:
        folder: an existing folder, the log directory of TensorBoard or a folder within it.
        name: of the descriptors.
        vectors: (n, d) descriptors.
        metadata: columns of n values.
        pictures: (h, w, c) uint8, one per descriptor, image channels first.
    """
    np.savetxt(folder / "vectors.tsv", vectors, "%.7g", "\t")
    with (folder / "metadata.tsv").open("w", encoding="utf-8", newline="\n") as file:
        for values in (metadata, *zip(*metadata.values(), strict=True)):
            file.write("\t".join(re.sub(r"[\t\r\n]", " ", value) for value in values) + "\n")
    across = math.ceil(math.sqrt(len(vectors)))
    side = min(THUMBNAIL, SPRITE // across)
    sprite = Image.new("RGB", (across * side, across * side))
    for i, pixels in enumerate(pictures):
        row, column = divmod(i, across)
        sprite.paste(picture(pixels, side), (column * side, row * side))
    sprite.save(folder / "sprite.png")
    (folder / "projector_config.pbtxt").write_text(
        f"""embeddings {{
  tensor_name: "{name}"
  tensor_path: "vectors.tsv"
  metadata_path: "metadata.tsv"
  sprite {{
    image_path: "sprite.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
""",
        encoding="utf-8",
    )
    # TensorBoard finds a folder within its log directory only if it has an event file.
    SummaryWriter(str(folder)).close()
