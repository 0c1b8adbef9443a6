"""doctor: everything that is wrong in one answer, and nothing written."""

from pathlib import Path

from finished import Finished
from terminal import bd_merge
from tiny import Tiny


def lines(output: str, mark: str) -> dict[str, str]:
    """{what: detail} of the findings with this mark."""
    found = [line.removeprefix(mark).strip().partition(": ") for line in output.splitlines() if line.startswith(mark)]
    return {what: detail for what, _, detail in found}


def test_a_healthy_machine_and_configuration(tiny_project: Tiny) -> None:
    ended = bd_merge("doctor", tiny_project.write())
    assert ended.exit_code == 0 and "everything is fine" in ended.output
    fine = lines(ended.output, "ok")
    assert {"python", "torch", "faiss", "configuration", "store", "inputs of shard", "inputs of base", "disk"} <= set(
        fine
    )
    assert not (tiny_project.root / "store").exists()


def test_the_environment_alone() -> None:
    ended = bd_merge("doctor")
    assert ended.exit_code == 0 and "configuration" not in lines(ended.output, "ok")


def test_all_findings_at_once(tiny_project: Tiny) -> None:
    ended = bd_merge(
        "doctor",
        tiny_project.write(),
        "tasks.0.source.path=/gone/images",
        "models.base=/gone/base.safetensors",
        "models.experts.low=/gone/low.safetensors",
        "corrupt.corruptions=[fogg]",
        "store=/dev/null/store",
        "executor={kind: ray, cpus: 1}",
        "resources.embed.cpus=3",
    )
    assert ended.exit_code == 2 and "Traceback" not in ended.output
    wrong = lines(ended.output, "FAIL")
    assert set(wrong) == {"store", "resources", "corruptions", "inputs of shard", "inputs of base"}
    assert "/gone/base.safetensors" in ended.output and "/gone/low.safetensors" in ended.output
    assert "5 of " in ended.output and "must be corrected" in ended.output


def test_faults_of_the_configuration(tiny_project: Tiny) -> None:
    ended = bd_merge("doctor", tiny_project.write(), "fit_head.lr=1", "seed=-1")
    assert ended.exit_code == 2
    assert "fit_head.lr: unknown key" in ended.output and "seed: Input should be greater" in ended.output


def test_what_the_store_holds(finished_store: Finished) -> None:
    ended = bd_merge("doctor", finished_store.config, "--contents")
    assert ended.exit_code == 0
    assert f"of this run are in {finished_store.path}" in lines(ended.output, "ok")["units"]
    assert lines(ended.output, "ok")["contents"].endswith("units match")


def test_a_changed_byte_is_found_by_contents_alone(finished_copy: Finished) -> None:
    path = next((finished_copy.path / "fit_head").glob("head-*/model.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(bytes(data))
    assert bd_merge("doctor", finished_copy.config).exit_code == 0
    ended = bd_merge("doctor", finished_copy.config, "--contents")
    assert ended.exit_code == 2
    assert f"{path.parent}: model.safetensors has another sha256" in lines(ended.output, "FAIL")["contents"]


def test_a_fault_that_only_the_made_units_show(finished_copy: Finished) -> None:
    for path in (finished_copy.tiny.root / "images" / "low" / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    assert bd_merge("run", finished_copy.config).exit_code == 2
    ended = bd_merge("doctor", finished_copy.config)
    assert ended.exit_code == 2 and "no test image could be read" in lines(ended.output, "FAIL")["units"]
