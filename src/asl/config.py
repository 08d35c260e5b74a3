"""Settings: their one declaration, and where a run gets them from.

Each wing declares its settings in small frozen classes beside its code (`asl.images.settings`). A
`Config` composes those that one script takes. On the command line and in recipes all names are
flat. A setting is decided in this order, later wins: its default, the checkpoint that is evaluated,
the recipe (`--config FILE`), the command line.
"""

import difflib
import io
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError

from asl.errors import DataError, UsageError

# An optional value: without a metavar of its own tyro shows it as {None}|INT.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
OptionalStr = Annotated[str | None, tyro.conf.arg(metavar="STR")]

RESUME_LAST = "last"  # `resume` without a file
_HELP = {"-h", "--help"}  # which is there at once, and needs no checkpoint
_BARE_RESUME = {("--resume", ""), ("--resume", "-")}  # at the end, or before the next option


class Settings(BaseModel):
    """Settings that belong together: frozen, and checked for names, types, choices and ranges.

    Raises `UsageError`, in one line that names the setting, for a value that is wrong.
    """

    # The command line and YAML write numbers where a name is meant: `--train-split 2014`.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )

    def __init__(self, /, **values: Any) -> None:
        for name, value in values.items():
            texts = value if isinstance(value, list | tuple) else (value,)
            if any(isinstance(text, str) and "\0" in text for text in texts):
                raise UsageError(f"{name} holds a null byte: {value!r}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(_in_words(error, type(self).model_fields)) from None

    def replace(self, **changed: Any) -> Self:
        """The same settings but for those given, checked."""
        return type(self)(**{**dict(self), **changed})


class Config(Settings):
    """All that one script can be told: settings by the part of the program that they belong to."""

    # What a checkpoint of train.py knows about how it is to be evaluated, by flat names.
    from_checkpoint: ClassVar[Sequence[str]] = ()

    @classmethod
    def of(cls, **flat: Any) -> Self:
        """A config of these settings, by their flat names, and of defaults. Raises `UsageError`."""
        unknown = flat.keys() - cls.names()
        if unknown:
            raise UsageError(_unknown(min(unknown), cls.names()))
        parts = {}
        for name, part in cls.parts().items():
            given = {key: flat[key] for key in part.model_fields if key in flat}
            parts[name] = part(**given)
        return cls(**parts)

    @classmethod
    def parts(cls) -> dict[str, type[Settings]]:
        """The class of each part."""
        return {name: type(field.default) for name, field in cls.model_fields.items()}

    @classmethod
    def names(cls) -> list[str]:
        """The flat names of all settings."""
        return [name for part in cls.parts().values() for name in part.model_fields]

    @classmethod
    def options(cls) -> dict[str, list[str]]:
        """How each setting may be spelled on the command line, but for those that it cannot set."""
        spellings: dict[str, list[str]] = {}
        for part, fields in zip(cls.model_fields.values(), cls.parts().values(), strict=True):
            for name, field in fields.model_fields.items():
                if tyro.conf.Fixed in (*part.metadata, *field.metadata):
                    continue
                option = name.replace("_", "-")
                negated = [f"--no-{option}"] if field.annotation is bool else []
                aliases = [alias for about in field.metadata for alias in _aliases(about)]
                spellings[name] = [f"--{option}", *negated, *aliases]
        return spellings

    def flat(self) -> dict[str, Any]:
        """All settings by their flat names."""
        return {name: value for _, part in self for name, value in part}

    def with_settings(self, **flat: Any) -> Self:
        """The same config but for the settings given, by their flat names."""
        return self.of(**{**self.flat(), **flat})

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        usual = type(self)().flat()
        return {name: value for name, value in self.flat().items() if value != usual[name]}


C = TypeVar("C", bound=Config)


def parse(
    config: type[C],
    script: str,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    recipes: type[Config] | None = None,
    trained_with: Callable[[str], Mapping[str, Any]] | None = None,
) -> C:
    """The settings of one start of a script.

    `argv` defaults to the command line. `trained_with` maps the path of a checkpoint to settings:
    the ones of `from_checkpoint` take the place of the defaults, but for those of its data where
    another `dataset` is asked for. The checkpoint is the one that is typed, or that of the
    defaults. A recipe may hold all settings of `recipes`, and this script takes its own.

    Exits with 0 after `--help` and with 2 on a wrong command line, saying what is near. Raises
    `UsageError` for a wrong recipe and for values out of range.
    """
    argv = _with_bare_resume(sys.argv[1:] if argv is None else argv)
    typed = _typed(argv, config)
    trained: dict[str, Any] = {}
    path = typed.get("model_path", _usual_checkpoint(config))
    if trained_with is not None and path and _HELP.isdisjoint(argv):
        trained = of_checkpoint(config, path, trained_with)
    recipe: dict[str, Any] = {}
    if typed.get("config"):
        recipe = read_recipe(typed["config"], *[each for each in (config, recipes) if each])
    asked_for = {**recipe, **typed}.get("dataset")
    if asked_for not in (None, trained.get("dataset")):
        trained = {name: trained[name] for name in trained if name not in _of_data(config)}
    own = {name: recipe[name] for name in config.names() if name in recipe}
    return tyro.cli(
        config,
        prog=f"{script}.py",
        description=description,
        args=argv,
        default=config.of(**{**trained, **own}),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed),
    )


def _of_data(config: type[Config]) -> Collection[str]:
    """The settings that say which images there are: how one data set is split is not another's."""
    part = config.parts().get("data")
    return part.model_fields if part else ()


def _usual_checkpoint(config: type[Config]) -> str:
    """The checkpoint that a script takes where none is typed; empty if it wants to be told."""
    paths = config().flat().get("model_path")
    return paths[0] if paths else ""


def of_checkpoint(
    config: type[Config], path: str, trained_with: Callable[[str], Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings of `from_checkpoint` that `trained_with` knows of the checkpoint at `path`.

    Raises `DataError` for values that a setting cannot have.
    """
    trained = trained_with(path)
    try:
        known = {name: trained[name] for name in config.from_checkpoint if name in trained}
        checked = config.of(**known).flat()
    except (UsageError, TypeError) as error:
        raise DataError(f"{path}: its config cannot be used: {error}") from None
    return {name: checked[name] for name in known}


def read_recipe(path: str | Path, *configs: type[Config]) -> dict[str, Any]:
    """The settings that a YAML recipe gives: those of any of the `configs`, checked.

    Raises `UsageError` that names the file, for what is no YAML, names no setting, names one twice,
    or gives a value that the setting cannot have.
    """
    recipe = read_yaml(path)
    names = [str(key).replace("-", "_") for key in recipe]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{path}: {name} stands there twice")
    settings = dict(zip(names, recipe.values(), strict=True))
    known = {name for config in configs for name in config.names()}
    try:
        for name in names:
            if name not in known:
                raise UsageError(_unknown(name, known))
        checked: dict[str, Any] = {}
        for config in configs:
            own = {name: settings[name] for name in config.names() if name in settings}
            flat = config.of(**own).flat()
            checked |= {name: flat[name] for name in own}
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return checked


def write_recipe(config: Config, without: Collection[str] = ()) -> str:
    """All settings as a recipe that gives this very config again, but for those left out."""
    text = io.StringIO()
    flat = config.flat()
    _yaml().dump({name: flat[name] for name in flat if name not in without}, text)
    return text.getvalue()


def _yaml() -> Any:
    # YAML 1.2: `1e-4` is a number and `off` a word, and a key that is there twice is an error.
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def read_yaml(path: str | Path) -> Mapping[Any, Any]:
    """The `name: value` lines of a file. Raises `UsageError` that names it where it has no such."""
    try:
        with Path(path).open("rb") as file:
            recipe = _yaml().load(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # tags such as !!int raise whatever Python raises for their values
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, Mapping):
        raise UsageError(f"{path}: it must be a list of `setting: value` lines")
    return recipe


def _with_bare_resume(argv: Sequence[str]) -> list[str]:
    # `--resume` may stand alone, which tyro does not know of an option that takes a value.
    return [
        f"--resume={RESUME_LAST}" if (word, after[:1]) in _BARE_RESUME else word
        for word, after in zip_longest(argv, argv[1:], fillvalue="")
    ]


def _typed(argv: Sequence[str], config: type[Config]) -> dict[str, str]:
    """The settings whose options stand in `argv`, with the word behind or in each.

    Raises `UsageError` for one that is there twice: the second would win in silence, which in a
    shell script of many lines is a wrong run.
    """
    names = {word: name for name, words in config.options().items() for word in words}
    typed: dict[str, str] = {}
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        name = names.get(option.replace("_", "-"))
        if name in typed:
            raise UsageError(f"--{name.replace('_', '-')} is given twice")
        if name:
            typed[name] = value if equals else following
    return typed


def _aliases(about: Any) -> Iterable[str]:
    return getattr(about, "aliases", None) or ()  # of tyro.conf.arg


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"there is no setting {name!r}" + (f": did you mean {near[0]}?" if near else "")


def _in_words(error: ValidationError, known: Iterable[str]) -> str:
    """The first mistake that pydantic found, as one line."""
    errors = error.errors(include_url=False)
    # A name that is wrong explains why another is missing.
    first = min(errors, key=lambda each: each["type"] != "extra_forbidden")
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] == "extra_forbidden":
        return _unknown(name, known)
    return f"{name} is {first['input']!r}, but {first['msg'].replace('Input should', 'must', 1)}"
