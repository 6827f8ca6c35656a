"""What the Hub checks in the YAML block of a README before every commit that has one.

NOTE: PyYAML is not in the standard library, but comes with huggingface_hub.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from hub.wire import Request, Response, as_json, route

if TYPE_CHECKING:
    from hub.server import Hub

_BLOCK = re.compile(r"^\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 afl-3.0 artistic-2.0 "
    "bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 "
    "cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 "
    "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl "
    "ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc "
    "h-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 "
    "llama3.1 llama3.2 llama3.3 llama4 gemma unknown other".split()
)
TASKS = frozenset(
    "text-classification token-classification table-question-answering question-answering zero-shot-classification "
    "translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech "
    "text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text "
    "voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image "
    "image-to-text image-to-image image-to-video unconditional-image-generation video-classification "
    "reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text "
    "multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text "
    "visual-question-answering document-question-answering zero-shot-image-classification graph-ml mask-generation "
    "zero-shot-object-detection text-to-3d image-to-3d image-feature-extraction video-text-to-text keypoint-detection "
    "visual-document-retrieval any-to-any video-to-video other".split()
)


class _Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, as the Hub does; PyYAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(map(repr, keys))) < len(keys):
            raise yaml.YAMLError("duplicated mapping key")
        return super().construct_mapping(node, deep)


def block(content: str) -> str | None:
    """Return the YAML block at the top of a README."""
    match = _BLOCK.match(content.lstrip("\ufeff"))
    return match[1] if match else None


def metadata(readme: bytes) -> dict[str, Any]:
    """Return what a stored README says about its repo; nothing if it cannot be read."""
    try:
        card = yaml.safe_load(block(readme.decode(errors="replace")) or "")
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Response:
    asked = request.json()
    errors, warnings = check(asked["content"], asked["repoType"])
    answer = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return as_json(answer, 400 if errors else 200)


def check(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings for the README of a model, dataset or space."""
    text = block(content)
    if not (text or "").strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.load(text or "", _Strict)
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not isinstance(card, dict):
        return ["the metadata must be an object"], []
    errors = [*_common(card)]
    warnings = [f'"{v}" is not a known {k}' for k in ("pipeline_tag", "task_categories") for v in _unknown(card, k)]
    if kind == "model":
        errors += _model_index(card.get("model-index"))
    if kind == "dataset":
        errors += [*_configs(card.get("configs")), *_infos(card.get("dataset_info"))]
    return errors, warnings


def _unknown(card: dict[str, Any], key: str) -> list[str]:
    found = card.get(key) or []
    return [v for v in (found if isinstance(found, list) else [found]) if isinstance(v, str) and v not in TASKS]


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _common(card: dict[str, Any]) -> list[str]:
    errors = [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag", "license_name", "pretty_name")
        if key in card and not isinstance(card[key], str)
    ]
    errors += [
        f'"{key}" must be an array of strings'
        for key in ("tags", "task_categories", "task_ids")
        if key in card and not _strings(card[key])
    ]
    for key in ("license", "base_model", "datasets", "metrics", "language", "size_categories", "annotations_creators"):
        if key in card and not (isinstance(card[key], str) or _strings(card[key])):
            errors.append(f'"{key}" must be a string or an array of strings')
    return errors or [*_licenses(card), *_repo_names(card)]


def _many(card: dict[str, Any], key: str) -> list[str]:
    value = card.get(key, [])
    return [value] if isinstance(value, str) else value


def _licenses(card: dict[str, Any]) -> list[str]:
    return [
        f'"license" must be one of the known identifiers, not {one!r}; use "other" with a license_name'
        for one in _many(card, "license")
        if one not in LICENSES
    ]


def _repo_names(card: dict[str, Any]) -> list[str]:
    return [
        f'"{key}" with value {name!r} is not valid: it must be the id of a repo on the Hub'
        for key in ("base_model", "datasets")
        for name in _many(card, key)
        if not _REPO.fullmatch(name)
    ]


def _model_index(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        here = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"{here}.name" must be a string')
        elif not isinstance(model.get("results"), list):
            errors.append(f'"{here}.results" must be an array')
        else:
            errors += [e for j, r in enumerate(model["results"]) for e in _result(r, f"{here}.results[{j}]")]
    return errors


def _result(result: Any, here: str) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{here}" must be an object']
    errors = []
    for key, names in (("task", ("type",)), ("dataset", ("type", "name"))):
        part = result.get(key)
        for name in names:
            if not isinstance(part, dict) or not isinstance(part.get(name), str):
                errors.append(f'"{here}.{key}.{name}" must be a string')
    return errors + _metrics(result.get("metrics"), f"{here}.metrics")


def _metrics(metrics: Any, here: str) -> list[str]:
    if not isinstance(metrics, list) or not metrics:
        return [f'"{here}" must be an array of at least one']
    errors = []
    for k, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            errors.append(f'"{here}[{k}].type" must be a string')
        elif metric.get("value") is None:
            errors.append(f'"{here}[{k}].value" is required')
    return errors


def _configs(configs: Any) -> list[str]:
    if configs is None:
        return []
    if not isinstance(configs, list) or not all(isinstance(c, dict) for c in configs):
        return ['"configs" must be an array of objects']
    errors = []
    names = [c.get("config_name") for c in configs]
    if not _strings(names):
        errors.append('"configs[].config_name" must be a string')
    elif len(set(names)) < len(names):
        errors.append('"configs[].config_name" must be unique')
    if sum(c.get("default") is True for c in configs) > 1:
        errors.append('"configs" may have one default only')
    return errors + [e for i, c in enumerate(configs) for e in _data_files(c.get("data_files"), f"configs[{i}]")]


def _data_files(files: Any, here: str) -> list[str]:
    if files is None or isinstance(files, str) or _strings(files):
        return []
    if not isinstance(files, list):
        return [f'"{here}.data_files" must be a string or an array']
    return [
        f'"{here}.data_files[{i}]" must have a "split" and a "path", which is a string or an array of strings'
        for i, f in enumerate(files)
        if not isinstance(f, dict)
        or not isinstance(f.get("split"), str)
        or not (isinstance(f.get("path"), str) or _strings(f.get("path")))
    ]


def _infos(infos: Any) -> list[str]:
    """Check `dataset_info`, one object or one of each config."""
    if infos is None:
        return []
    several = infos if isinstance(infos, list) else [infos]
    if not all(isinstance(info, dict) for info in several):
        return ['"dataset_info" must be an object or an array of objects']
    if isinstance(infos, list) and not _strings([info.get("config_name") for info in infos]):
        return ['"dataset_info[].config_name" must be a string']
    return [error for info in several for error in _info(info)]


def _info(info: dict[str, Any]) -> list[str]:
    errors = []
    for key in ("features", "splits"):
        part = info.get(key)
        named = isinstance(part, list) and all(isinstance(p, dict) and isinstance(p.get("name"), str) for p in part)
        if part is not None and not named:
            errors.append(f'"dataset_info.{key}" must be an array of objects with a "name"')
        elif part and len({p["name"] for p in part}) < len(part):
            errors.append(f'"dataset_info.{key}" has a name twice')
    sizes = [(k, info[k]) for k in ("download_size", "dataset_size") if k in info]
    if not errors:
        sizes += [(k, s[k]) for s in info.get("splits") or [] for k in ("num_bytes", "num_examples") if k in s]
    return errors + [f'"dataset_info.{k}" must be an integer, not {v!r}' for k, v in sizes if not _count(v)]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
