"""Is merging files bound by the disk? `bd-merge merge` beside a copy of the same bytes, measured in turns.

    python -m infra.bench.bench_merge_files --full --save    # eight experts of ViT-B/32's size, K = 2..32 at an eighth
    python -m infra.bench.bench_merge_files                  # a toy size, to see that it works

The floor is what the same bytes cost without any merging: the K + 1 inputs read in blocks, the output's bytes written
and flushed, in one thread, as `cp` does it. The file cache is emptied of these files before every run (`--warm` leaves
it). The merge does more than the floor: it adds K task vectors, hashes inputs and output, and reads the output back.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, sleep

import torch
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results"
BLOCK_BYTES = 8 << 20
# open_clip's ViT-B-32, both towers: 151.3 M parameters, 605 MB in float32.
FULL = {"width": 768, "layers": 12, "text_width": 512, "text_layers": 12, "vocabulary": 49408}
TOY = {"width": 192, "layers": 12, "text_width": 128, "text_layers": 12, "vocabulary": 4096}


def shapes(width: int, layers: int, text_width: int, text_layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP ViT/32 of this size."""
    found: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (50, width),
        "visual.proj": (width, text_width),
        "visual.conv1.weight": (width, 3, 32, 32),
        "token_embedding.weight": (vocabulary, text_width),
        "positional_embedding": (77, text_width),
        "text_projection": (text_width, text_width),
        "logit_scale": (),
    }
    for prefix, size, count in (("visual.", width, layers), ("", text_width, text_layers)):
        for block in range(count):
            at = f"{prefix}transformer.resblocks.{block}"
            found |= {
                f"{at}.attn.in_proj_weight": (3 * size, size),
                f"{at}.attn.in_proj_bias": (3 * size,),
                f"{at}.attn.out_proj.weight": (size, size),
                f"{at}.attn.out_proj.bias": (size,),
                f"{at}.mlp.c_fc.weight": (4 * size, size),
                f"{at}.mlp.c_fc.bias": (4 * size,),
                f"{at}.mlp.c_proj.weight": (size, 4 * size),
                f"{at}.mlp.c_proj.bias": (size,),
            }
            found |= {f"{at}.{norm}.{kind}": (size,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    return found


def write_models(folder: Path, experts: int, size: dict[str, int]) -> list[Path]:
    """A base and its experts, random."""
    paths = []
    for k in range(experts + 1):
        generator = torch.Generator().manual_seed(k)
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes(**size).items()}
        paths.append(folder / f"{'base' if k == 0 else f'expert{k}'}.safetensors")
        save_file(state, paths[-1])
    os.sync()
    return paths


def forget(paths: list[Path]) -> None:
    """Have the kernel drop these files from its cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def floor_s(paths: list[Path], target: Path) -> float:
    """Seconds to read all inputs and to write and flush one output's bytes, as cp does."""
    block = bytearray(BLOCK_BYTES)
    view = memoryview(block)
    began = perf_counter()
    for path in paths[1:]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    with paths[0].open("rb", buffering=0) as source, target.open("wb", buffering=0) as out:
        while count := source.readinto(block):
            out.write(view[:count])
        os.fsync(out.fileno())
    return perf_counter() - began


@dataclass(frozen=True)
class Merge:
    """One `bd-merge merge`: seconds by its manifest, of the whole command, and the most memory it held of its own."""

    seconds: float
    command_s: float
    anonymous_bytes: int


def merge(paths: list[Path], target: Path, method: str) -> Merge:
    """Run the command and look every few milliseconds at its memory, mapped files apart."""
    command = [sys.executable, "-m", "pipeline", "merge", "--method", method, "--base", str(paths[0]), "--force"]
    command += [part for path in paths[1:] for part in ("--expert", str(path))] + ["-o", str(target)]
    began, most = perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        most = max(most, _anonymous_bytes(process.pid))
        sleep(0.005)
    whole = perf_counter() - began
    if process.returncode:
        raise SystemExit(process.communicate()[1])
    process.communicate()
    manifest = json.loads(target.with_name(target.name + ".json").read_text(encoding="utf-8"))
    return Merge(manifest["seconds"], whole, most)


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
    except (OSError, StopIteration):
        return 0  # it ended


def against_floor(folder: Path, size: dict[str, int], experts: int, repeats: int, method: str, cold: bool) -> list[str]:
    """The table of merge and floor, in turns."""
    paths = write_models(folder, experts, size)
    volume = sum(path.stat().st_size for path in paths) + paths[0].stat().st_size
    floors, merges, wholes = [], [], []
    for _ in range(repeats):
        for measure in ("floor", "merge"):
            target = folder / f"{measure}.safetensors"
            target.unlink(missing_ok=True)
            if cold:
                forget(paths)
            if measure == "floor":
                floors.append(floor_s(paths, target))
            else:
                run = merge(paths, target, method)
                merges.append(run.seconds)
                wholes.append(run.command_s)
    ratios = [floor / merge for floor, merge in zip(floors, merges, strict=True)]
    state = "emptied of them" if cold else "holding them"
    return [
        f"{method}, K = {experts}, {volume / 1e9:.2f} GB read and written, file cache {state}; median (least – most) "
        f"of {repeats} turns:",
        "",
        "| what | seconds | MB/s |",
        "|---|---|---|",
        f"| floor: read inputs, write and flush output | {_spread(floors)} | {volume / 1e6 / _mid(floors):.0f} |",
        f"| the merge | {_spread(merges)} | {volume / 1e6 / _mid(merges):.0f} |",
        f"| the whole command, Python and torch starting | {_spread(wholes)} | {volume / 1e6 / _mid(wholes):.0f} |",
        "",
        f"The merge runs at {_spread([100 * ratio for ratio in ratios], 0)} % of the floor's rate.",
        "",
    ]


def scaling(folder: Path, size: dict[str, int], counts: list[int], repeats: int, method: str) -> list[str]:
    """Time and memory against the number of experts."""
    paths = write_models(folder, max(counts), size)
    one = paths[0].stat().st_size
    rows = [
        "| K | seconds | seconds an expert | peak memory, MiB | above the first row, models |",
        "|---|---|---|---|---|",
    ]
    least = None
    for count in counts:
        target = folder / "scaling.safetensors"
        runs = []
        for _ in range(repeats):
            forget(paths)
            runs.append(merge(paths[: count + 1], target, method))
        seconds = [run.seconds for run in runs]
        peak = _mid([run.anonymous_bytes for run in runs])
        least = peak if least is None else least
        above = (peak - least) / one
        rows.append(
            f"| {count} | {_spread(seconds)} | {_mid(seconds) / count:.3f} | {peak / 2**20:.0f} | {above:+.2f} |"
        )
    return [f"{method}, models of {one / 1e6:.0f} MB, memory of the whole process without mapped files:", "", *rows, ""]


def _mid(values: list[float]) -> float:
    return statistics.median(values)


def _spread(values: list[float], digits: int = 2) -> str:
    return f"{_mid(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def header() -> list[str]:
    """What was run, on what."""
    return [
        "# Merging files against the disk",
        "",
        f"Command: `python -m infra.bench.bench_merge_files {' '.join(sys.argv[1:])}`; {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}.",
        "",
    ]


def main() -> None:
    """Measure, print, and save with --save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="ViT-B/32's size, 6 GB of disk")
    parser.add_argument("--method", default="task_arithmetic")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="leave the inputs in the file cache")
    parser.add_argument("--only", choices=("floor", "scaling"))
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--save", action="store_true", help="keep the result in infra/bench/results")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="merge-files-", dir=given.folder))
    lines: list[str] = []
    try:
        if given.only != "scaling":
            size = FULL if given.full else TOY
            lines += against_floor(folder, size, given.experts, given.repeats, given.method, not given.warm)
            shutil.rmtree(folder)
            folder.mkdir()
        if given.only != "floor":
            counts = [2, 4, 8, 16, 32] if given.full else [2, 4, 8]
            lines += scaling(folder, TOY, counts, given.repeats, given.method)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(lines))
    if given.save:
        name = f"merge_files_{platform.machine()}-{os.cpu_count()}cores_{datetime.now(UTC):%Y%m%d}.md"
        (RESULTS / name).write_text("\n".join([*header(), *lines]), encoding="utf-8")


if __name__ == "__main__":
    main()
