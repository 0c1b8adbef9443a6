"""One synthetic run and its report for the whole session: drawing costs seconds."""

import pytest
from synthetic_run import Synthetic

from pipeline.reporting import Report, build_report
from pipeline.store import Store


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return Synthetic(Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="session")
def report(run: Synthetic) -> Report:
    return build_report(run.artefacts, run.record)
