"""Generates the reference pages from the code, as Markdown: configuration, commands, variables, exit codes, results.

`pages` puts the text in place when Sphinx reads a page, so no page can differ from the code. What has no description in
the code is an error here.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

import gaq
from gaq.cli import arguments, frame
from gaq.config.schema import PRESETS, TEMPERATURES, QuantizationConfig
from gaq.settings import Settings

__all__ = ["PAGES", "MissingDescription", "api", "attributes_of", "commands", "configuration", "presets", "results"]

ROOT = Path(__file__).parents[2]
TYPES = {int: "integer", float: "number", str: "word", bool: "true or false"}
FRAMEWORKS = ("MACE", "NequIP")

OF_NO_SECTION = {
    "version": "version of the keys and presets; files of a later one are refused. Leave it out.",
    "preset": "the preset that all other keys start from; its name alone is a configuration.",
    "radial_activations": "whether the hidden layers of radial networks are rounded as scalars are. Only the baseline "
    "`naive_w8a8` does so: functions of the distance alone are kept smooth.",
    "overrides": "patterns on the names of modules, each with a preset, a mapping, or null, which leaves the modules "
    "in float. A pattern that matches nothing is an error.",
    "attention": "as a section, below; null, the default, leaves weights of neighbours and gates alone.",
}
"""Keys of `QuantizationConfig` itself: their dataclass describes sections, not keys."""

API = {
    "Quantize": ("quantize", "prepare", "calibrate", "convert", "select"),
    "Files": ("load", "save", "deploy", "ase.Calculator"),
    "Measure": ("report", "sensitivity", "summary"),
    "Configuration": ("parse_config", "QuantizationConfig", "PRESETS", "ConfigError"),
    "Settings": ("settings.override", "settings.current", "settings.Settings"),
}
"""Public names by subject; all of ``gaq.__all__`` have to be here."""

ENGINE = ("accelerate", "decelerate", "disabled", "is_accelerated", "serves")
"""Public functions of ``gaq_mace.engine``."""


class MissingDescription(ValueError):
    """Something public that the code does not describe."""


def first_paragraph(thing: object, name: str) -> str:
    """The first paragraph of a docstring, on one line.

    Raises:
        MissingDescription: if there is none, or it is one that Python wrote for a dataclass.
    """
    text = inspect.getdoc(thing) or ""
    if not text or text.startswith(f"{getattr(thing, '__name__', '')}("):
        raise MissingDescription(f"{name} has no docstring")
    return " ".join(text.split("\n\n")[0].split())


def attributes_of(kind: type) -> dict[str, str]:
    """Descriptions of the attributes of a dataclass, from the section ``Attributes:`` of its docstring.

    Raises:
        MissingDescription: for a field that the section leaves out.
    """
    text = inspect.getdoc(kind) or ""
    section = text.partition("Attributes:\n")[2].split("\n\n")[0]
    found = {
        match[1]: " ".join(match[2].split())
        for match in re.finditer(r"^ {4}(\w+): (.+?)(?=^ {4}\w|\Z)", section, re.MULTILINE | re.DOTALL)
    }
    if not section:  # a short class says in its first line what its fields are
        first_paragraph(kind, kind.__name__)
        return {field.name: "" for field in dataclasses.fields(kind)}
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in found]
    if missing:
        raise MissingDescription(f"{kind.__name__}: its docstring does not describe {', '.join(missing)}")
    return found


def type_name(kind: Any) -> str:  # a type, or a union of types
    """Return the name of a type in words: ``integer or null``."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    names = [TYPES.get(each, "mapping") for each in kinds if each is not NoneType]
    return " or ".join([*names, *(["null"] if NoneType in kinds else [])])


def yaml_value(value: object) -> str:
    """Write a value as YAML does."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return json.dumps(value) if isinstance(value, dict) else str(value)


def allowed(field: dataclasses.Field[Any]) -> str:
    """Return what a field takes beside its type, from its metadata; empty where the type says it all."""
    metadata = field.metadata
    if "choices" in metadata:
        return "one of " + ", ".join(f"`{choice}`" for choice in metadata["choices"])
    if "bits" in metadata:
        return f"{metadata['bits'][0]} to {metadata['bits'][-1]}"
    if "below" in metadata:
        return f"at least {metadata['minimum']:g}, below {metadata['below']:g}"
    if "minimum" in metadata:
        return f"at least {metadata['minimum']:g}"
    if field.name == "temperature":
        return "`learned`, or {:g} to {:g}".format(*TEMPERATURES)
    return ""


def framework_of(description: str) -> str:
    """Return the framework in which a key acts: that with which its description begins, or both."""
    for name in FRAMEWORKS:
        if re.match(rf"{name}[:,]", description):
            return f"{name} only"
    return "MACE and NequIP"


def _entry(path: str, field: dataclasses.Field[Any], default: object, description: str) -> str:
    facts = [type_name(field.type), allowed(field), f"default `{yaml_value(default)}`", framework_of(description)]
    text = re.sub(rf"^({'|'.join(FRAMEWORKS)}): ", "", description)
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", yaml, text)
    return f"`{path}`\n: {'; '.join(fact for fact in facts if fact)}.\n\n  {text[:1].upper()}{text[1:]}\n"


def configuration() -> str:
    """Every key of the configuration: type, allowed values, default, framework, and what it does."""
    default, parts = PRESETS["gaq"], list[str]()
    of_root, sections = list[str](), list[tuple[str, type]]()
    for field in dataclasses.fields(QuantizationConfig):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            sections.append((field.name, type(value)))
            continue
        if field.name not in OF_NO_SECTION:
            raise MissingDescription(f"quantization.{field.name}: describe it in OF_NO_SECTION")
        of_root.append(_entry(field.name, field, value, OF_NO_SECTION[field.name]))
        optional = (kind for kind in get_args(field.type) if isinstance(kind, type) and kind is not NoneType)
        sections += [(field.name, kind) for kind in optional if dataclasses.is_dataclass(kind)]
    parts.append("## Keys of no section\n\n" + "\n".join(of_root))
    for name, kind in sections:
        section = getattr(default, name) or kind()
        descriptions = attributes_of(kind)
        parts.append(f"## `{name}`\n\n{first_paragraph(kind, kind.__name__)}\n")
        parts += [
            _entry(f"{name}.{field.name}", field, getattr(section, field.name), descriptions[field.name])
            for field in dataclasses.fields(kind)
        ]
    return "\n".join(parts)


def presets() -> str:
    """What each preset sets, in a table: the keys in which presets differ, one column for each preset."""
    names = [name for name in PRESETS if name != "gaq"]
    plain = {name: dict(_flat(PRESETS[name].to_dict())) for name in names}
    keys = [key for key in plain[names[0]] if key != "preset" and len({str(p.get(key)) for p in plain.values()}) > 1]
    head = "| key | " + " | ".join(f"`{name}`" for name in names) + " |\n" + "|---" * (len(names) + 1) + "|\n"
    rows = (f"| `{key}` | " + " | ".join(yaml_value(plain[name].get(key)) for name in names) + " |" for key in keys)
    return head + "\n".join(rows) + "\n"


def _flat(document: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of this package's commands that have one of their own, by name, subcommands included."""
    from gaq_mace.commands import _parser as export_parser
    from gaq_nequip.deploy.cli import _parser as deploy_parser

    found: dict[str, argparse.ArgumentParser] = {}
    for root in (arguments.parser(), deploy_parser(), export_parser()):
        found |= dict(_with_subcommands(root))
    return found


def _with_subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield parser.prog, parser
    for action in inner:
        for choice, command in action.choices.items():
            if command.description is None:
                command.description = next(a.help for a in action._choices_actions if a.dest == choice)
            yield from _with_subcommands(command)


def _argument(action: argparse.Action, command: str) -> str:
    if not action.help:
        raise MissingDescription(f"{command}: {action.dest} has no help")
    names = [*action.option_strings] or [action.dest.upper()]
    value = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
    title = ", ".join(f"`{name}{value}`" for name in names)
    text = action.help.replace("%(default)s", str(action.default)).strip()
    choices = ", ".join(f"`{choice}`" for choice in action.choices) if action.choices else ""
    shown = action.default not in (None, False, argparse.SUPPRESS) and "default" not in text and action.option_strings
    facts = [
        *(["required"] if action.required and action.option_strings else []),
        *([f"one of {choices}"] if choices else []),
        *([f"default `{action.default}`"] if shown else []),
    ]
    return f"{title}\n: {text}" + (f" ({'; '.join(facts)})" if facts else "") + "\n"


def commands() -> str:
    """Every command with its arguments, and its exit codes."""
    parts = []
    for name, parser in parsers().items():
        if not parser.description:
            raise MissingDescription(f"{name} has no description")
        text = parser.description.rstrip(".")
        parts.append(f"### `{name}`\n\n{text[:1].upper()}{text[1:]}.\n")
        # What every command has stands on the page itself.
        shared = ("help", "version", "print_completion")
        parts += [_argument(action, name) for action in parser._actions if action.dest not in shared]
        if parser.epilog:
            epilog = parser.epilog.rstrip(".")
            parts.append(f"{epilog[:1].upper()}{epilog[1:]}.\n")
    return "\n".join(parts)


def variables() -> str:
    """Every environment variable: what it takes, its default, what it does."""
    descriptions, parts = attributes_of(Settings), []
    for field in dataclasses.fields(Settings):
        variable = field.metadata["variable"]
        text = re.sub(rf"^``{variable}``,? ?", "", descriptions[field.name])
        default = field.default
        shown = (
            f"default `{int(default) if isinstance(default, bool) else default}`" if default is not None else "not set"
        )
        parts.append(f"`{variable}`\n: takes {field.metadata['allowed']}; {shown}\n\n  {text[:1].upper()}{text[1:]}\n")
    return "\n".join(parts)


def exit_codes() -> str:
    """Exit codes of every command, in a table."""
    rows = (
        (frame.DONE, "done"),
        (frame.FAILED, "a gate failed, or a deployed file does not agree with its model"),
        (frame.REFUSED, "bad input: one line on stderr says what and what to do, and nothing is written"),
        (frame.STOPPED, "stopped by Ctrl-C"),
        (frame.BROKEN_PIPE, "the reader of a pipe, such as `head`, closed it"),
    )
    return "| code | meaning |\n|---|---|\n" + "\n".join(f"| {code} | {text} |" for code, text in rows) + "\n"


def api() -> str:
    """Public functions and classes, for autodoc.

    Raises:
        MissingDescription: for a public name without a docstring, or under no subject.
    """
    missing = set(gaq.__all__) - {"__version__"} - {name for names in API.values() for name in names}
    if missing:
        raise MissingDescription(f"gaq.{', gaq.'.join(sorted(missing))}: give a subject in API")
    parts = []
    for subject, names in API.items():
        parts.append(f"## {subject}\n")
        for name in names:
            if name == "PRESETS":  # a dictionary has no docstring of its own
                parts.append(
                    "`gaq.PRESETS`: the named configurations, by name ([what each sets](configuration.md#presets)).\n"
                )
                continue
            parts.append(_autodoc(f"gaq.{name}"))
    return "\n".join(parts)


def engine_api() -> str:
    """Public functions of MACE's engine, for autodoc."""
    return "\n".join(_autodoc(f"gaq_mace.engine.{name}") for name in ENGINE)


def _autodoc(path: str) -> str:
    from importlib import import_module

    module, _, name = path.rpartition(".")
    thing = getattr(import_module(module), name)
    first_paragraph(thing, path)
    kind = "autoclass" if inspect.isclass(thing) else "autofunction"
    return f"```{{eval-rst}}\n.. {kind}:: {path}\n```\n"


def results() -> str:
    """Every committed result and the command that made it."""
    rows = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        rows.append(f"[{path.name}](../benchmarks/results/{path.name})\n: `{command}`\n")
    return "\n".join(rows)


def of_the_repository(name: str) -> Callable[[], str]:
    """A page that stands at the top of the repository, with its links as they are in ``docs/dev``."""

    def page() -> str:
        text = (ROOT / name).read_text(encoding="utf-8")
        return re.sub(r"\]\((?!http|#)(docs/dev/)?", lambda match: "](" if match[1] else "](../../", text)

    return page


PAGES: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "presets": presets,
    "commands": commands,
    "variables": variables,
    "exit-codes": exit_codes,
    "api": api,
    "engine-api": engine_api,
    "results": results,
    "contributing": of_the_repository("CONTRIBUTING.md"),
    "changelog": of_the_repository("CHANGELOG.md"),
}
"""Texts by the names with which pages ask for them."""


if __name__ == "__main__":
    print(PAGES[sys.argv[1]]())
