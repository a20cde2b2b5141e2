"""What flags tell the chat template beside the rows: variables and a system message, for all rows
or for those of a domain.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from opd.config import DataConfig
from opd.inputs.chats import KWARGS, SYSTEM_ROLES, Chat, taken_names
from opd.log import cut, one_line

KWARGS_FLAG, SYSTEM_FLAG = f"--{KWARGS}", "--system_prompt"


@dataclass(frozen=True)
class TemplateFlags:
    """What `--chat_template_kwargs` and `--system_prompt` say, by domain; None is every domain."""

    kwargs: dict[str | None, dict[str, Any]]
    system: dict[str | None, str]

    @property
    def variables(self) -> set[str]:
        """The names of all variables that some row gets."""
        return {name for kwargs in self.kwargs.values() for name in kwargs}

    def system_of(self, domain: str) -> str:
        """The system message of a domain's rows that have none; empty for none."""
        return self.system.get(domain, self.system.get(None, ""))

    def completed(self, chat: Chat, domain: str) -> Chat:
        """A row's chat with what the flags add. What the row says itself stays."""
        kwargs = {**self.kwargs.get(None, {}), **self.kwargs.get(domain, {}), **chat.kwargs}
        system, messages = self.system_of(domain), chat.messages
        if system and not any(message["role"] in SYSTEM_ROLES for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return dataclasses.replace(chat, messages=messages, kwargs=kwargs)

    def check_domains(self, known: Collection[str]) -> None:
        """ValueError for a domain that no row has."""
        for flag, by_domain in ((KWARGS_FLAG, self.kwargs), (SYSTEM_FLAG, self.system)):
            for domain in by_domain:
                if domain is not None and domain not in known:
                    text = "; a text that begins like this is written =TEXT"
                    raise ValueError(
                        f"{flag} {domain}=...: the data has no domain {domain}, only "
                        f"{', '.join(known)}{text if flag == SYSTEM_FLAG else ''}"
                    )
        text = self.system.get(None, "")
        if spaced := [domain for domain in known if text.startswith(f"{domain}=")]:
            raise ValueError(
                f"{SYSTEM_FLAG} {cut(text)}: the name of the domain {spaced[0]} has spaces, so its "
                "text is not told from one for all; put it into the rows"
            )

    def check_tokenizer(self, tokenizer) -> None:
        """ValueError where its chat template is missing, or its own names are taken."""
        for flag, is_given in (
            (KWARGS_FLAG, self.variables),
            (SYSTEM_FLAG, any(self.system.values())),
        ):
            if is_given and tokenizer.chat_template is None:
                raise ValueError(
                    f"{flag}: only a chat template can write it, and the student's tokenizer has "
                    "none; remove the flag"
                )
        if taken := taken_names(self.variables, tokenizer):
            raise ValueError(f"{KWARGS_FLAG}: {taken[0]} is not a variable to choose; remove it")


def read_template_flags(cfg: DataConfig) -> TemplateFlags:
    """ValueError for what is no object or no text, and for what is given twice."""
    kwargs = objects_by_name(cfg.chat_template_kwargs, KWARGS_FLAG, "domain")
    system: dict[str | None, str] = {}
    for value in cfg.system_prompt:
        is_named = re.match(r"[^\s=]*=", value)
        domain, text = split_name(value) if is_named else (None, value)
        if domain is None and not text.strip():
            raise ValueError(f"{SYSTEM_FLAG}: the text is empty; write one, or remove the flag")
        add_once(system, domain, text, SYSTEM_FLAG, "domain")
    return TemplateFlags(kwargs, system)


def objects_by_name(
    values: Sequence[str], flag: str, whose: str
) -> dict[str | None, dict[str, Any]]:
    """JSON objects, `NAME={...}` or `{...}` for all, None; `whose` says whose names they are."""
    found: dict[str | None, dict[str, Any]] = {}
    for value in values:
        is_all = "=" not in value or value.lstrip()[:1] in ("{", "[")
        name, text = (None, value) if is_all else split_name(value)
        add_once(found, name, json_object(flag, value, text, whose.upper()), flag, whose)
    return found


def split_name(value: str) -> tuple[str | None, str]:
    """NAME=TEXT in two; None for an empty name, which is everybody's."""
    name, _, text = value.partition("=")
    return name or None, text


def add_once(
    by_name: dict[str | None, Any], name: str | None, value: Any, flag: str, whose: str
) -> None:
    """ValueError for a name that is there already."""
    if name in by_name:
        of = f"every {whose}" if name is None else f"the {whose} {name}"
        raise ValueError(f"{flag}: given twice for {of}; quote a text of several words")
    by_name[name] = value


def json_object(flag: str, value: str, text: str, name: str) -> dict[str, Any]:
    """The object that `text` says, of the flag's `value`; ValueError for anything else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {one_line(error)}"
    else:
        if isinstance(parsed, dict):
            return parsed
        reason = "not a JSON object"
    raise ValueError(
        f"{flag} {cut(value)}: {reason}; write "
        f"""'{{"enable_thinking": false}}', or '{name}={{...}}'"""
    )
