"""The sha256 of every input file, found while it is merged: threads that share the file cache with the merge."""

import hashlib
import mmap
import os
import threading
from collections.abc import Sequence

from pipeline.formats.spans import OpenFile

BLOCK_BYTES = 8 << 20


class Hashing:
    """Hashes files in the background, all of them a block at a time, so that it stays near where the merge reads.

    hashlib and the kernel both work without Python's lock. Leaving the `with` block ends the threads.
    """

    def __init__(self, files: Sequence[OpenFile], threads: int) -> None:
        self._hashes = {file.path: hashlib.sha256() for file in files}
        self._stopped = threading.Event()
        self._errors: list[Exception] = []
        threads = max(1, min(threads, len(files)))
        self._threads = [
            threading.Thread(target=self._run, args=(files[k::threads],), daemon=True) for k in range(threads)
        ]

    def __enter__(self) -> "Hashing":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def digests(self) -> dict[str, str]:
        """Path -> sha256 (hex), when all are done."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return {str(path): each.hexdigest() for path, each in self._hashes.items()}

    def _run(self, files: Sequence[OpenFile]) -> None:
        try:
            for start in range(0, max(file.size_bytes for file in files), BLOCK_BYTES):
                for file in files:
                    if self._stopped.is_set():
                        return
                    size = min(BLOCK_BYTES, file.size_bytes - start)
                    if size > 0:
                        hash_range(file.descriptor, start, size, self._hashes[file.path])
        except OSError as error:
            self._errors.append(error)


def hash_range(descriptor: int, start: int, size: int, *hashes: "hashlib._Hash") -> None:
    """Update the hashes with `size` bytes of a file from `start`, mapped: nothing is copied."""
    first = start - start % mmap.ALLOCATIONGRANULARITY
    os.posix_fadvise(descriptor, start + size, size, os.POSIX_FADV_WILLNEED)
    with mmap.mmap(descriptor, start - first + size, prot=mmap.PROT_READ, offset=first) as mapped:
        view = memoryview(mapped)[start - first :]
        try:
            for each in hashes:
                each.update(view)
        finally:
            view.release()
