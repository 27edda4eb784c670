"""Benchmarks: what the rules cost beside jitted Flax BPTT and beside stepwise forms of the same."""
