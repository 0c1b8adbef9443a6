"""File formats: image shards, tables, vectors and checkpoints. Equal content gives equal bytes."""
