"""What the Hub's own check says of the front matter of a README.md (POST /api/validate-yaml), as far as cards of
models and data sets use it. An error refuses the commit; the client reports warnings and goes on.
"""

import re
from typing import Any

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma
    grok2-community unknown other""".split()  # noqa: SIM905
)
_REPO = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_NAME = re.compile(r"[a-z0-9-.]+")  # of a licence that the Hub does not know


def card_errors(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """`(errors, warnings)` about the front matter of a README.md."""
    import yaml

    front = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    if front is None:
        broken = re.match(r"---[ \t]*\r?\n", content)
        return (["the metadata section is not closed"] if broken else []), [
            "empty or missing yaml metadata in repo card"
        ]
    try:
        card = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ["metadata must be a mapping"], []
    errors = _license(card)
    for key in ("tags", "datasets", "base_model", "metrics", "language"):
        values = card.get(key, [])
        values = [values] if isinstance(values, str) and key != "tags" else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be an array of strings')
        elif key in ("datasets", "base_model") and (odd := [value for value in values if not _REPO.fullmatch(value)]):
            errors.append(f'"{key}" with value "{odd[0]}" is not valid: a repository id of the Hub is expected')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(card.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    return errors + _model_index(card.get("model-index", []), repo_type), []


def _license(card: dict[str, Any]) -> list[str]:
    given = card.get("license")
    if given is None:
        return []
    if not isinstance(given, str) or given not in LICENSES:
        return [f'"license" must be one of [{", ".join(sorted(LICENSES))}]: "{given}"']
    name = card.get("license_name")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        return ['"license_name" fails to match the required pattern: /^[a-z0-9-.]+$/']
    return []


def _model_index(index: Any, repo_type: str) -> list[str]:
    """`model-index`: [{name, results: [{task: {type}, dataset: {type, name}, metrics: [{type, value}]}]}]."""
    if index and repo_type != "model":
        return ['"model-index" is for models']
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, entry in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
            errors.append(f'"{where}.name" is required')
            continue
        results = entry.get("results")
        if not isinstance(results, list):
            errors.append(f'"{where}.results" is required')
            continue
        for j, result in enumerate(results):
            errors += _result(result, f"{where}.results[{j}]")
    return errors


def _result(result: Any, where: str) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{where}" must be an object']
    errors = []
    for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
        found = result.get(part)
        for key in keys:
            if not isinstance(found, dict) or not isinstance(found.get(key), str) or not found[key]:
                errors.append(f'"{where}.{part}.{key}" is required')
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*errors, f'"{where}.metrics" is required']
    for k, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or metric.get("value") is None:
            errors.append(f'"{where}.metrics[{k}]" needs a type and a value')
        elif isinstance(metric["value"], float) and metric["value"] != metric["value"]:
            errors.append(f'"{where}.metrics[{k}].value" must be a number')
    return errors
