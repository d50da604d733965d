"""Command-line flags as dataclass fields: declared once, parsed strictly. The flags are in config.py.

What other modules need to know of a flag (may it change on resume? is it on the model card?) is declared with
it, so nobody keeps a list of flag names. Only the standard library is imported here: finding a typo in a flag
should not take seconds.
"""

import argparse
import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass


@dataclass(frozen=True)
class Limit:
    """The values a number may have; NaN and infinity are never among them."""

    allows: Callable[[float], bool]
    text: str  # completes "--flag must be ..."


POSITIVE = Limit(lambda value: value > 0, "above 0")
NON_NEGATIVE = Limit(lambda value: value >= 0, "0 or more")
AT_LEAST_1 = Limit(lambda value: value >= 1, "at least 1")
FRACTION = Limit(lambda value: 0 <= value < 1, "in [0, 1)")
SEED = Limit(lambda value: 0 <= value < 2**32, "in [0, 2^32)")  # what numpy takes


def flag(
    default,
    help: str,
    *,
    limit: Limit | None = None,
    needs: str | None = None,
    excludes: str | None = None,
    bare_value: str | None = None,
    may_be_empty: bool = False,
    resume: typing.Literal["same", "free"] = "same",
    compares: tuple[str, ...] = (),
    sets_shapes: bool = False,
    on_card: bool = True,
    is_place: bool = False,
    needs_cuda: Callable[[typing.Any], bool] | None = None,
    kept_as: str | None = None,
    for_quantization: bool = False,
):
    """A dataclass field that is a flag. All but `default` is its metadata.

    Parsing:
        default: ... for a flag that must be given
        needs, excludes: other flags as they are written ("--prompts_file", "--a or --b"); the flag is refused
            where none of the first, or any of the second, is set
        bare_value: what the flag means without a value
        needs_cuda: of the value: whether it needs a CUDA GPU

    Resuming, see qlora/run/fingerprint.py:
        resume: "same": a resumed run must have the value it began with. "free": its own value is not
            compared, but what it stands for may be
        compares: names of what is compared because of this flag: contents, wherever they lie, or what the
            flag comes to
        sets_shapes: whether shapes in a checkpoint depend on it, so that no --allow_changes can help

    Use by other modules:
        on_card: whether the model card shows it; not if it names places, or stands elsewhere on the card
        is_place: whether it says where a run writes, not what it computes
        kept_as: its name among the settings kept beside the adapter, which generate.py and the other commands
            for trained adapters take as defaults
        for_quantization: whether qlora.evaluate takes it together with --quantization
    """
    metadata = {
        "help": help, "limit": limit, "needs": needs, "excludes": excludes, "bare_value": bare_value,
        "may_be_empty": may_be_empty, "resume": resume, "compares": compares, "sets_shapes": sets_shapes,
        "on_card": on_card, "is_place": is_place, "needs_cuda": needs_cuda, "kept_as": kept_as,
        "for_quantization": for_quantization,
    }  # fmt: skip
    if default is ...:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list):  # copied for each instance
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_names(config_class, key: str, value=True) -> list[str]:
    """The flags of a class whose metadata has `value` under `key`, in their order."""
    return [field.name for field in dataclasses.fields(config_class) if field.metadata[key] == value]


def default_of(field: dataclasses.Field):
    """A flag's default; MISSING if it must be given."""
    return field.default if field.default_factory is MISSING else field.default_factory()


class Flags:
    """Base of the dataclasses of flags. Subclasses add their own checks to both methods."""

    def __post_init__(self):
        """Raise ValueError if a value is empty or outside its limit."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, list) else [value]:
                # An unset shell variable leaves an empty string.
                if isinstance(text, str) and not text.strip() and not field.metadata["may_be_empty"]:
                    raise ValueError(f"--{field.name} is empty")
            limit = field.metadata["limit"]
            if limit is not None and value is not None and not (_is_finite(value) and limit.allows(value)):
                raise ValueError(f"--{field.name} must be {limit.text}, not {value}")

    def compared_values(self) -> dict:
        """The flags that must not change on resume, with their values."""
        return {name: getattr(self, name) for name in flag_names(type(self), "resume", "same")}

    def card_flags(self) -> dict:
        """The flags that the model card shows, with their values."""
        return {name: getattr(self, name) for name in flag_names(type(self), "on_card")}

    def check_given(self, given: set[str]) -> None:
        """Raise ValueError if a flag among `given`, those on the command line, would be ignored."""
        for field in dataclasses.fields(self):
            if field.name not in given:
                continue
            needs, excludes = field.metadata["needs"], field.metadata["excludes"]
            if needs and not any(_is_set(self, name) for name in _named(needs)):
                raise ValueError(f"--{field.name} needs {needs}")
            if excludes and any(_is_set(self, name) for name in _named(excludes)):
                raise ValueError(f"--{field.name} cannot be used with {excludes}")


def parse_args(
    config_class, argv: list[str] | None = None, defaults: dict | None = None, program: str | None = None
):
    """Parse `argv` (default: the command line) into `config_class`. Any mistake is one line and exit code 2.

    `defaults` replace the class's own defaults and are checked like flags.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _OneLineParser(prog=program, allow_abbrev=False, formatter_class=_HelpFormatter)
    types_of_fields = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        _add_flag(parser, field, types_of_fields[field.name])
    default_argv = [f"--{name}={value}" for name, value in (defaults or {}).items()]
    values = vars(parser.parse_args([*default_argv, *argv]))
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    given = {word.removeprefix("no_") for word in words}
    try:
        config = config_class(**values)
        config.check_given(given)
    except ValueError as error:
        parser.error(str(error))
    return config


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, annotation) -> None:
    """Add one flag: str, int, float, bool, a Literal, a list of one of these, each optional with `| None`."""
    default, metadata = default_of(field), field.metadata
    dashed = field.name.replace("_", "-")
    spellings = dict.fromkeys([f"--{field.name}", f"--{dashed}"])  # one if they are equal
    options = {"dest": field.name, "help": metadata["help"], "required": default is MISSING}
    options["default"] = None if default is MISSING else default
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is list:
        (annotation,) = typing.get_args(annotation)
        options["nargs"] = "+"
    if typing.get_origin(annotation) is typing.Literal:
        options["choices"] = typing.get_args(annotation)
        options["type"] = str
    elif annotation is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    else:
        options["type"] = annotation
    if metadata["bare_value"] is not None:
        options |= {"nargs": "?", "const": metadata["bare_value"]}
    parser.add_argument(*spellings, **options)
    if annotation is bool and default is not False:
        off = dict.fromkeys([f"--no_{field.name}", f"--no-{dashed}"])
        parser.add_argument(
            *off, dest=field.name, action="store_false", default=argparse.SUPPRESS,
            help=f"Turn --{field.name} off.",
        )  # fmt: skip


def _boolean(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def _is_finite(value: float) -> bool:
    return -math.inf < value < math.inf


def _named(flags: str) -> list[str]:
    """The flags in a text such as "--prompt or --prompts_file"."""
    return re.findall(r"--(\w+)", flags)


def _is_set(config, name: str) -> bool:
    return getattr(config, name) not in (None, False, "none")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.required or action.default is None:  # "default: None" says nothing
            return action.help
        return super()._get_help_string(action)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")
