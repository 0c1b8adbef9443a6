"""Compares the GPU kernel of edge distances with torch; prints "equal" at the end.

TRITON_INTERPRET=1 python edge_triton_cases.py cpu     # in Triton's interpreter
python edge_triton_cases.py cuda
"""

import sys

import torch

from bd_core.edge_triton import triton_distance

DEVICE = sys.argv[1]


def compare(n_edges: int, n_classes: int) -> None:
    generator = torch.Generator().manual_seed(n_edges)
    anchor, base = (1 + torch.rand(9, n_classes, generator=generator).to(DEVICE) * 9 for _ in range(2))
    base[3] = anchor[4]
    i, j = (torch.randint(9, (n_edges,), generator=generator).to(DEVICE) for _ in range(2))
    i[0], j[0] = 4, 3
    p, q = (rows / rows.sum(1, keepdim=True) for rows in (anchor, base))
    found = triton_distance(anchor, base, 1 / anchor.sum(1), 1 / base.sum(1), i, j)
    torch.testing.assert_close(found, (p[i] - q[j]).abs().sum(1), rtol=1e-6, atol=1e-7)
    assert found[0] == 0


if __name__ == "__main__":
    for sizes in ((1, 2), (8, 256), (19, 257), (33, 758)):
        compare(*sizes)
    sys.stdout.write("equal\n")
