"""`mechint concepts`, `scripts/score_concepts.py`: latents against known concepts."""

import sys
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config import ConceptsConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(ConceptsConfig, argv, prog="score_concepts.py")
    from mechint.concepts import score_concepts, text_table, write_label_texts

    if config.texts_output is not None:
        count = write_label_texts(config)
        print(f"texts_output: {config.texts_output} ({count} texts)")
        return 0
    done = score_concepts(
        config, progress=sys.stderr.isatty(), on_note=lambda note: print(f"note: {note}", file=sys.stderr)
    )
    print(text_table(done.concepts, done.summary))
    print(f"concepts_output: {done.folder / 'concepts.csv'}")
    return 0
