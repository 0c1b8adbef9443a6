"""The command line. `bd-merge COMMAND --help` teaches each command; exit codes: 0 done, 1 failed units, 2 input error.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from pipeline import interrupts, logs
from pipeline.errors import BDMergeError
from pipeline.merge import commands as merging

if TYPE_CHECKING:
    from pipeline.store import Store

app = typer.Typer(
    name="bd-merge",
    help="Merge fine-tuned experts into one model that routes per sample, and see what it buys under shift.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. seed=1 fit_router.steps=100.")
]
StoreOption = Annotated[Path, typer.Option("--store", envvar="BD_STORE", help="The store's directory.")]
INTERRUPTED = 130
DEFAULT_STORE = Path("bd-store")


class PredictMode(StrEnum):
    """How a routed model may be merged, whatever its task vectors are stored as."""

    exact = "exact"
    grouped = "grouped"


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the pipeline; what the store holds is reused, so the same command resumes an interrupted run.

    \b
    Example:
      bd-merge run configs/demo.yaml seed=1 executor.kind=serial
    """
    from pipeline.run import resume_command
    from pipeline.run import run as run_workflow
    from pipeline.show import show_run
    from pipeline.workflow import Workflow

    workflow = Workflow.load(config, overrides or ())
    workflow.check()
    show_run(workflow, run_workflow(workflow, resume_command()))


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Show what would run, what is reused and why, with estimates of time, disk and memory; change nothing.

    \b
    Example:
      bd-merge plan configs/demo.yaml fit_router.steps=600
    """
    from pipeline.show import show_plan
    from pipeline.workflow import Workflow

    workflow = Workflow.load(config, overrides or ())
    workflow.check()
    show_plan(workflow)


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A merged model of a run, e.g. bd_layer, or an artefact's directory.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Images, or folders of images.")],
    store: StoreOption = DEFAULT_STORE,
    run: Annotated[str | None, typer.Option("--run", help="Run id, or its beginning; default: the newest.")] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Choose from this task's classes; default: from all tasks'.")
    ] = None,
    mode: Annotated[
        PredictMode | None,
        typer.Option("--mode", help="How samples are merged; default: as stored, so exact unless cut by SVD."),
    ] = None,
    max_distance: Annotated[
        float, typer.Option("--max-distance", min=0.0, help="Of routing weights that share a copy in mode grouped.")
    ] = 0.05,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a forward pass.")] = 64,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="A .parquet or .jsonl file, or - for JSON lines; default: a table to read."),
    ] = None,
) -> None:
    """Call a merged model on images: class, probability, uncertainty and the weight of each expert, image by image.

    Needs nothing but the artefact, which may have been copied elsewhere. A file that is no readable image is a row
    with the reason.

    \b
    Example:
      bd-merge predict bd_layer photos/ --store bd-store
      bd-merge predict bd_layer photos/cat.jpg --run demo-1a2b --task animals
      bd-merge predict models/bd_layer-0123456789ab photos/ --mode grouped --output called.parquet
    """
    from pipeline.formats.predictions import check_output, write_predictions
    from pipeline.predict import Caller, find_artefact, find_images
    from pipeline.show import show_predictions

    if output is not None:
        check_output(output)
    files = find_images(images)
    directory = find_artefact(model, store, run)
    caller = Caller.open(directory, task=task, mode=mode.value if mode else None, max_distance=max_distance)
    predictions = caller.predict(files, batch_size=batch_size)
    if output is None:
        show_predictions(predictions, caller)
    else:
        write_predictions(output, predictions)


app.command()(merging.merge)
app.command()(merging.explain)
app.command()(merging.methods)


@app.command()
def status(store: StoreOption = DEFAULT_STORE) -> None:
    """List the runs of a store, how far each got and how much disk its units take.

    \b
    Example:
      bd-merge status --store bd-store
    """
    from pipeline.show import show_status

    show_status(_store(store))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Also check this configuration.")] = None,
    overrides: Overrides = None,
    contents: Annotated[bool, typer.Option("--contents", help="Hash every file of the store again.")] = False,
) -> None:
    """Check environment, configuration, data and checkpoints before any long work; exit code 2 when one is unfit.

    \b
    Example:
      bd-merge doctor configs/local.yaml
    """
    from pipeline.doctor import examine
    from pipeline.show import show_findings

    findings = examine(config, overrides or (), contents=contents)
    show_findings(findings)
    if any(not finding.healthy for finding in findings):
        raise typer.Exit(2)


@app.command()
def gc(
    store: StoreOption = DEFAULT_STORE,
    keep: Annotated[int | None, typer.Option("--keep", min=0, help="Also forget all but the N newest runs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove the units that no run pins, and what killed runs left behind.

    \b
    Example:
      bd-merge gc --keep 3 --dry-run
    """
    from pipeline.gc import collect
    from pipeline.show import show_removed

    show_removed(collect(_store(store), keep_runs=keep, dry_run=dry_run), dry_run)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run ids, or their beginnings.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Put runs side by side: accuracy of every method at every level, and the options that differ.

    \b
    Example:
      bd-merge compare demo-1a2b demo-3c4d
    """
    from pipeline.show import show_comparison

    show_comparison(_store(store), runs)


@app.command()
def track(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Run id, or its beginning.")],
    store: StoreOption = DEFAULT_STORE,
    uri: Annotated[str | None, typer.Option(help="MLflow server; default: the sqlite file in the store.")] = None,
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "bd-merging",
) -> None:
    """Write a finished run into MLflow again, from the store alone, after the tracker was down.

    \b
    Example:
      bd-merge track demo-1a2b --uri http://mlflow:5000
    """
    from pipeline.errors import UnitsFailed
    from pipeline.record import read_record
    from pipeline.tracking import track_run

    place = _store(store)
    record = read_record(place, run_id)
    target = uri or f"sqlite:///{place.root / 'mlflow.db'}"
    record.tracked = track_run(record, record.artefacts(place), uri=target, experiment=experiment)
    if record.tracked is None:
        raise UnitsFailed(f"run {record.run_id} was not tracked at {target}; the log above says why")
    record.write(place)


def _store(path: Path) -> "Store":
    from pipeline.errors import ConfigError
    from pipeline.store import Store

    if not path.is_dir():
        raise ConfigError(f"store {path} does not exist; name one with --store or BD_STORE, or run a configuration")
    return Store(path)


def main() -> NoReturn:
    """Run the command line; every error of ours is printed without a traceback."""
    logs.configure()
    interrupts.listen()
    try:
        app(standalone_mode=True, prog_name="bd-merge")
    except BDMergeError as error:
        sys.stderr.write(f"bd-merge: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        # Of units, their own logs tell; this is the store's disk, or a file of ours.
        sys.stderr.write(f"bd-merge: {error}; finished units are kept, the same command goes on from there\n")
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        # Within a command, typer has already turned Ctrl-C into the exit code.
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        sys.stderr.write("bd-merge: interrupted; finished units are kept, the same command goes on from there\n")
        sys.exit(INTERRUPTED)
    sys.exit(0)


if __name__ == "__main__":
    main()
