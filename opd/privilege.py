"""The configuration of prompts that teachers alone read: privileged information, hints, longer
instructions, feedback on a response.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from opd.options import option


@dataclass(frozen=True)
class PrivilegeConfig:
    """Prompts that teachers read in place of the student's."""

    teacher_prompt: list[str] = option(
        [],
        "What a teacher reads in place of the student's prompt, in front of the student's "
        "response. A column: text or messages. A text with columns in braces, "
        "'{prompt} Hint: {answer}': the last user message. system:TEXT: the system message. "
        "python:MODULE:FUNCTION: the last user message that function(prompt, response) makes, or "
        "None. VALUE is for all teachers, NAME=VALUE for one, `NAME=` is none; a text that itself "
        "begins like `word=` is written `=word=...`.",
    )
    teacher_chat_template_kwargs: list[str] = option(
        [],
        "Variables of the chat template in the prompts that a teacher reads, as a JSON object: "
        "'{\"enable_thinking\": true}' is for all teachers, NAME={...} for one. They win over "
        "--chat_template_kwargs and over the rows.",
        is_object=True,
    )
    max_teacher_prompt_tokens: Annotated[int | Literal["auto"], Ge(1)] = option(
        "auto",
        "Longest prompt of a teacher's own, in tokens; auto is the longest in the data. A longer "
        "one in the data is refused; of one that a function makes, the teacher reads the student's "
        "prompt instead, and it is counted.",
    )
