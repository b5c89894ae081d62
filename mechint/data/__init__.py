"""Text to activations on disk, and batches of them. `docs/store.md` is the contract of the files.

Names load on first use, so that reading a store does not import what collecting needs.
"""

from mechint.lazy import lazy_names

_PUBLIC = {
    "Activations": "mechint.data.store",
    "open_activations": "mechint.data.store",
    "collect_activations": "mechint.data.collect",
    "iter_texts_from_path": "mechint.data.text",
    "CounterBatches": "mechint.data.batches",
    "ShuffledBatches": "mechint.data.batches",
    "Live": "mechint.data.source",
    "Source": "mechint.data.source",
    "Stored": "mechint.data.source",
    "deterministic_split_indices": "mechint.data.batches",
    "split_indices": "mechint.data.batches",
    "load_activation_tensor": "mechint.data.batches",
    "load_activations_with_splits": "mechint.data.batches",
    "random_batch_iterator": "mechint.data.batches",
    "split_batch_iterator": "mechint.data.batches",
    "iter_activation_batches": "mechint.data.batches",
    # These moved to where they belong; the first version had them here and scripts still ask for them here.
    "detect_device": "mechint.provenance",
    "set_global_seed": "mechint.provenance",
    "get_git_commit": "mechint.provenance",
    "timestamp_slug": "mechint.provenance",
    "make_run_dir": "mechint.runs",
    "write_run_manifest": "mechint.runs",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
