"""The parts of `geomatch.tile`: sources, plan, shards, and images without georeference."""
