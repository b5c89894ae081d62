"""Ground truth: how well latents match known concepts, and learned directions known ones. docs/concepts.md defines all.

Names load on first use: matching directions needs no labels, and labels no scores.
"""

from mechint.lazy import lazy_names

_PUBLIC = {
    "Concepts": "mechint.concepts.command",
    "score_concepts": "mechint.concepts.command",
    "write_label_texts": "mechint.concepts.command",
    "Labelled": "mechint.concepts.labels",
    "label_tales": "mechint.concepts.labels",
    "label_stored": "mechint.concepts.labels",
    "label_texts": "mechint.concepts.labels",
    "stored_texts": "mechint.concepts.labels",
    "Span": "mechint.concepts.spans",
    "SpanFile": "mechint.concepts.spans",
    "read_span_file": "mechint.concepts.spans",
    "Task": "mechint.concepts.score",
    "DictionaryScores": "mechint.concepts.score",
    "make_task": "mechint.concepts.score",
    "score_dictionary": "mechint.concepts.score",
    "baselines": "mechint.concepts.score",
    "dense_probes": "mechint.concepts.score",
    "token_f1": "mechint.concepts.score",
    "Codes": "mechint.concepts.codes",
    "encode_rows": "mechint.concepts.codes",
    "auroc": "mechint.concepts.scores",
    "Matching": "mechint.concepts.match",
    "match_directions": "mechint.concepts.match",
    "text_table": "mechint.concepts.table",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
