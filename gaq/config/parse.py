"""Parser of the quantization configuration: presets, mappings and files become a `QuantizationConfig`.

One frozen dataclass tree serves the YAML key, the command line and Python alike. Every error names the key path, the
value and what is allowed.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import fnmatch
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

from gaq.config.effect import check_keys
from gaq.config.schema import (
    PRESETS,
    REMOVED,
    REMOVED_VALUES,
    TEMPERATURES,
    VERSION,
    AttentionConfig,
    CalibrationConfig,
    ConfigError,
    DistillationConfig,
    EquivarianceLossConfig,
    QuantizationConfig,
    ScalarConfig,
    TrainingConfig,
    VectorConfig,
    WeightConfig,
    preset_of,
    without_removed,
)
from gaq.untyped import Document, ReadOnlyDocument

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "CalibrationConfig",
    "ConfigError",
    "DistillationConfig",
    "EquivarianceLossConfig",
    "QuantizationConfig",
    "ScalarConfig",
    "TrainingConfig",
    "VectorConfig",
    "WeightConfig",
    "parse_config",
    "parse_stored",
    "resolve_overrides",
]


ConfigSpec = str | Mapping[str, object] | QuantizationConfig
"""What `parse_config` reads: a preset, the text of a mapping or the path of a file; a mapping; a configuration."""

_BITS_OF_GROUPS = ("sensitive_bits", "first_bits", "mixing_bits", "species_bits")


_values = Repr()
_values.maxlevel, _values.maxdict, _values.maxlist, _values.maxtuple = 4, 12, 12, 12
_values.maxstring, _values.maxother, _values.maxlong = 200, 200, 500


def _shown(value: object) -> str:
    """Return a value for a message: as Python writes it, with the middle left out where it is long."""
    try:
        text = _values.repr(value)
        return text if len(text) <= 1000 else f"{text[:480]} ... {text[-480:]}"
    except ValueError:  # Python does not write integers of thousands of digits
        return f"a {type(value).__name__} too long to write"


def _options(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)


def _closest(word: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(names), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def _number(value: Any, kind: str) -> float | int | None:  # Any: `float` is to refuse what it cannot take
    """Convert a value to an ``int`` or a finite ``float``; None if that is not possible."""
    if isinstance(value, bool):
        return None
    if kind == "int":
        is_integer = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return int(value) if is_integer else None
    # YAML 1.1 reads 1e-3 as text: its floats need a point, and a sign in the exponent.
    if isinstance(value, str) and not re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _check_value(path: str, relative: str, value: Any, field: dataclasses.Field[object]) -> Any:  # of the field's type
    """Check a value and convert it to the type of its field.

    Args:
        path: key path in what the user wrote, for messages.
        relative: key path of the field in `QuantizationConfig`, which differs within an override.
        value: what the user wrote.
        field: with its type, and what is allowed in it as metadata.

    Raises:
        ConfigError: naming the path, for a value that is not allowed.
    """
    if relative == "attention.temperature":
        return _temperature(path, value)
    annotation = type_name(field.type)
    optional = "None" in annotation
    kind = annotation.replace("| None", "").strip()
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{path}: null is not allowed here; give a value of type {kind}.")
    given = value
    if kind in ("int", "float"):
        value = _number(given, kind)
    elif not isinstance(given, {"str": str, "bool": bool}[kind]):
        value = None
    if value is None:
        raise ConfigError(f"{path}: expected {kind}{' or null' if optional else ''}, got {_shown(given)}.")
    choices, bits, minimum, below = (field.metadata.get(n) for n in ("choices", "bits", "minimum", "below"))
    if choices is not None and value not in choices:
        if (advice := REMOVED_VALUES.get((relative, value))) is not None:
            raise ConfigError(f"{path}: {_shown(value)} is gone; {advice}.")
        hint = _closest(str(value), choices)
        raise ConfigError(f"{path}: {_shown(value)} is not one of {_options(choices)}.{hint}")
    if bits is not None and value not in bits:
        raise ConfigError(
            f"{path}: {_shown(value)} bits cannot be stored; choose one of {_options(bits)}"
            f"{' or null to leave it in float' if optional else ''}."
        )
    if minimum is not None and not value >= minimum:
        raise ConfigError(f"{path}: {_shown(value)} is too small; the least allowed is {minimum:g}.")
    if below is not None and not value < below:
        raise ConfigError(f"{path}: {_shown(value)} is too large; the key is a share, less than {below:g}.")
    return value


def _temperature(path: str, value: object) -> str | float:
    """Check the temperature of attention: ``learned`` or a number between `TEMPERATURES`."""
    low, high = TEMPERATURES
    if value == "learned":
        return "learned"
    number = _number(value, "float")
    if number is not None and low < number < high:
        return float(number)
    hint = _closest(value, ["learned"]) if isinstance(value, str) else ""
    raise ConfigError(f"{path}: {_shown(value)} is neither 'learned' nor a number between {low:g} and {high:g}.{hint}")


def type_name(annotation: object) -> str:
    """Return the annotation of a field as text, such as ``int`` or ``int | None``."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _merge(base: Any, changes: ReadOnlyDocument, path: str, section: str = "") -> Any:  # any of the dataclasses
    """Apply the keys of a user's mapping to a configuration, each checked against the field of that name.

    Args:
        base: a dataclass of the configuration tree.
        changes: the user's mapping.
        path: key path of `base` in what the user wrote, for messages.
        section: key path of `base` in `QuantizationConfig`, with a trailing point; empty for the root.

    Returns:
        A changed copy of `base`.
    """
    fields = {f.name: f for f in dataclasses.fields(base)}
    values: Document = {}
    attention_bits_given = True
    for key, value in changes.items():
        key_path = f"{path}.{key}"
        if key not in fields:
            if (gone := REMOVED.get(f"{section}{key}")) is not None:
                raise ConfigError(f"{key_path}: this key is gone; {gone.advice}.")
            allowed = _options(fields)
            raise ConfigError(f"{key_path}: unknown key.{_closest(str(key), fields)} Allowed in {path}: {allowed}.")
        current = getattr(base, key)
        if key == "attention":
            if value is None:
                values[key] = None
                continue
            if current is None:
                current = AttentionConfig()
                attention_bits_given = isinstance(value, Mapping) and "bits" in value
        if dataclasses.is_dataclass(current):
            if value is None and key in ("weights", "scalars", "vectors"):
                off = "magnitude_bits" if key == "vectors" else "bits"
                values[key] = _merge(current, {off: None}, key_path, f"{key}.")
                continue
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{key_path}: expected a mapping, got {_shown(value)}. "
                    f"Allowed in {key_path}: {_options(f.name for f in dataclasses.fields(current))}."
                )
            values[key] = _merge(current, value, key_path, f"{key}.")
        elif key == "overrides":
            values[key] = _check_overrides(value, key_path)
        elif key != "preset":
            values[key] = _check_value(key_path, section + key, value, fields[key])
    merged = dataclasses.replace(base, **values)
    if not attention_bits_given and merged.scalars.bits is None:
        # A preset that keeps activations exact keeps those of attention exact too, unless the user gives bits.
        merged = dataclasses.replace(merged, attention=dataclasses.replace(merged.attention, bits=None))
    return merged


def _check_overrides(value: object, path: str) -> Document:
    """Check that ``overrides`` maps module-name patterns to presets, mappings or null."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{path}: expected a mapping from module-name patterns to a preset, a mapping or null, "
            f"got {_shown(value)}. Example: {{'readouts.*': null}}."
        )
    overrides: Document = {}
    for pattern, override in value.items():
        key_path = f"{path}['{pattern}']"
        if not isinstance(pattern, str):
            raise ConfigError(f"{key_path}: a pattern must be a string such as 'readouts.*'.")
        # What a file holds, and not its name, is stored in the model.
        override = _contents(override, key_path)
        if isinstance(override, Mapping) and override.get("overrides"):
            raise ConfigError(f"{key_path}: an override cannot hold overrides of its own.")
        overrides[pattern] = override
    return overrides


def _preset(name: object, path: str, version: int) -> QuantizationConfig:
    """Return a preset by name, as it was in a version of the configuration."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"{path}: {_shown(name)} is not a preset.{_closest(str(name), PRESETS)} "
            f"Presets: {_options(sorted(PRESETS))}."
        )
    return preset_of(name, version)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, where YAML's own loader takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for (_, name), (key, _) in zip(keys, node.value, strict=False):
            if keys.count((key.tag, name)) > 1 and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


# What PyYAML raises for text that is no YAML or has values that Python cannot hold, besides its own errors.
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def _parse_yaml(text: str) -> object:
    """Read YAML; raises one of `_UNREADABLE`."""
    return yaml.load(text, Loader=_Loader)


def _check_literal(tree: ast.Expression, path: str) -> None:
    """Refuse a Python literal with a key given twice."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [ast.dump(key) for key in node.keys if key is not None]
            for key in node.keys:
                if key is not None and keys.count(ast.dump(key)) > 1:
                    raise ConfigError(f"{path}: the key {ast.unparse(key)} is given twice.")


def _read_mapping(text: str, path: str) -> object:
    """Read the text of a mapping, a Python literal or YAML."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what looks odd to Python is often YAML
            tree = ast.parse(text, mode="eval")
        literal = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        try:
            return _parse_yaml(text)
        except _UNREADABLE as error:
            raise ConfigError(f"{path}: cannot read the mapping {_shown(text)}: {error}") from error
    _check_literal(tree, path)
    return literal


def _read_file(name: str, path: str) -> object:
    """Read a YAML file; of one with the key ``quantization``, what stands under it."""
    file = Path(name)
    try:
        if not file.is_file():
            raise ConfigError(f"{path}: there is no file {_shown(name)}.")
        loaded = _parse_yaml(file.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read {_shown(name)}: {error.strerror}.") from error
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: {name} is not valid YAML: {error}") from error
    if not isinstance(loaded, Mapping) or "quantization" not in loaded:
        return loaded
    beside = [field.name for field in dataclasses.fields(QuantizationConfig) if field.name in loaded]
    if beside:
        raise ConfigError(
            f"{path}: {name} has {_options(beside)} beside the key quantization, where it has no effect. "
            "Write it under quantization, or leave it out."
        )
    return loaded["quantization"]


def _contents(spec: object, path: str) -> object:
    """Return a mapping or the name of a preset where `spec` is text: that of a mapping, or the name of a file."""
    files: list[str] = []
    while isinstance(spec, str):
        text = spec.strip()
        if text.startswith("{"):
            return _read_mapping(text, path)
        if not text.endswith((".yml", ".yaml")):
            return text
        if text in files:
            raise ConfigError(f"{path}: {' names '.join((*files, text))}: no configuration is in any of them.")
        files.append(text)
        spec = _read_file(text, path)
    return spec


def parse_config(spec: object, path: str = "quantization", version: int = VERSION) -> QuantizationConfig:
    """Validate what a user wrote and resolve it against its preset.

    Args:
        spec: a preset name, a mapping, a `QuantizationConfig`, the text of a mapping (as training commands pass it), or
            the path of a YAML file that holds one of these, at the top level or under the key ``quantization``.
        path: key path that error messages start with.
        version: version whose presets are meant where `spec` does not give one.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: for unknown keys, wrong types, impossible bit widths, unknown presets, or keys that cannot act
            (`gaq.config.effect`), naming the key path and what is allowed.
    """
    config = _resolve(spec, path, version)
    check_keys(config, path)
    for pattern, override in config.overrides.items():
        _override(config, override, f"{path}.overrides['{pattern}']", check=True)
    return config


def _resolve(spec: object, path: str, version: int = VERSION) -> QuantizationConfig:
    """`parse_config` without the checks of which keys act; for what a file holds."""
    if isinstance(spec, QuantizationConfig):
        spec = spec.to_dict()
    spec = _contents(spec, path)
    if isinstance(spec, str):
        return _preset(spec, path, version)
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"{path}: expected a preset name or a mapping, got {_shown(spec)}. Presets: {_options(sorted(PRESETS))}."
        )
    if "version" in spec:
        version = _check_version(spec["version"], f"{path}.version")
    base = _preset(spec.get("preset", "gaq"), f"{path}.preset", version)
    weights = spec.get("weights")
    if isinstance(weights, Mapping) and any(name in weights for name in ("bits", *_BITS_OF_GROUPS)):
        base = dataclasses.replace(base, weights=dataclasses.replace(base.weights, least_compression=None))
    config: QuantizationConfig = _merge(base, spec, path)
    _check_consistency(config, path)
    for pattern, override in config.overrides.items():
        _override(config, override, f"{path}.overrides['{pattern}']")
    return config


def _check_version(value: object, path: str) -> int:
    """Check the version that a configuration gives."""
    if isinstance(value, int) and value > VERSION:
        raise ConfigError(
            f"{path}: {value} is later than this gaq reads, which is {VERSION}. Upgrade with: pip install -U gaq"
        )
    field = next(f for f in dataclasses.fields(QuantizationConfig) if f.name == "version")
    return int(_check_value(path, "version", value, field))


def parse_stored(spec: object, finished: bool, path: str = "quantization") -> QuantizationConfig:
    """Read the configuration stored in a file, including files of earlier versions.

    Args:
        spec: what `QuantizationConfig.to_dict` gave when the file was written, or what a user wrote.
        finished: whether the weights are rounded for good, so that keys about training have no effect any more.
        path: key path that error messages start with.

    Raises:
        ConfigError: for anything that `parse_config` refuses, except removed keys without effect in this file.
    """
    if not isinstance(spec, Mapping):
        return _resolve(spec, path)
    present: Document = {}
    plain = without_removed(spec)
    for name in REMOVED:
        section, key = name.split(".")
        keys = plain.get(section)
        if isinstance(keys, Mapping) and key in keys:
            present[name] = keys[key]
            plain[section] = {other: value for other, value in keys.items() if other != key}
    config = _resolve(plain, path)
    idle = {"until_rounded", "throughout"} if finished else set()
    if config.rounds_weights_at_end:
        idle.add("throughout")
    for name, value in present.items():
        if REMOVED[name].acts not in idle:
            raise ConfigError(
                f"{path}.{name}: {_shown(value)} is at work in this file, and the key is gone. "
                f"Make the file again from its float model: {REMOVED[name].advice}."
            )
    return config


def _check_consistency(config: QuantizationConfig, path: str) -> None:
    """Refuse keys that contradict each other, and a configuration that quantizes nothing."""
    vectors = config.vectors
    if vectors.codebook != "octahedral" and vectors.scheme == "mddq" and vectors.direction_bits > 6:
        raise ConfigError(
            f"{path}.vectors.codebook: a {vectors.codebook} table of 2 x {vectors.direction_bits} bits is too "
            f"large to search; use direction_bits: 6 or fewer, or codebook: octahedral."
        )
    attention_only = config.attention is not None and config.attention.messages
    if config.weights.bits is None and not config.rounds_activations and not attention_only:
        raise ConfigError(f"{path}: weights, scalars and vectors are all null, so nothing would be quantized.")


def _override(
    config: QuantizationConfig, override: object, path: str, check: bool = False
) -> QuantizationConfig | None:
    """Apply one override to a configuration; None if it leaves modules alone.

    Args:
        config: that holds the override.
        override: a preset, a mapping or None.
        path: key path of the override.
        check: whether keys that cannot act are refused.

    Raises:
        ConfigError: as `parse_config`.
    """
    if override is None:
        return None
    if isinstance(override, Mapping) and "preset" not in override:
        weights = override.get("weights")
        base = dataclasses.replace(config, overrides={})
        if isinstance(weights, Mapping) and "bits" in weights:
            # Bits given for some modules apply to all of them, whatever group they belong to.
            groups: Document = dict.fromkeys((*_BITS_OF_GROUPS, "compression", "least_compression"))
            base = dataclasses.replace(base, weights=dataclasses.replace(config.weights, **groups))
        changed: QuantizationConfig = _merge(base, override, path)
        _check_consistency(changed, path)
    else:
        base = changed = _resolve(override, path, config.version)
        base = preset_of(changed.preset, changed.version)
        # Weights that are the same object are those of the model itself; see `gaq.model.bits.settle_bits`.
        changed = dataclasses.replace(changed, weights=dataclasses.replace(changed.weights))
    if check:
        check_keys(changed, path, base)
    return changed


def resolve_overrides(config: QuantizationConfig, module_names: Iterable[str]) -> dict[str, QuantizationConfig | None]:
    """Return the configuration of each module after ``overrides``; None for a module that stays float.

    An override that names a preset starts from that preset, in the version of the configuration. A mapping without a
    preset changes the configuration that holds it, and weight bits in it apply to all modules it matches. Later
    patterns win over earlier ones.

    Raises:
        ConfigError: if a pattern matches no module, with the names it could have matched.
    """
    names = list(module_names)
    resolved: dict[str, QuantizationConfig | None] = dict.fromkeys(names, config)
    for pattern, override in config.overrides.items():
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ConfigError(
                f"quantization.overrides['{pattern}']: matches no module.{_closest(pattern, names)} "
                f"Quantizable modules: {_options(names)}."
            )
        parsed = _override(config, override, f"quantization.overrides['{pattern}']")
        for name in matched:
            resolved[name] = parsed
    return resolved
