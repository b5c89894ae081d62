"""`mechint identify PATH`: what an SAE's files are."""

from collections.abc import Sequence

from mechint.cli.flags import command, parse, print_json
from mechint.config.formats import IdentifyConfig
from mechint.errors import MechintError


@command
def main(argv: Sequence[str]) -> int:
    config = parse(IdentifyConfig, argv, prog="mechint identify")
    from mechint.formats.convert import assumed, identify, inside, shapes_in_words

    found = identify(config.path)
    if config.json:
        print_json(found.to_dict())
        return 0
    sae = found.sae
    if sae is None:
        if several := inside(config.path):
            for entry in several:
                print(entry)
            return 0
        raise MechintError(str(found.problem))
    kind = "transcoder" if sae.is_transcoder else "SAE"
    options = "".join(f", {name} {value}" for name, value in sae.saved_options().items())
    print(f"format: {' or '.join(found.formats)}")
    print(f"what: {sae.architecture} {kind}{options}, d_in {sae.d_in}, d_sae {sae.d_sae}")
    print(f"tensors: {shapes_in_words(sae)}")
    subtracted = "subtracted from" if sae.cfg.apply_b_dec_to_input else "not subtracted from"
    scaled = "" if sae.cfg.input_scale == 1.0 else f", inputs times {sae.cfg.input_scale:g}"
    print(f"input: b_dec {subtracted} it, normalisation {sae.cfg.normalize_activations}{scaled}")
    for name, value in sae.departing().items():
        print(f"{name}: {value}, unlike what is trained here")
    for name in ("model_name", "hook_name", "processing", "prepend_bos"):
        if sae.metadata.get(name) is not None:
            print(f"{name}: {sae.metadata[name]}{' (assumed)' if name in assumed(sae) else ''}")
    if found.missing:
        print(f"not said: {', '.join(found.missing)}")
    if "model_name" in found.missing and found.model_hint:
        print(f"models of this width, a hint only: {', '.join(found.model_hint)}")
    print(f"opens here: yes, every command takes {config.path}")
    for note in sae.notes:
        print(f"note: {note}")
    return 0
