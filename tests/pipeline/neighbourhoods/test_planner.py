"""The planner: what it chooses, what it expects, and what it refuses with the number that would fit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.neighbourhoods.planner import (
    Choice,
    check_fits,
    choose,
    duration,
    exact_flops,
    expect,
    ivf_flops,
    lists_for,
    unit_bytes,
)

EXACT, IVF = Choice("exact", 0, ""), Choice("ivf", 4096, "")


def test_small_pools_are_exact_and_large_ones_ivf() -> None:
    assert choose(100_000, 512, max_exact_s=1800, gflops=100).backend == "exact"
    large = choose(1_000_000, 512, max_exact_s=1800, gflops=100)
    assert large.backend == "ivf" and large.n_lists == 4096
    assert "1,000,000 x 512 exactly: 85.3 min at 100 GFLOP/s, beyond index.max_exact_s 1800" in large.reason


def test_a_faster_machine_stays_exact_longer_and_a_wish_is_followed() -> None:
    assert choose(1_000_000, 512, max_exact_s=1800, gflops=100_000).backend == "exact"
    assert choose(100, 8, wanted="ivf", max_exact_s=1800, gflops=100).backend == "ivf"
    assert choose(10**8, 512, wanted="exact", max_exact_s=1, gflops=1) == choose(
        10**8, 512, wanted="exact", max_exact_s=1, gflops=1
    )


def test_a_pool_that_is_expected_to_grow_is_planned_for_what_it_will_be() -> None:
    now = choose(10_000, 512, expected_rows=2_000_000, max_exact_s=1800, gflops=100)
    assert now == choose(2_000_000, 512, max_exact_s=1800, gflops=100)
    assert choose(2_000_000, 512, expected_rows=10, max_exact_s=1800, gflops=100) == now


@given(st.integers(1, 10**10))
def test_lists_are_a_power_of_two_that_grows_slowly(n_rows: int) -> None:
    lists = lists_for(n_rows)
    assert lists & (lists - 1) == 0 and 4 <= lists <= 2**16
    assert lists <= lists_for(4 * n_rows) <= 4 * lists


def test_operations_are_those_of_the_products() -> None:
    assert exact_flops(1000, 512) == 1000 * 1000 * 2 * 512 / 2
    assert ivf_flops(10**6, 512, 4096, 8) < exact_flops(10**6, 512) / 20


def test_the_expectation_scales_with_the_share() -> None:
    whole = expect(EXACT, n_rows=10**5, width=512, degree=50, n_probes=0, largest_part=32768, flops_per_s=1e11)
    part = expect(
        EXACT, n_rows=10**5, width=512, degree=50, n_probes=0, largest_part=32768, flops_per_s=1e11, share=0.1
    )
    assert part.seconds == pytest.approx(whole.seconds / 10) and whole.seconds == pytest.approx(51.2)
    assert whole.edges == 5 * 10**6 and whole.disk_bytes == 5 * 10**6 * 20
    flat = expect(
        Choice("flat", 0, ""), n_rows=10**5, width=512, degree=50, n_probes=0, largest_part=1, flops_per_s=1e11
    )
    assert flat.seconds == pytest.approx(2 * whole.seconds)


@pytest.mark.parametrize("choice", [EXACT, IVF, Choice("flat", 0, "")])
def test_what_does_not_fit_is_refused_with_numbers_that_would(choice: Choice) -> None:
    given = {"n_rows": 10**6, "width": 512, "degree": 50.0}
    expected = expect(choice, **given, n_probes=8, largest_part=32768, flops_per_s=1e11)
    check_fits(expected, choice, rows=32768, **given, memory_gib=4, free_bytes=1e12)
    with pytest.raises(ConfigError, match=r"index\.memory_gib: .* needs .* GiB, the budget is 0\.1") as caught:
        check_fits(expected, choice, rows=32768, **given, memory_gib=0.1, free_bytes=1e12)
    rows = re.search(r"rows_per_partition to (\d+)", str(caught.value))
    assert rows and unit_bytes(choice, 10**6, 512, 50, int(rows[1])) <= 0.1 * 2**30
    enough = float(str(caught.value).rsplit(" ", 1)[1])
    check_fits(expected, choice, rows=32768, **given, memory_gib=enough, free_bytes=1e12)


def test_edges_that_do_not_fit_the_disk_are_refused_with_the_degree_that_would() -> None:
    expected = expect(EXACT, n_rows=10**6, width=512, degree=1000, n_probes=0, largest_part=100, flops_per_s=1e11)
    with pytest.raises(ConfigError, match=r"the mean degree would be 1000, 500 would fit; raise index\.min_cosine"):
        check_fits(
            expected, EXACT, rows=100, n_rows=10**6, width=512, degree=1000, memory_gib=4,
            free_bytes=expected.disk_bytes / 2,
        )  # fmt: skip


@pytest.mark.parametrize(("seconds", "said"), [(0.5, "0.5 s"), (119, "119 s"), (180, "3.0 min"), (10**6, "11.6 d")])
def test_durations_are_read_easily(seconds: float, said: str) -> None:
    assert duration(seconds) == said
