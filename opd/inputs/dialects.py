"""Whether a teacher reads the student's tokens as the student writes them: its tokenizer, where its
responses end, and its chat template.

A teacher never sees text, only the student's own token ids, prompt included. So a tokenizer that
differs in tokens that nobody uses does no harm, and of two chat templates it matters only what they
make of the run's own prompts.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from opd.inputs.prompts import PromptSet, RenderedChat
from opd.inputs.templates import ChatTemplate, added_tokens
from opd.types import Prompt

OTHER_TEACHER = "choose a teacher of the student's family"
_AROUND = 24  # characters that a message shows on each side of a difference


@dataclass(frozen=True)
class Foreign:
    """Added tokens in which a teacher's tokenizer and the student's differ."""

    ids: frozenset[int] = frozenset()  # that one of them does not have, or has for another token
    texts: tuple[str, ...] = ()  # of those that only the teacher has


@dataclass(frozen=True)
class Dialect:
    """What a teacher's tokenizer is to the student."""

    name: str
    flag: str  # what messages begin with
    allowed: frozenset[str]
    foreign: Foreign
    tokenizer: Any  # None where a server keeps it

    @property
    def accept(self) -> str:
        """What accepts a difference, but for the word that is put behind it."""
        return f"choose a matching teacher, or accept it with --allow {self.name}="


# ---- Tokenizers ----------------------------------------------------------------------------------


def compare_tokenizers(flag: str, theirs, mine, used: Collection[int]) -> Foreign:
    """Ids must mean the same; how text becomes ids does not matter, since nothing is ever tokenised
    again.

    Only added tokens may differ, and none of the ids `used`, which the run itself writes. Whether
    the prompts have such tokens, `check_dialects` says.
    """
    own, other = mine.get_vocab(), theirs.get_vocab()
    if own == other:
        return Foreign()
    differing = sorted(t for t in own.keys() | other.keys() if own.get(t) != other.get(t))
    plain = (own.keys() - added_tokens(mine).keys()) | (other.keys() - added_tokens(theirs).keys())
    if basic := [token for token in differing if token in plain]:
        raise ValueError(
            f"{flag}: its tokenizer is not the student's: {len(differing)} tokens differ, first "
            f"{basic[0]!r} (id {other.get(basic[0])}, the student's {own.get(basic[0])}); "
            f"{OTHER_TEACHER}"
        )
    foreign = Foreign(
        frozenset(ids[token] for ids in (own, other) for token in differing if token in ids),
        tuple(token for token in differing if token not in own),
    )
    refuse_used(flag, mine, foreign.ids & set(used))
    return foreign


def refuse_used(flag: str, tokenizer, ids: Collection[int]) -> None:
    """ValueError if there are any: tokens that end or pad a response, and that a teacher does not
    have.
    """
    if ids:
        first = min(ids)
        raise ValueError(
            f"{flag}: its tokenizer is not the student's: it has another token {first}, or none, "
            f"and the student's, {tokenizer.convert_ids_to_tokens(first)!r}, ends or pads "
            f"responses; {OTHER_TEACHER}"
        )


def _spelled(ids: list[int], tokenizer) -> str:
    """The text of tokens, by a decoder, which may put spaces between them, and without one."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return tokenizer.decode(ids) + "\n" + "".join(token or "" for token in tokens)


def _check_unused(
    dialect: Dialect, tokenizer, flag: str, prompts: Iterable[Prompt], foreign: Foreign
) -> None:
    """No prompt and no dataset response has a token that the teacher would take for another."""
    pattern = re.compile("|".join(map(re.escape, foreign.texts))) if foreign.texts else None
    for prompt in prompts:
        ids = [*prompt.ids_for(dialect.name), *(prompt.target_ids or ())]
        found = next((token for token in ids if token in foreign.ids), None)
        token = None if found is None else repr(tokenizer.convert_ids_to_tokens(found))
        if token is None and pattern and (match := pattern.search(_spelled(ids, tokenizer))):
            token = repr(match[0])
        if token is not None:
            raise ValueError(
                f"{dialect.flag}: its tokenizer is not the student's: only one of them has "
                f"{token}, or the two have it under other ids, and a row of {flag} uses it "
                f"(prompt {prompt.prompt_id}, domain {prompt.domain}); {OTHER_TEACHER}"
            )


# ---- The end of a response -----------------------------------------------------------------------


def check_eos(
    dialect: Dialect, tokenizer, theirs: Iterable[int], own: Collection[int], ends: Collection[int]
) -> None:
    """A teacher that ends its turns elsewhere teaches responses that never end.

    `own` is the student's EOS, and `ends` where its responses end: there may be more.
    """
    theirs = list(theirs)
    if "eos" in dialect.allowed or set(own) <= set(theirs) <= set(ends):
        return
    words, mine = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in (theirs, ends))
    more = ""
    if set(own) <= set(theirs):
        missing = " ".join(str(token) for token in theirs if token not in ends)
        more = f"let responses end there too with --stop_token_ids {missing}, or "
    raise ValueError(
        f"{dialect.flag}: its EOS is {words}, the student's is {mine}; {more}{dialect.accept}eos"
    )


# ---- Chat templates ------------------------------------------------------------------------------


def check_dialects(
    dialects: Iterable[Dialect],
    tokenizer,
    prompt_sets: dict[str, PromptSet],
    routes: dict[str, tuple[tuple[str, float], ...]],
) -> None:
    """Tries every teacher on the prompts that it will read; `prompt_sets` by their flags.

    ValueError, with the first prompt that the teacher would know in another form.
    """
    for dialect in dialects:
        domains = {domain for domain, chosen in routes.items() if dialect.name in dict(chosen)}
        for flag, prompt_set in prompt_sets.items():
            if dialect.foreign.ids:
                own = (prompt for prompt in prompt_set.prompts if prompt.domain in domains)
                _check_unused(dialect, tokenizer, flag, own, dialect.foreign)
            if dialect.tokenizer is not None:
                _check_template(dialect, tokenizer, prompt_set, domains)


def _check_template(
    dialect: Dialect, tokenizer, prompt_set: PromptSet, domains: Collection[str]
) -> None:
    theirs = dialect.tokenizer
    if _program(theirs) == _program(tokenizer):
        return
    if theirs.chat_template is None or tokenizer.chat_template is None:
        says = (
            "it has no chat template, and the student's tokenizer has one"
            if theirs.chat_template is None
            else "it has a chat template, and the student's tokenizer has none"
        )
        if "template" not in dialect.allowed:
            raise ValueError(f"{dialect.flag}: {says}; {dialect.accept}template")
        return
    template = ChatTemplate(theirs, prompt_set.moment)
    mine = ChatTemplate(tokenizer, prompt_set.moment)
    chats = prompt_set.samples_of(dialect.name)
    for domain in sorted(domains & chats.keys()):
        samples = chats[domain]
        for sample in samples:
            _check_rendering(dialect, template, sample)
        if "eos" not in dialect.allowed:
            _check_closing(dialect, template, mine, samples[0])


def _program(tokenizer) -> Any:
    """What decides how it renders: nothing, for one without a chat template."""
    if tokenizer.chat_template is None:
        return None
    return tokenizer.chat_template, tokenizer.special_tokens_map


def _check_rendering(dialect: Dialect, template: ChatTemplate, sample: RenderedChat) -> None:
    try:
        text = template.render(sample.where, sample.chat)
    except ValueError as error:
        if "template" in dialect.allowed:
            return
        raise ValueError(
            f"{dialect.flag}: its chat template cannot write the run's prompts: {error}; "
            f"{dialect.accept}template"
        ) from None
    if text == sample.text or "rendering" in dialect.allowed:
        return
    pairs = zip(text, sample.text, strict=False)
    shorter = min(len(text), len(sample.text))
    place = next((i for i, (there, here) in enumerate(pairs) if there != here), shorter)
    there, here = (_piece(whole, place) for whole in (text, sample.text))
    raise ValueError(
        f"{dialect.flag}: its chat template writes {sample.where} in another way, first {there} "
        f"where the student's has {here}; {dialect.accept}rendering"
    )


def _piece(text: str, place: int) -> str:
    start, end = max(0, place - _AROUND), place + _AROUND
    before, after = "..." if start else "", "..." if end < len(text) else ""
    return f"{before + text[start:end] + after!r}"


def _check_closing(
    dialect: Dialect, theirs: ChatTemplate, mine: ChatTemplate, sample: RenderedChat
) -> None:
    """The tokens with which the two templates close an answer, where both are tokens at all."""
    there, here = theirs.closing(sample.chat), mine.closing(sample.chat)
    if None not in (there, here) and there != here:
        raise ValueError(
            f"{dialect.flag}: its chat template ends a turn with "
            f"{theirs.tokenizer.convert_ids_to_tokens(there)!r}, the student's with "
            f"{mine.tokenizer.convert_ids_to_tokens(here)!r}; {dialect.accept}eos"
        )
