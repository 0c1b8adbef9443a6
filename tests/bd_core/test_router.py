"""The router: shape, start near uniform, null expert, randomness. Shapes: B batch, D width, G groups, K experts."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bd_core.router import Router


@given(
    width=st.integers(1, 24),
    tasks=st.integers(1, 6),
    groups=st.integers(1, 5),
    kind=st.sampled_from(["mlp", "linear"]),
    null_expert=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_weights_start_near_uniform(
    width: int, tasks: int, groups: int, kind: str, null_expert: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = Router(width, tasks, groups, kind=kind, null_expert=null_expert, generator=generator)  # type: ignore[arg-type]
    weights = router(torch.randn(4, width, generator=generator))
    assert weights.shape == (4, groups, tasks)
    experts = tasks + null_expert
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / experts), atol=0.05, rtol=0)
    torch.testing.assert_close(weights.sum(2), torch.full((4, groups), tasks / experts), atol=0.05, rtol=0)
    assert weights.min() >= 0
    if not null_expert:
        torch.testing.assert_close(weights.sum(2), torch.ones(4, groups))


def test_forward_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    router = Router(3, 2, 2, hidden=5, null_expert=True).double()
    tokens = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    state = {
        name: torch.randn(value.shape, dtype=torch.float64, generator=generator)
        for name, value in router.state_dict().items()
    }
    router.load_state_dict(state)
    first, second = (
        (state["layers.0.weight"], state["layers.0.bias"]),
        (state["layers.2.weight"], state["layers.2.bias"]),
    )
    for b in range(4):
        centred = (tokens[b] - state["token_mean"]) / state["token_scale"]
        hidden = first[0] @ centred + first[1]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        out = second[0] @ hidden + second[1]
        for g in range(2):
            exponentials = out[3 * g : 3 * g + 3].exp()
            torch.testing.assert_close(router(tokens)[b, g], (exponentials / exponentials.sum())[:2])


def test_standardise_centres_tokens_and_brings_them_to_unit_mean_square() -> None:
    tokens = 7 + 30 * torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    router, plain = (Router(6, 3, generator=torch.Generator().manual_seed(1)).double() for _ in range(2))
    router.standardise(tokens)
    centred = tokens - tokens.mean(dim=0)
    torch.testing.assert_close(router(tokens), plain(centred / centred.square().mean().sqrt()))
    router.standardise(torch.ones(4, 6, dtype=torch.float64))  # no spread to divide by
    assert torch.isfinite(router(torch.ones(4, 6, dtype=torch.float64))).all()


def test_null_expert_can_take_all_the_weight() -> None:
    router = Router(4, 3, kind="linear", null_expert=True)
    with torch.no_grad():
        router.layers[0].bias[3] = 50.0
    assert router(torch.randn(2, 4, generator=torch.Generator().manual_seed(0))).sum() < 1e-6


def test_the_generator_decides_and_the_global_one_is_left_alone() -> None:
    state = torch.get_rng_state()
    same = [Router(8, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    other = Router(8, 3, generator=torch.Generator().manual_seed(6))
    assert torch.equal(torch.get_rng_state(), state)
    tokens = torch.ones(1, 8)
    assert torch.equal(same[0](tokens), same[1](tokens))
    assert not torch.equal(same[0](tokens), other(tokens))
    assert torch.equal(Router(8, 3)(tokens), Router(8, 3)(tokens))


def test_samples_do_not_see_each_other_and_gradients_reach_every_parameter() -> None:
    router = Router(6, 3, 2).double()
    tokens = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(router(tokens)[2:3], router(tokens[2:3]))
    router(tokens)[:, :, 0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in router.parameters())


def test_bad_input_is_named() -> None:
    router = Router(6, 3)
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 5\), needs \[B >= 1, 6\]"):
        router(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"tokens have shape \(0, 6\)"):
        router(torch.ones(0, 6))
    tokens = torch.ones(4, 6)
    tokens[3, 1] = torch.nan
    with pytest.raises(ValueError, match="tokens of row 3 have nan or inf"):
        router(tokens)
    with pytest.raises(ValueError, match="n_tasks = 0"):
        Router(6, 0)
    with pytest.raises(ValueError, match="hidden = 0"):
        Router(6, 3, hidden=0)
    with pytest.raises(ValueError, match="kind = 'attention' is unknown"):
        inspect.unwrap(Router.__init__)(Router.__new__(Router), 6, 3, kind="attention")
