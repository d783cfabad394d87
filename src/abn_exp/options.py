"""Which options decide a run's result, and their defaults.

A run's identity is its seed, its chosen groups (data set, network, norm, recipe) and every option that is not at its
default. The default of an option is its value in the schema (`config`) when nothing sets it; for an option of a
network or a norm, the value in the signature of the class or function that `_target_` names. What a file in `conf/`
sets counts as set. So

- a new option at its default changes no hash, no folder's name and no comparison. Older records, which do not have
  it, are read as having it at its default;
- a released default never changes (`tests/test_options.py` has them all);
- a file in `conf/` that is changed describes another configuration, which is refused in the folder of the old one;
- an option without a default always counts, and so does one that a record has and the schema no longer knows.

Options that cannot change a result are marked `NoEffect` in the schema.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from abn_exp.config import Config, NoEffect, published_start_differs
from abn_exp.errors import flat

OWN_PACKAGES = ("abn_exp", "torch")  # whose modules may be imported for their signatures alone

Options = dict[str, Any]  # by dotted key


def all_options(plain: Mapping[str, Any], *, signatures: bool = True) -> Options:
    """Return every option of a configuration that can change a result: as it is set, or else at its default.

    `plain` may be an older record that lacks options or has options that are gone. 3 and 3.0 are the same number.
    `signatures`: whether to fill in the defaults of a network and a norm, which imports them.
    """
    options = {key: _plain_number(value) for key, value in flat(plain) if not isinstance(value, Mapping)}
    options = _defaults(plain, signatures) | {key: value for key, value in options.items() if _has_effect(key)}
    return {key: value for key, value in options.items() if key not in _options_without_effect(plain)}


def set_options(plain: Mapping[str, Any]) -> Options:
    """Return those of all_options that are not at their default."""
    defaults = _defaults(plain, signatures=True)
    return {k: v for k, v in all_options(plain).items() if k not in defaults or defaults[k] != v}


def differing_options(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the keys of the options in which two configurations differ, with a remark on those that are gone."""
    own, other = set_options(ours), set_options(theirs)
    known = _defaults(ours, signatures=True).keys() | own.keys()
    different = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    return [key if key in known else f"{key}, which is no option any more" for key in different]


def _options_without_effect(plain: Mapping[str, Any]) -> set[str]:
    """Return the options that cannot change a result of this configuration, whatever their values.

    Devices count only where each normalises its share of a batch by itself.
    """
    unused = {"devices"} if plain.get("sync_norm", False) else set()
    return unused if published_start_differs(plain) else unused | {"recipe.init"}


def _plain_number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _has_effect(key: str) -> bool:
    """Return whether neither an option nor its section is marked NoEffect; true for one that the schema lacks."""
    section: Any = Config
    for name in key.split("."):
        if not (inspect.isclass(section) and issubclass(section, BaseModel)) or name not in section.model_fields:
            return True
        if NoEffect in section.model_fields[name].metadata:
            return False
        section = section.model_fields[name].annotation
    return True


def _defaults(plain: Mapping[str, Any], signatures: bool) -> Options:
    """Return the defaults of the options that can change a result and have one."""
    nodes: Options = {}
    if signatures:
        for group in ("model", "norm"):
            nodes |= _node_defaults(plain.get(group), group)
    return {key: value for key, value in _schema_defaults(Config) if _has_effect(key)} | nodes


def _schema_defaults(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        key = f"{path}{name}"
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from _schema_defaults(field.annotation, f"{key}.")
        elif not field.is_required():
            yield key, _plain_number(field.get_default(call_default_factory=True))


def _node_defaults(node: Any, path: str) -> Options:
    """Return the defaults in the signature of what a `_target_` names, and those of nested nodes.

    Where an argument's default is a data class, its fields are options, too, which a nested node may leave out.
    """
    target = _find(node.get("_target_")) if isinstance(node, Mapping) else None
    try:
        parameters = inspect.signature(target).parameters if target is not None else {}
    except (ValueError, TypeError):
        parameters = {}
    defaults: Options = {}
    for name, parameter in parameters.items():
        default = parameter.default
        if is_dataclass(default) and not isinstance(default, type):
            kind = type(default)
            defaults[f"{path}.{name}._target_"] = f"{kind.__module__}.{kind.__qualname__}"
            defaults |= {f"{path}.{name}.{f.name}": _plain_number(getattr(default, f.name)) for f in fields(default)}
        elif default is None or isinstance(default, bool | int | float | str | list | tuple):
            defaults[f"{path}.{name}"] = _plain_number(default)
    for name, part in node.items() if isinstance(node, Mapping) else ():
        if isinstance(part, Mapping):
            defaults.pop(f"{path}.{name}", None)
            defaults = _node_defaults(part, f"{path}.{name}") | defaults
        elif f"{path}.{name}._target_" in defaults:
            defaults = {key: value for key, value in defaults.items() if not key.startswith(f"{path}.{name}.")}
    return defaults


def _find(name: Any) -> Any:
    """Return what a `_target_` names. Only this package and torch are imported: a record may be of unknown origin."""
    module, _, attribute = str(name).rpartition(".")
    if module.split(".")[0] in OWN_PACKAGES:
        try:
            importlib.import_module(module)
        except ImportError:
            return None
    return getattr(sys.modules.get(module), attribute, None)
