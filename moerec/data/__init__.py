"""Interaction data: schema, readers, the city world, splits and the packed pipeline."""
