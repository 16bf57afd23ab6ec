"""Which adapter encodes which text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_task", "tasks_of"]


def check_task(task: str, tasks: Sequence[str]) -> str:
    """The task, or a ValueError that lists the tasks of the checkpoint."""
    if task in tasks:
        return task
    if not tasks:
        raise ValueError(
            f"task={task!r}: this checkpoint has no adapters, its weights serve one task; leave task out"
        )
    raise ValueError(f"task={task!r} is unknown: choose one of {list(tasks)}")


def tasks_of(
    task: str | Sequence[str] | None, default: str | None, tasks: Sequence[str], count: int
) -> list[str | None]:
    """Returns the adapter of every text, None where the checkpoint has none.

    Args:
        task: one name, or one a text; None for `default`.
        default: the encoder's own.
        tasks: names of the checkpoint's adapters.
        count: number of texts.

    Raises:
        ValueError: no task where one is needed, an unknown one, or another number of them than of texts.
    """
    task = default if task is None else task
    if task is None and tasks:
        raise ValueError(f"task is needed for this checkpoint: choose one of {list(tasks)}")
    if task is None or isinstance(task, str):
        return [check_task(task, tasks) if task is not None else None] * count
    if len(task) != count:
        raise ValueError(f"task has {len(task)} entries for {count} texts")
    return [check_task(name, tasks) for name in task]
