"""What flags tell the chat template beside the rows: variables and a system message, for all rows
or for those of a domain.
"""

import dataclasses
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from opd.config import DataConfig
from opd.inputs.chats import KWARGS, Chat, taken_names
from opd.log import cut, one_line

KWARGS_FLAG, SYSTEM_FLAG = f"--{KWARGS}", "--system_prompt"
_SYSTEM_ROLES = {"system", "developer"}


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
        if system and not any(message["role"] in _SYSTEM_ROLES for message in messages):
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
    kwargs: dict[str | None, dict[str, Any]] = {}
    for value in cfg.chat_template_kwargs:
        is_all = "=" not in value or value.lstrip()[:1] in ("{", "[")
        domain, text = (None, value) if is_all else _of_domain(value)
        _add(kwargs, domain, _object(value, text), KWARGS_FLAG)
    system: dict[str | None, str] = {}
    for value in cfg.system_prompt:
        is_named = re.match(r"[^\s=]*=", value)
        domain, text = _of_domain(value) if is_named else (None, value)
        if domain is None and not text.strip():
            raise ValueError(f"{SYSTEM_FLAG}: the text is empty; write one, or remove the flag")
        _add(system, domain, text, SYSTEM_FLAG)
    return TemplateFlags(kwargs, system)


def _of_domain(value: str) -> tuple[str | None, str]:
    domain, _, text = value.partition("=")
    return domain or None, text


def _add(by_domain: dict[str | None, Any], domain: str | None, value: Any, flag: str) -> None:
    if domain in by_domain:
        whose = "every domain" if domain is None else f"the domain {domain}"
        raise ValueError(f"{flag}: given twice for {whose}; quote a text of several words")
    by_domain[domain] = value


def _object(value: str, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON: {one_line(error)}"
    else:
        if isinstance(parsed, dict):
            return parsed
        reason = "not a JSON object"
    raise ValueError(
        f"{KWARGS_FLAG} {cut(value)}: {reason}; write "
        """'{"enable_thinking": false}', or 'DOMAIN={...}'"""
    )
