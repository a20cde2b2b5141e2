"""The memory of one engine among three, on a stand-in for a GPU under vLLM's own allocator.

The stand-in is the C side of vLLM's allocator: reserved addresses, bytes that are there while they
are mapped, copies that happen when they are waited for, and the error that a second unmap leaves
behind. What is tested on top of it is vLLM's `CuMemAllocator` with its own callbacks, and
`EngineMemory`.
"""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from opd.engines.engine_memory import DEFERRABLE, KV_CACHE, WEIGHTS, EngineMemory

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
cumem = pytest.importorskip("vllm.device_allocator.cumem")

RUNTIME = "runtime"
PAGE = 16
DRIVER_CALLS = ("map", "unmap", "host_buffer", "copy_to_host", "copy_from_host", "synchronize")


def mapped_bytes(memory: EngineMemory) -> int:
    """What the engine holds on the GPU now, by its own books."""
    return sum(
        data.handle[1]
        for address, data in memory._all().items()
        if not data.is_asleep or address in memory._arriving
    )


class Gpu:
    """Bytes behind addresses, and a driver to them.

    `fail_at` names the call that fails next, and how many come before; `free_at` the call in which
    garbage collection frees an address.
    """

    def __init__(self):
        self.reserved: dict[int, tuple] = {}  # address -> handle
        self.mapped: dict[int, torch.Tensor] = {}
        self.pending: list = []
        self.calls: list[str] = []
        self.fail_at: tuple[str, int] | None = None
        self.free_at: tuple[str, int] | None = None
        self.poisoned = False
        self.allocator = cumem.CuMemAllocator()

    # What PyTorch calls.

    def malloc(self, tag: str, size: int) -> int:
        address = next(a for a in itertools.count(PAGE, PAGE) if self._is_free(a, size))
        handle = self.reserved[address] = (0, size, address, object())
        self.allocator.current_tag = tag
        self.allocator.python_malloc_callback(handle)
        self.mapped[address] = _garbage(size)
        return address

    def free(self, address: int) -> None:
        handle = self.allocator.python_free_callback(address)
        self._assert_no_copy_under_way(address)
        self.poisoned |= address not in self.mapped
        self.mapped.pop(address, None)
        assert self.reserved.pop(address) is handle

    def _is_free(self, address: int, size: int) -> bool:
        return all(address >= a + h[1] or address + size <= a for a, h in self.reserved.items())

    # The driver.

    def map(self, handle) -> None:
        self._call("map")
        if self.poisoned:
            self.poisoned = False
            raise RuntimeError("CUDA Error: an error of somebody else")
        assert handle[2] not in self.mapped, "mapped twice"
        self.mapped[handle[2]] = _garbage(handle[1])

    def unmap(self, handle) -> None:
        self._call("unmap")
        self._assert_no_copy_under_way(handle[2])
        del self.mapped[handle[2]]

    def host_buffer(self, size: int) -> torch.Tensor:
        self._call("host_buffer")
        return _garbage(size)

    def copy_to_host(self, handle, buffer) -> None:
        self._call("copy_to_host")
        self.pending.append((handle[2], lambda: buffer.copy_(self.mapped[handle[2]])))

    def copy_from_host(self, handle, buffer) -> None:
        self._call("copy_from_host")
        self.pending.append((handle[2], lambda: self.mapped[handle[2]].copy_(buffer)))

    def synchronize(self) -> None:
        self._call("synchronize")
        pending, self.pending = self.pending, []
        for _, copy in pending:
            copy()

    def _assert_no_copy_under_way(self, address: int) -> None:
        assert address not in [a for a, _ in self.pending], (
            f"{address} goes while a copy reads or writes it"
        )

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.free_at is not None and self.free_at[0] == name:
            (_, address), self.free_at = self.free_at, None
            self.free(address)
        if self.fail_at is not None and self.fail_at[0] == name:
            before = self.fail_at[1]
            self.fail_at = (name, before - 1) if before else None
            if not before:
                raise RuntimeError(f"CUDA Error: {name}")

    @property
    def used(self) -> int:
        return sum(bytes_.numel() for bytes_ in self.mapped.values())


def _garbage(size: int) -> torch.Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8)


@pytest.fixture(autouse=True, scope="module")
def _no_gpu():
    """vLLM's free callback waits for the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        yield


class Engine:
    """An engine's memory with something written to each of its allocations."""

    def __init__(self, gpu: Gpu, name: str, *, frozen: bool = False, sizes=(48, 16, 32)):
        self.gpu = gpu
        self.memory = EngineMemory(name, gpu.allocator, gpu, frozen=frozen)
        with self.memory.active():
            assert gpu.allocator.get_current_usage() == 0, "vLLM asserts it before it loads weights"
            self.weights = [gpu.malloc(WEIGHTS, size) for size in (sizes[0], sizes[1])]
            self.cache = gpu.malloc(KV_CACHE, sizes[2])
            self.runtime = gpu.malloc(RUNTIME, PAGE)
        self.content = {a: gpu.mapped[a].clone() for a in (*self.weights, self.cache, self.runtime)}
        self.bytes = sum(sizes) + PAGE

    def write(self, address: int) -> None:
        self.content[address] = _garbage(self.content[address].numel())
        self.gpu.mapped[address].copy_(self.content[address])

    def holds(self, *addresses: int) -> bool:
        """Whether these are mapped with what was written to them."""
        return all(
            a in self.gpu.mapped and torch.equal(self.gpu.mapped[a], self.content[a])
            for a in addresses
        )

    @property
    def kept(self) -> tuple[int, ...]:
        return (*self.weights, self.runtime)


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def engines(gpu):
    """A generator and two teachers, of different sizes."""
    return [
        Engine(gpu, "rollout"),
        Engine(gpu, "math", frozen=True, sizes=(96, 32, 16)),
        Engine(gpu, "code", frozen=True, sizes=(16, 16, 64)),
    ]


def test_an_engine_sleeps_alone(gpu, engines):
    everything = gpu.used
    for sleeper in engines:
        others = [e for e in engines if e is not sleeper]
        sleeper.memory.suspend(1)
        assert gpu.used == everything - sleeper.bytes
        assert mapped_bytes(sleeper.memory) == 0 and sleeper.memory.size() == sleeper.bytes
        assert all(e.holds(*e.content) and mapped_bytes(e.memory) == e.bytes for e in others)
        sleeper.memory.resume()
        assert gpu.used == everything and sleeper.holds(*sleeper.kept)
        sleeper.write(sleeper.cache)
    assert gpu.allocator.get_current_usage() == everything


def test_a_cache_goes_when_nothing_reads_it_any_more(gpu, engines):
    sleeper = engines[0]
    gpu.calls.clear()
    sleeper.memory.drop_cache()
    assert gpu.calls == ["synchronize", "unmap"] and sleeper.holds(*sleeper.kept)
    sleeper.memory.resume([KV_CACHE])
    assert mapped_bytes(sleeper.memory) == sleeper.bytes


def test_all_but_one_sleep(gpu, engines):
    for engine in engines:
        engine.memory.suspend(1)
    assert gpu.used == 0
    for engine in engines:
        engine.memory.resume()
        assert gpu.used == engine.bytes and engine.holds(*engine.kept)
        engine.memory.suspend(1)


def test_the_cache_is_dropped_and_the_rest_kept(engines):
    engine = engines[0]
    engine.memory.suspend(1)
    assert engine.memory.host_bytes == engine.memory.size(WEIGHTS, RUNTIME)
    engine.memory.resume()
    assert engine.holds(*engine.kept) and not engine.holds(engine.cache)


def test_level_2_drops_the_weights(engines):
    engine = engines[0]
    engine.memory.suspend(2)
    assert engine.memory.host_bytes == PAGE, (
        "what is neither weights nor cache is kept at any level"
    )
    engine.memory.resume()
    assert engine.holds(engine.runtime) and not engine.holds(engine.weights[0])


def test_level_2_drops_what_an_earlier_sleep_kept(engines):
    engine = engines[0]
    engine.memory.suspend(1)
    engine.memory.suspend(2)
    assert engine.memory.host_bytes == PAGE
    engine.memory.resume()
    assert engine.holds(engine.runtime) and not engine.holds(engine.weights[0])


def test_weights_wake_before_the_cache(gpu, engines):
    engine = engines[0]
    engine.memory.suspend(1)
    engine.memory.resume([WEIGHTS])
    assert engine.holds(*engine.kept), "any wake brings back what cannot be deferred"
    assert engine.cache not in gpu.mapped
    engine.memory.resume([KV_CACHE])
    assert mapped_bytes(engine.memory) == engine.bytes
    engine.memory.suspend(1)
    engine.memory.resume([KV_CACHE])
    assert engine.holds(engine.runtime) and engine.weights[0] not in gpu.mapped


def test_host_buffers_are_allocated_once_and_filled_again(gpu, engines):
    engine = engines[0]
    engine.memory.suspend(1)
    first = [gpu.allocator.pointer_to_data[a].cpu_backup_tensor.data_ptr() for a in engine.kept]
    for _ in range(2):
        engine.memory.resume()
        for address in engine.content:
            engine.write(address)
        engine.memory.suspend(1)
        assert [
            gpu.allocator.pointer_to_data[a].cpu_backup_tensor.data_ptr() for a in engine.kept
        ] == first
    engine.memory.resume()
    assert engine.holds(*engine.kept)


def test_frozen_weights_are_copied_to_the_host_once(gpu, engines):
    rollout, teacher, _ = engines
    for engine, copies in ((rollout, [3, 3, 3]), (teacher, [3, 1, 1])):
        counts = []
        for _ in range(3):
            engine.write(engine.runtime)  # not weights: it may change, frozen or not
            gpu.calls.clear()
            engine.memory.suspend(1)
            counts.append(gpu.calls.count("copy_to_host"))
            engine.memory.resume()
            assert engine.holds(*engine.kept)
        assert counts == copies


def test_prefetch_starts_and_resume_waits(gpu, engines):
    engine = engines[1]
    engine.memory.suspend(1)
    gpu.calls.clear()
    engine.memory.prefetch()
    assert "synchronize" not in gpu.calls and gpu.calls.count("copy_from_host") == 3
    assert mapped_bytes(engine.memory) == engine.memory.size(WEIGHTS, RUNTIME)
    assert all(gpu.allocator.pointer_to_data[a].is_asleep for a in engine.content), (
        "not awake before resume"
    )
    gpu.calls.clear()
    engine.memory.prefetch()
    assert gpu.calls == [], "it is on its way"
    engine.memory.resume([WEIGHTS])
    assert gpu.calls == ["synchronize"] and engine.holds(*engine.kept)


def test_a_prefetch_may_be_slept_on(gpu, engines):
    """The teacher turned out not to be needed: nothing is copied back, and the host still knows
    everything.
    """
    engine = engines[1]
    engine.memory.suspend(1)
    engine.memory.prefetch()
    gpu.calls.clear()
    engine.memory.suspend(1)
    assert mapped_bytes(engine.memory) == 0 and "copy_to_host" not in gpu.calls
    engine.memory.resume()
    assert engine.holds(*engine.kept)


def test_there_is_nothing_to_prefetch_after_level_2(engines):
    engine = engines[0]
    engine.memory.suspend(2)
    engine.memory.prefetch()
    assert mapped_bytes(engine.memory) <= PAGE


# ---- Frees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["awake", "asleep", "arriving"])
def test_a_free_may_come_at_any_time(gpu, engines, state):
    engine, other = engines[1], engines[2]
    if state != "awake":
        engine.memory.suspend(1)
    if state == "arriving":
        engine.memory.prefetch()
    gone = engine.weights[0]
    gpu.free(gone)
    assert gone not in gpu.mapped and gone not in gpu.allocator.pointer_to_data
    other.memory.suspend(1)
    other.memory.resume()  # an unmap too many would have poisoned this
    engine.memory.resume()
    assert engine.holds(engine.weights[1], engine.runtime) and other.holds(*other.kept)
    assert engine.memory.size() == engine.bytes - len(engine.content[gone])


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("call", DRIVER_CALLS)
def test_a_free_may_come_in_the_middle(gpu, engines, call, prefetch):
    """Garbage is collected whenever Python likes, here of an allocation that the loop has still to
    reach.
    """
    engine, other = engines[0], engines[1]
    gone = engine.weights[1]
    gpu.free_at = (call, gone)
    engine.memory.suspend(1)
    if prefetch:
        engine.memory.prefetch()
    engine.memory.resume()
    assert gpu.free_at is None and gone not in gpu.mapped and not gpu.poisoned
    assert engine.holds(engine.weights[0], engine.runtime) and other.holds(*other.content)
    assert (
        mapped_bytes(engine.memory)
        == engine.memory.size()
        == engine.bytes - len(engine.content[gone])
    )


def test_a_free_may_come_while_a_prefetch_is_slept_on(gpu, engines):
    engine = engines[1]
    engine.memory.suspend(1)
    engine.memory.prefetch()
    gpu.free_at = ("synchronize", engine.weights[1])
    engine.memory.suspend(1)
    engine.memory.resume()
    assert (
        gpu.free_at is None and engine.holds(engine.weights[0], engine.runtime) and not gpu.poisoned
    )


def test_a_free_during_the_copy_leaves_no_copy(gpu, engines):
    """Else the next owner of the address would be taken for copied already."""
    engine = engines[1]
    address = engine.weights[1]
    gpu.free_at = ("synchronize", address)
    engine.memory.suspend(1)
    engine.memory.resume()
    with engine.memory.active():
        assert gpu.malloc(WEIGHTS, len(engine.content[address])) == address
    engine.content[address] = gpu.mapped[address].clone()
    engine.memory.suspend(1)
    engine.memory.resume()
    assert engine.holds(*engine.kept)


def test_a_reused_address_belongs_to_its_new_owner(gpu, engines):
    """The old owner's host copy would otherwise be written over the new owner's weights."""
    old, new = engines[1], engines[2]
    old.memory.suspend(1)
    address = old.weights[0]
    gpu.free(address)
    with new.memory.active():
        assert gpu.malloc(WEIGHTS, len(old.content[address])) == address
    new.weights.append(address)
    new.content[address] = gpu.mapped[address].clone()
    old.memory.resume()
    assert new.holds(*new.content)
    new.memory.suspend(1)
    assert old.holds(old.weights[1]) and mapped_bytes(old.memory) == old.memory.size()
    new.memory.resume()
    assert new.holds(*new.kept)


def test_a_reused_address_of_the_same_engine_starts_anew(gpu, engines):
    engine = engines[1]
    engine.memory.suspend(1)
    engine.memory.resume()
    address = engine.weights[0]
    gpu.free(address)
    with engine.memory.active():
        assert gpu.malloc(WEIGHTS, len(engine.content[address])) == address
    engine.content[address] = gpu.mapped[address].clone()
    engine.memory.suspend(1)
    engine.memory.resume()
    assert engine.holds(*engine.kept), "frozen, but never copied yet"


def test_an_allocation_of_nobody_is_left_alone(gpu, engines):
    address = gpu.malloc("default", PAGE)
    content = gpu.mapped[address].clone()
    for engine in engines:
        engine.memory.suspend(1)
    assert torch.equal(gpu.mapped[address], content)
    gpu.free(address)


def test_activity_nests_and_ends_with_an_exception(engines):
    first, second = engines[0].memory, engines[1].memory
    with first.active():
        with pytest.raises(KeyError), second.active():
            assert EngineMemory.current is second
            raise KeyError
        assert EngineMemory.current is first
    assert EngineMemory.current is None


# ---- Failures ------------------------------------------------------------------------------------


def assert_defined(gpu, engine) -> None:
    """Each allocation is mapped and awake, unmapped and asleep, or mapped for a wake that has not
    come.
    """
    for address in engine.content.keys() - engine.memory._arriving:
        assert gpu.allocator.pointer_to_data[address].is_asleep == (address not in gpu.mapped)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("call", DRIVER_CALLS)
def test_a_failure_leaves_a_defined_state_and_a_second_try_works(gpu, call, before, frozen):
    engine, other = Engine(gpu, "math", frozen=frozen), Engine(gpu, "code")

    def attempt(action) -> bool:
        gpu.fail_at = (call, before)
        try:
            action()
        except RuntimeError as error:
            assert str(error) == f"CUDA Error: {call}"
            assert_defined(gpu, engine)
            assert other.holds(*other.content)
            action()
            return True
        finally:
            gpu.fail_at = None
        return False

    suspended = attempt(lambda: engine.memory.suspend(1))
    assert mapped_bytes(engine.memory) == 0
    resumed = attempt(engine.memory.resume)
    assert not engine.memory._arriving
    assert engine.holds(*engine.kept) and mapped_bytes(engine.memory) == engine.bytes
    engine.memory.suspend(1)
    prefetched = attempt(lambda: (engine.memory.prefetch(), engine.memory.resume()))
    assert engine.holds(*engine.kept) and other.holds(*other.content)
    engine.memory.suspend(1)
    engine.memory.prefetch()
    attempt(lambda: engine.memory.suspend(1))
    assert mapped_bytes(engine.memory) == 0
    if before == 0:
        on_the_way_down = call in ("unmap", "host_buffer", "copy_to_host", "synchronize")
        on_the_way_up = call in ("map", "copy_from_host", "synchronize")
        assert (suspended, resumed, prefetched) == (on_the_way_down, on_the_way_up, on_the_way_up)


@pytest.mark.parametrize("fail_at", [("map", 3), ("copy_from_host", 1), ("synchronize", 0)])
@pytest.mark.parametrize("prefetched", [False, True])
def test_a_wake_that_fails_gives_the_memory_back(gpu, engines, fail_at, prefetched):
    engine = engines[1]
    for one in engines:
        one.memory.suspend(1)
    if prefetched:
        engine.memory.prefetch()
        fail_at = ("synchronize", 0) if fail_at[0] == "synchronize" else ("map", 0)
    gpu.fail_at = fail_at
    with pytest.raises(RuntimeError):
        engine.memory.resume()
    assert gpu.used == 0
    engine.memory.resume()
    assert engine.holds(*engine.kept)


def test_a_sleep_that_fails_halfway_copies_again(gpu, engines):
    """Between the failure and the next try the engine may have been written to."""
    engine = engines[0]
    gpu.fail_at = ("unmap", 0)
    with pytest.raises(RuntimeError):
        engine.memory.suspend(1)
    engine.write(engine.weights[0])
    engine.memory.suspend(1)
    engine.memory.resume()
    assert engine.holds(*engine.kept)


# ---- Any sequence --------------------------------------------------------------------------------

NAMES = st.integers(0, 2)
FAULT = st.none() | st.tuples(st.sampled_from(DRIVER_CALLS), st.integers(0, 5))


class AnySequence(RuleBasedStateMachine):
    """Three engines against a model of three facts per allocation: its owner, whether it is awake,
    what it holds.
    """

    def __init__(self):
        super().__init__()
        self.gpu = Gpu()
        self.memories = [
            EngineMemory(str(i), self.gpu.allocator, self.gpu, frozen=i == 2) for i in range(3)
        ]
        self.known: dict[int, SimpleNamespace] = {}

    @rule(i=NAMES, tag=st.sampled_from([WEIGHTS, KV_CACHE, RUNTIME]), pages=st.integers(1, 3))
    def malloc(self, i, tag, pages):
        with self.memories[i].active():
            address = self.gpu.malloc(tag, pages * PAGE)
        assert address not in self.known
        content = self.gpu.mapped[address].clone()
        self.known[address] = SimpleNamespace(owner=i, tag=tag, awake=True, content=content)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def free(self, data):
        address = data.draw(st.sampled_from(sorted(self.known)))
        self.gpu.free(address)
        del self.known[address]

    @precondition(lambda self: any(e.awake for e in self.known.values()))
    @rule(data=st.data())
    def write(self, data):
        awake = [
            a for a, e in self.known.items() if e.awake and not (e.owner == 2 and e.tag == WEIGHTS)
        ]
        for address in awake and [data.draw(st.sampled_from(sorted(awake)))]:
            entry = self.known[address]
            entry.content = _garbage(len(self.gpu.mapped[address]))
            self.gpu.mapped[address].copy_(entry.content)

    @rule(i=NAMES, level=st.sampled_from([1, 2]), fault=FAULT)
    def suspend(self, i, level, fault):
        self._insist(lambda: self.memories[i].suspend(level), fault)
        for entry in self._of(i):
            entry.awake = False
            if entry.tag == KV_CACHE or (entry.tag == WEIGHTS and level == 2):
                entry.content = None

    @rule(i=NAMES, tags=st.sampled_from([None, [WEIGHTS], [KV_CACHE]]), fault=FAULT)
    def resume(self, i, tags, fault):
        self._insist(lambda: self.memories[i].resume(tags), fault)
        for entry in self._of(i):
            entry.awake |= tags is None or entry.tag in tags or entry.tag not in DEFERRABLE

    @rule(i=NAMES, fault=FAULT)
    def prefetch(self, i, fault):
        self._insist(self.memories[i].prefetch, fault)

    def _of(self, i) -> list[SimpleNamespace]:
        return [entry for entry in self.known.values() if entry.owner == i]

    def _insist(self, action, fault) -> None:
        self.gpu.fail_at = fault
        try:
            action()
        except RuntimeError:
            action()
        finally:
            self.gpu.fail_at = None

    @invariant()
    def as_the_model_says(self):
        table = self.gpu.allocator.pointer_to_data
        assert set(table) == set(self.known) == set(self.gpu.reserved)
        for address, entry in self.known.items():
            assert table[address].is_asleep == (not entry.awake)
            if entry.awake and entry.content is not None:
                assert torch.equal(self.gpu.mapped[address], entry.content)
        for i, memory in enumerate(self.memories):
            mine = {a: e for a, e in self.known.items() if e.owner == i}
            assert memory.size() == sum(self.gpu.reserved[a][1] for a in mine)
            assert mapped_bytes(memory) == sum(
                self.gpu.mapped[a].numel() for a in mine if a in self.gpu.mapped
            )
        assert not self.gpu.poisoned


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
