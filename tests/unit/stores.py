"""Stores for tests, in one line."""

from fedssl.data.indexing.ingest import Decoding
from fedssl.data.store import Source, Store


def store_of(root, folder, *, site="", patient_from="auto", edge=16, budget_gb=None, **decoding):
    return Store(folder, Source(root, site, patient_from), Decoding(edge, **decoding), budget_gb)
