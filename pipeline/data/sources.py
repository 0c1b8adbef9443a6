"""Every kind of source, told apart by `kind`."""

from typing import Annotated

from pydantic import Field

from pipeline.data.folder import FolderSource
from pipeline.data.packages import PackageSource
from pipeline.data.parquet import ParquetSource

AnySource = Annotated[FolderSource | ParquetSource | PackageSource, Field(discriminator="kind")]
