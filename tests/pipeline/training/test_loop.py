"""The training loop: a fit that was interrupted ends with the bytes of one that was not."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.training.context import LocalContext, read_state
from pipeline.training.loop import History, optimise, schedule, step_generator

STEPS = 9


class Killed(BaseException):
    """Stands for the end of the process."""


class Fit:
    """A small regression with noise from the step's generator."""

    def __init__(self, die_at: int | None = None) -> None:
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        with torch.no_grad():
            for number, parameter in enumerate(self.module.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.die_at, self.calls = die_at, 0
        self.first_draws: list[float] = []

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if self.calls == self.die_at:
            raise Killed
        self.calls += 1
        batch = torch.randn(8, 3, generator=generator)
        self.first_draws.append(batch[0, 0].item())
        error = (self.module(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        return error, {"error": error.item()}

    def run(self, state: Path, **options: Any) -> History:
        settings: dict[str, Any] = {
            "steps": STEPS,
            "learning_rate": 0.05,
            "seed": 5,
            "weight_decay": 0.01,
            "warmup_steps": 2,
            "cosine": True,
            "clip_norm": 1.0,
            "checkpoint_every": 2,
        }
        return optimise(self.module, self.loss, context=LocalContext(state), **{**settings, **options})

    def weights(self) -> list[bytes]:
        return [value.numpy().tobytes() for value in self.module.state_dict().values()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, History]:
    fit = Fit()
    return fit, fit.run(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("every", [1, 2, 4, 100])
@pytest.mark.parametrize("die_at", range(STEPS))
def test_a_fit_killed_at_any_step_ends_with_equal_bytes(
    undisturbed: tuple[Fit, History], tmp_path: Path, die_at: int, every: int
) -> None:
    whole, history = undisturbed
    with pytest.raises(Killed):
        Fit(die_at).run(tmp_path, checkpoint_every=every)
    resumed = Fit()
    assert resumed.run(tmp_path, checkpoint_every=every) == history
    assert resumed.weights() == whole.weights()
    assert resumed.calls == STEPS - die_at // every * every  # no step before the checkpoint is done again


def test_a_fit_killed_again_and_again_ends_with_equal_bytes(undisturbed: tuple[Fit, History], tmp_path: Path) -> None:
    whole, history = undisturbed
    for _ in range(3):
        with pytest.raises(Killed):
            Fit(die_at=2).run(tmp_path)
    resumed = Fit()
    assert resumed.run(tmp_path) == history
    assert resumed.calls == STEPS - 6 and resumed.weights() == whole.weights()


def test_a_damaged_checkpoint_costs_time_and_no_bytes(undisturbed: tuple[Fit, History], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Fit(die_at=5).run(tmp_path)
    state = tmp_path / "state.pt"
    whole = state.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no checkpoint at all"):
        state.write_bytes(damaged)
        again = Fit()
        assert again.run(tmp_path, checkpoint_every=100) == undisturbed[1]
        assert again.calls == STEPS and again.weights() == undisturbed[0].weights()


def test_a_checkpoint_executes_no_pickled_object(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"module": Trap()}, tmp_path / "state.pt")
    assert read_state(tmp_path / "state.pt") is None
    assert not (tmp_path / "executed").exists()


def test_the_generator_of_a_step_knows_nothing_of_the_steps_before(undisturbed: tuple[Fit, History]) -> None:
    for step, drawn in enumerate(undisturbed[0].first_draws):
        assert torch.randn(8, 3, generator=step_generator(5, step))[0, 0].item() == drawn


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 64)), min_size=2, max_size=2, unique=True
    )
)
def test_every_seed_step_and_worker_draws_its_own(two: Sequence[tuple[int, int, int]]) -> None:
    one, other = (torch.randint(2**62, (4,), generator=step_generator(*which)) for which in two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_its_terms(tmp_path: Path, value: float) -> None:
    fit = Fit()

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        found, terms = fit.loss(generator)
        return (found * value if fit.calls == 4 else found), terms

    before = copy.deepcopy(fit.module.state_dict())
    with pytest.raises(DataError, match=r"step 3: the loss is (nan|-?inf) with terms \{'error': .*lower the learning"):
        optimise(fit.module, loss, steps=STEPS, learning_rate=0.1, seed=0, context=LocalContext(tmp_path))
    assert all(torch.isfinite(value).all() for value in fit.module.state_dict().values())
    assert any(not torch.equal(before[name], value) for name, value in fit.module.state_dict().items())


def test_the_history_has_a_row_a_step_and_the_last_step_saves_nothing(
    undisturbed: tuple[Fit, History], tmp_path: Path
) -> None:
    history = undisturbed[1]
    assert [row["step"] for row in history] == list(range(STEPS))
    assert all(row["loss"] == row["error"] for row in history)
    Fit().run(tmp_path, checkpoint_every=STEPS)
    assert list(tmp_path.iterdir()) == []


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    assert [schedule(step, 10, 4, False) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    falling = [schedule(step, 10, 0, True) for step in range(10)]
    assert falling[0] == 1.0 and falling == sorted(falling, reverse=True) and falling[-1] < 0.03
    assert schedule(10, 10, 0, True) == pytest.approx(0.0, abs=1e-6)
