"""The evidential head: its formula, its start as a zero-shot classifier, its calibration. Shapes: N, C, D."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from bd_core.dirichlet import opinion
from bd_core.head import EvidentialHead
from bd_core.label_space import unify_labels


def clip_like(n: int, classes: int, seed: int, width: int = 32) -> tuple[Tensor, Tensor]:
    """Features [N, D] and class heads [C, D] whose cosines lie in a narrow band above 0, as those of CLIP do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(width, generator=generator)
    heads = normalize(torch.randn(classes, width, generator=generator) + shared, dim=1)
    own = heads[torch.randint(classes, (n,), generator=generator)] * 3
    return normalize(own + torch.randn(n, width, generator=generator) * 0.5 + shared * 0.2, dim=1), heads


@pytest.mark.parametrize("activation", ["softplus", "exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_is_the_definition(activation: str, dtype: torch.dtype) -> None:
    features, heads = (part.to(dtype) for part in clip_like(5, 4, 0))
    head = EvidentialHead(heads, activation=activation, scale=7.0, offset=0.2)  # type: ignore[arg-type]
    found = head(features)
    assert found.dtype == dtype
    for i in range(5):
        for c in range(4):
            logit = 7 * (float(features[i] @ heads[c]) - 0.2)
            evidence = math.exp(logit) if activation == "exp" else math.log1p(math.exp(logit))
            assert found[i, c].item() == pytest.approx(1 + evidence, rel=1e-4)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    classes=st.integers(2, 60),
    target=st.floats(0.1, 0.9),
    activation=st.sampled_from(["softplus", "exp"]),
)
def test_calibrated_head_meets_the_target_and_keeps_the_zero_shot_class(
    seed: int, classes: int, target: float, activation: str
) -> None:
    features, heads = clip_like(64, classes, seed)
    target = 1 / classes + target * 0.4 * (1 - 1 / classes)
    head = EvidentialHead(heads, activation=activation)  # type: ignore[arg-type]
    report = head.calibrate(features, target_confidence=target)
    found = opinion(head(features))
    assert found.probability.amax(1).mean().item() == pytest.approx(target, abs=1e-3)
    assert report.mean_confidence == pytest.approx(target, abs=1e-3)
    assert report.mean_uncertainty == pytest.approx(found.uncertainty.mean().item(), abs=1e-3)
    assert (report.scale, report.offset) == (head.scale.item(), head.offset.item())
    zero_shot = (features @ heads.T).argmax(1)
    chosen = head(features).gather(1, zero_shot[:, None])[:, 0]
    assert (chosen == head(features).amax(1)).all()  # ties happen where float32 cannot tell two alphas near 1 apart


def test_calibration_reaches_the_target_over_many_classes() -> None:
    features, heads = clip_like(256, 758, 1, width=64)
    for activation, target in (("softplus", 0.09), ("exp", 0.27), ("exp", 0.59)):
        head = EvidentialHead(heads, activation=activation)  # type: ignore[arg-type]
        assert head.calibrate(features, target_confidence=target).mean_confidence == pytest.approx(target, abs=1e-3)


def test_raw_clip_logits_under_softplus_are_flat_and_calibration_repairs_it() -> None:
    features, heads = clip_like(128, 100, 2)
    raw = EvidentialHead(heads, scale=100.0)
    assert opinion(raw(features)).probability.amax(1).mean() < 0.05
    raw.calibrate(features, target_confidence=0.2)
    assert opinion(raw(features)).probability.amax(1).mean().item() == pytest.approx(0.2, abs=1e-3)


def test_unreachable_targets_are_refused() -> None:
    features, heads = clip_like(8, 10, 0)
    with pytest.raises(ValueError, match=r"target_confidence = 0.1, needs a value between 1/C = 0.1 and 1"):
        EvidentialHead(heads).calibrate(features, target_confidence=0.1)
    with pytest.raises(ValueError, match=r"0.999 cannot be reached over 10 classes with softplus \(at most 0\.\d+\)"):
        EvidentialHead(heads).calibrate(features, target_confidence=0.999)
    with pytest.raises(ValueError, match=r"cannot be reached .*one backbone"):
        EvidentialHead(heads[:1].repeat(10, 1)).calibrate(features[:1], target_confidence=0.5)


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_evidence_is_clamped(activation: str) -> None:
    head = EvidentialHead(torch.eye(3), activation=activation, scale=1e9, max_logit=5.0)  # type: ignore[arg-type]
    alpha = head(torch.eye(3))
    assert torch.isfinite(alpha).all()
    assert alpha.max().item() == pytest.approx(1 + math.exp(5), rel=1e-4)
    assert alpha.min().item() >= 1


def test_state_dict_round_trips_and_the_input_is_copied() -> None:
    features, heads = clip_like(6, 5, 0)
    before = heads.clone()
    head = EvidentialHead(heads)
    head.calibrate(features, target_confidence=0.4)
    other = EvidentialHead(torch.zeros(5, 32))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(features), head(features))
    with torch.no_grad():
        head.weight.add_(1)
    assert torch.equal(heads, before)


def test_from_class_heads_is_over_the_unified_space() -> None:
    space = unify_labels({"a": ["x", "y"], "b": ["y", "z"]})
    head = EvidentialHead.from_class_heads({"a": torch.eye(3)[:2], "b": torch.eye(3)[1:]}, space, activation="exp")
    torch.testing.assert_close(head.weight.detach(), torch.eye(3))
    assert head.activation == "exp"


def test_weight_and_offset_are_trained_and_the_scale_is_not() -> None:
    features, heads = clip_like(6, 5, 0)
    head = EvidentialHead(heads, scale=10.0)
    head(features).sum().backward()
    assert {name for name, parameter in head.named_parameters() if parameter.grad is not None} == {"weight", "offset"}
    head.calibrate(features, target_confidence=0.4)
    assert head.weight.requires_grad and head.offset.requires_grad and not head.scale.requires_grad


@pytest.mark.parametrize("call", ["forward", "calibrate"])
def test_bad_features_are_named(call: str) -> None:
    features, heads = clip_like(6, 5, 0)
    head = EvidentialHead(heads)
    for value, message in (
        (torch.nan, "row 2 has nan or inf"),
        (torch.inf, "row 2 has nan"),
        (1.5, "row 2 has a length"),
    ):
        bad = features.clone()
        bad[2] *= value
        with pytest.raises(ValueError, match=message):
            head(bad) if call == "forward" else head.calibrate(bad, target_confidence=0.5)
    head(features * 1.0009)  # within the tolerance
    with pytest.raises(ValueError, match=r"shape \(0, 32\)"):
        head(features[:0])
    with pytest.raises(ValueError, match="31 wide, the head is 32 wide"):
        head(normalize(features[:, :31], dim=1))


def test_bad_settings_are_refused() -> None:
    make = inspect.unwrap(EvidentialHead.__init__)
    for settings_, message in (
        ({"activation": "relu"}, "activation = 'relu' is unknown"),
        ({"scale": 0.0}, "scale = 0.0"),
        ({"offset": math.nan}, "offset = nan"),
        ({"max_logit": 100.0}, "max_logit = 100.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(EvidentialHead.__new__(EvidentialHead), torch.eye(3), **settings_)
    with pytest.raises(ValueError, match=r"needs finite \[C >= 2, D\]"):
        EvidentialHead(torch.ones(1, 3))
