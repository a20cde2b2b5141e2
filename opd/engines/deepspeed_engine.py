"""Everything that touches DeepSpeed: the student's sharded engine.

The only importer of deepspeed in the package, and only when the first engine is built: it takes
seconds, and it must find its variables set.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd.config import OptimConfig
from opd.distributed import rank, world_size
from opd.engines.checkpoint_names import by_layer, persistent_tensors
from opd.engines.host_memory import HostCopy
from opd.engines.shards import MASTERS, Shards


def _import_deepspeed():
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if on_cpu:
        # DeepSpeed 0.19.8 compiles a shared-memory reduction on first use, for a minute or more,
        # under a lock file that a killed rank leaves behind for every later run to wait on. Without
        # it gloo reduces.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def complete_ds_config(
    ds_config: dict[str, Any], optim: OptimConfig, *, dtype: torch.dtype
) -> dict[str, Any]:
    """Fills in what the flags own.

    DeepSpeed never averages or scales a loss here: the script divides by loss tokens.

    Batch sizes are nominal. Micro-batches are summed by `backward(last=...)`, so DeepSpeed must not
    count them. DeepSpeed 0.19.8 clips at norm 1.0 when `gradient_clipping` is absent, so it is
    always set. It adds up gradients in the model's type when `grad_accum_dtype` is absent; here in
    float32, unless the ds_config says something else. Its stages 0 and 1 are left out: see
    `_accumulate_in_float32`.
    """
    data_types = {"grad_accum_dtype": "fp32", **ds_config.get("data_types", {})}
    if _accumulates_here(ds_config, dtype):
        del data_types["grad_accum_dtype"]
    return {
        **ds_config,
        "data_types": data_types,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _stage(ds_config: dict[str, Any]) -> int:
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def _accumulates_here(ds_config: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether `_accumulate_in_float32` has to see to it."""
    wanted = ds_config.get("data_types", {}).get("grad_accum_dtype", "fp32")
    return dtype is torch.bfloat16 and _stage(ds_config) < 2 and wanted == "fp32"


def _accumulate_in_float32(engine, stage: int) -> None:
    """What `grad_accum_dtype` does in stages 2 and 3, for bfloat16 parameters in stages 0 and 1.

    DeepSpeed 0.19.8 refuses it in stage 0. In stage 1 it makes another optimizer of it, whose
    states cannot leave the GPU, where the one of stage 2 knows both.
    """
    if stage == 0:
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.grad_dtype = torch.float32
    else:
        zero = engine.optimizer
        zero.gradient_accumulation_dtype = torch.float32
        zero.use_separate_grad_accum = zero.use_grad_accum_attribute = True


def check_ds_config(path: str, ds_config: dict[str, Any]) -> None:
    """Lets DeepSpeed itself read the sharding section; ValueError with one line for what it does
    not know.
    """
    _import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
    except ValueError as error:
        raise ValueError(
            f"--ds_config {path}: zero_optimization: {' '.join(str(error).split())[:300]}"
        ) from None


class _HeldErrors:
    """A DeepSpeed checkpoint engine that keeps a write error until DeepSpeed's collectives are
    over.

    In DeepSpeed 0.19.8 a rank whose disk is full leaves `save_checkpoint` between two barriers, and
    the others wait.
    """

    def __init__(self, writer):
        self.writer = writer
        self.error: Exception | None = None

    def __getattr__(self, name):
        return getattr(self.writer, name)

    def save(self, state_dict, path):
        try:
            self.writer.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self.error = self.error or error


def what_leaves(
    ds_config: dict[str, Any], offload_student: str, *, dtype: torch.dtype, use_cuda: bool
) -> tuple[frozenset[str], str]:
    """What of the student leaves the GPU while others work, and why not more: ({"states",
    "parameters"} or less, a line).

    "states" are the AdamW moments, float32 masters and gradients. `offload_student` is none, states
    or all.
    """
    zero = ds_config.get("zero_optimization") or {}
    if not use_cuda or offload_student == "none":
        return frozenset(), ""
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        return (
            frozenset(),
            "offload_param keeps the student on the host; DeepSpeed cannot move the rest beside it",
        )
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        return frozenset(), "offload_optimizer keeps the optimizer states on the host at all times"
    if zero.get("stage", 0) == 0:
        return (
            frozenset(),
            "ZeRO stage 0 has no states that could leave the GPU; use ds_configs/zero1.json or "
            "above",
        )
    if offload_student == "states":
        return frozenset({"states"}), ""
    if zero["stage"] < 3:  # DeepSpeed 0.19.8 brings them back without their shapes
        why = (
            f"parameters stay on the GPU under ZeRO stage {zero['stage']}; only stage 3 moves them"
        )
        return frozenset({"states"}), why
    # masters may be views of the parameters, which DeepSpeed would bring back apart
    if dtype is torch.float32:
        return frozenset({"states"}), "float32 parameters stay on the GPU; only bfloat16 ones move"
    return frozenset({"states", "parameters"}), ""


class ShardedEngine:
    """A module under ZeRO 0-3 with AdamW: backward over any number of micro-batches, step, gather,
    save, load.

    `hf_config` must be alive before the model is built, so that `from_pretrained` shards it while
    loading.
    """

    def __init__(self, ds_config: dict[str, Any], optim: OptimConfig, *, dtype: torch.dtype):
        self.config = complete_ds_config(ds_config, optim, dtype=dtype)
        self.stage = _stage(ds_config)
        self._accumulates_here = _accumulates_here(ds_config, dtype)
        offload = ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}
        self._gradients_on_host = self.stage == 3 and offload.get("device", "none") != "none"
        self._deepspeed = _import_deepspeed()
        from transformers.integrations import HfDeepSpeedConfig  # imports deepspeed

        self.hf_config = HfDeepSpeedConfig(self.config) if self.stage == 3 else None
        self.optim = optim
        self.offloads = frozenset()  # what `place` may move; see `what_leaves`
        self._on_host = frozenset()  # DeepSpeed's names of what its own offloading has moved

    def attach(self, module: nn.Module, external_parameters: tuple[Tensor, ...]) -> nn.Module:
        """Shards `module`; returns what to call.

        `external_parameters` are used in its forward but owned by a submodule.
        """
        decayed = [p for p in module.parameters() if p.requires_grad and _ndim(p) > 1]
        plain = [p for p in module.parameters() if p.requires_grad and _ndim(p) <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.optim.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=0.0,  # every step has its own; what DeepSpeed steps to make states moves nothing
            betas=(self.optim.adam_beta1, self.optim.adam_beta2),
            eps=self.optim.adam_eps,
        )
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.config
        )
        # In bfloat16 under stage 0, DeepSpeed 0.19.8 makes AdamW's states by a step on gradients of
        # zero, and leaves it counted: the first real one would be half as long.
        for state in self.engine.basic_optimizer.state.values():
            state["step"].zero_()
        if self._accumulates_here:
            _accumulate_in_float32(self.engine, self.stage)
        # while it lives, `from_pretrained` shards whatever it loads, teachers included
        self.hf_config = None
        self.engine.checkpoint_engine = _HeldErrors(self.engine.checkpoint_engine)
        # rank 0 alone could fail in it, between collectives
        self.engine._copy_recovery_script = lambda directory: None
        if self.stage == 3:
            for parameter in external_parameters:
                self._deepspeed.zero.register_external_parameter(self.engine.module, parameter)
        self._frozen = [p for p in module.parameters() if not p.requires_grad]
        self._host_copy = HostCopy(self._masters_and_moments, self.engine.device)
        return self.engine

    def _masters_and_moments(self) -> list[Tensor]:
        """What AdamW owns under ZeRO-3, without masters that are the parameters themselves."""
        zero = self.engine.optimizer
        parameters = zero.lp_param_buffer.untyped_storage().data_ptr()
        masters = [
            t
            for t in zero.fp32_partitioned_groups_flat
            if t.untyped_storage().data_ptr() != parameters
        ]
        moments = [
            v
            for state in zero.optimizer.state.values()
            for v in state.values()
            if torch.is_tensor(v)
        ]
        # a step count is a scalar on the host
        return masters + [moment for moment in moments if moment.ndim > 0]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds this micro-batch's gradient; `last` closes the sum.

        DeepSpeed then averages over ranks.
        """
        if last and self.stage == 0 and self._accumulates_here:
            # DeepSpeed 0.19.8 fills up what is missing with zeros of the parameter's dtype
            for p in (p for p in self.engine.module.parameters() if p.requires_grad):
                if p.grad is None:
                    p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        self.engine.set_gradient_accumulation_boundary(last and not self._gradients_on_host)
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._complete_gradients()
        # DeepSpeed 0.19.8 knows no norm where it wraps no optimizer, in ZeRO 0 with float32; there
        # all ranks hold the sum.
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if self.stage == 0 else None
        self.engine.step()
        if self.stage == 3:
            # DeepSpeed 0.19.8 overwrites it in a step's first micro-batch, and adds to it in the
            # others: weights that the first did not use would get the last step's gradient again.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        self._check_partitioned()
        known = self.engine.get_global_grad_norm()
        return float(norm if known is None else known)

    def _complete_gradients(self) -> None:
        """Weights that the last micro-batch did not use, or none of the step's, such as those of an
        image encoder, have their gradient too: the sum of the others, or zero.
        """
        if self._gradients_on_host:
            zero = self.engine.optimizer  # which brings there what the last one has reduced alone
            zero._offload_boundary_param_ids = {p.ds_id for ps in zero.fp16_groups for p in ps}
            zero.finalize_gradient_accumulation_boundary()
            self.engine.set_gradient_accumulation_boundary(True)

    def _check_partitioned(self) -> None:
        """Between two steps no frozen parameter is whole, but for those that stage 3 keeps.

        Of DeepSpeed 0.19.3 and later it is reported that recomputation leaves frozen ones gathered:
        memory that nobody plans for.
        """
        if self.stage == 3:
            whole = [
                p.ds_id
                for p in self._frozen
                if p.ds_status.name == "AVAILABLE" and not p.ds_persist
            ]
            assert not whole, f"{len(whole)} frozen parameters stayed gathered after a step"

    def trained_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of what is trained, whole; collective: all exhaust it alike.

        All are gathered at once, so this is for modules that are frozen but for a small part.
        """
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        with self.gathered([p for _, p in trained]):
            yield from trained

    @contextmanager
    def gathered(self, parameters: list[Tensor]) -> Iterator[None]:
        """Whole parameters on every rank inside the block, under ZeRO-3; collective."""
        if self.stage == 3:
            with self._deepspeed.zero.GatheredParameters(parameters):
                yield
        else:
            yield

    def full_layers(
        self, module: nn.Module, bucket_bytes: int = 256 << 20
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """(name, tensor) of `module` as far as a checkpoint holds it, whole, layer by layer;
        collective: all exhaust it alike.

        Layers are gathered bucket by bucket. One that is yielded is valid until the next one is
        asked for.
        """
        bucket: list[list[tuple[str, Tensor]]] = []
        size = 0
        for layer in by_layer(persistent_tensors(module)):
            layer_bytes = sum(
                getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
                for _, tensor in layer
            )
            if bucket and size + layer_bytes > bucket_bytes:
                yield from self._emit(bucket)
                bucket, size = [], 0
            bucket.append(layer)
            size += layer_bytes
        yield from self._emit(bucket)

    def _emit(self, bucket: list[list[tuple[str, Tensor]]]) -> Iterator[list[tuple[str, Tensor]]]:
        with self.gathered(
            [t for layer in bucket for _, t in layer if isinstance(t, nn.Parameter)]
        ):
            for layer in bucket:
                yield [(name, tensor.detach()) for name, tensor in layer]

    def named_full_parameters(
        self, module: nn.Module, bucket_bytes: int = 256 << 20
    ) -> Iterator[tuple[str, Tensor]]:
        """Of these the parameters, one by one."""
        names = {name for name, _ in module.named_parameters()}
        for layer in self.full_layers(module, bucket_bytes):
            yield from ((name, tensor) for name, tensor in layer if name in names)

    def save(self, directory: Path) -> None:
        """DeepSpeed's shards under `directory`/shards, without frozen parameters: who builds the
        engine again has them.

        Its `latest` file is written without a barrier, so it is not used.
        """
        writer = self.engine.checkpoint_engine
        writer.error = None
        self.engine.save_checkpoint(
            str(directory),
            tag="shards",
            save_latest=False,
            exclude_frozen_parameters=bool(self._frozen),
        )
        if writer.error is not None:
            raise writer.error

    def load(self, directory: Path) -> None:
        """Raises if DeepSpeed finds nothing: by itself it would start fresh without a word.

        Under ZeRO-3 the shards may be those of another number of ranks. What the flags say of
        AdamW stays: a checkpoint holds what they said when it was written.
        """
        said = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.engine.optimizer.param_groups
        ]
        if self.stage == 3 and Shards.count(directory) not in (0, world_size()):
            self._load_divided_anew(Shards(directory))
        else:
            # without `strict` it would not miss what is trained either: that is asked here
            self._check_names(directory)
            path, _ = self.engine.load_checkpoint(
                str(directory), tag="shards", load_module_strict=not self._frozen
            )
            if path is None:
                raise RuntimeError(f"{directory}: DeepSpeed found no checkpoint in it")
        for group, own in zip(self.engine.optimizer.param_groups, said, strict=True):
            group.update(own)

    def _check_names(self, directory: Path) -> None:
        """Shards of a module with frozen parameters hold what is trained, and nothing of the
        rest.
        """
        if not self._frozen or not (directory / "shards").is_dir():
            return
        found = Shards(directory).names
        trained = {n for n, p in self.engine.module.named_parameters() if p.requires_grad}
        if found != trained:
            raise RuntimeError(
                f"{directory}: its shards are not of what is trained here, such as "
                f"{min(found ^ trained)}"
            )

    def _load_divided_anew(self, shards: Shards) -> None:
        """Gives DeepSpeed what it would have saved on this number of ranks: this rank's slices of
        the masters and of AdamW's moments.
        """
        zero, names = self.engine.optimizer, {}
        for name, parameter in self.engine.module.named_parameters():
            names[parameter] = name
        where = {
            names[p]: (i, k) for i, ps in enumerate(zero.fp16_groups) for k, p in enumerate(ps)
        }
        sizes = [[p.partition_numel() for p in group] for group in zero.fp16_groups]

        def slices(key: str) -> list[Tensor]:
            """A flat tensor per sub-group."""
            flats = [torch.zeros(sum(group), dtype=torch.float32) for group in sizes]
            parts = [list(flat.split(group)) for flat, group in zip(flats, sizes, strict=True)]
            found = set()
            for name, whole in shards.whole(key):
                group, index = where[name]
                part = parts[group][index]
                mine = whole.flatten()[rank() * part.numel() :][: part.numel()]
                part[: mine.numel()] = mine
                found.add(name)
            assert found == where.keys(), sorted(found ^ where.keys())[:4]
            return flats

        moments = {key: slices(key) for key in shards.moments}
        steps = shards.steps()
        zero._set_fp32_optimizer_param_groups()
        groups = zero.optimizer.state_dict()["param_groups"]
        zero._clear_fp32_optimizer_param_groups()
        adam = {
            index: {"step": steps.clone(), **{key: flat[index] for key, flat in moments.items()}}
            for index in range(len(sizes))
        }
        zero.checkpoint_event_prologue()
        zero._rigid_load_state_dict(
            {
                "loss_scaler": zero.loss_scaler,
                "dynamic_loss_scale": zero.dynamic_loss_scale,
                "overflow": zero.overflow,
                "optimizer_state_dict": {"state": adam, "param_groups": groups},
                "fp32_flat_groups": slices(MASTERS),
            }
        )
        zero.checkpoint_event_epilogue()

    def place(self, *, states: bool, parameters: bool) -> int:
        """Brings optimizer states and parameters to the GPU, or starts to move to the host what is
        not asked for.

        Returns the bytes that leave; their GPU memory is free after `settle`. Only what `offloads`
        names ever moves.
        """
        away = set()
        # under ZeRO-3 masters and moments go by `HostCopy`
        if "states" in self.offloads and not states:
            away |= {
                "lp_grads",
                *(
                    ("contiguous_grad_buffer",)
                    if self.stage == 3
                    else ("hp_params", "optim_states")
                ),
            }
        if "parameters" in self.offloads and not parameters:
            away.add("lp_params")
        if self._on_host - away:  # DeepSpeed 0.19.8 brings all back or nothing
            self.engine.reload_states()
            self._on_host = frozenset()
        if away - self._on_host:
            names = self._deepspeed.runtime.zero.offload_config.OffloadStateTypeEnum
            self.engine.offload_states(
                include=[names(name) for name in sorted(away)], non_blocking=False
            )
            self._on_host = frozenset(away)
        if self.stage != 3 or "states" not in self.offloads:
            return 0
        if states:
            self._host_copy.back()
            return 0
        return self._host_copy.out()

    def settle(self) -> None:
        """Waits until what leaves has left."""
        self._host_copy.settle()


def _ndim(parameter: Tensor) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
