"""Cells that Flax does not have."""
