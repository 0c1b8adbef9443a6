"""A finished run in a real store, committed unit by unit, with made-up but believable numbers in every file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import StageReport
from pipeline.store import Artefact, Store, commit
from pipeline.store.keys import digest_json

TASKS = ("mnist", "fashion", "signs", "letters <A&B>")
CLASSES = {"mnist": 10, "fashion": 10, "signs": 4, "letters <A&B>": 12}
# digits and letters share two class names
MAPS = {"mnist": range(10), "fashion": range(10, 20), "signs": range(20, 24), "letters <A&B>": [0, 1, *range(24, 34)]}
LEVELS = ("clean", "L1", "L2", "L3")
PER_TASK = 150
SHARDS = 2
ANSWER = ("label", "prediction", "confidence")
PREDICTED = ("sample_id", "task", "level", *ANSWER, *(f"{name}_free" for name in ANSWER))
GROUPS = ("stem", *(f"block {i}" for i in range(6)), "head")
TITLES = {
    "pretrained": "Pretrained",
    "experts": "Individual experts",
    "weight_average": "Weight average",
    "task_arithmetic": "Task Arithmetic",
    "ties": "Ties-Merging",
    "adamerging": "AdaMerging (layer-wise)",
    "twin_merging": "Twin-Merging",
    "bd_task": "BD-Merging (task-wise)",
    "bd_layer": "BD-Merging (layer-wise)",
}
NEEDS = {
    "weight_average": "nothing",
    "task_arithmetic": "nothing",
    "ties": "nothing",
    "adamerging": "unlabelled batches",
    "twin_merging": "task labels",
    "bd_task": "unlabelled batches",
    "bd_layer": "unlabelled batches",
}
CLEAN = dict(zip(TITLES, (0.51, 0.87, 0.60, 0.62, 0.64, 0.71, 0.79, 0.78, 0.81), strict=True))
LOST = dict(zip(TITLES, (0.30, 0.27, 0.29, 0.30, 0.29, 0.33, 0.31, 0.24, 0.22), strict=True))
TIMING: tuple[tuple[str, int, float, float, float, dict[str, float], int, int], ...] = (
    ("executor start", 0, 5.2, 0.0, 0.0, {}, 0, 0),
    ("shard", 2, 3.1, 2.6, 0.3, {"read": 0.8, "validate": 1.5}, 8_400_000, 2),
    ("base", 1, 92.0, 90.5, 0.1, {"forward_backward": 84.0, "decode": 5.5}, 5_600_000, 1),
    ("experts", 4, 61.0, 118.0, 0.3, {"forward_backward": 111.0, "decode": 5.0}, 22_000_000, 2),
    ("embed", 2, 7.2, 11.9, 0.2, {"forward": 9.8, "decode": 1.7}, 3_100_000, 2),
    ("fit_head", 1, 9.6, 5.1, 0.1, {"forward_backward": 4.4}, 130_000, 1),
    ("radius", 1, 0.9, 0.5, 0.1, {"calibrate": 0.2}, 1_300, 1),
    ("neighbours", 2, 1.1, 0.9, 0.1, {"search": 0.8}, 2_500_000, 2),
    ("score", 2, 1.4, 1.2, 0.1, {"score": 1.0}, 900_000, 2),
    ("pairs", 2, 0.8, 0.5, 0.1, {}, 2_100_000, 2),
    ("fit_router", 2, 71.0, 133.0, 0.1, {"forward_backward": 127.0, "sample": 3.0}, 450_000, 2),
    ("baselines", 5, 20.0, 35.0, 0.5, {"forward_backward": 29.0, "merge": 2.5}, 31_000_000, 2),
    ("export", 2, 2.0, 3.0, 0.3, {}, 20_000_000, 2),
    ("corrupt", 4, 12.0, 22.0, 0.5, {"corrupt": 20.0}, 30_000_000, 2),
    ("evaluate", 9, 48.0, 92.0, 0.4, {"forward": 83.0, "decode": 4.0}, 1_900_000, 2),
    ("detect", 1, 2.0, 1.5, 0.1, {"forward": 1.0}, 600_000, 1),
)


def timing_rows() -> list[dict[str, Any]]:
    """`TIMING` as a record has it: one stage after the other, and in each one kind of work after the other."""
    rows: list[dict[str, Any]] = []
    clock = 0.0
    for stage, units, wall, busy, flush, spans, size, lanes in TIMING:
        at: dict[str, list[list[float]]] = {}
        moment = clock
        for name, seconds in {**spans, "commit (hash, flush, rename)": flush}.items():
            at[name] = [[moment, moment + seconds / max(lanes, 1)]]
            moment = at[name][0][1]
        at["unit"] = [[clock, min(clock + wall, clock + busy / max(lanes, 1))]]
        row = {"stage": stage, "units": units, "reused": 0, "began_s": clock, "wall_s": wall, "busy_s": busy}
        rows.append(row | {"bytes": size, "spans": dict(spans), "at": at})
        clock += wall
    return rows


class Synthetic:
    """Writes a run; `leave_out` stages are not there at all, and a model named there is not evaluated."""

    def __init__(self, store: Store, leave_out: Sequence[str] = (), seed: int = 0, name: str = "demo") -> None:
        self.store, self.leave_out, self.seed, self.name = store, set(leave_out), seed, name
        self.rng = np.random.default_rng(seed)
        self.artefacts: dict[str, list[Artefact]] = {}
        self._images()
        self._fits()
        self._graph()
        self._evaluation()
        self._detection()

    @property
    def record(self) -> dict[str, Any]:
        """The run record, as `run.json` holds it."""
        return {
            "schema": 1,
            "run_id": f"{self.name}-{self.seed:010d}",
            "name": self.name,
            "created": "2026-11-22T01:28:48+0000",
            "finished": "2026-11-22T01:34:40+0000",
            "tracked": None,
            "git": "d7c1de5a0b1c",
            "config": {"seed": self.seed, "data": {"tasks": list(TASKS)}, "fit_router": {"steps": 300, "eta": 0.1}},
            "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
            "stages": {s: {a.unit: a.key for a in units} for s, units in self.artefacts.items()},
            "timing": timing_rows(),
        }

    def add(self, stage: str, unit: str, files: Mapping[str, Any], **report: Any) -> None:
        """Commit one unit: dicts as JSON, tables as Parquet, arrays as npy."""
        if stage in self.leave_out or unit in self.leave_out:
            return
        sources = [[name, ""] for name in report.pop("made_from", ())]
        made = StageReport(report.pop("rows", 1), report.pop("out", 1), report.pop("rejected", 0), **report)

        def produce(directory: Path) -> StageReport:
            for name, content in files.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                _write(directory / name, content)
            return made

        key = digest_json([stage, unit, self.seed, self.name])
        artefact = commit(
            self.store,
            produce,
            stage=stage,
            unit=unit,
            key=key,
            version=1,
            seed=self.seed,
            spec={},
            settings={},
            inputs=sources,
        )
        self.artefacts.setdefault(stage, []).append(artefact)

    def _images(self) -> None:
        """Every image serves both as pool row and, under another split, as test image."""
        self.task = np.repeat(np.arange(len(TASKS)), PER_TASK)
        self.label = np.concatenate([self.rng.integers(0, CLASSES[t], PER_TASK) for t in TASKS])
        self.ids = [f"{i:016x}" for i in range(len(self.task))]
        self.unified = np.array([list(MAPS[TASKS[t]])[c] for t, c in zip(self.task, self.label, strict=True)])
        shard_of = np.arange(len(self.task)) * SHARDS // len(self.task)
        self.rows = [np.flatnonzero(shard_of == s) for s in range(SHARDS)]
        for s, rows in enumerate(self.rows):
            names = pa.array([TASKS[t] for t in self.task[rows]])
            ids = pa.array([self.ids[i] for i in rows])
            samples = pa.table(
                {
                    "row": np.arange(len(rows)),
                    "sample_id": ids,
                    "task": names,
                    "label": self.label[rows],
                    "split": pa.array(["test"] * len(rows)),
                }
            )
            rejects = pa.table(
                {
                    "source": ["a.png", "b.gif", "c.png"],
                    "reason": ["truncated file", "<not> an image", "truncated file"],
                }
            )
            unit = f"shard-{s:05d}"
            files = {"samples.parquet": samples, "rejects.parquet": rejects}
            self.add("shard", unit, files, rows=len(rows) + 3, out=len(rows), rejected=3)
            small = samples.select(["row", "sample_id", "task"])
            self.add("embed", unit, {"samples.parquet": small}, rows=len(rows), out=len(rows))

    def _fits(self) -> None:
        self.add("base", "base", {"history.parquet": self._history(400, {"contrastive": (5.5, 1.2)})})
        for task in TASKS:
            self.add("experts", task.split()[0], {"history.parquet": self._history(200, {"cross_entropy": (2.1, 0.2)})})
        head = {"l_ent": (3.4, 2.2), "l_inv": (0.31, 0.06), "kl": (48.0, 21.0), "mean_u": (0.9, 0.7)}
        config = {"activation": "softplus", "maps": {task: list(ids) for task, ids in MAPS.items()}}
        files = {"history.parquet": self._history(300, head), "config.json": config}
        self.add("fit_head", "head", files, metrics={"mean_p_max": 0.214, "mean_u": 0.702})
        for kind in ("task", "layer"):
            terms = {"l_unsup": (1.3, 0.5), "l_dis": (2.9, 2.4), "information": (-2.0, -2.6)}
            self.add("fit_router", kind, {"history.parquet": self._history(300, terms)}, metrics={"final_loss": 0.74})
        for place, model in enumerate(name for name in TITLES if name in NEEDS):
            files = {"history.parquet": self._history(500, {"entropy": (1.6, 0.7)})} if model == "adamerging" else {}
            made_from = ["base/base", *(f"experts/{task.split()[0]}" for task in TASKS)]
            if model.startswith("bd_"):
                made_from.append(f"fit_router/{model.removeprefix('bd_')}")
            stage = "export" if model.startswith("bd_") else "baselines"
            memory = {"peak_memory_bytes": 4e6 * (place + 1)}
            self.add(
                stage, model, {"recipe.json": {}, **files}, metrics=memory, seconds={"merge": 0.25}, made_from=made_from
            )

    def _history(self, steps: int, terms: Mapping[str, tuple[float, float]]) -> pa.Table:
        decay = np.exp(-np.arange(steps) / (steps / 5))
        noise = self.rng.normal(0, 0.06, (len(terms), steps))
        columns = {
            name: end + (start - end) * decay + noise[i] * abs(start - end)
            for i, (name, (start, end)) in enumerate(terms.items())
        }
        return pa.table({"step": np.arange(steps), **columns})

    def _graph(self) -> None:
        radius = {"mode": "global", "min_cosine": 0.8412, "backend": "ivf", "n_lists": 64, "n_probes": 4}
        self.add("radius", "radius", {"radius.json": radius}, metrics={"isolated_share_sample": 0.0195})
        for join, (wanted, found) in {"shard-00000": (400, 398), "shard-00000--shard-00001": (100, 99)}.items():
            self.add("edges", join, {}, metrics={"recall_edges": wanted, "recall_found": found})
        n = len(self.task)
        crowd = self.rng.lognormal(2.6, 1.2, n).astype(int).clip(0, 200)
        crowd[self.rng.random(n) < 0.05] = 0
        edges = 0
        for s, rows in enumerate(self.rows):
            anchor, other, cosine = [], [], []
            for row in rows:
                same = np.flatnonzero((self.unified == self.unified[row]) & (np.arange(n) != row))
                wanted = self.rng.random(crowd[row]) < 0.5
                picks = np.where(wanted, self.rng.choice(same, crowd[row]), self.rng.integers(0, n, crowd[row]))
                picks = np.unique(picks[picks != row])
                anchor += [row] * len(picks)
                other += picks.tolist()
                cosine += (0.86 + 0.04 * (self.unified[picks] == self.unified[row])).tolist()
            a, o = np.array(anchor), np.array(other)
            c = (np.array(cosine) + self.rng.normal(0, 0.03, len(a))).clip(0.8412, 1).astype(np.float32)
            ads = (0.05 + 0.03 * (self.unified[a] != self.unified[o]) + self.rng.normal(0, 0.025, len(a))).astype(
                np.float32
            )
            degree = np.bincount(a, minlength=n)[rows]
            edges += len(a)
            unit = f"shard-{s:05d}"
            offsets = np.concatenate([[0], np.cumsum(degree)])
            self.add("neighbours", unit, {"offsets.npy": offsets, "neighbours.npy": o, "cosine.npy": c})
            sums = np.bincount(a, weights=ads, minlength=n)[rows]
            scores = {
                "row": rows,
                "u": self.rng.beta(7, 3, len(rows)),
                "iec": self.rng.gamma(2, 1, len(rows)),
                "sharpness": self.rng.normal(2, 0.5, len(rows)),
                "divergence": self.rng.gamma(4, 0.1, len(rows)),
                "mean_ads": pa.array(np.where(degree > 0, sums / degree.clip(1), np.nan), from_pandas=True),
                "degree": degree,
            }
            self.add("score", unit, {"scores.parquet": pa.table(scores)})
            kind = np.where(ads < 0.065, "positive", "negative")
            pairs = pa.table({"anchor": a, "other": o, "kind": pa.array(kind.tolist()), "cosine": c, "ads": ads})
            self.add("pairs", unit, {"pairs.parquet": pairs})
        self.add("threshold", "epsilon", {"epsilon.json": {"epsilon": 0.065, "positive_quantile": 0.5, "edges": edges}})

    def _evaluation(self) -> None:
        easy = self.rng.random(len(self.task))  # one difficulty an image, so that methods err on the same ones
        for model, title in TITLES.items():
            self._evaluate(model, title, easy)

    def _evaluate(self, model: str, title: str, easy: np.ndarray[Any, Any]) -> None:
        free_cost = 0.0 if model == "experts" else 0.07
        protocols: dict[str, Any] = {"task_known": {}, "task_free": {}}
        reliability: dict[str, Any] = {}
        columns: dict[str, list[Any]] = {name: [] for name in PREDICTED}
        for depth, level in enumerate(LEVELS):
            shift = CLEAN[model] * (1 - LOST[model] * depth / 3)
            offset = np.array([0.08, -0.02, 0.03, -0.09])[self.task]
            hit = easy + self.rng.normal(0, 0.12, len(easy)) < shift + offset
            confidence = (0.35 + 0.5 * shift + 0.25 * (hit - 0.5) + self.rng.normal(0, 0.12, len(hit))).clip(0.1, 0.999)
            for protocol, cost in (("task_known", 0.0), ("task_free", free_cost)):
                accuracy = {t: float(np.mean(hit[self.task == k])) - cost for k, t in enumerate(TASKS)}
                tasks = {
                    t: {"n": PER_TASK, "accuracy": a, "ece": 0.02 + 0.03 * depth, "aurc": 0.4 * (1 - a)}
                    for t, a in accuracy.items()
                }
                mean = {m: float(np.mean([tasks[t][m] for t in TASKS])) for m in ("accuracy", "ece", "aurc")}
                protocols[protocol][level] = {"tasks": tasks, "mean": mean}
            reliability[level] = _bins(confidence, hit)
            columns["sample_id"] += self.ids
            columns["task"] += [TASKS[t] for t in self.task]
            columns["level"] += [level] * len(hit)
            columns["label"] += self.label.tolist()
            columns["label_free"] += self.unified.tolist()
            columns["prediction_free"] += np.where(hit, self.unified, self.unified + 1).tolist()
            columns["confidence_free"] += confidence.tolist()
            columns["prediction"] += np.where(hit, self.label, (self.label + 1) % 4 + 20).tolist()
            columns["confidence"] += confidence.tolist()
        if model == "experts":
            protocols["task_free"] = None
        metrics = {
            "model": model,
            "title": title,
            "method": {"method": model, "parameters": {}, "need": NEEDS[model]} if model in NEEDS else None,
            "tasks": list(TASKS),
            "levels": list(LEVELS),
            "protocols": protocols,
            "reliability": reliability,
            "router": self._router(model),
            "cost": {"parameters": 5_600_000, "extra_parameters": 3_700_000 if self._routed(model) else 0},
        }
        price = {"price_per_sample": 2.5} if self._routed(model) else {}
        files = {"metrics.json": metrics, "predictions.parquet": pa.table(columns)}
        self.add("evaluate", model, files, metrics=price)

    @staticmethod
    def _routed(model: str) -> bool:
        return model in ("twin_merging", "bd_task", "bd_layer")

    def _router(self, model: str) -> dict[str, Any] | None:
        if not self._routed(model):
            return None
        groups = GROUPS if model == "bd_layer" else ("all",)
        weights: dict[str, Any] = {}
        for depth, level in enumerate(LEVELS):
            weights[level] = {}
            for k, task in enumerate(TASKS):
                logits = self.rng.normal(0, 0.5, (len(groups), len(TASKS)))
                logits[:, k] += np.linspace(0.4, 3.2, len(groups)) * (1 - 0.2 * depth) + (len(groups) == 1) * 1.2
                w = np.exp(logits)
                weights[level][task] = (w / w.sum(1, keepdims=True)).tolist()
        return {"groups": list(groups), "experts": list(TASKS), "mean_weights": weights}

    def _detection(self) -> None:
        n = len(self.ids)
        parts = []
        for depth, level in enumerate(LEVELS):
            ads = self.rng.gamma(4 + depth, 0.015, n)
            ads[self.rng.random(n) < 0.02 + 0.06 * depth] = np.nan
            parts.append(
                pa.table(
                    {
                        "sample_id": pa.array(self.ids),
                        "task": pa.array([TASKS[t] for t in self.task]),
                        "level": pa.array([level] * n),
                        "u": self.rng.beta(7 + 1.2 * depth, 3, n),
                        "iec": self.rng.gamma(2 + 0.3 * depth, 1, n),
                        "mean_ads": pa.array(ads, from_pandas=True),
                        "degree": self.rng.poisson(20 / (1 + depth), n),
                    }
                )
            )
        scores = {"u": (0.56, 0.62, 0.69), "iec": (0.53, 0.58, 0.61), "mean_ads": (0.57, 0.66, 0.73)}
        metrics = {
            "auroc": {name: dict(zip(LEVELS[1:], values, strict=True)) for name, values in scores.items()},
            "isolated": {"clean": 0.02, "L1": 0.08, "L2": 0.14, "L3": 0.2},
        }
        self.add("detect", "detect", {"scores.parquet": pa.concat_tables(parts), "metrics.json": metrics})


def _bins(confidence: np.ndarray[Any, Any], hit: np.ndarray[Any, Any]) -> dict[str, list[float]]:
    place = np.minimum((confidence * 15).astype(int), 14)
    count = np.bincount(place, minlength=15)

    def mean(values: np.ndarray[Any, Any]) -> list[float]:
        found: list[float] = (np.bincount(place, weights=values, minlength=15) / count.clip(1)).tolist()
        return found

    return {"confidence": mean(confidence), "accuracy": mean(hit.astype(float)), "count": count.tolist()}


def _write(path: Path, content: Any) -> None:
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
