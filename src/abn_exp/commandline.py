"""Hydra's command line: arguments in any order, and each error in one sentence."""

import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from abn_exp.errors import flat_keys, in_a_line, unknown_key

HYDRA_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
FLAGS = ("-m", "--multirun", "-r", "--run", "-h", "--help", "--hydra-help", "--resolve", "--version")  # no value
OPEN = ("model.", "norm.", "recipe.optimizer.")  # sections that take any argument of the class that they name


def positive_int(text: str) -> int:
    """Parse an argument of a script that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text} is not allowed; use a whole number, 1 or more")
    return int(text)


def overrides_last(words: Sequence[str]) -> list[str]:
    """Return a command's arguments with the overrides last: Hydra's parser takes them only in one piece."""
    order = sorted(range(len(words)), key=lambda number: _is_override(words, number))
    return [words[number] for number in order]


def _is_override(words: Sequence[str], number: int) -> bool:
    word, before = words[number], words[number - 1] if number else ""
    is_value = before.startswith("-") and "=" not in before and before not in FLAGS
    return not is_value and not word.startswith("-") and ("=" in word or word.startswith("~"))


def check_groups(words: Sequence[str], conf: Path) -> None:
    """Refuse a list, null or a number for the name of a group's file: Hydra ends in a traceback on some of them.

    `words` are a command's arguments, `conf` the folder of the groups. Raises ValueError, and HydraException for what
    is no override.
    """
    typed = [word for number, word in enumerate(words) if _is_override(words, number)]
    for override in OverridesParser.create().parse_overrides(typed):
        group = override.key_or_group
        if group == "seeds" and override.is_sweep_override():
            raise ValueError(f"{override.input_line} is not allowed: choose one list of seeds, or seed=0,1,2.")
        names = sorted(file.stem for file in (conf / group).glob("*.yaml")) if "/" not in group else []
        if not names or override.is_sweep_override() or override.is_delete():
            continue
        if isinstance(value := override.value(), str):
            continue
        hint = ""
        if isinstance(value, list):
            values = [str(element) for element in value]
            key = group if set(values) <= set(names) else "seed" if group == "seeds" else None
            hint = f"; -m {key}={','.join(values)} trains each" if key else ""
        raise ValueError(f"{override.input_line} is not allowed: it should be one of {', '.join(names)}{hint}.")


def share_config_store() -> None:
    """Let Hydra list its groups without a deep copy of all its configurations for each: --help in half the time.

    Only for a process that prints and ends: what composes configurations needs the copies.
    """
    ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]


def hydra_sentence(error: Exception, conf: Path | None = None) -> str:
    """Return an error of Hydra, OmegaConf or YAML as a sentence that says what is allowed.

    `conf` is the folder of the configuration, needed where Hydra is not initialised any more.
    """
    text = in_a_line(error)
    if match := re.search(r"Could not override '(.+?)'", text):
        key = match[1]
        hint = f" An argument that its class has and its file leaves out is added by +{key}=VALUE."
        return unknown_key(key, _keys(conf)) + (hint if key.startswith(OPEN) else "")
    if match := re.search(r"Ambiguous value for argument '(.+?)=(.+?)'", text):
        key, values = match.groups()
        hint = "" if key in _groups(_composed(conf)) else f", or write a list as '{key}=[{values}]'"
        return f"{key}={values} has several values: add -m to train each{hint}."
    if match := re.search(r"Could not find '(.+)/(.*?)' Available options in '.+?': (.+)", text):
        group, chosen, options = match[1], match[2], match[3].split()
        close = get_close_matches(chosen, options, n=1, cutoff=0.5)
        suggestion = f"; did you mean {close[0]}?" if close else "."
        return f"{group}={chosen} is not allowed: it should be {', '.join(options)}{suggestion}"
    if match := re.search(r"LexerNoViableAltException: (\S+?)=(.*?) \^", text):
        quoted = "" if {'"', "'"} & set(match[2]) else f": '{match[1]}=\"{match[2]}\"'"
        return f"{match[1]}={match[2]} has a character that needs quotes{quoted}."
    if match := re.search(r"Error parsing override '(.*?)'\s+missing EQUAL", text):
        return f"{match[1]} is not allowed: an option is written KEY=VALUE, without blanks."
    if match := re.search(r"In 'hydra/launcher/((\w+?)(?:_\w+)?)': Could not load", text):
        return f'hydra/launcher={match[1]} needs a plug-in: pip install --editable ".[{match[2]}]".'
    if error.__cause__ is not None and text.startswith("Error merging override"):
        text = f"{text}: {str(error.__cause__).splitlines()[0]}"
    return text


def print_error(error: Exception, conf: Path | None = None) -> int:
    """Print an error that the user can mend, and return the exit status 1; `conf` as for `hydra_sentence`."""
    text = hydra_sentence(error, conf) if isinstance(error, HYDRA_ERRORS) else error
    print(f"error: {text}", file=sys.stderr)
    return 1


def _composed(conf: Path | None) -> DictConfig:
    if GlobalHydra.instance().is_initialized() or conf is None:
        return compose("config", return_hydra_config=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        return compose("config", return_hydra_config=True)


def _groups(cfg: DictConfig) -> list[str]:
    return [str(group) for group in cfg.hydra.runtime.choices if "/" not in str(group)]


def _keys(conf: Path | None) -> list[str]:
    """Return the groups and keys that can be given, with their dots."""
    cfg = _composed(conf)
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return _groups(cfg) + flat_keys(OmegaConf.to_container(ours))
