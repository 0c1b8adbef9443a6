"""Features, graphs and their definition for the tests of radius graphs. Shapes: N samples, M base rows, D width."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from bd_core import radius_scan
from bd_core.graph_kernel import graph_kernel_name
from bd_core.neighbourhood import Neighbourhoods

ENGINES = st.sampled_from(["kernel", "torch"])
# The kernel's cosines do not depend on blocks at all.
CLOSE = {"kernel": 0.0 if graph_kernel_name() != "torch" else 1e-6, "torch": 1e-6}
NEAR = 1e-5  # a float32 cosine this close to the radius may fall on either side


@contextmanager
def running(engine: str) -> Iterator[None]:
    """The kernel if there is one, or torch."""
    with pytest.MonkeyPatch.context() as patch:
        if engine == "torch":
            patch.setattr(radius_scan, "kernel_runs", lambda *tensors: False)
        yield


@st.composite
def clouds(draw: st.DrawFn, min_size: int = 1) -> Tensor:
    """Unit rows [N, D]: random, with duplicates, in tight clusters, all equal, or with their opposites."""
    n, width = draw(st.integers(min_size, 24)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = normalize(torch.randn(n, width, dtype=dtype, generator=generator), dim=1)
    kind = draw(st.sampled_from(["random", "duplicated", "clustered", "all equal", "antipodal"]))
    if kind == "duplicated":
        rows = rows[torch.randint(n, (n,), generator=generator) // 2]
    if kind == "clustered":
        centre = rows[torch.randint(n, (n,), generator=generator) // 4]
        rows = normalize(centre + 0.01 * torch.randn(n, width, dtype=dtype, generator=generator), dim=1)
    if kind == "all equal":
        rows = rows[:1].repeat(n, 1)
    if kind == "antipodal":
        rows = torch.cat([rows[: n // 2], -rows])[:n]
    return rows


def joined(parts: Iterable[tuple[slice, Neighbourhoods]]) -> Neighbourhoods:
    graphs = [part for _, part in parts]
    degree = torch.cat([part.degree for part in graphs])
    return Neighbourhoods(
        torch.cat([degree.new_zeros(1), degree.cumsum(0)]),
        torch.cat([part.neighbours for part in graphs]),
        torch.cat([part.cosine for part in graphs]),
    )


def cluster_rows(n: int, width: int, seed: int = 0, n_clusters: int = 40, spread: float = 0.7) -> Tensor:
    """Unit rows [n, width] around centres of very different numbers of rows."""
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(n_clusters, width, generator=generator), dim=1)
    which = (n_clusters * torch.rand(n, generator=generator) ** 3).long()
    noise = torch.randn(n, width, generator=generator) * spread / width**0.5
    return normalize(centres[which] + noise, dim=1)


def same(first: Neighbourhoods, second: Neighbourhoods, atol: float = 0.0) -> None:
    """The same edges, and cosines equal to atol."""
    assert torch.equal(first.offsets, second.offsets) and torch.equal(first.neighbours, second.neighbours)
    torch.testing.assert_close(first.cosine, second.cosine, rtol=0, atol=atol)


def by_the_rule(query: Tensor, base: Tensor, radius: float | Tensor, first_own: int | None = None) -> Neighbourhoods:
    """Every pair in float64, rounded to float32 and compared: the rule, with all cosines at once."""
    cosine = (query.double() @ base.double().T).float()
    inside = cosine >= torch.as_tensor(radius, dtype=torch.float32).expand(len(query))[:, None]
    if first_own is not None:
        inside &= torch.arange(len(base)) != first_own + torch.arange(len(query))[:, None]
    row, column = inside.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), inside.sum(1).cumsum(0)])
    return Neighbourhoods(offsets, column, cosine[row, column])
