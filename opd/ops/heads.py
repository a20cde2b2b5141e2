"""The output head: how a model turns its final hidden states into logits.

    logits = form(hidden @ weight.T + bias)

The weight is the `lm_head` or the tied embedding. Few models have a bias (Phi-2, GPT-J); some scale
or soft-cap what comes out (Gemma 2, Cohere, Granite). Hidden states and the head then say all that
a model says, which is what the loss of the student and the scores of the teachers are computed
from.

N tokens, V vocabulary, H hidden size.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from opd.ops.headers import read_headers

HEAD_NAMES = (
    "lm_head.weight",
    "embed_out.weight",
    "language_model.lm_head.weight",
    "output_projection.weight",
    "head.weight",
)
EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "transformer.word_embeddings.weight",
    "word_embeddings.weight",
    "backbone.embeddings.weight",
    "biogpt.embed_tokens.weight",
)

# Keys by which configurations change logits behind the lm_head, those of models with code of their
# own included.
LOGIT_KEYS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "output_multiplier_scale",
    "logits_mup_width_multiplier",
    "mup_width_multiplier",
    "dim_model_base",
)

# What a family does, and by which key: the same key divides in one and multiplies in another. A
# family stands here when transformers 5.19, which trains it, and vLLM 0.32, which samples from it,
# were both read to do the same, outside the hidden states. Not so MiniCPM3 (vLLM's hidden states
# are divided already), RecurrentGemma (vLLM forgets the soft-cap), and Gemma 3 with images
# (transformers forgets it).
SOFTCAP, MULTIPLY, DIVIDE = "softcap", "multiply", "divide"
FAMILIES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "gemma2",
            "gemma3_text",
            "gemma3n",
            "gemma3n_text",
            "gemma4",
            "gemma4_text",
            "gemma4_unified",
            "gemma4_unified_text",
            "nanochat",
            "vaultgemma",
        ),
        (SOFTCAP, "final_logit_softcapping"),
    ),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), (MULTIPLY, "logit_scale")),
    **dict.fromkeys(
        (
            "granite",
            "granite_swa",
            "granitemoe",
            "granitemoe_swa",
            "granitemoehybrid",
            "granitemoeshared",
        ),
        (DIVIDE, "logits_scaling"),
    ),
    "hyperclovax": (MULTIPLY, "logits_scaling"),
    "falcon_h1": (MULTIPLY, "lm_head_multiplier"),
}


@dataclass(frozen=True, slots=True)
class LogitForm:
    """What happens to z = hidden @ weight.T + bias on its way to the logits: `softcap * tanh(scale
    * z / softcap)`.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Logits of `z`, any shape, in its dtype; `z` itself where there is nothing to do.

        Example: LogitForm(scale=0.5, softcap=30.0)(tensor(60.0)) is 30 tanh(1) = 22.85.
        """
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else (z / self.softcap).tanh() * self.softcap


@dataclass(frozen=True, slots=True)
class OutputHead:
    """Weight [V, H], bias [V] or None, and the form.

    `form(F.linear(hidden_NH, weight_VH, bias_V))` are logits [N, V].
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    form: LogitForm = LogitForm()

    def __post_init__(self):
        assert self.weight_VH.ndim == 2, f"weight {tuple(self.weight_VH.shape)}"
        assert self.bias_V is None or self.bias_V.shape == self.weight_VH.shape[:1], (
            f"bias {tuple(self.bias_V.shape)} for weight {tuple(self.weight_VH.shape)}"
        )

    def to(self, device: torch.device | str) -> "OutputHead":
        """On another device; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def in_type(self, dtype: torch.dtype) -> "OutputHead":
        """A copy of its own in another type."""
        return self._each(lambda tensor: tensor.to(dtype, copy=True))

    def cut(self, vocab: int) -> "OutputHead":
        """The first `vocab` rows, as views: what models with differently padded
        vocabularies share.
        """
        return self._each(lambda tensor: tensor[:vocab])

    def pinned(self) -> "OutputHead":
        """In page-locked host memory, from where `to` copies to a GPU without blocking; on a
        machine without one, as it is.
        """
        return self._each(Tensor.pin_memory) if torch.cuda.is_available() else self

    def _each(self, change) -> "OutputHead":
        bias_V = None if self.bias_V is None else change(self.bias_V)
        return replace(self, weight_VH=change(self.weight_VH), bias_V=bias_V)


@dataclass(frozen=True, slots=True)
class MappedHead:
    """An output head that stays in its files: `to` maps it, and whoever drops the result has
    unmapped it.

    It is used as an `OutputHead` is, by code that must not hold the head of every teacher at once.
    """

    weight: tuple[Path, str]  # file, tensor name
    bias: tuple[Path, str] | None
    form: LogitForm
    vocab: int | None = None  # rows of a cut head

    @property
    def weight_VH(self) -> Tensor:
        """Mapped: shape and dtype cost nothing."""
        return _read_tensor(*self.weight)[: self.vocab]

    def to(self, device: torch.device | str) -> OutputHead:
        """The head itself, on `device`."""
        bias_V = self.bias and _read_tensor(*self.bias)[: self.vocab]
        return OutputHead(self.weight_VH, bias_V, self.form).to(device)

    def cut(self, vocab: int) -> "MappedHead":
        """The first `vocab` rows."""
        return replace(self, vocab=vocab)

    def pinned(self) -> "MappedHead":
        """As it is: nothing of it lies in memory."""
        return self


def logit_form(config: PreTrainedConfig | dict) -> LogitForm:
    """The form of a model, from its configuration or the content of its config.json.

    Raises ValueError, naming family and key, for a model that changes its logits in a way that a
    form does not express.
    """
    config = _as_config(config)
    text_config = _as_config(config.get_text_config())
    effect, own_key = FAMILIES.get(config.model_type, (None, None))
    for key in LOGIT_KEYS:
        for part in (config, text_config):
            value = getattr(part, key, None)
            if key == own_key or value is None or (value == 1 and "cap" not in key):
                continue
            raise ValueError(
                f"its logits are changed by {key} = {value}, which scores from hidden states do "
                f"not reproduce for {config.model_type or 'this model'}; choose a model without it"
            )
    value = getattr(text_config, own_key, None) if own_key else None
    if value is None:
        return LogitForm()
    if not value > 0:
        raise ValueError(
            f"{config.model_type}: {own_key} = {value} must be greater than 0; mend its config.json"
        )
    if effect == SOFTCAP:
        return LogitForm(softcap=float(value))
    return LogitForm(scale=float(value) if effect == MULTIPLY else 1 / value)


def weights_beside_the_head(model: nn.Module) -> list[str]:
    """Names of weights that are neither the base model's nor the head's.

    Logits pass through them on the way from the hidden states (the transform layer of BERT, for
    one), so hidden states and the head do not say all that such a model says.
    """
    known = (model.base_model, model.get_output_embeddings())
    inside = {id(x) for module in known for x in (*module.parameters(), *module.buffers())}
    return [
        name
        for name, x in (*model.named_parameters(), *model.named_buffers())
        if id(x) not in inside
    ]


def find_head(model: str) -> tuple[Path, str]:
    """(file, tensor name) of a checkpoint's output projection: its `lm_head`, or the embedding that
    it is tied to.

    `model` is a directory. Raises ValueError if its safetensors hold
    neither, are broken, or hold both and they differ: then vLLM 0.32 uses the one, and transformers
    5.19 under ZeRO-3 the other.
    """
    root, files = _checkpoint(model)
    name = _weight_name(model, root, files)
    if name in HEAD_NAMES and _is_tied(root):
        embedding = next((other for other in EMBEDDING_NAMES if other in files), None)
        if embedding is not None and not _is_equal(
            (files[name], name), (files[embedding], embedding)
        ):
            raise ValueError(
                f"{model}: tie_word_embeddings is true, and its {name} is another than its "
                f"{embedding}; set tie_word_embeddings to false in config.json"
            )
    return files[name], name


def load_head(model: str) -> OutputHead:
    """The output head of a checkpoint, in its dtype, on the host.

    One or two tensors are read, however large the model.

    Raises ValueError as `find_head` and `logit_form` do.
    """
    return map_head(model).to("cpu")


def map_head(model: str) -> MappedHead:
    """The same head, left in its files until it is used. Raises as `load_head` does."""
    root, files = _checkpoint(model)
    name = _weight_name(model, root, files)
    bias = next((b for h in HEAD_NAMES if (b := h.removesuffix("weight") + "bias") in files), None)
    try:
        form = logit_form(_read_config(root))
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    return MappedHead((files[name], name), bias and (files[bias], bias), form)


def _as_config(config: PreTrainedConfig | dict) -> PreTrainedConfig:
    """A configuration with the defaults of its family: config.json does not repeat them."""
    if not isinstance(config, dict):
        return config
    family = config.get("model_type")
    if family not in CONFIG_MAPPING:
        return PreTrainedConfig.from_dict(dict(config))
    return CONFIG_MAPPING[family].from_dict(dict(config))


def _read_config(root: Path) -> PreTrainedConfig:
    # reads infinity as transformers writes it
    content, _ = PreTrainedConfig.get_config_dict(root, local_files_only=True)
    return _as_config(content)


def _checkpoint(model: str) -> tuple[Path, dict[str, Path]]:
    """(directory, tensor name -> its file) of a model."""
    root = Path(model)
    try:
        return root, {name: stored.file for name, stored in read_headers(root).items()}
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None


def _is_tied(root: Path) -> bool:
    config = _read_config(root)
    parts = (config, _as_config(config.get_text_config()))
    return any(getattr(part, "tie_word_embeddings", False) for part in parts)


def _weight_name(model: str, root: Path, files: dict[str, Path]) -> str:
    """The checkpoint decides, as in vLLM 0.32: a head that it holds is the head, whatever the
    configuration says.
    """
    names = HEAD_NAMES + EMBEDDING_NAMES if _is_tied(root) else HEAD_NAMES
    for name in names:
        if name in files:
            return name
    kind = "head or embedding" if len(names) > len(HEAD_NAMES) else "head"
    raise ValueError(
        f"{model}: its safetensors hold no output {kind} under a known name ({names[0]} and "
        f"{len(names) - 1} others); choose another model"
    )


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _is_equal(head: tuple[Path, str], embedding: tuple[Path, str]) -> bool:
    head_VH, embedding_VH = _read_tensor(*head), _read_tensor(*embedding)
    if head_VH.dtype != embedding_VH.dtype:
        head_VH, embedding_VH = head_VH.float(), embedding_VH.float()
    return torch.equal(head_VH, embedding_VH)
