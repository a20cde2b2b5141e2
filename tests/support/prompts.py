"""Rows of data and a tokenizer of one token per character."""

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd.config import DataConfig
from opd.inputs.prompts import load_prompts

SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")
TEMPLATE = (
    "<bos>{%- for m in messages -%}{%- if m.role == 'system' -%}{{ raise_exception('no system "
    "messages') }}{%- endif -%}{{ '<' + m.role + '>' + m.content }}{{ m.name if m.name is defined "
    "}}{%- endfor -%}{{ '<assistant>' if add_generation_prompt }}"
)


def make_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per character. Adds BOS and EOS to plain text, as some tokenizers do."""
    vocab = {
        token: i
        for i, token in enumerate((*SPECIAL, *string.ascii_lowercase, *string.digits, *" +=?"))
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="?",
        chat_template=chat_template,
    )


TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def write(path: Path, rows: list) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def row(prompt="1+1=", domain="math", **more) -> dict:
    return {"data_source": domain, "prompt": prompt, **more}


def load(*paths, tokenizer=TOKENIZER, **options):
    flags = {k: options.pop(k) for k in list(options) if k in DataConfig.__dataclass_fields__}
    return load_prompts(list(paths), tokenizer, DataConfig(**flags), flag="--data", **options)
