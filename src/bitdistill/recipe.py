"""Recipes: TOML in, frozen dataclasses, JSON out.

A recipe is one TOML file with a section per step of the method, on top of the files that ``extends`` names, if any
(paths beside it). Unknown keys and impossible values are errors that name the key, the value and the remedy.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from .config import KD_KEYS, Recipe
from .config.presets import BASE_PRESETS, with_base_preset
from .errors import ConfigError

DISTILL_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Paper eq. 8-13: scaled dot product on the model's own heads, no tau^2; classification weights.
    "paper": {
        "lambda_logits": 10.0,
        "gamma_relation": 1e5,
        "temperature": 5.0,
        "tau_squared": False,
        "relation_form": "scaled_dot",
        "relation_heads": 0,
        "relation_mask": "none",
        "kd_tokens": "response",
        "relation_temperature": 1.0,
        "relation_states": "post_rope",
        "relation_layers": [-1],
    },
    # The authors' code: cosine over 32 relation heads after RoPE, no mask, tau^2, every real token. Their loss is
    # divided by the number of heads once more than a mean over rows, hence gamma = 1e5 / 32, and sums Q, K, V.
    # Their layers are 22 and 24 of 28 (set relation_layers) and their norms sit before every linear
    # (set refine.norm_sites = "all").
    "authors": {
        "lambda_logits": 10.0,
        "gamma_relation": 3125.0,
        "temperature": 5.0,
        "tau_squared": True,
        "kd_tokens": "all",
        "relation_form": "cosine",
        "relation_heads": 32,
        "relation_mask": "none",
        "relation_temperature": 1.0,
        "relation_states": "post_rope",
        "relation_layers": [-1],
    },
}
"""Values that ``distill.preset`` starts from; keys written in the recipe win."""


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config, as JSON stores it."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def load_recipe(
    path: str | Path,
    overrides: typing.Sequence[str] = (),
    values: typing.Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a TOML recipe and apply ``values`` by dotted key, then ``section.key=value`` overrides.

    Raises:
        ConfigError: the file or one that it extends is missing or not TOML, or holds an unknown key or an impossible
            value; ``extends`` goes in a circle.
    """
    path = Path(path)
    document = {"name": path.stem} | _read_document(path, ())
    return build_recipe(document, overrides, values)


def _read_document(path: Path, inside: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file on top of those that its ``extends`` names: later ones win by key, the file itself over all.

    ``inside`` are the files that led here. A recipe is named by itself, never by what it extends.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        named = f", which {inside[-1]} extends" if inside else ""
        raise ConfigError(
            f"{path}: cannot read the recipe{named} ({error.strerror}); check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    names = document.pop("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends = {names!r}: name one recipe file or a list of them")
    merged: dict[str, Any] = {}
    for parent in (path.parent / name for name in names):
        if parent.resolve() in {file.resolve() for file in (*inside, path)}:
            raise ConfigError(
                f"{path}: extends = {parent.name!r} leads back to itself; take one of the two out"
            )
        found = _read_document(parent, (*inside, path))
        found.pop("name", None)
        _merge(merged, found)
    _merge(merged, document)
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            below[key] = below[key] | value
        else:
            below[key] = value


def build_recipe(
    document: dict[str, Any],
    overrides: typing.Sequence[str] = (),
    values: typing.Mapping[str, Any] | None = None,
) -> Recipe:
    """A ``Recipe`` from a nested dict, ``values`` by dotted key, and ``section.key=value`` overrides, which win."""
    document = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
    for key, value in (values or {}).items():
        _put(document, key, value, key)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: write section.key=value, for example sft.epochs=3")
        _put(document, key.strip(), _parse_value(text.strip()), f"--set {override}")
    distill = document.get("distill")
    if isinstance(distill, dict):
        preset = distill.get("preset", "default")
        if not isinstance(preset, str) or preset not in DISTILL_PRESETS:
            raise ConfigError(f"distill.preset = {preset!r}: use one of {', '.join(DISTILL_PRESETS)}")
        switched_off = {key for weight, keys in KD_KEYS.items() if distill.get(weight) == 0 for key in keys}
        kept = {key: value for key, value in DISTILL_PRESETS[preset].items() if key not in switched_off}
        document["distill"] = kept | distill
    base = document.get("base")
    if isinstance(base, dict) and "preset" in base:
        preset = base.pop("preset")
        if not isinstance(preset, str) or preset not in BASE_PRESETS:
            raise ConfigError(f"base.preset = {preset!r}: use one of {', '.join(BASE_PRESETS)}")
        document["base"] = with_base_preset(base, preset)
    return typing.cast("Recipe", _build(Recipe, document, prefix=""))


def split_grid(text: str) -> tuple[str, tuple[Any, ...]]:
    """Key and values of ``section.key=a,b,c``; commas inside brackets and quotes belong to a value.

    Raises:
        ConfigError: there is no key or no value.
    """
    key, _, listed = text.partition("=")
    parts, depth, quote = [""], 0, ""
    for character in listed:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in "[{") - (character in "]}") if not quote else 0
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if not key.strip() or not all(part.strip() for part in parts):
        raise ConfigError(f"{text}: write section.key=a,b,c, for example distill.gamma_relation=0.1,1,10")
    return key.strip(), tuple(_parse_value(part.strip()) for part in parts)


def _put(document: dict[str, Any], key: str, value: Any, what: str) -> None:
    section, _, name = key.rpartition(".")
    if section and not isinstance(document.setdefault(section, {}), dict):
        raise ConfigError(f"{what}: {section} is not a section")
    (document[section] if section else document)[name] = value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{prefix}{key}: unknown key; known here: {', '.join(sorted(known))}"
                + _suggestion(key, known)
            )
    return cls(**{key: _coerce(value, hints[key], f"{prefix}{key}") for key, value in values.items()})


def _suggestion(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f". Did you mean {close[0]}?" if close else ""


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """Bring a TOML value to the field's type, or say what the field takes."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(value, next(a for a in typing.get_args(hint) if a is not type(None)), key)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{key} = {value!r}: this is a section; write [{key}] with keys below it")
        return _build(typing.cast("type", hint), value, f"{key}.")
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed or isinstance(value, bool):
            raise ConfigError(f"{key} = {value!r}: use one of {', '.join(map(str, allowed))}")
        return allowed[allowed.index(value)]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} = {value!r}: write a list, for example [1, 2]")
        return tuple(_coerce(item, typing.get_args(hint)[0], key) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not hint:
        raise ConfigError(f"{key} = {value!r}: expected a value of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value!r}: use a finite number")
    return value
