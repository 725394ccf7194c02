"""Where images come from: the table of image sources.

A new source is a module beside this one, a row in ``SOURCES``, and a name in ``Source``.
"""

from collections.abc import Callable

from pipeline.config.sections import DatasetOptions, ShardOptions, Source
from pipeline.data.sources.base import ImageSource
from pipeline.data.sources.files import FolderSource
from pipeline.data.sources.idx import IdxSource
from pipeline.data.sources.mnist import MnistSource
from pipeline.data.sources.npz import NpzSource
from pipeline.data.sources.parquet import ParquetSource
from pipeline.data.sources.synthetic import SyntheticSource
from pipeline.data.sources.tars import TarSource, WebDatasetSource

SOURCES: dict[Source, Callable[[DatasetOptions, ShardOptions, str | None], ImageSource]] = {
    Source.mnist: MnistSource.open,
    Source.idx: IdxSource.open,
    Source.folder: FolderSource.open,
    Source.npz: NpzSource.open,
    Source.tar: TarSource.open,
    Source.webdataset: WebDatasetSource.open,
    Source.parquet: ParquetSource.open,
    Source.synthetic: SyntheticSource.open,
}
"""How each source is opened: from the options, and the S3 server's address."""


def open_source(
    dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None = None
) -> ImageSource:
    """The image source ``dataset.source``. Raises ``UserError`` if it is missing or unusable."""
    return SOURCES[dataset.source](dataset, options, endpoint_url)
