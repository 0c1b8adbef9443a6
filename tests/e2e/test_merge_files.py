"""`bd-merge merge`, `explain` and `methods` as users type them."""

import json
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from merge_models import Models, assert_same, out
from processes import CONTEXT, Command
from processes import bd_merge as bd_merge_process
from safetensors.torch import load_file
from terminal import bd_merge

from bd_core.methods import METHODS, merge


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """A base and three experts."""
    return Models(tmp_path)


def arguments(models: Models, *experts: str, method: str = "ties", base: str = "base") -> list[object]:
    chosen = [part for name in experts or "ab" for part in ("--expert", models.path(name))]
    return ["--method", method, "--base", models.path(base), *chosen]


def test_files_merge_in_one_line(models: Models) -> None:
    target = models.folder / "out.safetensors"
    ended = bd_merge("merge", *arguments(models), "-o", target, "--set", "keep=0.5", "--set", "trim=per_tensor")
    assert ended.exit_code == 0, ended.output
    assert_same(out(models), merge("ties", models.base, models.experts[:2], keep=0.5, trim="per_tensor"))
    manifest = json.loads((models.folder / "out.safetensors.json").read_text())
    assert f"sha256   {manifest['output']['files'][0]['sha256']}  {target}" in ended.output
    assert "peak memory" in ended.output and f"manifest {target}.json" in ended.output
    again = bd_merge("merge", *arguments(models), "-o", target)
    assert again.is_clear_refusal and "exists; name another, or replace it with --force" in again.output
    assert bd_merge("merge", *arguments(models), "-o", target, "--force").exit_code == 0


def test_a_configuration_says_the_same_as_the_options(models: Models) -> None:
    target = models.folder / "out.safetensors"
    options = ["--group", "layers.0.*: scale=0.5", "--exclude", "table", "--seed", "3"]
    assert bd_merge("merge", *arguments(models), *options, "-o", target).exit_code == 0
    once = load_file(target)
    config = models.folder / "merge.yaml"
    said = {
        "method": "ties",
        "base": str(models.path("base")),
        "experts": [str(models.path("a")), str(models.path("b"))],
        "output": str(target),
        "groups": {"layers.0.*": {"scale": 0.5}},
        "exclude": ["table"],
        "seed": 3,
    }
    config.write_text(yaml.safe_dump(said))
    assert bd_merge("merge", config, "--force").exit_code == 0
    assert_same(load_file(target), once)
    # Overrides of the file, then options above both.
    overrides = ["method=task_arithmetic", "parameters.scale=1"]
    ended = bd_merge("merge", config, *overrides, "--force", "--seed", "4")
    assert ended.exit_code == 0, ended.output
    expected = merge("task_arithmetic", models.base, models.experts[:2], scale=1.0)
    half = merge("task_arithmetic", models.base, models.experts[:2], scale=0.5)
    kept = {"table": models.base["table"], "layers.0.weight": half["layers.0.weight"]}
    assert_same(load_file(target), expected | kept)
    assert json.loads((models.folder / "out.safetensors.json").read_text())["seed"] == 4
    config.write_text(yaml.safe_dump(said | {"grups": {}}))
    refused = bd_merge("merge", config, "--force")
    assert refused.is_clear_refusal and "grups" in refused.output and "groups" in refused.output


def test_explain_and_dry_run_tell_what_each_tensor_gets_and_write_nothing(models: Models) -> None:
    config = models.folder / "merge.yaml"
    said = {"method": "ties", "base": str(models.path("base")), "experts": [str(models.path("a"))]}
    config.write_text(yaml.safe_dump(said | {"exclude": ["*.bias"], "groups": {"table": {"keep": 0.4}}}))
    before = sorted(models.folder.iterdir())
    for ended in (
        bd_merge("explain", config),
        bd_merge("merge", *arguments(models, "a"), "--exclude", "*.bias", "--group", "table: keep=0.4", "--dry-run"),
    ):
        assert ended.exit_code == 0, ended.output
        for told in (
            r"layers.#.weight │     2 │ [12, 8] │ float32 │ ties keep=0.2 scale=0.3",
            "ties keep=0.4 scale=0.3",
            "the base's: excluded by *.bias",
            "the base's: integer or boolean",
            "3 merged, 3 copied",
            "of --memory-budget 2.00 GiB",
            "Groups are merged apart",
        ):
            assert told in ended.output, ended.output
    assert sorted(models.folder.iterdir()) == before


def test_methods_are_listed_with_need_cost_source_and_defaults() -> None:
    listed = bd_merge("methods")
    assert listed.exit_code == 0
    for method in METHODS.values():
        assert method.name in listed.output
    for word in ("needs", "cost", "defaults", "source", "unlabelled batches", "keep=0.2", "NeurIPS 2023"):
        assert word in listed.output, word
    one = bd_merge("methods", "ties")
    assert one.exit_code == 0 and "Elect: the sign" in one.output and "--set keep=0.2" in one.output
    unknown = bd_merge("methods", "tys")
    assert unknown.is_clear_refusal and "did you mean ties" in unknown.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "adamerging"], "adamerging needs unlabelled batches"),
        (["--method", "tie"], "no merging method 'tie'; did you mean ties"),
        (["--set", "keep"], "'keep' is not of the form name=value"),
        (["--set", "kep=1"], "ties has no parameter 'kep'; did you mean keep"),
        (["--group", "table"], "group 'table' is not of the form 'PATTERN: name=value ...'"),
        (["--memory-budget", "1KiB"], "--memory-budget is 1.0 KiB; set it to"),
        (["--memory-budget", "much"], "'much' is no size; write it as 2GiB"),
        (["--expert", "nowhere.safetensors"], "checkpoint nowhere.safetensors does not exist"),
        (["--include", "layr*"], "pattern 'layr*' fits no tensor"),
    ],
)
def test_a_mistake_is_told_and_ends_with_2(models: Models, options: list[str], told: str) -> None:
    ended = bd_merge("merge", *arguments(models), "-o", models.folder / "out.safetensors", *options)
    assert ended.is_clear_refusal, ended.output
    assert told in ended.output
    assert not (models.folder / "out.safetensors").exists()


def test_options_that_are_missing_are_named() -> None:
    ended = bd_merge("merge", "--method", "ties")
    assert ended.is_clear_refusal and "--base, --expert missing: bd-merge merge --method M" in ended.output
    ended = bd_merge("merge", "merge.yaml")
    assert ended.is_clear_refusal and "merge.yaml does not exist" in ended.output


def _large(models: Models, name: str, entries: int) -> Path:
    """A model of one tensor of zeros, of which the disk holds nothing."""
    text = json.dumps({"w": {"dtype": "F32", "shape": [entries], "data_offsets": [0, 4 * entries]}}).encode()
    with models.path(name).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * entries)
    return models.path(name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_a_merge_leaves_nothing(models: Models, number: signal.Signals) -> None:
    for name in "base", "a":
        _large(models, name, 2**24)
    options = [*arguments(models, *"aaaaaaaaaaaaaaaa"), "-o", models.folder / "out.safetensors"]
    command = Command("merge", *options, output=models.folder / "log")
    while command.running and not list(models.folder.glob(".*.partial*")):
        time.sleep(0.001)
    command.signal(number)
    ended = command.end()
    assert ended.exit_code == 130, ended.output
    assert ended.output.endswith("bd-merge: interrupted; nothing was written\n") and "Traceback" not in ended.output
    assert {path.name for path in models.folder.iterdir()} == {f"{n}.safetensors" for n in ("base", *"abc")} | {"log"}


def test_a_full_disk_leaves_nothing(models: Models) -> None:
    ended = bd_merge_process(
        "merge",
        *arguments(models),
        "-o",
        models.folder / "out.safetensors",
        output=models.folder / "log",
        file_size_limit=1500,
    )
    assert ended.exit_code == 2 and "cannot be written (File too large); choose another" in ended.output
    assert {path.name for path in models.folder.iterdir()} == {f"{n}.safetensors" for n in ("base", *"abc")} | {"log"}


def test_out_of_memory_is_named_with_the_budget_to_set(models: Models) -> None:
    for name in "base", "a":
        _large(models, name, 2**27)
    log = models.folder / "log"
    options = [str(part) for part in (*arguments(models, "a", method="tsv_m"), "-o", models.folder / "out.safetensors")]
    process = CONTEXT.Process(target=_starved, args=([*options, "--memory-budget", "64GiB"], log))
    process.start()
    process.join(60)
    assert process.exitcode == 1, log.read_text()
    told = log.read_text()
    assert "bd-merge: out of memory at" in told and "set it to what is free" in told and "Traceback" not in told
    assert not list(models.folder.glob(".*")) and not (models.folder / "out.safetensors").exists()


def _starved(options: list[str], log: Path) -> None:
    """The command in a process that may have little more memory than it has."""
    with log.open("w") as stream:
        sys.stdout = sys.stderr = stream
        from pipeline.cli import main
        from pipeline.merge import run  # noqa: F401  with all it imports, before memory is short

        torch.set_num_threads(1)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20), size + (200 << 20)))
        sys.argv = ["bd-merge", "merge", *options]
        main()
