"""Experiments with localgrad: `python -m experiments NAME`, or `--help` for their names."""
