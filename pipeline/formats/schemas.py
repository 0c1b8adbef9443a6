"""The data contract: the schema of every table in the store."""

import pyarrow as pa

from pipeline.formats.tables import field

SAMPLES = pa.schema(
    [
        field("row", pa.int64()),
        field("sample_id", pa.string()),  # sha256 of the encoded bytes, its first 16 characters
        field("task", pa.string()),
        field("label", pa.int32(), nullable=True),  # class number within the task; no fitting stage reads it
        field("split", pa.string()),
        field("width", pa.int32()),
        field("height", pa.int32()),
        field("source", pa.string()),
    ]
)
REJECTS = pa.schema([field("source", pa.string()), field("reason", pa.string())])
EMBEDDED = pa.schema([field("row", pa.int64()), field("sample_id", pa.string()), field("task", pa.string())])
SCORES = pa.schema(
    [
        field("row", pa.int64()),  # global: position over the embed units
        field("u", pa.float32()),
        field("iec", pa.float32()),
        field("sharpness", pa.float32(), nullable=True),  # null: isolated
        field("divergence", pa.float32(), nullable=True),
        field("mean_ads", pa.float32(), nullable=True),
        field("degree", pa.int64()),
    ]
)
PAIRS = pa.schema(
    [
        field("anchor", pa.int64()),
        field("other", pa.int64()),
        field("kind", pa.string()),  # positive or negative
        field("cosine", pa.float32()),
        field("ads", pa.float32()),
    ]
)
TEST_IMAGES = pa.schema(
    [
        field("sample_id", pa.string()),
        field("task", pa.string()),
        field("label", pa.int32(), nullable=True),
        field("corruption", pa.string()),
    ]
)
DETECTION = pa.schema(
    [
        field("sample_id", pa.string()),
        field("task", pa.string()),
        field("level", pa.string()),
        field("u", pa.float32()),
        field("iec", pa.float32()),
        field("mean_ads", pa.float32(), nullable=True),
        field("degree", pa.int64()),
    ]
)
PREDICTIONS = pa.schema(
    [
        field("sample_id", pa.string()),
        field("task", pa.string()),
        field("level", pa.string()),
        field("label", pa.int32()),  # -1 where the image has none
        field("prediction", pa.int32()),  # class of the known task
        field("confidence", pa.float32()),
        field("label_free", pa.int32()),  # class of the unified label space
        field("prediction_free", pa.int32()),
        field("confidence_free", pa.float32()),
        field("weights", pa.list_(pa.float32()), nullable=True),  # [G, K] flattened; null where nothing is routed
    ]
)
