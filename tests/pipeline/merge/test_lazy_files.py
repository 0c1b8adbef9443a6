"""Tensors that stay on disk: the same values as when loaded whole, and every broken file named."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import ConfigError, DataError
from pipeline.formats.lazy import open_checkpoint
from pipeline.formats.safetensors_files import DTYPES, SafetensorsWriter


def test_a_torch_file_is_read_by_where_its_tensors_lie(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    state = {
        "matrix": matrix,
        "tied": matrix,
        "rows": matrix[1:3],
        "columns": matrix[:, 2:5],
        "transposed": matrix.T,
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(1.5),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pt", "old.pt"):
        lazy = open_checkpoint(tmp_path / name).state
        assert lazy.keys() == state.keys()
        for key, value in state.items():
            assert (lazy.header[key].shape, lazy.header[key].dtype) == (value.shape, value.dtype)
            assert torch.equal(lazy[key], value), key
    assert not any(source.scratch_bytes for source in open_checkpoint(tmp_path / "new.pt").sources.values())


def test_every_dtype_of_safetensors_is_read_also_where_it_is_not_aligned(tmp_path: Path) -> None:
    state = {name: torch.arange(5).to(dtype) for name, dtype in DTYPES.items()}
    save_file(state, tmp_path / "all.safetensors")
    lazy = open_checkpoint(tmp_path / "all.safetensors").state
    for name, value in state.items():
        assert lazy[name].dtype == value.dtype
        assert torch.equal(lazy[name].view(torch.uint8), value.view(torch.uint8)), name
    header = {"flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}
    header["odd"] = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    text = json.dumps(header).encode()
    values = b"\x01" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values)
    assert open_checkpoint(tmp_path / "odd.safetensors").state["odd"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_writing_to_a_tensor_that_was_read_leaves_the_file_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    save_file({"w": torch.ones(9)}, path) if suffix == "safetensors" else torch.save({"w": torch.ones(9)}, path)
    before = path.read_bytes()
    open_checkpoint(path).state["w"].zero_()
    assert path.read_bytes() == before
    assert open_checkpoint(path).state["w"].sum() == 9


def test_a_wrapper_around_all_names_is_taken_off(tmp_path: Path) -> None:
    save_file({"module._orig_mod.w": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert list(checkpoint.state) == ["w"]
    assert checkpoint.parts["w"].sources == ("module._orig_mod.w",)


def test_shards_are_one_model_by_folder_and_by_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    for path in (tmp_path, index):
        state = open_checkpoint(path).state
        assert {name: value.tolist() for name, value in state.items()} == {"a": [0, 0], "b": [1, 1]}
    save_file({"a": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(DataError, match="a is in more than one of its shards"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards are missing, first model-2\.safetensors"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(DataError, match="lies outside the folder"):
        open_checkpoint(tmp_path)


def test_folder_without_weights_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds none of model\.safetensors\.index\.json.*name a file of weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere.safetensors")


def test_git_lfs_pointer_is_told_as_one(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.bin"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 605\n")
        with pytest.raises(DataError, match="is a Git LFS pointer, not the weights; fetch them: git lfs pull"):
            open_checkpoint(tmp_path / name)


def test_a_checkpoint_a_quarter_of_its_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 4])
    told = rf"{len(whole) // 4:,} bytes where its header says {len(whole):,}.*copy it again"
    with pytest.raises(DataError, match=told):
        open_checkpoint(path)
    path.write_bytes(whole[:20])
    with pytest.raises(DataError, match="cut short within its header"):
        open_checkpoint(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(DataError, match="followed by bytes that are no tensor"):
        open_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no header"):
        open_checkpoint(path)


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for header, reason in (
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "w does not lie where it must"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "w does not lie where it must"),
        ({"w": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, "dtype 'Q4', which cannot be merged"),
        ({"w": 3}, "not a safetensors file"),
        ([1], "not a safetensors file"),
        ({}, "holds no tensor"),
    ):
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + (b"\0" * 4 if "dtype" in str(header) else b""))
        with pytest.raises(DataError, match=reason):
            open_checkpoint(path)
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(DataError, match="it is a torch file"):
        open_checkpoint(path)


def test_a_pickle_bound_to_a_class_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints of task_vectors are pickled ImageEncoder objects, bound to that repository's `src.modeling`."""
    (tmp_path / "code" / "src").mkdir(parents=True)
    (tmp_path / "code" / "src" / "modeling.py").write_text(
        "import torch\nclass ImageEncoder(torch.nn.Linear):\n    pass\nprint('imported')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    from src.modeling import ImageEncoder  # type: ignore[import-not-found]

    torch.save(ImageEncoder(2, 2), tmp_path / "zip.pt")
    torch.save(ImageEncoder(2, 2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"encoder": ImageEncoder(2, 2)}))
    for module in ("src", "src.modeling"):
        monkeypatch.delitem(sys.modules, module)
    for name in ("zip.pt", "old.pt", "plain.pt"):
        with pytest.raises(
            DataError, match=r"refused.*wants src\.modeling\.ImageEncoder.*Nothing was executed.*save_file"
        ):
            open_checkpoint(tmp_path / name)
    assert "src.modeling" not in sys.modules
    # What the message advises works: its state dict, wrapper and all.
    torch.save({"model.w": torch.ones(1)}, tmp_path / "state.pt")
    assert list(open_checkpoint(tmp_path / "state.pt").sources) == ["model.w"]


def test_torchscript_quantised_and_no_state_dict_are_refused(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(DataError, match="TorchScript"):
        open_checkpoint(tmp_path / "script.pt")
    torch.save({"w": torch.ones(2).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(DataError, match=r"sparse\.pt"):
        open_checkpoint(tmp_path / "sparse.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(DataError, match="holds a list, not a state dict"):
        open_checkpoint(tmp_path / "list.pt")


def test_a_file_changed_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    opened = open_checkpoint(path).opened[0]
    opened.check_unchanged()
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="was changed while it was read"):
        opened.check_unchanged()


def test_the_writer_gives_the_reference_implementations_bytes_in_any_order(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 4), "h": torch.randn(5).half(), "n": torch.tensor(3), "e": torch.empty(0, 2)}
    save_file(state, tmp_path / "theirs", metadata={"format": "pt"})
    for k, names in enumerate((list(state), list(reversed(state)))):
        header = {name: value.to("meta") for name, value in state.items()}
        writer = SafetensorsWriter(tmp_path / f"ours{k}", header, {"format": "pt"})
        for name in names:
            writer.write(name, state[name])
        writer.finish()
        assert (tmp_path / f"ours{k}").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "ours0").keys() == state.keys()
    writer = SafetensorsWriter(tmp_path / "torn", {"w": torch.empty(2, device="meta")}, {})
    with pytest.raises(AssertionError, match="never written"):
        writer.finish()
    writer.close()
