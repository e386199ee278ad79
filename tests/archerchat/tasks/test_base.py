"""Tasks as sequences, their slices, and their mixtures."""

from __future__ import annotations

from collections import Counter

import pytest

from archerchat.errors import DataError, UsageError
from archerchat.tasks.base import CategoricalTask, Task, TaskMixture
from archerchat.tasks.collected import build_question
from archerchat.tasks.conversation import Conversation, assistant, user


class Numbers(Task):
    """Conversations that say which number they are."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.rows = range(size)

    def render(self, row: int) -> Conversation:
        return {"messages": [user(self.name), assistant(str(row))]}


class Exam(CategoricalTask, Numbers):
    """Questions whose answer is always B."""

    def render(self, row: int) -> Conversation:
        return build_question("?", "AB", ["no", "yes"], "B")


def said(conversations: object) -> list[tuple[str, int]]:
    assert isinstance(conversations, Task | TaskMixture | list)
    return [
        (each["messages"][0]["content"], int(each["messages"][1]["content"]))
        for each in conversations
    ]


def numbers(task: Task) -> list[int]:
    return [number for _, number in said(task)]


@pytest.mark.parametrize(
    "key",
    [
        slice(None),
        slice(3),
        slice(2, None),
        slice(1, 8, 3),
        slice(None, None, -1),
        slice(-2, None),
        slice(5, 5),
        slice(0, 100),
    ],
)
def test_a_slice_is_a_task_of_the_same_kind(key: slice) -> None:
    task = Numbers("n", 10)
    assert numbers(task[key]) == list(range(10))[key]
    assert isinstance(task[key], Numbers)
    assert len(task) == 10


def test_slices_are_taken_of_slices_and_shuffles() -> None:
    task = Numbers("n", 20)
    assert numbers(task[4:16:2][1:3]) == [6, 8]
    shuffled = task.shuffled(1)
    assert sorted(numbers(shuffled)) == list(range(20))
    assert numbers(shuffled) == numbers(task.shuffled(1)) != numbers(task.shuffled(2))
    assert numbers(shuffled[:5]) == numbers(shuffled)[:5]
    assert numbers(shuffled) != list(range(20))


def test_an_index_counts_from_either_end_and_ends() -> None:
    task = Numbers("n", 3)
    assert task[-1] == task[2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            task[index]
        with pytest.raises(IndexError):
            TaskMixture([task])[index]


def test_a_training_task_judges_nothing() -> None:
    task = Numbers("n", 3)
    with pytest.raises(UsageError, match="n has no answers to check"):
        task.evaluate(task[0], "0")


def test_a_categorical_task_judges_letters() -> None:
    task = Exam("exam", 1)
    assert (task.kind, task.random_baseline) == ("categorical", 0.25)
    assert [task.evaluate(task[0], letter) for letter in "AB"] == [False, True]
    assert [task.reward(task[0], letter) for letter in "AB"] == [0.0, 1.0]


def test_a_mixture_holds_everything_once_in_a_fixed_order() -> None:
    tasks = [Numbers("a", 30), Numbers("b", 50), Numbers("a", 30)]
    mixture = TaskMixture(tasks, seed=3)
    expected = Counter({("a", i): 2 for i in range(30)}) + Counter(("b", i) for i in range(50))
    assert Counter(said(mixture)) == expected
    assert said(mixture) == said(TaskMixture(tasks, seed=3)) != said(TaskMixture(tasks, seed=4))
    names = [name for name, _ in said(mixture)]
    assert {"a", "b"} == set(names[:20])
    assert [mixture.tasks[task][i] for task, i in map(mixture.origin, range(110))] == [
        mixture[index] for index in range(110)
    ]


def test_the_order_of_a_mixture_stays_what_it_was() -> None:
    """Runs that are resumed later need the order that they began with."""
    assert numbers_of(TaskMixture([Numbers("a", 8)])) == [3, 4, 6, 7, 2, 5, 0, 1]


def numbers_of(mixture: TaskMixture) -> list[int]:
    return [number for _, number in said(mixture)]


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(DataError, match="no conversations in none, nothing"):
        TaskMixture([Numbers("none", 0), Numbers("nothing", 0)])


def test_descriptions_tell_tasks_apart() -> None:
    task = Numbers("a", 10)
    others = [task, task[:9], task[1:], task.shuffled(1), task.shuffled(2), Numbers("b", 10)]
    mixtures = [TaskMixture([each], seed) for each in others for seed in (1, 2)]
    described = [str(each.describe()) for each in mixtures]
    assert len(set(described)) == len(described)
    assert task.shuffled(1).describe() == task.shuffled(1).describe()
