"""Turns of teachers where nobody shares the GPU with them."""

from collections.abc import Callable, Collection, Iterator, Sequence

from opd.teachers import ColocatedTeacher


def one_after_another(
    teachers: Sequence[ColocatedTeacher],
) -> Callable[[Collection[str]], Iterator[str]]:
    members = {teacher.name: teacher for teacher in teachers}

    def turns(names: Collection[str]) -> Iterator[str]:
        for name in names:
            members[name].wake()
            try:
                yield name
            finally:
                members[name].sleep()

    return turns
