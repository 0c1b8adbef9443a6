"""Configurations: `extends`, overrides, and faults that say key, value and what to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Resources, load_yaml, parse
from pipeline.errors import ConfigError
from pipeline.workflow import Config, Workflow

TASK = {"source": {"kind": "folder", "path": "images"}}
VALID: dict[str, Any] = {
    "name": "mine",
    "store": "store",
    "tasks": [{"name": "low", **TASK}, {"name": "high", **TASK}],
    "models": {"kind": "checkpoints", "model": "ViT-B-32", "base": "b", "experts": {"low": "l", "high": "h"}},
    "executor": {"kind": "serial"},
}


def faults(*overrides: str, path: Path, **changes: Any) -> str:
    """What is said of the valid configuration with these changes."""
    path.write_text(yaml.safe_dump(VALID | changes), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        parse(Config, load_yaml(path, overrides), str(path))
    assert str(error.value).startswith(str(path))
    return str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def test_the_valid_configuration_is_valid() -> None:
    assert parse(Config, VALID, "here").tasks[1].name == "high"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("fit_ruter.steps=3", "fit_ruter: unknown key (value {'steps': 3}); did you mean fit_router?"),
        ("fit_router.stepz=3", "fit_router.stepz: unknown key (value 3); did you mean fit_router.steps?"),
        ("label_union=by_name", "label_union: unknown key (value 'by_name'); there is fit_head.label_union"),
        ("executor.adress=auto", "executor.adress: unknown key (value 'auto'); there is executor.address"),
        ("shard.xyz=1", "shard.xyz: unknown key (value 1); known here: images_per_shard, max_pixels"),
        ("tasks.0.source.pth=x", "tasks.0.source.pth: unknown key (value 'x'); did you mean tasks.0.source.path?"),
        ("resources.embed.cpuss=2", "resources.embed.cpuss: unknown key (value 2); did you mean resources.embed.cpus?"),
        ("resources.embedd.cpus=2", "resources.embedd: there is no such stage; did you mean 'embed'?"),
        ("executor.kind=rai", "executor.kind: 'rai' is none of serial, ray; did you mean 'ray'?"),
        ("tasks.1.source={kind: foldr}", "tasks.1.source.kind: 'foldr' is none of folder, parquet, package"),
        ("tasks.1.source.test_fraction=2", "tasks.1.source.test_fraction: Input should be less than or equal to 1"),
        ("fit_router.steps=0", "fit_router.steps: Input should be greater than or equal to 1 (value 0)"),
        ("fit_router.steps=many", "fit_router.steps: Input should be a valid integer"),
        ("index.min_cosine=nan", "index.min_cosine: Input should be a finite number"),
        ("resources.embed.threads=0", "resources.embed.threads: Input should be greater than or equal to 1 (value 0)"),
        ("name=Not This", "name: String should match pattern"),
        ("store=s3://bucket", "store: s3://bucket: only paths of a shared file system"),
        ("tasks.0.templates=[a photo]", "tasks.0.templates: 'a photo' must hold {} once"),
        ("tasks.0.templates=['{} {x}']", "tasks.0.templates: '{} {x}' must hold {} once"),
        ("tasks.1.name=low", "tasks.1.name: 'low' is the name of another task too"),
        ("models.experts.hihg=x", "models.experts.hihg: there is no such task; did you mean 'high'?"),
        ("models.base=~nobody-here/x", "models.base: "),
        ("baselines.methods.tise={}", "baselines.methods: no merging method 'tise'; did you mean ties?"),
        ("baselines.methods.ties.trimm=1", "baselines.methods: ties has no parameter 'trimm'; did you mean trim?"),
        (
            "baselines.methods.ties.keep=5",
            "baselines.methods: ties with {'keep': 5.0}: ties: keep=5.0 must lie in (0, 1]",
        ),
        ("baselines.methods.adamerging.steps=0", "steps=0 must be at least 1"),
        ("baselines.methods.twin_merging.rank_share=9", "rank_share=9.0 must lie in (0, 1]"),
        ("fit_router.variants=[task,task]", "fit_router.variants: task, task: one is named twice"),
        ("score.factors=[]", "score.factors: "),
        ("corrupt.levels.L1=9", "corrupt.levels.L1: Input should be less than or equal to 5 (value 9)"),
        ("corrupt.levels.clean=1", "corrupt.levels: 'clean' cannot be a level's name"),
        ("corrupt.levels.a/b=1", "corrupt.levels: 'a/b' cannot be a level's name"),
        ("evaluate.bins=0", "evaluate.bins: Input should be greater than or equal to 1 (value 0)"),
    ],
)
def test_faults_name_key_value_and_next_step(path: Path, override: str, said: str) -> None:
    assert said in faults(override, path=path)


def test_all_faults_are_told_at_once(path: Path) -> None:
    said = faults("fit_head.lr=1", "seed=-1", "executor.kind=rai", path=path)
    assert [line.split(":")[0].strip() for line in said.splitlines()[1:]] == ["seed", "fit_head.lr", "executor.kind"]


def test_missing_keys_and_kinds(path: Path) -> None:
    path.write_text("name: mine\ntasks: [{name: low, source: {path: x}}]\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        parse(Config, load_yaml(path), str(path))
    assert "store: required and missing; add it" in str(error.value)
    assert "tasks.0.source.kind: required and missing; add one of folder, parquet, package" in str(error.value)


def test_fewer_than_two_experts_are_refused(path: Path) -> None:
    one = faults(path=path, tasks=VALID["tasks"][:1], models=VALID["models"] | {"experts": {"low": "l"}})
    assert "tasks: 1 given, merging needs at least 2 experts; add a task" in one


def test_a_task_without_expert_and_an_expert_without_task_are_told_together(path: Path) -> None:
    said = faults(path=path, models=VALID["models"] | {"experts": {"low": "l", "hihg": "h"}})
    assert "models.experts.high: required and missing" in said
    assert "models.experts.hihg: there is no such task; did you mean 'high'?" in said


@pytest.mark.parametrize(
    "override", ["seed", "=3", "seed=[1", "tasks.7.name=x", "tasks.first.name=x", "a: b=3", "seed={"]
)
def test_an_override_that_cannot_be_applied_is_named(path: Path, override: str) -> None:
    path.write_text(yaml.safe_dump(VALID), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        Workflow.load(path, [override])
    assert override.split("=")[0] in str(error.value)


def test_overrides_reach_into_lists_and_may_refer_to_other_keys(path: Path) -> None:
    path.write_text(yaml.safe_dump(VALID), encoding="utf-8")
    data = load_yaml(path, ["tasks.1.source.max_train=7", "seed=3", "corrupt.seed=${seed}", "fit_router.steps=5"])
    assert [task["source"].get("max_train") for task in data["tasks"]] == [None, 7]
    assert (data["corrupt"], data["fit_router"]) == ({"seed": 3}, {"steps": 5})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: }", "while parsing a flow sequence"),
        ("- 1\n- 2\n", "the top level is a list; write a mapping"),
        ("name: a\nname: b\n", "found duplicate key name"),
        ("name: ${nothing}\n", "name: Interpolation key 'nothing' not found"),
        ("name: ${oc.env:BD_NOT_SET}\n", "name: \"Environment variable 'BD_NOT_SET' not found\""),
        ("extends: [a]\n", "extends: ['a'] is not the path of one file"),
        ("extends: mine.yaml\n", "`extends` forms a circle"),
        ("extends: gone.yaml\n", "gone.yaml, which "),
        ("\x00", "control characters are not allowed"),
    ],
)
def test_files_that_are_no_configuration(path: Path, text: str, said: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_yaml(path)
    assert said in str(error.value)
    assert path.name in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist; known ones: "):
        load_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match=r"is not a file; known ones: "):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: 'utf-8' codec"):
        load_yaml(tmp_path / "latin.yaml")


def test_extends_lies_below_and_overrides_above(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\nfit_head: {steps: 1, batch_size: 8}\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nfit_head: {steps: 2}\n", encoding="utf-8")
    data = load_yaml(tmp_path / "mine.yaml", ["seed=3"])
    assert data == {"seed": 3, "fit_head": {"steps": 2, "batch_size": 8}}


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(Config, VALID | {"store": "~/store", "models": VALID["models"] | {"base": "~/b"}}, "here")
    assert config.store == tmp_path / "store"
    assert config.models.base == tmp_path / "b"


def test_resources_stand_apart_from_what_is_hashed() -> None:
    fast = parse(Config, VALID | {"resources": {"embed": {"batch_size": 8}}, "store": "elsewhere"}, "here")
    assert fast.resources["embed"] == Resources(batch_size=8)
    assert Workflow(fast).hashed() == Workflow(parse(Config, VALID, "here")).hashed()


@pytest.mark.parametrize("name", ["demo", "local", "clip_vit_b32_8tasks"])
def test_configurations_we_ship_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("BD_DATA", "BD_MODELS"):
        monkeypatch.setenv(variable, "/somewhere")
    monkeypatch.delenv("BD_STORE", raising=False)
    root = Path(__file__).parents[2] / "configs"
    workflow = Workflow.load(root / f"{name}.yaml")
    assert workflow.name == name
    assert len(workflow.config.tasks) == {"demo": 4, "local": 3, "clip_vit_b32_8tasks": 8}[name]


def test_the_five_lines_of_the_readme_are_a_configuration() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    lines = readme.split("## Your own checkpoints in five lines")[1].split("```yaml\n")[1].split("```")[0]
    assert len(lines.splitlines()) == 5
    config = parse(Config, yaml.safe_load(lines), "README.md")
    assert [task.name for task in config.tasks] == ["cars", "signs"]
