"""The command line and `--config FILE` to a configuration.

Nothing here imports torch or checks a value.

`parse` reads the file first and lets the command line win. What is unknown is refused with the
nearest name there is.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec
import yaml
from transformers.hf_argparser import HfArgumentParser

from opd.config import SELF, Backend, LocalBackend, TeacherSpec
from opd.options import groups_of

# Keys under which people write the secret itself.
_SECRET_KEYS = (
    "api_key", "apikey", "key", "token", "auth_token", "access_token", "secret", "password"
)  # fmt: skip

TRACKERS = ("tensorboard", "wandb")

# Flags that were taken away or are asked for in vain, and what to do instead.
_REMOVED = {
    "weight_transfer": "it was removed: leave it out, and let trainer and servers share the folder "
    "--weights_dir",
    **dict.fromkeys(
        ("load_in_8bit", "load_in_4bit"),
        "quantised bases are out of scope: give the model's bfloat16 checkpoint",
    ),
    "allow_template_mismatch": "it was removed: write what may differ, --allow "
    "eos,template,rendering for every teacher, or NAME=eos for one",
}


class OneLineParser(argparse.ArgumentParser):
    """Of the programs beside the trainers, described by the first paragraph of their page: a
    mistake is a ValueError.
    """

    def __init__(self, prog: str, page: str):
        super().__init__(prog=prog, description=page.partition("\n\n")[0], allow_abbrev=False)

    def error(self, message: str):
        raise ValueError(message)


def pairs(flag: str, values: list[str]) -> dict[str, float]:
    """NAME=NUMBER pairs."""
    parsed = {}
    for value in values:
        name, _, number = value.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not 0 <= weight < math.inf:
            raise ValueError(f"--{flag} {value}: expected NAME=NUMBER with a finite number >= 0")
        if name in parsed:
            raise ValueError(f"--{flag} {value}: {name} is given twice")
        parsed[name] = weight
    return parsed


def trackers_of(report_to: str) -> frozenset[str]:
    """What `--report_to` names; ValueError for a name that is not known."""
    names = {name.strip() for name in report_to.split(",")}
    for name in sorted(names - {"none", *TRACKERS}):
        raise ValueError(
            f"--report_to {report_to}: unknown name {name!r}; choose of {', '.join(TRACKERS)}, "
            "with a comma between them, or none"
        )
    if "none" in names and len(names) > 1:
        raise ValueError(f"--report_to {report_to}: none stands alone; leave it out")
    return frozenset(names - {"none"})


def resolve_teachers(flags: list[str], backend: LocalBackend = "vllm") -> tuple[TeacherSpec, ...]:
    """`--teacher` values to entries: NAME=PATH takes the domain NAME, a bare PATH every domain;
    URLs, BASE+ADAPTER or `self@..` may stand for a path.
    """
    specs = []
    for value in flags:
        name, equals, model = value.partition("=")
        if not equals or "/" in name:  # a path or URL may hold an equals sign, a name no slash
            name, model, domains = "default", value, "*"
        elif name and model:
            domains = (name,)
        else:
            raise ValueError(
                f"--teacher {value}: expected NAME=PATH or PATH, or URLs instead of the path"
            )
        if "://" in model:  # whether it is one that can be asked, the validation says
            specs.append(
                TeacherSpec(
                    name, "", domains, backend="server", urls=tuple(map(base_url, model.split(",")))
                )
            )
        else:
            base, adapter = _base_and_adapter(model)
            runs = _backend_of(base, backend)
            specs.append(TeacherSpec(name, base, domains, backend=runs, adapter=adapter))
    return tuple(specs)


def _base_and_adapter(value: str) -> tuple[str, str]:
    """BASE+ADAPTER; a directory whose own name holds a plus is a base."""
    parts = value.split("+")
    cuts = ["+".join(parts[:n]) for n in range(len(parts), 0, -1)]
    base = next((cut for cut in cuts if Path(cut).is_dir()), cuts[-1])
    return base, value[len(base) + 1 :]


def _backend_of(model: str, backend: LocalBackend) -> LocalBackend:
    """What runs a teacher that names no backend: one that takes new weights is no vLLM's."""
    return "hf" if model.startswith(SELF) and model != f"{SELF}0" else backend


def base_url(url: str) -> str:
    """A server's address in one spelling: host in lower case, without a slash or `/v1`
    at its end.
    """
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return url  # the validation says what is wrong with it
    host = parts.netloc.rpartition("@")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return parts._replace(netloc="".join((*host[:2], host[2].lower())), path=path).geturl()


def teachers_from_yaml(
    entries: Any, path: str, backend: LocalBackend = "vllm"
) -> tuple[TeacherSpec, ...]:
    """The long form of `teachers`, checked key by key; `backend` is for entries that name none."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path}: teachers must be a list of {{name, model, domains, weight, backend}}"
        )
    return tuple(_teacher_from_yaml(entry, path, backend) for entry in entries)


_Word = str | int | float  # YAML reads the name 7 as a number
_ENTRY = {key: kind for key, kind in get_type_hints(TeacherSpec).items() if key != "past"} | {
    "name": _Word,
    "model": _Word,
    "domains": Annotated[tuple[_Word, ...], msgspec.Meta(min_length=1)] | Literal["*"],
    "teacher_chat_template_kwargs": str | dict[str, Any],
    "max_teacher_prompt_tokens": Annotated[int, msgspec.Meta(ge=0)],
}
_FORMS = {
    "domains": "a list of names or '*'",
    "weight": "a number",
    "backend": "vllm, hf or server",
    "tensor_parallel_size": "a whole number",
    "urls": "a list like [http://127.0.0.1:8000]",
    "allow": "a list of eos, template, rendering",
    "teacher_chat_template_kwargs": "an object",
    "max_teacher_prompt_tokens": "a whole number",
}


def _teacher_from_yaml(entry: Any, path: str, backend: LocalBackend) -> TeacherSpec:
    if isinstance(entry, dict):
        _refuse_secrets(entry, f"{path}: teachers")
    if not isinstance(entry, dict) or not entry.get("name"):
        raise ValueError(f"{path}: teachers: {entry!r} needs at least `name` and `model`")
    where = f"{path}: teachers: {entry['name']}"
    runs = _backend_of(str(entry.get("model")), backend)
    values = {"model": "", "domains": (entry["name"],), "backend": runs}
    for key, value in entry.items():
        if key not in _ENTRY:
            raise ValueError(f"{where}: unknown key `{key}`{nearest(str(key), [*_ENTRY])}")
        if value is not None:
            values[key] = _converted(where, key, value)
    if not values["model"] and values["backend"] != "server":
        remedy = (
            "`urls` need `backend: server`"
            if values.get("urls")
            else "only backend server does without a model"
        )
        raise ValueError(f"{where}: needs at least `name` and `model`; {remedy}")
    values |= {"name": str(values["name"]), "model": str(values["model"])}
    values["urls"] = tuple(map(base_url, values.get("urls", ())))
    if isinstance(variables := values.get("teacher_chat_template_kwargs"), dict):
        values["teacher_chat_template_kwargs"] = json.dumps(variables)
    if values["domains"] != "*":
        values["domains"] = tuple(map(str, values["domains"]))
    return TeacherSpec(**values)


def _converted(where: str, key: str, value: Any) -> Any:
    """The value of a key of an entry, in its type. Of URLs and keys nothing is shown: they may hold
    a secret.
    """
    try:
        return msgspec.convert(value, _ENTRY[key])
    except msgspec.ValidationError:
        shown = "" if key in ("urls", "api_key_env") else f", got {value!r}"
        close = nearest(str(value).lower(), list(get_args(Backend))) if key == "backend" else ""
        raise ValueError(
            f"{where}: {key} must be {_FORMS.get(key, 'text')}{shown}{close}"
        ) from None


def _refuse_secrets(content: dict[Any, Any], where: str) -> None:
    """A file is copied into the run directory, so no key may stand in it.

    The message does not repeat the secret.
    """
    for key in content:
        if str(key).lower().replace("-", "_") in _SECRET_KEYS:
            raise ValueError(
                f"{where}: `{key}`: no secret may stand in a file; put it into an environment "
                "variable and name that one in the teacher's `api_key_env`"
            )


def nearest(name: str, known: list[str]) -> str:
    """A remedy to append to a message: the known name most like `name`, or nothing if none is
    close; for a flag that is not to be had, what to do instead.
    """
    if remedy := _REMOVED.get(name.removeprefix("--")):
        return f"; {remedy}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(HfArgumentParser):
    """argparse, but a mistake is one line and exit status 2."""

    def add_argument(self, *names, **options):
        """Of what a field says of itself, argparse takes what it knows."""
        for ours in ("fingerprinted", "identifies", "remedy", "is_object"):
            options.pop(ours, None)
        return super().add_argument(*names, **options)

    @staticmethod
    def _parse_dataclass_field(parser, field):
        """A number, or `auto` in its place: a type that the base class does not know."""
        kinds = get_args(field.type)
        if Literal["auto"] not in kinds:
            HfArgumentParser._parse_dataclass_field(parser, field)
            return
        kind = next(kind for kind in kinds if kind != Literal["auto"])

        def number(text: str) -> int | float | str:
            return text if text == "auto" else kind(text)

        # argparse says it of a value that is neither
        number.__name__ = f"{'whole number' if kind is int else 'number'} or auto"
        parser.add_argument(f"--{field.name}", type=number, default=field.default, **field.metadata)

    def error(self, message):
        raise ValueError(message.removeprefix("argument "))


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(
            f"--config {path}: not a YAML file: {' '.join(str(error).split())}"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {path}: expected `flag: value` lines, got {type(content).__name__}"
        )
    return content


def _as_argv(key: str, value: Any, field: dataclasses.Field) -> list[str]:
    """One YAML entry as command-line arguments, so that both are read by the same code.

    `--flag=value`: a value may be -1.
    """
    if value is None or value == []:
        return []
    if not _is_list(field):
        if isinstance(value, dict | list):
            raise ValueError(f"--{key}: one value expected, the YAML file has {value!r}")
        return [f"--{key}={value}"]
    if field.metadata.get("is_object"):
        items = value if isinstance(value, list) else [value]
        value = [json.dumps(v, default=str) if isinstance(v, dict) else v for v in items]
    if isinstance(value, dict):
        value = [f"{k}={v}" for k, v in value.items()]
    return [f"--{key}={v}" for v in (value if isinstance(value, list) else [value])]


def parse(config_class, argv: list[str] | None = None):
    """Builds `config_class` from `--config FILE` and the command line; the command line always
    wins.

    The class is a frozen dataclass of groups plus a field `teachers: tuple[TeacherSpec, ...]`. If
    it has a field `explicit` too, that is the set of flags and keys that were given, whatever their
    values. Raises ValueError with one line for any mistake.
    """
    argv = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    groups = groups_of(config_class)
    fields = {f.name: f for group in groups.values() for f in dataclasses.fields(group)}
    path, content = _file_of(argv)
    _check_keys(path, content, [*fields, "teachers"])
    flags = _flags_in(argv)
    from_file = [
        word
        for key, value in content.items()
        if key not in flags and key != "teachers"
        for word in _as_argv(key, value, fields[key])
    ]
    values = _values(groups, fields, [*from_file, *argv])
    built = {
        name: group(**{f.name: values[f.name] for f in dataclasses.fields(group)})
        for name, group in groups.items()
    }
    if any(f.name == "explicit" for f in dataclasses.fields(config_class)):
        built["explicit"] = frozenset(given(argv))
    if "teachers" in content and "teacher" not in flags:
        if values["teacher"]:
            raise ValueError(f"--config {path}: both `teacher` and `teachers`; keep one")
        teachers = teachers_from_yaml(content["teachers"], path, values["teacher_backend"])
    else:
        teachers = resolve_teachers(values["teacher"], values["teacher_backend"])
    return config_class(**built, teachers=teachers)


def given(argv: list[str]) -> set[str]:
    """The flags of a command line, and the keys of its `--config FILE` that have a value."""
    argv = [_underscored(argument) for argument in argv]
    _, content = _file_of(argv)
    return _flags_in(argv) | {key for key, value in content.items() if value is not None}


def _flags_in(argv: list[str]) -> set[str]:
    return {a[2:].partition("=")[0].removeprefix("no_") for a in argv if a.startswith("--")}


def _file_of(argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The path behind `--config` and what the file holds."""
    path = _value_of(argv, "--config")
    content = _read_yaml(path) if path else {}
    _refuse_secrets(content, f"--config {path}")
    return path, content


def _check_keys(path: str | None, content: dict[str, Any], known: list[str]) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"--config {path}: unknown key `{key}`{nearest(str(key), known)}")


def _is_list(field: dataclasses.Field) -> bool:
    return field.default_factory is not dataclasses.MISSING


def _values(
    groups: dict[str, type], fields: dict[str, dataclasses.Field], argv: list[str]
) -> dict[str, Any]:
    """The value of every flag, from `argv` or by default."""
    parser = _Parser(
        list(groups.values()),
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config", help="YAML file of the same flags; the command line overrides it."
    )
    lists = [name for name, field in fields.items() if _is_list(field)]
    parser.set_defaults(**dict.fromkeys(lists))  # argparse would append to the default
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise ValueError(f"unknown flag {flag}{nearest(flag, ['--' + name for name in fields])}")
    values = vars(namespace)
    for name in lists:
        parts = values[name]
        if parts is None:
            parts = [fields[name].default_factory()]
        values[name] = [value for part in parts for value in part]
    return values


def _underscored(argument: str) -> str:
    """`--some-flag=a-b` is `--some_flag=a-b`."""
    flag, equals, value = argument.partition("=")
    return (
        flag.replace("-", "_").replace("__", "--", 1) + equals + value
        if flag.startswith("--")
        else argument
    )


def _value_of(argv: list[str], flag: str) -> str | None:
    for index, argument in enumerate(argv):
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
        if argument == flag:
            if index + 1 == len(argv):
                raise ValueError(f"{flag}: expected one argument")
            return argv[index + 1]
    return None
