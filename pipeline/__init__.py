"""The distributed pipeline around `bd_core`: everything that touches disk, processes or a tracker."""

import os

# torch reads this at its first tensor: large ones get huge pages where Linux offers them (see bd_core/huge_pages.py),
# which random reads of evidence and passes over checkpoints gain from. The user's own setting stands.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
