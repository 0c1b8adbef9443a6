"""Bad input to a merge of files: refused by name, before it costs anything, with nothing left behind."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import Models, assert_same, out, run
from safetensors.torch import load_file

from bd_core.methods import merge
from pipeline.errors import BDMergeError, ConfigError, DataError
from pipeline.merge import output as output_module
from pipeline.merge import run as run_module
from pipeline.merge.memory import OutOfMemory
from pipeline.merge.output import Output, verify


def test_an_expert_may_lack_or_have_what_is_not_merged(models: Models) -> None:
    models.save("part", {"layers.0.weight": models.experts[0]["layers.0.weight"], "head": torch.zeros(2)})
    run(models, "part", include=["layers.0.*"], parameters={"scale": 1.0})
    expected = models.base | {"layers.0.weight": models.experts[0]["layers.0.weight"]}
    assert_same(out(models), expected)
    run(models, "part", exclude=["head", "layers.1.*", "table", "steps", "mask"], force=True)


def test_all_differences_of_all_experts_are_in_one_message(models: Models) -> None:
    a, b = dict(models.experts[0]), dict(models.experts[1])
    del a["table"]
    b |= {f"extra.{k}": torch.zeros(1) for k in range(20)} | {"layers.0.weight": torch.zeros(2, 2)}
    b["layers.1.bias"] = b["layers.1.bias"].half()
    models.save("a", a)
    models.save("b", b)
    with pytest.raises(DataError) as caught:
        run(models)
    told = str(caught.value)
    assert "2 of 3 experts do not fit the base" in told and "22 difference(s)" in told and "and 16 more" in told
    assert "- table [20, 6] float32: only in the base" in told
    models.save("b", {**models.experts[1], "layers.1.bias": b["layers.1.bias"], "layers.0.weight": torch.zeros(2, 2)})
    with pytest.raises(DataError) as caught:
        run(models)
    assert "~ layers.0.weight: [12, 8] float32 in the base, [2, 2] float32 in the expert" in str(caught.value)
    assert "~ layers.1.bias: [12] float32 in the base, [12] float16 in the expert" in str(caught.value)


def test_headers_are_compared_before_any_value_is_read(models: Models) -> None:
    models.save("b", {**models.experts[1], "table": torch.zeros(1, 1)})
    path = models.path("a")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:header] + b"\xff" * (len(whole) - header))  # NaN everywhere, were it read
    with pytest.raises(DataError, match="1 of 3 experts do not fit"):
        run(models)


def test_what_is_probably_not_meant_is_a_warning(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    models.save("copy", models.experts[0])
    done = run(models, "base", "a", "a", "copy")
    warned = "\n".join(done.manifest["warnings"])
    assert f"{models.path('base')} is the base itself; its task vector is zero" in warned
    assert f"{models.path('a')} is given 2 times" in warned
    assert f"{models.path('copy')} is byte by byte the expert {models.path('a')}" in warned
    assert all(f"warning: {line}" in caplog.text for line in done.manifest["warnings"])
    models.save("copy", models.base)
    assert "is byte by byte the base's" in run(models, "copy", force=True).manifest["warnings"][0]


def test_integer_tensors_by_the_stated_policy(models: Models, nothing_left: Callable[[], None]) -> None:
    models.save("a", models.experts[0] | {"steps": torch.tensor(9)})
    with pytest.raises(DataError, match=r"steps \(int64\) of .*a\.safetensors; .*--integer-buffers base"):
        run(models)
    nothing_left()
    run(models, integer_buffers="base")
    assert out(models)["steps"] == 3
    for name, state, count in (("base", models.base, 1), ("a", models.experts[0], 2), ("b", models.experts[1], 3)):
        models.save(name, state | {"bn.num_batches_tracked": torch.tensor(count)})
    run(models, "a", "b", force=True)
    assert out(models)["bn.num_batches_tracked"] == 1  # a counter nobody reads


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_tensor_and_file_unless_allowed(
    models: Models, value: float, nothing_left: Callable[[], None]
) -> None:
    broken = models.experts[1]["layers.1.weight"].clone()
    broken[2, 3] = value
    models.save("b", models.experts[1] | {"layers.1.weight": broken})
    for method in ("task_arithmetic", "ties"):
        with pytest.raises(DataError, match=r"b\.safetensors.*layers\.1\.weight.*(NaN|infinit).*--allow-nonfinite"):
            run(models, method=method)
        nothing_left()
        assert not (models.folder / "out.safetensors").exists()
    done = run(models, allow_nonfinite=True)
    unchanged = models.experts[1]["layers.1.weight"].clone()
    unchanged[2, 3] = models.base["layers.1.weight"][2, 3]
    experts = [models.experts[0], models.experts[1] | {"layers.1.weight": unchanged}, models.experts[2]]
    assert_same(out(models), merge("task_arithmetic", models.base, experts))
    told = {"path": str(models.path("b")), "tensor": "layers.1.weight", "entries": 1}
    assert done.manifest["non_finite"] == [told]


def test_nan_in_the_base_is_refused_or_kept(models: Models) -> None:
    table = models.base["table"].clone()
    table[0, 0] = torch.nan
    models.save("base", models.base | {"table": table})
    for exclude in ([], ["table"]):
        with pytest.raises(DataError, match=r"base\.safetensors: table holds NaN"):
            run(models, exclude=exclude)
    run(models, allow_nonfinite=True)
    found = out(models)["table"]
    assert found[0, 0].isnan() and int(found.isnan().sum()) == 1


def test_a_mask_of_infinities_that_all_share_is_kept(models: Models) -> None:
    mask = torch.full((3, 3), -torch.inf).triu(1)
    for name, state in zip(("base", "a"), (models.base, models.experts[0]), strict=True):
        models.save(name, state | {"causal": mask})
    run(models, "a")
    assert torch.equal(out(models)["causal"], mask)


def test_a_budget_that_cannot_do_is_refused_with_the_one_that_does(models: Models) -> None:
    with pytest.raises(ConfigError, match=r"needs .* at \S+ \(.* float32\).*set it to (\d+)MiB") as caught:
        run(models, memory_budget="1MiB")
    enough = str(caught.value).split("set it to ")[1].split(",")[0]
    run(models, memory_budget=enough)
    with pytest.raises(ConfigError, match=r"'lots' is no size; write it as 2GiB"):
        from pipeline.merge.spec import load_spec

        load_spec(None, (), {"method": "ties", "base": "b", "experts": ["a"], "memory_budget": "lots"})


def test_memory_that_runs_out_is_told_with_the_budget(
    models: Models, monkeypatch: pytest.MonkeyPatch, nothing_left: Callable[[], None]
) -> None:
    """The allocator really refuses: a tensor of 8 TiB is asked for in the middle of the merge."""
    stream = run_module._tensors

    def greedy(*given: Any) -> Any:
        yield next(stream(*given))
        torch.empty(2**43, dtype=torch.uint8).fill_(1)

    monkeypatch.setattr(run_module, "_tensors", greedy)
    with pytest.raises(
        OutOfMemory, match=r"out of memory at the tensor after .* \(8192\.00 GiB asked for\).*--memory-budget"
    ):
        run(models)
    nothing_left()


def test_output_paths_that_cannot_be(models: Models, nothing_left: Callable[[], None]) -> None:
    run(models)
    before = (models.folder / "out.safetensors").read_bytes()
    folder = models.folder
    for target, reason in (
        (folder / "out.safetensors", "exists; name another, or replace it with --force"),
        (folder / "nowhere" / "out.safetensors", r"folder .*nowhere does not exist"),
        (models.path("base"), "is one of the inputs, which are never written to"),
        (folder / "out.gguf", r"\.gguf is not written"),
        (Path("/proc/out.safetensors"), "cannot be written|has 0 B free"),
        (None, "has no output"),
    ):
        with pytest.raises(ConfigError, match=reason):
            run(models, output=target)
    assert (folder / "out.safetensors").read_bytes() == before
    nothing_left()
    run(models, "a", force=True)
    assert (folder / "out.safetensors").read_bytes() != before


def test_a_disk_without_room_is_known_before_it_is_full(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    real = output_module.shutil.disk_usage(models.folder)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: real._replace(free=100))
    with pytest.raises(ConfigError, match=r"needs .* KiB; .* has 100 B free; make room"):
        run(models)


@pytest.mark.parametrize("moment", ["write", "finish", "commit"])
def test_whatever_ends_a_merge_leaves_nothing_half_written(
    models: Models, monkeypatch: pytest.MonkeyPatch, moment: str, nothing_left: Callable[[], None]
) -> None:
    run(models)
    before = {path.name: path.read_bytes() for path in models.folder.iterdir()}
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):

        def fail(*_: Any, error: Any = error) -> None:
            raise error

        monkeypatch.setattr(Output, moment, fail)
        with pytest.raises((KeyboardInterrupt, ConfigError)):
            run(models, "a", force=True)
        nothing_left()
        assert {path.name: path.read_bytes() for path in models.folder.iterdir()} == before


def test_a_disk_that_gives_back_other_bytes_is_found(models: Models) -> None:
    run(models)
    path = models.folder / "out.safetensors"
    state = load_file(path)
    headers = {name: value.to("meta") for name, value in state.items()}
    digests = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}
    assert verify(path, headers, digests) == hashlib.sha256(path.read_bytes()).hexdigest()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="1 tensors read back differently from what was written"):
        verify(path, headers, digests)
    with pytest.raises(DataError, match="holds other tensors than were written"):
        verify(path, {**headers, "more": torch.empty(1, device="meta")}, digests)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "tise"}, r"no merging method 'tise'; did you mean ties"),
        ({"method": "ties", "parameters": {"kep": 0.2}}, r"no parameter 'kep'; did you mean keep"),
        ({"method": "ties", "parameters": {"keep": 3}}, r"keep=3.* must lie in \(0, 1\]"),
        ({"method": "ties", "parameters": {"keep": "much"}}, r"ties: keep='much' cannot be used"),
        ({"method": "ties", "parameters": {"trim": "locally"}}, r"ties: trim='locally' cannot be used"),
        ({"method": "ties", "groups": {"*": {"keep": -1}}}, r"keep=-1.* must lie in"),
        ({"method": "adamerging"}, r"adamerging needs unlabelled batches.*bd-merge run CONFIG"),
        ({"method": "twin_merging"}, r"twin_merging needs task labels and gives a model per sample"),
    ],
)
def test_methods_and_parameters_that_cannot_be(models: Models, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(BDMergeError, match=reason):
        run(models, **settings)


def test_more_experts_than_ranks_is_an_error_and_no_silent_zero(
    models: Models, nothing_left: Callable[[], None]
) -> None:
    names = ["a", "b", "c"] * 3  # nine experts, matrices of rank 6 and 8
    with pytest.raises(DataError, match=r"tsv_m.*(rank|K)"):
        run(models, *names, method="tsv_m")
    nothing_left()
