"""No wait without a deadline: what waits for another process, thread, socket or task says how long.

The test reads syntax, not types, so it goes by names and by missing arguments: `x.get()` without an
argument is a queue's, `x.join()` a thread's. It does not see a lock in a `with` (held for lines,
not for answers) or a loop that polls.
"""

import ast

import pytest

from tests.support.processes import ROOT

SOURCES = [
    path
    for pattern in ("opd/**/*.py", "train_*.py", "scripts/**/*.py")
    for path in sorted(ROOT.glob(pattern))
]

# "file: the function that waits" -> why it may wait as long as it takes
ALLOWED = {
    "rollout.py: subprocess.run": "a child writes responses as long as that takes, dies with us",
    "pool.py: request.turn": "a replica takes it, or the pool gives it up after `wait_s`",
    "bench_recovery.py: future.result": "the pool is closed, and each run had its own deadline",
    "tools.py: process.submit(function, *args).result": "a measurement takes what it takes",
    "make_demo.py: job.result": "training takes what it takes; a dead child raises",
    "lora_models.py: job.result": "likewise",
    "vision_models.py: job.result": "likewise",
}

HTTP_LIBRARIES = {"httpx", "requests"}
HTTP_CALLS = {
    "get",
    "post",
    "put",
    "patch",
    "delete",
    "head",
    "options",
    "request",
    "stream",
    "Client",
    "AsyncClient",
}
CHILD_CALLS = {"run", "call", "check_call", "check_output"}


def name_of(node: ast.expr) -> str:
    """The last name of a call's function: `wait` of `a.b.wait`."""
    return (
        node.attr
        if isinstance(node, ast.Attribute)
        else node.id
        if isinstance(node, ast.Name)
        else ""
    )


def owner_of(node: ast.expr) -> str:
    """The last name of what an attribute belongs to: `b` of `a.b.wait`."""
    return name_of(node.value) if isinstance(node, ast.Attribute) else ""


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def says(call: ast.Call, keyword: str, value=...) -> bool:
    """Whether a keyword is given: any value but None, or that very constant."""
    found = next((k.value for k in call.keywords if k.arg == keyword), None)
    if found is None or is_none(found):
        return False
    return value is ... or (isinstance(found, ast.Constant) and found.value is value)


def is_deadline(node: ast.expr) -> bool:
    """`asyncio.timeout(3)`, `asyncio.timeout_at(then)`, `asyncio.wait_for(what, 3)`."""
    if not isinstance(node, ast.Call):
        return False
    arguments = [a for a in node.args if not is_none(a)]
    name = name_of(node.func)
    if name == "wait_for":
        return len(arguments) > 1 or says(node, "timeout")
    return name in ("timeout", "timeout_at") and (
        bool(arguments) or says(node, "delay") or says(node, "when")
    )


class Waits(ast.NodeVisitor):
    """Collects the waits without a deadline of one source: (line, the function or future that is
    waited for).
    """

    def __init__(self):
        self.found: list[tuple[int, str]] = []
        self.from_subprocess: set[str] = set()
        # inside `asyncio.timeout` or `wait_for`: a bound for what is awaited, not for what blocks
        self.bounded = False
        # calls that are awaited or handed to `wait_for`: they return at once themselves
        self.awaited: set[int] = set()

    def visit_ImportFrom(self, node):
        if node.module == "subprocess":
            self.from_subprocess |= {
                alias.asname or alias.name for alias in node.names
            } & CHILD_CALLS

    def _in_a_new_function(self, node):
        outer, self.bounded = self.bounded, False  # it runs at another time
        self.generic_visit(node)
        self.bounded = outer

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _in_a_new_function

    def visit_AsyncWith(self, node):
        outer = self.bounded
        for item in node.items:  # from left to right: a deadline covers what stands behind it
            self.visit(item)
            call = item.context_expr
            if is_deadline(call):
                self.bounded = True
            elif (
                isinstance(call, ast.Call)
                and name_of(call.func) == "TaskGroup"
                and not self.bounded
            ):
                self._report(call)
        for statement in node.body:
            self.visit(statement)
        self.bounded = outer

    def visit_Await(self, node):
        value = node.value
        if isinstance(value, ast.Call):
            self.awaited.add(id(value))
            endless = self._waits(value, awaited=True) or name_of(value.func) in (
                "gather",
                "shield",
            )
        else:
            endless = True  # a future or a task
        if endless and not self.bounded:
            self._report(value)
        self.generic_visit(node)

    def visit_Call(self, node):
        if is_deadline(node) and name_of(node.func) == "wait_for":
            self.awaited |= {
                id(a)
                for a in [*node.args, *(k.value for k in node.keywords)]
                if isinstance(a, ast.Call)
            }
        elif id(node) not in self.awaited and self._waits(node, awaited=False):
            self._report(node)
        self.generic_visit(node)

    def _waits(self, call: ast.Call, *, awaited: bool) -> bool:
        """Whether a call waits, and nothing in it says how long."""
        name, owner, positional = (
            name_of(call.func),
            owner_of(call.func),
            [a for a in call.args if not is_none(a)],
        )
        if says(call, "timeout"):
            return False
        if name in CHILD_CALLS and (
            owner == "subprocess" or (not owner and name in self.from_subprocess)
        ):
            return True
        if name == "urlopen":
            return len(positional) < 3
        if (owner in HTTP_LIBRARIES and name in HTTP_CALLS) or name == "ClientSession":
            return True
        if not isinstance(call.func, ast.Attribute):
            return False
        if name == "wait" and owner in ("asyncio", "futures"):
            return len(positional) < (2 if owner == "futures" else 99)
        if name in ("wait", "result", "join"):
            return not positional and not (awaited and name == "result")
        if name in ("acquire", "get"):
            if any(says(call, keyword, False) for keyword in ("blocking", "block")):
                return False
            return all(isinstance(a, ast.Constant) and a.value is True for a in positional)
        return name == "communicate"

    def _report(self, node: ast.expr) -> None:
        self.found.append(
            (node.lineno, ast.unparse(node.func if isinstance(node, ast.Call) else node))
        )


def waits_in(source: str) -> list[tuple[int, str]]:
    visitor = Waits()
    visitor.visit(ast.parse(source))
    return sorted(set(visitor.found))


def test_nothing_waits_without_a_deadline():
    found, used = [], set()
    for path in SOURCES:
        for line, code in waits_in(path.read_text()):
            used.add(f"{path.name}: {code}")
            if f"{path.name}: {code}" not in ALLOWED:
                found.append(f"{path.relative_to(ROOT)}:{line}: {code}")
    assert not found, "no deadline:\n" + "\n".join(found)
    assert used == set(ALLOWED), f"allowed, but not there any more: {set(ALLOWED) - used}"
    assert all(reason.strip() and "\n" not in reason for reason in ALLOWED.values())


ENDLESS = [
    *("child.wait()", "event.wait()", "event.wait(None)", "child.wait(timeout=None)", "os.wait()"),
    *("future.result()", "future.result(timeout=None)", "thread.join()", "self.queue.join()"),
    *(
        "lock.acquire()",
        "lock.acquire(True)",
        "queue.get()",
        "queue.get(True)",
        "queue.get(block=True)",
    ),
    *("child.communicate()", "child.communicate(text)", "futures.wait(all_of_them)"),
    *(
        "subprocess.run(['ls'])",
        "subprocess.check_output(['ls'], timeout=None)",
        "subprocess.check_call(['ls'])",
    ),
    *(
        "from subprocess import run\nrun(['ls'])",
        "from subprocess import check_output as co\nsubprocess.call(['ls'])",
    ),
    *("urlopen(url)", "urllib.request.urlopen(url, data)", "httpx.get(url)", "httpx.Client()"),
    *(
        "httpx.AsyncClient(timeout=None)",
        "requests.post(url, json=body)",
        "aiohttp.ClientSession()",
    ),
    "async def f():\n    await event.wait()",
    "async def f():\n    await self.queue.get()",
    "async def f():\n    await asyncio.gather(a(), b())",
    "async def f():\n    await task",
    "async def f():\n    await self.future",
    "async def f():\n    await asyncio.shield(task)",
    "async def f():\n    await asyncio.wait(tasks)",
    "async def f():\n    await asyncio.wait_for(event.wait(), None)",
    "async def f():\n    async with asyncio.timeout(None):\n        await event.wait()",
    "async def f():\n    async with asyncio.TaskGroup() as group:\n        pass",
    "async def f():\n    async with asyncio.timeout(3):\n        future.result()",
    "async def f():\n    async with asyncio.timeout(3):\n        pass\n    await task",
    "async def f():\n    async with asyncio.timeout(3):\n        async def g():\n            "
    "await task",
    "async def f():\n    await limiter.acquire()",
]

BOUNDED = [
    *(
        "child.wait(3)",
        "event.wait(timeout=3)",
        "future.result(left)",
        "thread.join(timeout=3)",
        "', '.join(words)",
    ),
    *(
        "os.path.join('a', 'b')",
        "lock.acquire(timeout=3)",
        "lock.acquire(False)",
        "lock.acquire(blocking=False)",
    ),
    *(
        "queue.get(timeout=3)",
        "queue.get(block=False)",
        "queue.get_nowait()",
        "mapping.get('key')",
        "sizes.get(1)",
    ),
    *(
        "child.communicate(timeout=3)",
        "futures.wait(all_of_them, timeout=3)",
        "run(['ls'])",
        "engine.run(3)",
    ),
    *(
        "subprocess.run(['ls'], timeout=3)",
        "urlopen(url, timeout=3)",
        "httpx.get(url, timeout=3)",
        "client.get(url)",
    ),
    *(
        "httpx.AsyncClient(timeout=3)",
        "requests.get(url, timeout=(1, 3))",
        "aiohttp.ClientSession(timeout=limits)",
    ),
    "async def f():\n    await asyncio.wait_for(event.wait(), 3)",
    "async def f():\n    await asyncio.wait_for(timeout=3, fut=queue.get())",
    "async def f():\n    async with asyncio.timeout(3):\n        await event.wait()\n        "
    "await task",
    "async def f():\n    async with asyncio.timeout_at(then), asyncio.TaskGroup() as group:\n     "
    "   await queue.get()",
    "async def f():\n    async with asyncio.timeout(3):\n        await asyncio.gather(a(), b())",
    "async def f():\n    await asyncio.wait(tasks, timeout=3)",
    "async def f():\n    await asyncio.sleep(3)\n    await self.ask(url)",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_an_endless_wait_is_seen(source):
    assert len(waits_in(source)) == 1


@pytest.mark.parametrize("source", BOUNDED)
def test_a_wait_with_a_deadline_passes(source):
    assert waits_in(source) == []
