"""Settings into a section: all problems at once, each with its dotted key, what was expected and the nearest name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mmalign.config.files import COMMAND_LINE, Resolved
from mmalign.config.othernames import OTHER_NAMES
from mmalign.config.schema import Section, Variants, child, field_annotation, section_of
from mmalign.errors import ConfigError, MmalignError
from mmalign.registry import did_you_mean

S = TypeVar("S", bound=Section)

_EXPECTED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}
_BOUND = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def decode(model: type[S], resolved: Resolved, source: str | None = None) -> S:
    """The section that these settings describe.

    Args:
        model: the class to make.
        resolved: what `load_yaml` returned.
        source: what messages call the file; the file that was loaded unless given.

    Raises:
        ConfigError: with every unknown key, missing setting and unfit value, nearest names included.
    """
    resolved = resolved.for_model(model)
    try:
        # JSON rules, because a file has lists and text where Python has tuples and paths; types stay strict.
        return model.model_validate_json(json.dumps(resolved.values))
    except ValidationError as error:
        problems = _problems(model, resolved, error.errors(include_url=False))
        raise ConfigError(problems, source=source or resolved.source) from error


def _problems(model: type[Section], resolved: Resolved, errors: list[ErrorDetails]) -> list[str]:
    """One line per key. A union reports each member's complaint; those about one key are joined."""
    found: dict[str, _Complaints] = {}
    for error in errors:
        path = _real_path(error, resolved.values)
        complaints = found.setdefault(".".join(str(part) for part in path), _Complaints())
        wanted = _expectation(error)
        if wanted is None:
            complaints.sentences.append(_sentence(model, resolved.values, path, error))
        else:
            complaints.expected.append(wanted)
            complaints.got = _got(error)
            complaints.hint = complaints.hint or _nearest_option(error)
    lines: list[str] = []
    for key, complaints in found.items():
        # Where one member of a union was entered and refused for its contents, that is the news; "or text" is not.
        inside = any(other.startswith(f"{key}.") for other in found)
        lines += [f"{key}: {text}{_origin(key, resolved)}" if key else text for text in complaints.texts(inside)]
    return lines


@dataclass(slots=True)
class _Complaints:
    """What is wrong with the value of one key."""

    expected: list[str] = field(default_factory=list)
    got: str = ""
    hint: str = ""
    sentences: list[str] = field(default_factory=list)

    def texts(self, inside: bool) -> list[str]:
        if self.sentences or inside:
            return list(dict.fromkeys(self.sentences))
        return [f"expected {', or '.join(dict.fromkeys(self.expected))}, got {self.got}{self.hint}"]


def _real_path(error: ErrorDetails, values: object) -> tuple[str | int, ...]:
    """The location without the names of union members, which pydantic puts between real keys."""
    path: list[str | int] = []
    for index, part in enumerate(error["loc"]):
        last_of_missing = error["type"] in ("missing", "variant_name") and index == len(error["loc"]) - 1
        if isinstance(values, Mapping):
            held = part in values
        else:
            held = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if held:
            values = values[part]  # type: ignore[index]
        elif not last_of_missing:
            continue
        path.append(part)
    return tuple(path)


def _expectation(error: ErrorDetails) -> str | None:
    """What the value should have been, for errors of the kind "expected …, got …"."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUND:
        words, name = _BOUND[kind]
        return f"{'' if kind == 'multiple_of' else 'a number '}{words} {context[name]}"
    if kind in ("literal_error", "enum"):
        options = _options(error)
        return f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    if kind in ("too_short", "too_long"):
        short = kind == "too_short"
        return f"{'at least' if short else 'at most'} {context['min_length' if short else 'max_length']} elements"
    return None


def _options(error: ErrorDetails) -> list[str]:
    """The allowed values of a literal or enumeration, as pydantic lists them: ``'a', 'b' or 'c'``."""
    return str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")


def _nearest_option(error: ErrorDetails) -> str:
    if error["type"] not in ("literal_error", "enum") or not isinstance(error["input"], str):
        return ""
    near = difflib.get_close_matches(error["input"], [option.strip("'") for option in _options(error)], n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _sentence(model: type[Section], values: Mapping[str, Any], path: tuple[str | int, ...], error: ErrorDetails) -> str:
    """Everything that is not "expected …, got …"."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "variant_mapping":
        return f"{context['expected']}, got {_got(error)}"
    if kind == "variant_name":
        return str(context["text"])
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    if kind == "missing" and isinstance(path[-1], int):
        return "required, but the list ends before it"
    if kind == "missing":
        return f"required, but not set{_description(model, values, path)}"
    if kind == "extra_forbidden":
        return _unknown(model, values, path)
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {_got(error)}"


def _unknown(model: type[Section], values: Mapping[str, Any], path: tuple[str | int, ...]) -> str:
    """Why a key is refused: the nearest setting, the section it belongs to, or the variants that have it."""
    key = str(path[-1])
    owner, choice, holder = _owner(model, values, path)
    known = list(owner.model_fields) if owner is not None else []
    name = str(holder["name"]) if choice is not None else str(path[-2]) if len(path) > 1 else "an experiment"
    hint = did_you_mean(key, known)
    places = _called_here(model, values, key) or _other_sections(model, values, key)
    if places:
        return f"not a setting of {name}; that is {places} here"
    if choice is not None and "did you mean" not in hint:
        having = _variants_with(choice, key, apart_from=name)
        if having:
            return f"not a setting of '{name}' (settings of {having} include it)"
    return f"not a setting of {name}{hint}" if known else f"not a setting of {name}, which has none"


def _called_here(model: type[Section], values: Mapping[str, Any], key: str) -> str:
    """Our dotted name of a setting that other tools call `key`; '' where this file can hold none of that name."""
    dotted = OTHER_NAMES.get(key.lower().replace("-", "_"), "")
    section, _, leaf = dotted.partition(".")
    if dotted.startswith("--") or leaf in _settings_of(model, values, section):
        return f"'{dotted}'"
    field = model.model_fields.get(section)
    choice = section_of(field_annotation(field), values.get(section))[1] if field is not None else None
    having = _variants_with(choice, leaf, apart_from="") if choice is not None else ""
    return f"'{dotted}' of {having}" if having and "," not in having else ""


def _other_sections(model: type[Section], values: Mapping[str, Any], key: str) -> str:
    """The dotted names of a setting that was written in the wrong section; '' where none has it, or most do."""
    having = [f"'{section}.{key}'" for section in model.model_fields if key in _settings_of(model, values, section)]
    return " or ".join(having) if len(having) < 3 else ""


def _settings_of(model: type[Section], values: Mapping[str, Any], section: str) -> list[str]:
    field = model.model_fields.get(section)
    found = section_of(field_annotation(field), values.get(section))[0] if field is not None else None
    return list(found.model_fields) if found is not None else []


def _variants_with(choice: Variants, key: str, *, apart_from: str) -> str:
    having = []
    for entry in choice.registry:
        if entry.name == apart_from:
            continue
        try:
            model = choice.resolve(entry.name)
        except (ImportError, MmalignError):  # a hint only: a variant whose library is absent cannot be the answer
            continue
        if key in model.model_fields:
            having.append(f"'{entry.name}'")
    return " and ".join(", ".join(having).rsplit(", ", 1)) if having else ""


def _description(model: type[Section], values: Mapping[str, Any], path: tuple[str | int, ...]) -> str:
    owner, _, _ = _owner(model, values, path)
    setting = owner.model_fields.get(str(path[-1])) if owner is not None else None
    if setting is None or not setting.description:
        return ""
    first = setting.description.strip().partition("\n\n")[0].replace("\n", " ").strip()
    return f" ({first.rstrip('.')})"


def _owner(
    model: type[Section], values: Any, path: tuple[str | int, ...]
) -> tuple[type[Section] | None, Variants | None, Mapping[str, Any]]:
    """The section that should hold the last key of a path, the variants it was chosen from, and its values."""
    annotation: object = model
    for part in path[:-1]:
        annotation = child(annotation, values, part)
        values = values[part]
    return (*section_of(annotation, values), values if isinstance(values, Mapping) else {})


def _got(error: ErrorDetails) -> str:
    value = error["input"]
    if isinstance(value, Mapping):
        return "a mapping"
    if error["type"] in ("too_short", "too_long"):
        return str(error["ctx"]["actual_length"])
    text = json.dumps(value) if isinstance(value, bool | None) else repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    if error["type"] == "string_type" and isinstance(value, int | float):
        return f"{text} (put it in quotes)"
    return text


def _origin(key: str, resolved: Resolved) -> str:
    """Where an unfit value was set, if not in the file that the message is headed by."""
    source = resolved.provenance.get(key)
    if source is None:
        inside = {found for name, found in resolved.provenance.items() if name.startswith(f"{key}.")}
        source = inside.pop() if len(inside) == 1 else None
    if source is None or source == resolved.source:
        return ""
    return " (set on the command line)" if source == COMMAND_LINE else f" (set in {source})"
