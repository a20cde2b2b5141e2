"""What a run leaves: the student as a Hugging Face model, or the adapter that was trained."""

import copy
from pathlib import Path

from torch import nn

from opd import distributed
from opd.hub_names import as_named
from opd.inputs.shapes import model_of
from opd.log import say
from opd.records import export
from opd.run.context import Run
from opd.student import Student


def export_student(run: Run, student: Student, path: Path, *, card: str) -> None:
    """Writes the trained student to `path`, whole or not at all. Collective."""
    generation_config = student.model.generation_config
    generation_config.eos_token_id = list(run.facts.student.eos_ids)
    if student.lora is None or run.cfg.lora.merge_on_export:
        model, tensors = student.model, student.named_full_parameters()
        if student.lora is not None:
            model = _without_adapter(run, student)
            tensors = student.named_full_tensors()
        export.export_huggingface(path, model, run.tokenizer, tensors, generation_config, card=card)
        say(f"model: {path}")
        return
    tensors = [(name, tensor.cpu().clone()) for name, tensor in student.adapter_tensors()]
    base = as_named(run.cfg.model.student_model)
    with distributed.agree_on_error(f"export to {path}"):
        if distributed.rank() == 0:
            export.export_adapter(
                path, student.lora, tensors, run.tokenizer, generation_config, base=base, card=card
            )
    say(f"adapter: {path} (of {base}; --merge_on_export writes a whole model)")


def _without_adapter(run: Run, student: Student) -> nn.Module:
    """The student's class and configuration with no adapter in it, on the meta device."""
    config = copy.deepcopy(student.model.config)
    path, trust = run.cfg.model.student_model, run.cfg.model.trust_remote_code
    model = model_of(config, "--student_model", path, trust_remote_code=trust)
    model.config.dtype = student.model.dtype
    return model
