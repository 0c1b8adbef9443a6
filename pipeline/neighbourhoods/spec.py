"""How the neighbourhoods are made: the radius, and the back end that finds the edges."""

from typing import Any, Literal

from pydantic import Field

from pipeline.config import Spec


class IndexSpec(Spec):
    """The radius and the search. The paper publishes no radius and no cost; both ways of setting it are ours."""

    radius: Literal["global", "adaptive"] = "global"
    min_cosine: float | None = Field(
        default=None, ge=-1, le=1, description="overrides the calibration; pins the radius while shards arrive"
    )
    max_isolated: float = Field(default=0.02, ge=0, lt=1, description="global: share of samples left alone")
    target_degree: int = Field(default=32, ge=1, description="adaptive: neighbours a sample should have")
    sample: int = Field(default=4096, ge=2, description="rows the calibration looks at")
    calibration_rows: int = Field(
        default=131072, ge=2, description="rows it looks among, and IVF is trained on: the first shards of each task"
    )
    recall_sample: int = Field(
        default=256, ge=4, description="queries on which edges are counted; in each join a quarter, for edge recall"
    )
    min_edge_recall: float = Field(default=0.99, gt=0, le=1, description="ivf: more lists are searched until it holds")
    backend: Literal["auto", "exact", "flat", "ivf", "gpu"] = Field(
        default="auto",
        description="exact: blockwise matmul and threshold; flat, gpu: FAISS, exact too; ivf: FAISS, approximate; "
        "auto: exact as long as it takes at most max_exact_s",
    )
    rows_per_partition: int = Field(default=32768, ge=1, description="rows joined as one; smaller: finer increments")
    # What only the planner reads: its choice is hashed, these are not.
    expected_rows: int | None = Field(default=None, ge=1, description="what the pool will grow to: fixes the choice")
    max_exact_s: float = Field(default=1800, gt=0, description="auto: what the exact graph may take of one worker")
    gflops: float = Field(default=100, gt=0, description="auto: the rate it is reckoned at, 10^9 operations a second")
    memory_gib: float = Field(default=4, gt=0, description="what one join may hold; refused beforehand where it cannot")

    def of(self, *names: str) -> dict[str, Any]:
        """These options as plain data: the part of the spec that counts in a stage's key."""
        return self.model_dump(mode="json", include=set(names))
