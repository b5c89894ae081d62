"""Licences as the Hub accepts them in a card, and the name that was asked for beside them.

The Hub refuses a card whose `license` is not one of its own identifiers (HTTP 400). Any other licence is `other`, and
its own name goes into `license_name`: https://huggingface.co/docs/hub/repositories-licenses
"""

import re

from mechint.errors import MechintError

# The Hub's identifiers, in the order of its page.
_NAMES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3
    gemma unknown other
"""
ACCEPTED = frozenset(_NAMES.split())
SAE_LICENSE = "research-only"  # what bundles of SAEs have always been published under
INVESTIGATION_LICENSE = "CC-BY-4.0"
MAX_LENGTH = 200
# What people call a licence -> the Hub's identifier of the same one. SPDX names of the GNU family say whether later
# versions may be chosen too; the Hub's do not.
SAME = {
    "apache2": "apache-2.0",
    "apache-2": "apache-2.0",
    "apache 2.0": "apache-2.0",
    "mit license": "mit",
    "cc0": "cc0-1.0",
    "cc by 4.0": "cc-by-4.0",
    "bsd-3": "bsd-3-clause",
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "pddl-1.0": "pddl",
} | {
    f"{name}-{suffix}": name
    for name in ("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0")
    for suffix in ("only", "or-later")
}


def front_matter_license(name: str | None) -> dict[str, str]:
    """`{"license": one the Hub accepts}`, with `license_name` where the Hub has no identifier for `name`.

    `license_name` is `name` itself, with what an identifier cannot hold replaced by `-`. None or an empty name is a
    licence that nobody stated: `unknown`.

    Raises:
        MechintError: a name of several lines or of more than 200 characters, which is a licence's text.
    """
    given = (name or "").strip()
    if not given:
        return {"license": "unknown"}
    if len(given) > MAX_LENGTH or not given.isprintable():
        raise MechintError(
            "--license should be a licence's name, such as MIT, CC-BY-4.0 or research-only; found"
            f" {len(given)} characters of text"
        )
    plain = " ".join(given.lower().split())
    plain = SAME.get(plain, plain)
    if plain in ACCEPTED:
        return {"license": plain}
    return {"license": "other", "license_name": re.sub(r"[^A-Za-z0-9.+_-]+", "-", given).strip("-") or "unnamed"}
