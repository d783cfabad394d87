"""Data sets: the facts of each, their conversion into one file, batches on the device."""

from abn_exp.data.catalog import CATALOG, DatasetInfo
from abn_exp.data.loader import BatchLoader
from abn_exp.data.prepare import (
    ImageDataset,
    Split,
    channel_statistics,
    load,
    prepare,
    stratified_split,
    stratified_subset,
)

__all__ = [
    "CATALOG",
    "BatchLoader",
    "DatasetInfo",
    "ImageDataset",
    "Split",
    "channel_statistics",
    "load",
    "prepare",
    "stratified_split",
    "stratified_subset",
]
