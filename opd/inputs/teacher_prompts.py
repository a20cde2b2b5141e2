"""Prompts that teachers alone read: a column, a text made of columns, another system message, other
variables of the chat template, or what a function of the user makes of a prompt and its response.

The student never sees them. A teacher reads its own prompt, rendered by the student's tokenizer,
and then the student's response; scores are aligned by the index in the response.
"""

import dataclasses
import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opd.config import DataConfig, TeacherSpec
from opd.inputs.arguments import nearest
from opd.inputs.chats import (
    Chat,
    read_plain,
    taken_names,
    user_text,
    with_system_text,
    with_user_text,
)
from opd.inputs.columns import text_column
from opd.inputs.functions import import_function
from opd.inputs.template_flags import add_once, json_object, objects_by_name, split_name
from opd.inputs.templates import ChatTemplate, tokenize
from opd.log import cut
from opd.ops.pixels import Pixels
from opd.pictures import PromptImages
from opd.types import Prompt

FLAG, VARIABLES_FLAG = "--teacher_prompt", "--teacher_chat_template_kwargs"
BOUND_FLAG = "--max_teacher_prompt_tokens"
SYSTEM, PYTHON = "system:", "python:"
PROMPT = "prompt"  # the field of a text that stands for the row's own prompt

# (prompt, text of the response, id of the sample) -> a user message, or None
Feedback = Callable[[Prompt, str, str], str | None]


@dataclass(frozen=True)
class OwnPrompt:
    """How a teacher's prompts differ from the student's."""

    name: str  # of the teacher
    flag: str  # what messages begin with
    kind: Literal["same", "column", "user", "system", "function"] = "same"
    text: str = ""  # the column, or module:function
    # of a text: (what stands in front, column) pairs; the last one may have no column
    parts: tuple[tuple[str, str | None], ...] = ()
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the chat template
    bound: int = 0  # its longest, in tokens; 0 if nobody has said it

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that it takes its text from."""
        fields = tuple(field for _, field in self.parts if field is not None)
        return (self.text,) if self.kind == "column" else fields

    def chat(self, where: str, row: dict[str, Any], own: Chat, cfg: DataConfig) -> Chat:
        """What the teacher reads of a row: of `own`, which the student reads.

        Of a column, `own` is what that says. ValueError, with the row, for what cannot be read.
        """
        chat, key = own, cfg.prompt_key
        if self.kind == "user":
            text = self.filled(where, row, self.check_has_user(where, own, key), key)
            chat = with_user_text(f"{where}: {self.flag}", own, text, cfg.images_key)
        elif self.kind == "system":
            # its images stay where the user shows them
            text = self.filled(where, row, user_text(own, marker="") or "", key)
            chat = with_system_text(f"{where}: {self.flag}", own, text)
        return self.with_variables(chat)

    def check_has_user(self, where: str, chat: Chat, key: str) -> str:
        """The text of the last user message; ValueError without one."""
        asked = user_text(chat)
        if asked is None:
            raise ValueError(
                f"{where}: column `{key}` has no user message into which {self.flag} could put its "
                "text; use a column of messages"
            )
        return asked

    def with_variables(self, chat: Chat) -> Chat:
        """The chat with the teacher's variables of the template."""
        return dataclasses.replace(chat, kwargs={**chat.kwargs, **self.variables})

    def plain(self, where: str, row: dict[str, Any], own: str, key: str) -> str:
        """The same for a tokenizer without a chat template."""
        if self.kind == "column":
            return read_plain(where, row, self.text, self.flag)
        return self.filled(where, row, own, key) if self.kind == "user" else own

    def filled(self, where: str, row: dict[str, Any], prompt: str, key: str) -> str:
        """The text with the row's columns in it; `prompt` is the student's, of the column `key`."""
        found = []
        for before, name in self.parts:
            found.append(before)
            if name in (PROMPT, key):
                found.append(prompt)
            elif name is not None:
                value = text_column(where, row, name, self.flag, is_needed=True)
                if not value.strip():
                    raise ValueError(f"{where}: column `{name}` is empty, and {self.flag} needs it")
                found.append(value)
        return "".join(found)

    @property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint of a run says of it; rows' prompts are in that of the data."""
        found = {"prompt": [self.kind, self.text, self.parts], "variables": self.variables}
        return found | ({"prompt_tokens": self.bound} if self.kind == "function" else {})

    def lacks(self, row: dict[str, Any], key: str) -> list[str]:
        """The columns that it needs and the row does not have."""
        given = () if self.kind == "column" else (PROMPT, key)
        return [name for name in self.needs if name not in row and name not in given]

    def check_columns(self, where: str, row: dict[str, Any], key: str) -> None:
        """ValueError for a column that the row does not have, with the nearest that it has."""
        for name in self.lacks(row, key):
            remedy = nearest(name, [*map(str, row), PROMPT])
            if self.kind == "column" and ":" in name:
                remedy = f"; a function is {PYTHON}MODULE:FUNCTION"
            elif self.kind == "column" and " " in name:
                remedy = "; a text has columns in braces, such as {prompt}"
            name, known = (" ".join(text.split()) for text in (name, ", ".join(map(str, row))))
            raise ValueError(
                f"{where}: column `{name}` is missing, which {self.flag} needs; the row has {known}"
                f"{remedy}"
            )

    def check_tokenizer(self, tokenizer) -> None:
        """ValueError where its chat template is missing, or its own names are taken."""
        if tokenizer.chat_template is None and (self.kind == "system" or self.variables):
            raise ValueError(
                f"{self.flag}: only a chat template can write it, and the student's tokenizer has "
                "none; remove it"
            )
        if taken := taken_names(self.variables, tokenizer):
            raise ValueError(f"{self.flag}: {taken[0]} is not a variable to choose; remove it")


# ---- What flags and entries say ------------------------------------------------------------------


def own_prompts(config) -> dict[str, OwnPrompt]:
    """By teacher; one that reads the student's prompt is absent.

    ValueError for what cannot be understood, for an unknown teacher, and for what is given twice.
    """
    flags, found = config.privilege, {}
    names = [spec.name for spec in config.teachers]
    texts = _texts_by_name(flags.teacher_prompt)
    variables = objects_by_name(flags.teacher_chat_template_kwargs, VARIABLES_FLAG, "teacher")
    for flag, by_name in ((FLAG, texts), (VARIABLES_FLAG, variables)):
        for name in by_name:
            if name is not None and name not in names:
                text = "; a text that begins like this is written =TEXT" if flag == FLAG else ""
                raise ValueError(
                    f"{flag} {name}=...: no teacher is called {name}, only {', '.join(names)}{text}"
                )
    for spec in config.teachers:
        own = _own_prompt(spec, texts, variables)
        if own.kind != "same" or own.variables:
            found[spec.name] = own = dataclasses.replace(own, bound=_bound_of(config, spec))
        if own.kind == "function" and not own.bound:
            raise ValueError(
                f"{own.flag}: how long its prompts are is not known before they are made; give "
                f"{BOUND_FLAG}"
            )
    return found


def _bound_of(config, spec: TeacherSpec) -> int:
    general = config.privilege.max_teacher_prompt_tokens
    return spec.max_teacher_prompt_tokens or (0 if general == "auto" else general)


def _texts_by_name(values: Sequence[str]) -> dict[str | None, str]:
    found: dict[str | None, str] = {}
    for value in values:
        name, text = split_name(value) if re.match(r"[^\s={}]*=", value) else (None, value)
        if name is None and not text.strip():
            raise ValueError(f"{FLAG}: the text is empty; write one, or remove the flag")
        add_once(found, name, text, FLAG, "teacher")
    return found


def _own_prompt(
    spec: TeacherSpec, texts: dict[str | None, str], variables: dict[str | None, dict[str, Any]]
) -> OwnPrompt:
    """Of one teacher: its entry's, else its flag's, else everybody's."""
    said = {**variables.get(None, {}), **variables.get(spec.name, {})}
    flag = f"{FLAG} of teacher {spec.name}"
    if entry := spec.teacher_chat_template_kwargs:
        if spec.name in variables:
            raise ValueError(f"{VARIABLES_FLAG} {spec.name}=...: its entry in `teachers` has them")
        where = f"teachers: {spec.name}: {VARIABLES_FLAG[2:]}"
        said |= json_object(where, entry, entry, spec.name)
    if spec.teacher_prompt and spec.name in texts:
        raise ValueError(f"{FLAG} {spec.name}=...: its entry in `teachers` has one")
    text = spec.teacher_prompt or texts.get(spec.name, texts.get(None, ""))
    if not text.strip():
        return OwnPrompt(spec.name, flag if text else VARIABLES_FLAG, variables=said)
    if text.startswith(PYTHON):
        return OwnPrompt(spec.name, flag, "function", _function(flag, text), variables=said)
    if text.startswith(SYSTEM):
        text = text.removeprefix(SYSTEM).strip()
        if not text:
            raise ValueError(f"{flag}: the system message is empty; write {SYSTEM}TEXT")
        return OwnPrompt(spec.name, flag, "system", parts=_read_fields(flag, text), variables=said)
    if set(text) & set("{}"):
        return OwnPrompt(spec.name, flag, "user", parts=_read_fields(flag, text), variables=said)
    return OwnPrompt(spec.name, flag, "column", text, variables=said)


def _function(flag: str, text: str) -> str:
    name = text.removeprefix(PYTHON).strip()
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f"{flag} {cut(text)}: write {PYTHON}MODULE:FUNCTION")
    return name


def _read_fields(flag: str, text: str) -> tuple[tuple[str, str | None], ...]:
    """As `str.format` reads them, but that a field is the name of a column and nothing else."""
    remedy = "a field is a column, such as {prompt}; braces of the text itself are doubled: {{ }}"
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{flag} {cut(text)}: {error}; {remedy}") from None
    for _, field, form, conversion in found:
        if field is not None and (not field.strip() or form or conversion):
            raise ValueError(f"{flag} {cut(text)}: {remedy}")
    return tuple((before, field) for before, field, _, _ in found)


# ---- Rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnRows:
    """What a teacher reads of its rows in place of what the student does, by row."""

    own: OwnPrompt
    chats: dict[int, Chat]  # none for a tokenizer without a chat template
    texts: dict[int, str]
    ids: dict[int, list[int]]
    notes: tuple[str, ...] = ()


def read_own_rows(
    own: OwnPrompt,
    rows: dict[int, tuple[str, dict[str, Any], Any]],
    cfg: DataConfig,
    tokenizer,
    template: ChatTemplate | None,
    read_column: Callable[[int], Chat],
    *,
    is_held_out: bool,
) -> OwnRows:
    """The prompts of a teacher; `rows` has (where, row, what the student reads) of its domains.

    `read_column` reads a row's column in place of the prompt. Held-out rows may all lack a column:
    the teacher is then evaluated on the student's prompts. ValueError for a row that cannot be
    read.
    """
    own.check_tokenizer(tokenizer)
    key = cfg.prompt_key
    if own.kind == "function" and template is not None:
        for where, _, students in rows.values():
            own.check_has_user(where, students, key)
    if own.kind == "function" and not own.variables:
        return OwnRows(own, {}, {}, {})
    if is_held_out and rows and all(own.lacks(row, key) for _, row, _ in rows.values()):
        (name, *_) = own.lacks(next(iter(rows.values()))[1], key)
        note = f"no row has column `{name}`, so teacher {own.name} reads the student's prompts"
        return OwnRows(own, {}, {}, {}, (note,))
    chats: dict[int, Chat] = {}
    texts: dict[int, str] = {}
    for i, (where, row, students) in rows.items():
        own.check_columns(where, row, key)
        if template is None:
            texts[i] = own.plain(where, row, students, key)
            continue
        if own.kind == "column":
            students = read_column(i)
        chats[i] = own.chat(where, row, students, cfg)
        texts[i] = template.render(f"{where}: {own.flag}", chats[i])
    all_ids = tokenize([*texts.values()], tokenizer) if texts else []
    ids = dict(zip(texts, all_ids, strict=True))
    for i, found in ids.items():
        if not found:
            raise ValueError(f"{rows[i][0]}: {own.flag}: the prompt is empty after tokenisation")
    unknown = template.unknown(own.variables) if template else []
    notes = [f"{own.flag} sets {cut(n)}, which the chat template does not mention" for n in unknown]
    return OwnRows(own, chats, texts, ids, tuple(notes))


def claimants(teachers: Sequence[TeacherSpec], domain: str) -> list[TeacherSpec]:
    """The teachers of a domain: those that name it, else the "*" teachers; none of weight 0."""
    named = [spec for spec in teachers if spec.domains != "*" and domain in spec.domains]
    chosen = named or [spec for spec in teachers if spec.domains == "*"]
    return [spec for spec in chosen if spec.share > 0]


def expanded_own(
    where: str,
    row: int,
    student_ids: list[int],
    theirs: Mapping[str, OwnRows],
    *,
    show: Callable[[str, str, list[int]], PromptImages | None],
    pixels: Pixels | None,
    never: Collection[int],
) -> tuple[dict[str, list[int]], dict[str, PromptImages]]:
    """Teacher -> what it reads of a row, where that is not the student's, and its images.

    `student_ids` have placeholders that are not expanded, `show` makes of (where, text, its ids)
    the row's images in it, and `never` are the placeholders that a row without images must not
    have. ValueError for those, and for a prompt that is longer than somebody has allowed.
    """
    found, shown = {}, {}
    for name, rows in theirs.items():
        ids, at, bound = rows.ids.get(row, student_ids), f"{where}: {rows.own.flag}", rows.own.bound
        if ids == student_ids:
            continue
        images = show(at, rows.texts[row], ids)
        if images is not None:
            shown[name], ids = images, pixels.expanded(images.text, images.pictures)
        elif set(never) & {*ids}:
            raise ValueError(
                f"{at}: the placeholder of an image, and the row has none; remove it from the text"
            )
        if 0 < bound < len(ids):
            raise ValueError(
                f"{at}: {len(ids)} tokens, over {BOUND_FLAG} {bound}; raise it or shorten the "
                "prompt"
            )
        found[name] = ids
    return found, shown


def longest_prompt(config, spec: TeacherSpec) -> int:
    """Tokens of the longest prompt that the teacher may have to read."""
    return max(config.data.max_prompt_tokens, spec.max_teacher_prompt_tokens)


def with_bounds(config, found: dict[str, int]) -> Any:
    """The configuration in which the entry of every teacher with prompts of its own says how long
    they may be: what somebody has said, else what was `found`.
    """
    own = own_prompts(config)
    specs = [
        dataclasses.replace(
            spec, max_teacher_prompt_tokens=own[spec.name].bound or found.get(spec.name, 0)
        )
        if spec.name in own
        else spec
        for spec in config.teachers
    ]
    return dataclasses.replace(config, teachers=tuple(specs))


def check_first_token(
    own: OwnPrompt, template: ChatTemplate, samples: Sequence[Chat], theirs: Sequence[Chat]
) -> str | None:
    """What to warn of where the two prompts begin the answer in other ways: the first token of a
    response then means something else to the teacher. None where they do not.

    `samples` are chats of the student, `theirs` those of the teacher.
    """
    here = {template.opening(chat) for chat in samples} - {None}
    there = {template.opening(chat) for chat in theirs} - {None}
    if there <= here:
        return None
    mine, other = (min(found) if found else "" for found in (here, there - here))
    return (
        f"teacher {own.name}: its prompt ends with {cut(other)}{_thinking(other)} where the "
        f"student's ends with {cut(mine)}{_thinking(mine)}, so the first token of a response means "
        f"something else to it; see {VARIABLES_FLAG}"
    )


def _thinking(opening: str) -> str:
    """Whether an answer that begins so is inside a block of thinking."""
    is_open = opening.rfind("<think>") > opening.rfind("</think>")
    return " (inside an open <think>)" if is_open else ""


# ---- Functions of the user -----------------------------------------------------------------------


def load_feedback(own: OwnPrompt) -> Feedback:
    """The function of a teacher whose prompts are made after the rollout.

    It gives the text of a user message, or None for the student's prompt. Anything else, and
    whatever it raises, is a RuntimeError that names function and sample.
    """
    name = f"{own.flag} {PYTHON}{own.text}"
    function = import_function(name, own.text)

    def feedback(prompt: Prompt, response: str, sample_id: str) -> str | None:
        where = f"{name}: sample {sample_id}, prompt {prompt.prompt_id} ({prompt.domain})"
        try:
            text = function(prompt, response)
        except Exception as error:  # the user's function may fail in any way
            said = " ".join(str(error).split())
            raise RuntimeError(f"{where}: {type(error).__name__}: {said}") from error
        if text is None:
            return None
        if not isinstance(text, str) or not text.strip():
            raise RuntimeError(f"{where}: it returned {cut(text)}, not a text or None")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RuntimeError(f"{where}: its text has half a surrogate pair") from None
        return text

    return feedback
