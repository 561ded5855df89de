"""What TensorBoard shows: events of a run, and descriptors for its Embedding Projector."""

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
"""Largest side in pixels of a projector's sprite, which is a texture, and of a picture in it."""

FAR = 1e20
"""Where the bins of a histogram end."""


class Board:
    """A run's events.

    Args:
        start: what earlier sessions wrote from this step on is hidden.
    """

    def __init__(self, folder: Path, start: int) -> None:
        # A second is all that a killed run may lose of what came before its checkpoint.
        self._events = SummaryWriter(str(folder), purge_step=start, flush_secs=1)

    def close(self) -> None:
        self._events.close()

    def scalars(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Figures by name; None is left out."""
        for name, value in metrics.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def histograms(self, step: int, values: Mapping[str, NDArray[np.floating]]) -> None:
        """Distributions by name; values beyond `FAR`, or that are no numbers, are left out."""
        for name, drawn in values.items():
            near = drawn[np.abs(drawn) < FAR]
            if len(near):
                self._events.add_histogram(name, near, step)

    def pictures(self, step: int, name: str, rows: Sequence[Sequence[Thumbnail]]) -> None:
        """Rows of thumbnails as one image."""
        png = io.BytesIO()
        sheet(rows, png)
        with Image.open(png) as image:
            self._events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def graph(self, nodes: Iterable[tuple[str, str, Sequence[str], Sequence[int]]]) -> None:
        """A network of (name, operation, names of inputs, shape); see `module_graph.trace`."""
        made = [
            NodeDef(name=name, op=operation, input=inputs, attr={"_output_shapes": _shape(shape)})
            for name, operation, inputs, shape in nodes
        ]
        graph = GraphDef(node=made).SerializeToString()
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
        folder: that TensorBoard is pointed at, or is within; it is there.
        name: of the descriptors.
        vectors: (n, d).
        metadata: columns of n values.
        pictures: (h, w, c) of each, the image channels first.
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
    # A folder without events is none that TensorBoard finds within another.
    SummaryWriter(str(folder)).close()
