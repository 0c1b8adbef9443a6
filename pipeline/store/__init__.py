"""The content-addressed store: keys, manifests, atomic commits, runs that pin units, one writer at a time."""

from pipeline.store.commit import commit
from pipeline.store.keys import canonical_json, sha256_file, unit_key
from pipeline.store.layout import Artefact, Store
from pipeline.store.lock import hold
from pipeline.store.manifest import Manifest

__all__ = ["Artefact", "Manifest", "Store", "canonical_json", "commit", "hold", "sha256_file", "unit_key"]
