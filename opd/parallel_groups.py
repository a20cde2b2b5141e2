"""vLLM's process groups, one set per tensor-parallel size, so that engines of different sizes share a process.

vLLM 0.32 keeps its groups in globals of `vllm.distributed.parallel_state`, makes them for the first engine of a process and
refuses an engine of another size. What an engine sees there is therefore exchanged around building and calling it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# All but `_WORLD`, which every engine of the process shares.
GLOBALS = ("_TP", "_ETP", "_ENGRAM_DP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB")
NOTHING = dict.fromkeys(GLOBALS)
# Names that vLLM gives the groups of a set. It numbers them, and compiled code holds the number.
NAMES = ("tp", "etp", "edp", "dcp", "pcp", "pp", "dp", "ep", "eplb")

_sets: dict[int, dict[str, Any]] = {}  # tensor-parallel size -> its groups


class ParallelGroups:
    """The groups of the engines of one size; `parallel_state` is vLLM's module of that name."""

    def __init__(self, parallel_state: ModuleType, tensor_parallel_size: int):
        self.state, self.size = parallel_state, tensor_parallel_size

    @contextmanager
    def active(self) -> Iterator[None]:
        """vLLM's globals are this size's inside the block. Collective over all ranks for an engine of a size not met yet."""
        if self.state._WORLD is None:  # a new process, or vLLM's environment was destroyed and all groups with it
            _sets.clear()
        if self.size not in _sets:  # "tp:2" whatever was built before: a compiled graph in vLLM's cache says so too
            self.state._group_name_counter.update(dict.fromkeys(NAMES, self.size))
        outside = self._exchange(_sets.get(self.size, NOTHING))
        try:
            yield
        finally:
            mine = self._exchange(outside)
            if mine["_TP"] is not None:
                # A dense model is given no group of experts, but the next engine may have some: they are the same ranks.
                _sets[self.size] = {**mine, "_EP": mine["_EP"] or mine["_TP"]}

    def _exchange(self, groups: dict[str, Any]) -> dict[str, Any]:
        """Puts `groups` in place of those that are there, which it returns."""
        before = {name: getattr(self.state, name) for name in GLOBALS}
        for name, group in groups.items():
            setattr(self.state, name, group)
        return before
