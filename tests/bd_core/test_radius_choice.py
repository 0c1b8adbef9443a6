"""Radii chosen from data: by coverage of a sample, or by local density. Shapes: N samples, M base rows, D width."""

import pytest
import torch
from graph_cases import ENGINES, NEAR, clouds, cluster_rows, running
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from bd_core import radius_choice
from bd_core.neighbourhood import adaptive_min_cosine, calibrate_min_cosine, radius_graph


@given(clouds(min_size=2), st.integers(1, 30), st.integers(1, 30), ENGINES, st.data())
def test_adaptive_radius_gives_the_target_degree(
    features: Tensor, block_rows: int, columns: int, engine: str, data: st.DataObject
) -> None:
    target = data.draw(st.integers(1, len(features) - 1))
    with pytest.MonkeyPatch.context() as patch, running(engine):
        patch.setattr(radius_choice, "FIRST_COLUMNS", columns)
        patch.setattr(radius_choice, "MOST_COLUMNS", columns)
        radius = adaptive_min_cosine(features, target, block_rows=block_rows)
    assert radius.dtype == torch.float32
    for i, row in enumerate((features.double() @ features.double().T).tolist()):
        others = sorted(row[:i] + row[i + 1 :], reverse=True)
        assert radius[i].item() == pytest.approx(others[target - 1], abs=NEAR)
    degree = radius_graph(features, radius).degree
    # Only antipodal pairs of cosine -1.0000001 cannot be kept by any radius in [-1, 1].
    assert (degree >= target).all() or radius.min() == -1


def test_adaptive_radius_against_a_base() -> None:
    generator = torch.Generator().manual_seed(0)
    base = normalize(torch.randn(50, 16, generator=generator), dim=1)
    own = torch.tensor([3, 40, -1])
    radius = adaptive_min_cosine(base[[3, 40, 7]], 4, base, self_rows=own)
    graph = radius_graph(base[[3, 40, 7]], radius, base_MD=base, self_rows=own)
    assert graph.degree.tolist() == [4, 4, 4]
    assert 7 in graph.neighbours[graph.offsets[2] :].tolist()


@given(clouds(min_size=2), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 40), st.integers(0, 2**32))
def test_calibrated_radius_covers_the_sample(features: Tensor, max_isolated: float, sample: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    radius = calibrate_min_cosine(features, max_isolated=max_isolated, sample=sample, generator=generator)
    n = len(features)
    drawn = torch.arange(n)
    if sample < n:
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:sample]
    nearest = [
        max(float(features[i].double() @ features[j].double()) for j in range(n) if j != i) for i in drawn.tolist()
    ]
    assert radius == pytest.approx(sorted(nearest)[int(max_isolated * len(drawn))], abs=NEAR)
    degree = radius_graph(features, radius).degree[drawn]
    assert (degree == 0).double().mean() <= max_isolated or radius == -1


def test_calibration_repeats_with_its_generator() -> None:
    features = normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    first, second, other = (
        calibrate_min_cosine(features, max_isolated=0.1, sample=20, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize("engine", ["kernel", "torch"])
def test_adaptive_radii_of_many_rows(engine: str) -> None:
    """More rows than are looked at one by one, so that the rest is only searched for what is nearer."""
    features = cluster_rows(5200, 24)
    with running(engine):
        radius = adaptive_min_cosine(features[:300], 33, features, self_rows=torch.arange(300))
    cosine = features[:300].double() @ features.double().T
    cosine[torch.arange(300), torch.arange(300)] = -2
    expected = cosine.topk(33, dim=1).values[:, -1]
    torch.testing.assert_close(radius.double(), expected, rtol=0, atol=3e-6)
