"""Data sets: written to shards, described by a manifest, and read as batches."""

from pipeline.data.dataset import DataSet

__all__ = ["DataSet"]
