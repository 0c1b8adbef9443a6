"""The command line: frozen, taught by its help, quick to answer, and one under both of its names."""

import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
import typer
from finished import Finished
from terminal import bd_merge
from tiny import Tiny

from pipeline.cli import app

# Whoever changes a line here changes what users have typed into scripts: say so in the CHANGELOG.
COMMANDS = {
    "run": ["CONFIG", "KEY=VALUE"],
    "plan": ["CONFIG", "KEY=VALUE"],
    "predict": [
        "MODEL",
        "IMAGE",
        "--store",
        "--run",
        "--task",
        "--mode",
        "--max-distance",
        "--batch-size",
        "--output",
    ],
    "merge": [
        "CONFIG",
        "KEY=VALUE",
        "--method",
        "--base",
        "--expert",
        "--output",
        "--set",
        "--group",
        "--include",
        "--exclude",
        "--seed",
        "--memory-budget",
        "--integer-buffers",
        "--allow-nonfinite",
        "--dry-run",
        "--force",
    ],
    "explain": ["CONFIG", "KEY=VALUE"],
    "methods": ["METHOD"],
    "status": ["--store"],
    "doctor": ["CONFIG", "KEY=VALUE", "--contents"],
    "gc": ["--store", "--keep", "--dry-run"],
    "compare": ["RUN", "--store"],
    "track": ["RUN", "--store", "--uri", "--experiment"],
}


def test_the_command_line_is_frozen() -> None:
    group = typer.main.get_command(app)
    found = {
        name: [
            parameter.opts[0] if parameter.opts[0].startswith("--") else parameter.metavar for parameter in each.params
        ]
        for name, each in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_teaches_by_an_example(command: str) -> None:
    ended = bd_merge(command, "--help")
    assert ended.exit_code == 0
    assert f"Example:\n    bd-merge {command} " in ended.output or f"Example:\n    bd-merge {command}\n" in ended.output
    assert f"Usage: bd-merge {command} [OPTIONS]" in ended.output


def test_help_answers_within_a_second_and_is_the_same_under_both_names() -> None:
    script, module = [str(Path(sys.executable).with_name("bd-merge"))], [sys.executable, "-m", "pipeline"]
    printed, seconds = [], []
    for command in (script, module, script):
        began = perf_counter()
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=60)
        seconds.append(perf_counter() - began)
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    # The quickest of three: other tests share this machine's cores.
    assert min(seconds) < 1.0


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = ("torch", "ray", "mlflow", "numpy", "pydantic", "omegaconf", "open_clip", "matplotlib", "pyarrow", "faiss")
    code = f"import sys, pipeline.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_mistyped_commands_and_options() -> None:
    assert bd_merge("rum").exit_code == 2
    assert bd_merge("run").exit_code == 2
    assert bd_merge("gc", "--keep", "-1").exit_code == 2
    assert bd_merge("run", "configs/demo.yaml", "--steps").exit_code == 2


@pytest.mark.parametrize("command", [["status"], ["gc"], ["compare", "a", "b"], ["track", "a"]])
def test_a_store_that_is_not_there(command: list[str], tmp_path: Path) -> None:
    ended = bd_merge(*command, "--store", tmp_path / "gone")
    assert ended.is_clear_refusal and f"store {tmp_path}/gone does not exist" in ended.output
    assert not (tmp_path / "gone").exists()


def test_a_run_that_is_not_there(finished_store: Finished) -> None:
    for command in (["compare", "nope", finished_store.run_id], ["track", "nope"]):
        ended = bd_merge(*command, "--store", finished_store.path)
        assert ended.is_clear_refusal
        assert f"no record matches 'nope' in {finished_store.path}; known: {finished_store.run_id}" in ended.output
    alone = bd_merge("compare", finished_store.run_id, "--store", finished_store.path)
    assert alone.is_clear_refusal and "1 run given, comparing needs at least 2" in alone.output


def test_status_tells_the_finished_run(finished_store: Finished) -> None:
    ended = bd_merge("status", "--store", finished_store.path)
    assert ended.exit_code == 0 and finished_store.run_id in ended.output and "not yet" not in ended.output


def test_a_second_run_does_nothing(finished_store: Finished) -> None:
    before = listing(finished_store.path)
    ended = bd_merge("run", finished_store.config)
    assert ended.exit_code == 0 and "nothing to do, every unit is in the store" in ended.output
    assert "BD-Merging (layer-wise)" in ended.output and "report.html" in ended.output
    assert listing(finished_store.path) == before


def listing(root: Path) -> dict[str, int]:
    """Every file of a store but its lock, with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def row(output: str, stage: str) -> list[str]:
    """The cells of a stage's row in the plan's table."""
    line = next(line for line in output.splitlines() if line.startswith(f"│ {stage} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_plan_of_a_fresh_store_tells_disk_before_anything_was_made(tiny_project: Tiny) -> None:
    config = tiny_project.write(shard={"images_per_shard": 8})
    ended = bd_merge("plan", config)
    assert ended.exit_code == 0
    assert row(ended.output, "shard")[1:5] == ["16", "0", "?", "< 0.1"]
    assert row(ended.output, "shard")[6].endswith("and 14 more: never made")
    base_mib = (tiny_project.root / "models" / "base.safetensors").stat().st_size / 2**20
    assert row(ended.output, "base") == ["base", "?", "?", "?", f"≈ {base_mib:.1f}", "?", "after shard"]
    # 32 test images at three levels of 32x32 pixels in three colours.
    assert row(ended.output, "corrupt")[4] == f"≈ {32 * 3 * 32 * 32 * 3 / 2**20:.1f}"
    assert row(ended.output, "evaluate")[6] == "after base"
    assert not (tiny_project.root / "store").exists()


def test_a_plan_of_a_finished_store_has_nothing_to_do(finished_store: Finished) -> None:
    ended = bd_merge("plan", finished_store.config)
    for stage in ("shard", "embed", "fit_router", "report"):
        assert row(ended.output, stage)[1] == "0" and row(ended.output, stage)[3:] == ["0", "0", "0", ""]


def test_a_plan_says_why_and_what_it_cost_before(finished_store: Finished) -> None:
    before = listing(finished_store.path)
    ended = bd_merge("plan", finished_store.config, "fit_router.steps=7")
    _, run, reuse, seconds, disk, memory, why = row(ended.output, "fit_router")
    assert (run, reuse, why) == ("2", "0", "task, layer: steps 4 -> 7")
    assert all(value != "?" and float(value.removeprefix("< ")) > 0 for value in (seconds, disk, memory))
    assert row(ended.output, "pairs")[1] == "0"
    assert row(ended.output, "export")[6] == "after fit_router"
    assert listing(finished_store.path) == before


def test_lanes_are_those_of_the_executor(finished_store: Finished) -> None:
    def seconds(*overrides: str) -> float:
        ended = bd_merge("plan", finished_store.config, "score.max_negative_sharpness=0.9", *overrides)
        return float(row(ended.output, "score")[3].removeprefix("< "))

    assert seconds("executor={kind: ray, cpus: 4}") <= seconds()


def test_gc_dry_run_removes_nothing(finished_copy: Finished) -> None:
    before = listing(finished_copy.path)
    ended = bd_merge("gc", "--store", finished_copy.path, "--keep", "0", "--dry-run")
    assert ended.exit_code == 0 and "would be removed" in ended.output
    assert listing(finished_copy.path) == before
