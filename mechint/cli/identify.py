"""`mechint identify PATH`: what an SAE's files are."""

from collections.abc import Sequence

from mechint.cli.flags import command, parse, print_json
from mechint.config.formats import IdentifyConfig
from mechint.errors import MechintError


@command
def main(argv: Sequence[str]) -> int:
    config = parse(IdentifyConfig, argv, prog="mechint identify")
    from mechint.formats.convert import assumed, identify, inside, shapes_in_words
    from mechint.formats.folds import not_ours

    found = identify(config.path)
    if config.json:
        print_json(found.to_dict())
        return 0
    loaded = found.loaded
    if loaded is None:
        if several := inside(config.path):
            for entry in several:
                print(entry)
            return 0
        raise MechintError(str(found.problem))
    kind = "transcoder" if loaded.transcoder else "SAE"
    options = "".join(f", {name} {value}" for name, value in loaded.options.items())
    print(f"format: {' or '.join(found.formats)}")
    print(f"what: {loaded.architecture} {kind}{options}, d_in {loaded.d_in}, d_sae {loaded.d_sae}")
    print(f"tensors: {shapes_in_words(loaded)}")
    subtracted = "subtracted from" if loaded.apply_b_dec_to_input else "not subtracted from"
    scaled = "" if loaded.scale == 1.0 else f", inputs times {loaded.scale:g}"
    print(f"input: b_dec {subtracted} it, normalisation {loaded.normalize}{scaled}")
    if loaded.architecture == "topk" and not loaded.topk_relu:
        print("top-k: without ReLU, negative entries are kept")
    for name in ("model_name", "hook_name", "processing", "prepend_bos"):
        if loaded.metadata.get(name) is not None:
            print(f"{name}: {loaded.metadata[name]}{' (assumed)' if name in assumed(loaded) else ''}")
    if found.missing:
        print(f"not said: {', '.join(found.missing)}")
    if "model_name" in found.missing and found.model_hint:
        print(f"models of this width, a hint only: {', '.join(found.model_hint)}")
    reason = not_ours(loaded)
    print("opens here: yes" if reason is None else f"opens here: no, {reason}")
    for note in loaded.notes:
        print(f"note: {note}")
    return 0
