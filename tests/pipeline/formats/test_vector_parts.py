"""Parts of one-dimensional arrays, read without a memory map."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.formats.vectors import length_of, read_part, write_vectors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_vectors(tmp_path / "a.npy", np.arange(10, dtype=np.int32))
    return tmp_path / "a.npy"


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 7), (4, 4), (10, 10), (9, 10)])
def test_a_part_is_that_slice(path: Path, start: int, stop: int) -> None:
    part = read_part(path, start, stop)
    assert part.dtype == np.int32 and part.flags.writeable
    assert np.array_equal(part, np.arange(start, stop))
    assert length_of(path) == 10


def test_nothing_of_an_empty_array(tmp_path: Path) -> None:
    write_vectors(tmp_path / "a.npy", np.empty(0, dtype=np.float32))
    assert length_of(tmp_path / "a.npy") == 0 and len(read_part(tmp_path / "a.npy", 0, 0)) == 0


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (-1, 3), (5, 4)])
def test_what_the_array_has_not(path: Path, start: int, stop: int) -> None:
    with pytest.raises(DataError, match=f"has 10 elements, {start} to {stop}"):
        read_part(path, start, stop)


def test_a_file_cut_short_or_grown_is_refused_even_after_it_was_read(path: Path) -> None:
    assert len(read_part(path, 0, 10)) == 10
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="cannot be read"):
        read_part(path, 0, 2)
    path.write_bytes(whole + b"....")
    with pytest.raises(DataError, match="bytes beyond its 10 elements"):
        read_part(path, 0, 2)


def test_objects_matrices_and_missing_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    write_vectors(tmp_path / "m.npy", np.zeros((2, 3)))
    for name, message in {"o.npy": "objects", "m.npy": "1 dimensions", "none.npy": "cannot be read"}.items():
        with pytest.raises(DataError, match=message):
            length_of(tmp_path / name)
