"""What a row tells the chat template: messages, tools and template variables, each checked."""

import dataclasses
import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from opd.inputs.columns import column, json_column, without_nulls
from opd.inputs.images import MARKER, parts_of, with_images
from opd.log import cut

TOOLS, KWARGS = (
    "tools",
    "chat_template_kwargs",
)  # the columns' names in TRL, whose data sets have them


SYSTEM_ROLES = {"system", "developer"}


@dataclass(frozen=True)
class Chat:
    """What a row tells the chat template.

    A content is text, a list of parts that are text or images, or absent beside tool calls.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None  # JSON schemas of functions
    # variables of the template, such as enable_thinking
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a template may treat in ways of its own, whatever the texts are."""
        return (
            tuple((m["role"], frozenset(m), _form(m.get("content"))) for m in self.messages),
            self.tools is None,
            frozenset(self.kwargs),
        )


def _form(content: Any) -> Any:
    return tuple(part["type"] for part in content) if isinstance(content, list) else type(content)


def text_of(message: dict[str, Any]) -> str:
    """The text of a message's content, empty where there is none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def _is_content(content: Any) -> bool:
    """Text, or a list of parts that are text or images: `{"type": "image"}` says where."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(
            isinstance(part, dict)
            and (
                part.get("type") == "image"
                or (part.get("type") == "text" and isinstance(part.get("text"), str))
            )
            for part in content
        )
    )


def _says(message: dict[str, Any]) -> bool:
    content = message["content"]
    shows = isinstance(content, list) and any(part["type"] == "image" for part in content)
    return shows or bool(text_of(message).strip())


def user_text(chat: Chat, marker: str = MARKER) -> str | None:
    """The text of its last user message, with `marker` where an image stands; None without one."""
    message = next((m for m in reversed(chat.messages) if m["role"] == "user"), None)
    if message is None:
        return None
    if not isinstance(message.get("content"), list):
        return message.get("content") or ""
    parts = parts_of(message)
    return "".join(part["text"] if part["type"] == "text" else marker for part in parts)


def with_user_text(where: str, chat: Chat, text: str, images_key: str = "images") -> Chat:
    """The chat with another text in its last user message, which shows the same images.

    ValueError if the text shows more or fewer: `<image>` says where, and without any they come
    first.
    """
    place = max(i for i, message in enumerate(chat.messages) if message["role"] == "user")
    old, message = chat.messages[place].get("content"), {**chat.messages[place], "content": text}
    if isinstance(old, list):
        count = sum(part["type"] == "image" for part in old)
        (message,) = with_images(where, [message], count, images_key)
    messages = [*chat.messages[:place], message, *chat.messages[place + 1 :]]
    return dataclasses.replace(chat, messages=messages)


def with_system_text(where: str, chat: Chat, text: str) -> Chat:
    """The chat with this system message, in place of its own if it has one.

    ValueError if an image would get lost with that, or if the text is to show one.
    """
    old = [m for m in chat.messages if m["role"] in SYSTEM_ROLES]
    if any(part["type"] == "image" for m in old for part in parts_of(m)):
        raise ValueError(f"{where}: it takes the place of a system message that shows an image")
    if MARKER in text and any(parts_of(m) for m in chat.messages):
        raise ValueError(f"{where}: a system message shows no image; remove {MARKER} from it")
    rest = [m for m in chat.messages if m["role"] not in SYSTEM_ROLES]
    return dataclasses.replace(chat, messages=[{"role": "system", "content": text}, *rest])


def _messages(where: str, row: dict[str, Any], key: str, key_flag: str) -> list[dict[str, Any]]:
    """Checked chat messages; text becomes one user message."""
    prompt = column(where, row, key, key_flag)
    where = f"{where}: column `{key}`"
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) for m in prompt):
        raise ValueError(
            f"{where} must be text or a list of {{role, content}} messages, got {cut(prompt)}"
        )
    for message in prompt:
        is_call = message.get("content") is None and message.get("tool_calls")
        if not isinstance(message.get("role"), str) or not (
            is_call or _is_content(message.get("content"))
        ):
            raise ValueError(
                f"{where}: every message needs a role and a content of text, or of parts of type "
                f"text and image, got {cut(message)}"
            )
    if not any(message.get("content") and _says(message) for message in prompt):
        raise ValueError(f"{where}: the prompt is empty")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{where} ends with an assistant message; remove the answer from the prompt"
        )
    # A column store fills the keys that other messages have with nulls; a template would take them
    # for values.
    return without_nulls(prompt)


def _tools(where: str, row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = json_column(where, row, TOOLS)
    if tools in (None, []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"{where}: column `{TOOLS}` must be a list of JSON schemas, or its JSON text, got "
            f"{cut(tools)}"
        )
    return tools


def _kwargs(where: str, row: dict[str, Any]) -> dict[str, Any]:
    kwargs = json_column(where, row, KWARGS)
    if kwargs in (None, []):
        return {}
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise ValueError(
            f"{where}: column `{KWARGS}` must be an object of names and values, got {cut(kwargs)}"
        )
    return kwargs


def taken_names(names: Collection[str], tokenizer) -> list[str]:
    """Those of the variables' names that `apply_chat_template` has taken itself."""
    if not names:
        return []
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    ours = {*parameters, "messages", "strftime_now"} - {"documents"}
    return sorted(ours & set(names))


def read_chat(
    where: str,
    row: dict[str, Any],
    prompt_key: str,
    tokenizer,
    *,
    key_flag: str = "--prompt_key",
    num_images: int = 0,
    images_key: str = "images",
    sees: bool = False,
) -> Chat:
    """What a row says to the chat template of `tokenizer`. For a student that `sees`, the text
    shows as many images as there are.

    ValueError, with the row, for what it must not say.
    """
    kwargs = _kwargs(where, row)
    if taken := taken_names(kwargs, tokenizer):
        raise ValueError(
            f"{where}: column `{KWARGS}`: {taken[0]} is not the row's to choose; remove it"
        )
    messages = _messages(where, row, prompt_key, key_flag)
    if sees or num_images or any(isinstance(m.get("content"), list) for m in messages):
        messages = with_images(where, messages, num_images, images_key)
    if not num_images:
        messages = [{**m, "content": text_of(m)} if "content" in m else m for m in messages]
    return Chat(messages, _tools(where, row), kwargs)


def read_plain(
    where: str, row: dict[str, Any], prompt_key: str, key_flag: str = "--prompt_key"
) -> str:
    """The prompt of a row as it is, for a tokenizer without a chat template."""
    _messages(where, row, prompt_key, key_flag)  # for what it refuses
    prompt = row[prompt_key]
    if not isinstance(prompt, str):
        raise ValueError(
            f"{where}: column `{prompt_key}` holds messages and the tokenizer has no chat "
            "template; use text"
        )
    for name, value in ((TOOLS, _tools(where, row)), (KWARGS, _kwargs(where, row))):
        if value:
            raise ValueError(
                f"{where}: column `{name}` needs a chat template, and the tokenizer has none; "
                "remove it"
            )
    return prompt
