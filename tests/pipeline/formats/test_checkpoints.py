"""Checkpoints: what is read, what is refused, and that a pickle is never executed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError
from pipeline.formats.checkpoints import (
    declared_activation,
    read_checkpoint,
    read_expert,
    read_header,
    write_safetensors,
)
from pipeline.formats.headers import check_experts, compare_headers


def tiny_state(width: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "visual.class_embedding": (width,),
        "visual.conv1.weight": (width, 3, 2, 2),
        "visual.ln_post.weight": (width,),
        "visual.proj": (width, 3),
        "visual.transformer.resblocks.0.attn.in_proj_weight": (3 * width, width),
        "token_embedding.weight": (5, width),
        "logit_scale": (),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pt_legacy", "pt_nested", "pt_data_parallel"])
def test_every_form_of_one_state_reads_the_same(tmp_path: Path, kind: str) -> None:
    state = tiny_state()
    path = tmp_path / f"model.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pt_nested":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif kind == "pt_data_parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pt")
    assert_equal(read_checkpoint(path), state)
    header = read_header(path)
    assert all(value.is_meta for value in header.values())
    assert compare_headers(state, header) == []


def test_header_of_safetensors_needs_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tiny_state(), path)
    # The values are overwritten; a header must not notice.
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:header_bytes].ljust(path.stat().st_size, b"\xff"))
    assert compare_headers(tiny_state(), read_header(path)) == []


def test_image_tower_alone_is_an_expert_and_so_is_a_full_model(tmp_path: Path) -> None:
    state = tiny_state()
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    torch.save(visual, tmp_path / "visual.pt")
    torch.save(state, tmp_path / "full.pt")
    assert_equal(read_expert(tmp_path / "visual.pt", state), visual)
    assert_equal(read_expert(tmp_path / "full.pt", state), visual)
    assert compare_headers(visual, read_expert(tmp_path / "full.pt", state, header_only=True)) == []


def test_a_fine_tuned_text_tower_is_left_behind_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = tiny_state()
    torch.save(state, tmp_path / "same.pt")
    tuned = next(name for name in state if not name.startswith("visual.") and state[name].is_floating_point())
    torch.save(state | {tuned: state[tuned] + 1}, tmp_path / "tuned.pt")
    read_expert(tmp_path / "same.pt", state)
    assert caplog.records == []
    read_expert(tmp_path / "tuned.pt", state)
    assert "the text tower of this expert differs" in caplog.text and f"first={tuned}" in caplog.text


class Payload:
    """What an attacker puts into a checkpoint."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("header_only", [False, True])
@pytest.mark.parametrize("container", ["torch", "torch_legacy", "pickle"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, container: str, header_only: bool) -> None:
    proof = tmp_path / "executed"
    path = tmp_path / "expert.pt"
    content = {**tiny_state(), "payload": Payload(proof)}
    if container == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "torch")
    with pytest.raises(DataError, match=r"refused.*could run any code.*save_file"):
        (read_header if header_only else read_checkpoint)(path)
    assert not proof.exists()


def test_whole_model_object_is_refused_with_the_class_it_wants(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"refused.*torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "model.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "model.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), archive)
    with pytest.raises(DataError, match="TorchScript"):
        read_checkpoint(archive)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_file_cut_short_is_a_data_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save(tiny_state(), path)
    else:
        save_file(tiny_state(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=name):
        read_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match=name):
        read_checkpoint(path)


def test_missing_file_unknown_names_and_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pt does not exist"):
        read_checkpoint(tmp_path / "nowhere.pt")
    save_file({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.safetensors")
    with pytest.raises(DataError, match=r"layer1\.0\.conv1\.weight.*neither open_clip's nor Hugging Face"):
        read_checkpoint(tmp_path / "resnet.safetensors")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "log.pt")
    with pytest.raises(DataError, match="mapping with keys epoch, loss"):
        read_checkpoint(tmp_path / "log.pt")


def test_differences_are_printed(tmp_path: Path) -> None:
    base = tiny_state()
    expert = {**base, "extra": torch.zeros(2), "visual.proj": base["visual.proj"].half()}
    del expert["visual.ln_post.weight"]
    expert["visual.class_embedding"] = torch.zeros(9)
    lines = compare_headers(base, expert)
    assert lines == [
        "+ extra [2] float32: only in the expert",
        "~ visual.class_embedding: [4] float32 in the base, [9] float32 in the expert",
        "- visual.ln_post.weight [4] float32: only in the base",
        "~ visual.proj: [4, 3] float32 in the base, [4, 3] float16 in the expert",
    ]
    with pytest.raises(DataError, match=r"1 of 2 experts do not fit(?s:.*)expert cars: 4 difference(?s:.*)float16"):
        check_experts(base, {"digits": dict(base), "cars": expert})
    check_experts(base, {"digits": dict(base)})


def test_safetensors_bytes_do_not_depend_on_order_or_shared_memory(tmp_path: Path) -> None:
    state = tiny_state()
    state["visual.tied"] = state["visual.class_embedding"]
    write_safetensors(tmp_path / "one", state)
    write_safetensors(tmp_path / "two", dict(reversed([*state.items()])))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_activation_of_a_hugging_face_folder(tmp_path: Path) -> None:
    assert declared_activation(tmp_path / "model.pt") is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {}}))
    assert declared_activation(tmp_path) == "quick_gelu"
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu"}}))
    assert declared_activation(tmp_path) == "gelu"
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="not a model configuration"):
        declared_activation(tmp_path)
