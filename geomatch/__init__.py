"""Find the same place in aerial imagery of different years.

The pipeline is the architecture; each stage is one module with one function of its name:

    rasters + labels --tile--> TileTable + pixels --train--> checkpoints --embed--> Embeddings
                                                     --index--> Index --query--> Matches
                                                                      --eval---> Report

A project folder holds every artefact (`geomatch.project.Project`). Python callers import the stages
from `geomatch.api`.
"""

__version__ = "0.1.0"
