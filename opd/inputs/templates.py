"""The chat template of a tokenizer: what it makes of a row's messages, and with which token it ends
an answer.

A template is a program that came with a model. It may fail in any way, want its messages in another
form than the usual one, or leave out what it was given without a word; each of these is found here,
row by row.
"""

import itertools
import json
import re
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2

from opd.inputs.chats import TOOLS, Chat, text_of
from opd.log import one_line

TIME_LIMIT_S = 5  # of processor time; a row takes about 0.1 ms
MARK = "zqxjk"  # an answer that no template contains
_ANSWER = {"role": "assistant", "content": MARK}


# ---- The forms in which templates want messages --------------------------------------------------


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The form of models that see images; to their templates a plain text is a list of nothing."""
    return (
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
    )


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": message.get("content", "")}


def _call_arguments(message: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """The arguments of its tool calls as JSON text, or as the object that such a text says."""

    def convert(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": convert(call["function"])}
        arguments = call.get("arguments")
        if as_text and isinstance(arguments, dict):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False, default=str)}
        if not as_text and isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                return call
            return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
        return call

    calls = message.get("tool_calls")
    return (
        {**message, "tool_calls": [convert(call) for call in calls]}
        if isinstance(calls, list)
        else message
    )


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same messages in every form that some template wants, the usual one first, none twice.

    A content is text, absent beside tool calls; or text always; or a list of parts. Arguments of
    tool calls are objects, as `transformers` documents them: most templates write a text as a JSON
    string of JSON; or they are text.
    """
    seen: list[list[dict[str, Any]]] = []
    for content, as_text in itertools.product((dict, _with_content, _as_parts), (False, True)):
        form = [content(_call_arguments(message, as_text=as_text)) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


# ---- Rendering -----------------------------------------------------------------------------------


class _Refused(Exception):
    """A template failed; the message is its own, in one line."""


@contextmanager
def _time_limit():
    """TimeoutError after TIME_LIMIT_S of processor time: loops in loops of a template may take
    days, and jinja has no limit.
    """

    def stop(*_):
        raise TimeoutError(f"it takes more than {TIME_LIMIT_S} s")

    # signals reach the main thread only
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def tokenize(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids with special tokens exactly once: a template writes its own, plain text
    gets a BOS.
    """
    if tokenizer.chat_template is not None:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    token_ids = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        ends_itself = eos is not None and text.endswith(eos)
        token_ids.append(
            ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not ends_itself else ids
        )
    return token_ids


def added_tokens(tokenizer) -> dict[str, int]:
    """The tokens beside its vocabulary proper, and their ids; mistral-common does not tell them."""
    return getattr(tokenizer, "get_added_vocab", dict)()


class ChatTemplate:
    """A tokenizer's chat template at work on the rows of a data set.

    `moment` is the time that it is told if it asks, as those of Llama 3.1 and Granite do, now by
    default. It must not change when a run is resumed: the prompts would.
    """

    def __init__(self, tokenizer, moment: datetime | None = None):
        self.tokenizer = tokenizer
        asks = "strftime_now" in str(tokenizer.chat_template)
        self.moment = (moment or datetime.now()) if asks else None
        self._clock = {"strftime_now": self.moment.strftime} if self.moment else {}
        self._shown: set[Any] = set()  # kinds of chats of which the template leaves out nothing

    def render(self, where: str, chat: Chat) -> str:
        """The text of a chat, with the beginning of the answer.

        Raises ValueError if the template fails, or leaves out a message or the tools in every form
        that it may want.
        """
        problems: list[str] = []
        for messages in _forms(chat.messages):
            form = Chat(messages, chat.tools, chat.kwargs)
            try:
                text = self._apply(form)
                left_out = self._left_out(form, text)
            except _Refused as error:
                problems.append(f"refuses it: {error}")
                continue
            if left_out is None:
                return text
            problems.insert(0, f"leaves out {left_out}")  # says more than a failure over some form
        raise ValueError(f"{where}: the chat template {problems[0]}")

    def end_of_turn(self, chat: Chat, eos_ids: Collection[int]) -> int | None:
        """The token that the template writes after an answer to `chat`, if it is one of `eos_ids`.

        Some write it only where another message follows, and some refuse an answer to no question.
        """
        user = {"role": "user", "content": MARK.upper()}
        for messages in (
            [*chat.messages, _ANSWER],
            [*chat.messages, _ANSWER, user],
            [{**user, "content": "?"}, _ANSWER],
        ):
            for ids in self._behind_answer(chat, messages):
                end = next((token_id for token_id in ids if token_id in eos_ids), None)
                if end is not None:
                    return end
        return None

    def closing(self, chat: Chat) -> int | None:
        """The added token right behind an answer to `chat` with which the chat ends, if there is
        one: whether responses end there or not.
        """
        added = set(added_tokens(self.tokenizer).values())
        firsts = (ids[0] for ids in self._behind_answer(chat, [*chat.messages, _ANSWER]) if ids)
        return next((token_id for token_id in firsts if token_id in added), None)

    def opening(self, chat: Chat) -> str | None:
        """What the template writes behind `chat` to begin an answer; None where that is not told.

        A model that has read it writes the first token of its answer.
        """
        for form in _forms(chat.messages):
            try:
                whole, rest = (
                    self._apply(Chat(form, chat.tools, chat.kwargs), add_generation_prompt=answers)
                    for answers in (True, False)
                )
            except _Refused:
                continue
            if whole.startswith(rest):
                return whole.removeprefix(rest)
        return None

    def _behind_answer(self, chat: Chat, messages: list[dict[str, Any]]) -> Iterator[list[int]]:
        """The tokens behind the answer in `messages`, in every form that the template takes."""
        for form in _forms(messages):
            try:
                text = self._apply(Chat(form, chat.tools, chat.kwargs), add_generation_prompt=False)
            except _Refused:
                continue
            # templates may change the case
            _, *after = re.split(MARK, text, flags=re.IGNORECASE)
            yield self.tokenizer(after[0], add_special_tokens=False)["input_ids"] if after else []

    def unknown(self, names: Collection[str]) -> list[str]:
        """Those of the variables that do not occur in the template."""
        source = str(self.tokenizer.chat_template)
        return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", source)]

    def _apply(self, chat: Chat, *, add_generation_prompt: bool = True) -> str:
        try:
            with _time_limit():
                text = self.tokenizer.apply_chat_template(
                    chat.messages,
                    tools=chat.tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self._clock,
                    **chat.kwargs,
                )
            text.encode()  # a template may write what no tokenizer takes
        except Exception as error:  # a template is a program of others: it may fail in any way
            said, kind = one_line(error), type(error).__name__
            plain = isinstance(error, jinja2.TemplateError | ValueError | TypeError) or said == kind
            raise _Refused(said if plain else f"{kind}: {said}") from None
        return text

    def _left_out(self, chat: Chat, text: str) -> str | None:
        """What of `chat` has no part in its rendering `text`; answers aside, whose thinking many
        templates drop.

        A template may change a text in any way, so each is exchanged for another one, and the
        rendering must change. For chats of a kind that was tried before it is enough if the text
        stands there.
        """
        is_known = chat.kind in self._shown
        if isinstance(chat.messages[-1].get("content"), list) and re.search(
            r"""['"]type['"]: ['"]text['"]""", text
        ):
            raise _Refused("it takes no list of parts")
        for number, message in enumerate(chat.messages, 1):
            content, role = text_of(message).strip(), message["role"]
            is_seen = not content or role == "assistant" or (is_known and content in text)
            if not is_seen and not self._changes(chat, text, number - 1, _exchanged(message)):
                return f"the text of message {number}, of role {' '.join(role.split())}"
            for without in () if is_known else _with_an_image_less(message):
                if not self._changes(chat, text, number - 1, without):
                    return f"an image of message {number}; take a model that sees images"
            if message.get("tool_calls") and not is_known:
                silent = {k: v for k, v in _with_content(message).items() if k != "tool_calls"}
                if not self._changes(chat, text, number - 1, silent):
                    return f"the tool calls of message {number}"
        if (
            chat.tools
            and not is_known
            and self._rendering(Chat(chat.messages, None, chat.kwargs)) == text
        ):
            return (
                f"the tools of column `{TOOLS}`; remove the column, or take a model that uses tools"
            )
        self._shown.add(chat.kind)
        return None

    def _changes(self, chat: Chat, text: str, index: int, message: dict[str, Any]) -> bool:
        """Whether the rendering changes with another message in the place `index`."""
        other = [*chat.messages[:index], message, *chat.messages[index + 1 :]]
        return self._rendering(Chat(other, chat.tools, chat.kwargs)) != text

    def _rendering(self, chat: Chat) -> str | None:
        try:
            return self._apply(chat)
        except _Refused:
            return None


def _exchanged(message: dict[str, Any]) -> dict[str, Any]:
    """The message with another text of the same length: some templates write something for every
    letter of a text.
    """
    text = text_of(message)
    other = ("x" if set(text.lower()) != {"x"} else "y") * len(text)
    if not isinstance(message["content"], list):
        return {**message, "content": other}
    parts = [
        {**part, "text": other[: len(part["text"])]} if part["type"] == "text" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _with_an_image_less(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The message without each of its images in turn."""
    content = message.get("content")
    for index, part in enumerate(content) if isinstance(content, list) else ():
        if part["type"] == "image":
            yield {**message, "content": content[:index] + content[index + 1 :]}
