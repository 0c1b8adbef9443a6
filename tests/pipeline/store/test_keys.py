"""Keys: everything that can change a unit's bytes, nothing else."""

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.store import canonical_json, sha256_file, unit_key
from pipeline.store.keys import digest_json, files_digest

# A busy machine is no fault of a key.
UNHURRIED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PARTS: dict[str, Any] = {
    "stage": "embed",
    "version": 1,
    "spec": {"width": 8, "options": [1, 2]},
    "settings": {"level": "L1"},
    "inputs": [("shard/a", "d1"), ("base/base", "d2")],
    "seed": 0,
}
OTHERS = [
    ("stage", "score"),
    ("version", 2),
    ("spec", {"width": 9, "options": [1, 2]}),
    ("spec", {"width": 8, "options": [2, 1]}),
    ("spec", {"width": 8}),
    ("settings", {"level": "L2"}),
    ("settings", {}),
    ("inputs", [("shard/a", "d1"), ("base/base", "d3")]),
    ("inputs", [("shard/b", "d1"), ("base/base", "d2")]),
    ("inputs", [("base/base", "d2"), ("shard/a", "d1")]),
    ("inputs", [("shard/a", "d1")]),
    ("seed", 1),
    ("seed", None),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(("part", "other"), OTHERS)
def test_every_part_counts_in_the_key(part: str, other: Any) -> None:
    assert unit_key(**{**PARTS, part: other}) != unit_key(**PARTS)


def test_the_key_is_the_sha256_of_canonical_json() -> None:
    assert unit_key(**PARTS) == digest_json({**PARTS, "inputs": [list(pair) for pair in PARTS["inputs"]]})
    assert digest_json({"b": 1, "a": "é"}) == hashlib.sha256('{"a":"é","b":1}'.encode()).hexdigest()


@UNHURRIED
@given(st.dictionaries(st.text(), JSON))
def test_the_order_of_keys_does_not_count(value: dict[str, Any]) -> None:
    backwards = dict(reversed(list(value.items())))
    assert canonical_json(backwards) == canonical_json(value)


@UNHURRIED
@given(JSON, JSON)
def test_other_values_have_other_json(one: Any, other: Any) -> None:
    # 1 == 1.0 == True in Python; as settings they are three.
    assert (canonical_json(one) == canonical_json(other)) == (repr_sorted(one) == repr_sorted(other))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_has_no_json_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"rate": value})


def test_a_digest_of_files_knows_names_and_bytes_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    sha256 = sha256_file(tmp_path / "a")
    assert sha256 == hashlib.sha256(b"content").hexdigest()
    one = files_digest({"a": {"sha256": sha256, "bytes": 7}, "b": {"sha256": "0", "bytes": 0}})
    assert one == files_digest({"b": {"sha256": "0"}, "a": {"sha256": sha256}})
    assert one != files_digest({"a": {"sha256": "0"}, "b": {"sha256": sha256}})


def repr_sorted(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{repr_sorted(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(repr_sorted, value)) + "]"
    return repr(value)
