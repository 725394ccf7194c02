"""Where images come from: the table of image sources."""

from pathlib import Path

from pipeline.config import sections
from pipeline.data.sources.arrays import IdxSource, NpzSource
from pipeline.data.sources.base import ImageSource
from pipeline.data.sources.files import FileSource, FolderSource, TarSource, WebDatasetSource
from pipeline.data.sources.mnist import MnistSource
from pipeline.data.sources.parquet import ParquetSource
from pipeline.data.sources.synthetic import SyntheticSource
from pipeline.errors import UserError


def open_source(
    dataset: sections.DatasetOptions,
    options: sections.ShardOptions,
    endpoint_url: str | None = None,
) -> ImageSource:
    """The source that the configuration names. Raises ``UserError`` if it is not there or cannot be
    used.
    """
    kind, path = (
        dataset.source,
        Path(dataset.path).expanduser().absolute() if dataset.path else None,
    )
    if kind is sections.Source.mnist:
        return MnistSource(path)
    if kind is sections.Source.synthetic:
        if path is not None:
            raise UserError(
                "dataset.source=synthetic draws its images itself; leave dataset.path out"
            )
        return SyntheticSource(options.seed)
    if path is None or dataset.path is None:
        raise UserError(f"dataset.source={kind.value} needs dataset.path, where its files are")
    if kind in FILE_SOURCES:
        return FILE_SOURCES[kind](dataset.path, options, endpoint_url)
    if kind is sections.Source.npz:
        return NpzSource(path, options.valid_fraction, options.test_fraction)
    if not path.is_dir():
        raise UserError(f"dataset.path={dataset.path} is not a folder")
    return IdxSource(path, options.valid_fraction)


FILE_SOURCES: dict[sections.Source, type[FileSource]] = {
    sections.Source.folder: FolderSource,
    sections.Source.tar: TarSource,
    sections.Source.webdataset: WebDatasetSource,
    sections.Source.parquet: ParquetSource,
}
