# this_file: tests/durable/stores/test_conformance.py
"""What every store does, whatever it is made of; see `conftest.PLACES`."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from opero.durable.records import (
    Acquire,
    Annotate,
    Cancel,
    Create,
    Drop,
    Fork,
    Move,
    Op,
    PutStep,
    Resolve,
    Resume,
    Send,
    State,
    StepRecord,
    StepState,
    Take,
    Wake,
    WorkflowRecord,
)
from opero.errors import JournalError

if TYPE_CHECKING:
    from opero.durable.records import JournalStore

pytestmark = pytest.mark.internal

Kill = Callable[[str], None]
NAMES = ("billing", "mailing")


@pytest.fixture
def kill(place: Any) -> Kill:
    return place.kill


@pytest.fixture
def owner(store: JournalStore) -> Iterator[str]:
    joined = store.join()
    yield joined
    store.leave(joined)


@pytest.fixture
def other(store: JournalStore) -> Iterator[str]:
    joined = store.join()
    yield joined
    store.leave(joined)


def do(store: JournalStore, op: Op) -> Any:
    return store.apply([op])[0]


def new(store: JournalStore, name: str = "billing", id: str | None = None, **fields: Any) -> str:
    """Create a workflow and return its id."""
    number = next(_numbers)
    record = WorkflowRecord(
        id=id or f"w{number}", name=name, version=None, args="[]", hash="h", **fields
    )
    assert do(store, Create(record)) is record
    time.sleep(0.001)  # so that they have an age
    return record.id


_numbers = itertools.count()


def acquire(
    store: JournalStore, owner: str, limit: int = 10, **fields: Any
) -> list[WorkflowRecord]:
    found: list[WorkflowRecord] = do(store, Acquire(owner, NAMES, limit, **fields))
    return found


def running(store: JournalStore, owner: str) -> WorkflowRecord:
    new(store)
    return acquire(store, owner)[0]


def step(path: str = "1", order: int = 1, **fields: Any) -> StepRecord:
    made: dict[str, Any] = {"name": "charge", "hash": "x", "state": StepState.DONE, "value": "1"}
    return StepRecord(path=path, order=order, **{**made, "began": 1.0, **fields})


def put(store: JournalStore, run: WorkflowRecord, *steps: StepRecord) -> list[bool]:
    assert run.owner is not None
    return store.apply([PutStep(run.id, run.owner, run.epoch, s) for s in steps])


def move(store: JournalStore, run: WorkflowRecord, state: State, **fields: Any) -> bool:
    assert run.owner is not None
    return bool(do(store, Move(run.id, run.owner, run.epoch, state, **fields)))


def got(store: JournalStore, id: str) -> WorkflowRecord:
    found = store.get(id)
    assert found is not None
    return found


# --- workflows ----------------------------------------------------------------------------------------------------


def test_workflow_comes_back_as_it_was_created(store: JournalStore) -> None:
    before = time.time()
    record = WorkflowRecord(
        id="ünïcode 'id'", name="billing", version="2", args='["ä", 1]', hash="h", progress=3
    )
    do(store, Create(record))
    found = got(store, "ünïcode 'id'")
    assert before <= found.created == found.updated <= time.time()
    assert found == record
    assert store.get("unknown") is None


def test_second_workflow_of_an_id_is_not_created(store: JournalStore) -> None:
    new(store, id="a")
    found = do(
        store, Create(WorkflowRecord(id="a", name="mailing", version=None, args="", hash=""))
    )
    assert (found.name, got(store, "a").name) == ("billing", "billing")


def test_workflows_are_found_by_name_and_state_the_youngest_first(
    store: JournalStore, owner: str
) -> None:
    ids = [new(store, name) for name in ("billing", "mailing", "billing")]
    acquire(store, owner, 1)
    assert [w.id for w in store.find()] == ids[::-1]
    assert [w.id for w in store.find("billing")] == [ids[2], ids[0]]
    assert [w.id for w in store.find(states=[State.RUNNING, State.DONE])] == [ids[0]]
    assert [w.id for w in store.find("mailing", [State.RUNNING])] == []
    assert [w.id for w in store.find(limit=2)] == [ids[2], ids[1]]


# --- owners -------------------------------------------------------------------------------------------------------


def test_the_oldest_are_acquired_and_each_once(store: JournalStore, owner: str, other: str) -> None:
    ids = [new(store) for _ in range(3)]
    new(store, "unknown")
    first = acquire(store, owner, 2)
    assert [w.id for w in first] == ids[:2]
    assert {(w.owner, w.epoch, w.state) for w in first} == {(owner, 1, State.RUNNING)}
    assert [got(store, w.id) for w in first] == first
    assert [w.id for w in acquire(store, other)] == ids[2:]
    assert acquire(store, owner) == acquire(store, other) == []


def test_an_acquisition_can_be_limited_to_recoveries(
    store: JournalStore, kill: Kill, owner: str
) -> None:
    first, second = new(store), new(store)
    dying = store.join()
    assert len(acquire(store, dying)) == 2
    kill(dying)
    third = new(store)
    assert [run.id for run in acquire(store, owner, recoveries=(0, 0))] == [third]
    assert [run.id for run in acquire(store, owner, 1, recoveries=(1, 5))] == [first]
    assert [run.id for run in acquire(store, owner, recoveries=(1, 5))] == [second]


def test_a_workflow_that_was_put_aside_has_no_recoveries(
    store: JournalStore, kill: Kill, owner: str
) -> None:
    id = new(store)
    dying = store.join()
    acquire(store, dying)
    kill(dying)
    run = running(store, owner)
    assert run.recoveries == 1
    assert move(store, run, State.QUEUED)
    assert got(store, id).recoveries == 0


def test_workflows_that_nothing_acquires_can_be_annotated_until_they_are(
    store: JournalStore, owner: str
) -> None:
    first, other = new(store, "billing"), new(store, "shipping")
    later = time.time() + 1
    assert store.unowned(0.0) == []
    assert sorted(store.unowned(later)) == ["billing", "shipping"]
    assert do(store, Annotate("billing", later, "unknown here")) == 1
    assert store.unowned(later) == ["shipping"]
    assert got(store, first).error == "unknown here"
    assert got(store, other).error is None
    assert running(store, owner).error is None


def test_a_sleeper_can_be_woken_before_its_time(store: JournalStore, owner: str) -> None:
    new(store)
    run = running(store, owner)
    put(store, run, step(state=StepState.PENDING, wake=time.time() + 1000))
    assert move(store, run, State.SLEEPING, wake=time.time() + 1000)
    assert not do(store, Wake(run.id, run.epoch + 1))
    assert do(store, Wake(run.id, run.epoch))
    assert not do(store, Wake(run.id, run.epoch))
    assert running(store, owner).id == run.id
    assert (store.steps(run.id)[0].wake or 0) <= time.time()


def test_sleepers_are_acquired_when_it_is_time(store: JournalStore, owner: str) -> None:
    later, soon = running(store, owner), running(store, owner)
    assert move(store, later, State.SLEEPING, wake=time.time() + 60)
    assert acquire(store, owner) == []
    assert move(store, soon, State.SLEEPING, wake=time.time() + 0.02)
    time.sleep(0.03)
    again = acquire(store, owner)
    assert [(w.id, w.epoch, w.wake) for w in again] == [(soon.id, 2, None)]


def test_blocked_ones_are_acquired_on_request_only(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    move(store, run, State.BLOCKED, error="changed")
    assert got(store, run.id).error == "changed"
    assert acquire(store, owner) == []
    assert [w.id for w in acquire(store, owner, blocked=True)] == [run.id]
    assert got(store, run.id).error is None


@pytest.mark.parametrize(
    "state", [State.DONE, State.FAILED, State.CANCELLED, State.DEAD, State.IN_DOUBT, State.WAITING]
)
def test_ended_blocked_and_in_doubt_workflows_are_not_acquired(
    store: JournalStore, owner: str, state: State
) -> None:
    move(store, running(store, owner), state)
    assert acquire(store, owner, blocked=True) == []


# --- owners -------------------------------------------------------------------------------------------------------


def test_work_of_the_dead_is_taken_over_and_that_of_the_living_never(
    opened: Callable[[], JournalStore], kill: Kill
) -> None:
    one, two = opened(), opened()
    dead, alive = one.join(), two.join()
    run = running(one, dead)
    assert two.attention(alive) == (False, None)
    assert acquire(two, alive) == []
    kill(dead)
    assert two.attention(alive)[0]
    taken = acquire(two, alive)
    assert [(w.id, w.owner, w.recoveries) for w in taken] == [(run.id, alive, 1)]
    assert taken[0].epoch > run.epoch
    two.leave(alive)


def test_sleepers_of_the_dead_sleep_on(store: JournalStore, kill: Kill, owner: str) -> None:
    dead = store.join()
    run = running(store, dead)
    wake = time.time() + 60
    move(store, run, State.SLEEPING, wake=wake, free=False)
    kill(dead)
    assert acquire(store, owner) == []
    found = got(store, run.id)
    assert (found.state, found.wake, found.owner) == (State.SLEEPING, wake, None)
    assert store.attention(owner) == (False, wake)


def test_too_many_deaths_without_progress_end_a_workflow(store: JournalStore, kill: Kill) -> None:
    id = new(store)
    for death, counted in enumerate([0, 1, 1, 2]):
        mortal = store.join()
        (run,) = acquire(store, mortal, max_recoveries=2)
        assert run.recoveries == counted
        if death == 1:
            put(store, run, step())  # progress: the count begins again
        kill(mortal)
    last = store.join()
    assert acquire(store, last, max_recoveries=2) == []
    store.leave(last)
    found = got(store, id)
    assert found.state is State.DEAD
    assert "died 3 times in a row" in (found.error or "")


def test_a_cancellation_outlives_the_owner(store: JournalStore, kill: Kill, owner: str) -> None:
    dead = store.join()
    run = running(store, dead)
    do(store, Cancel(run.id))
    kill(dead)
    assert acquire(store, owner) == []
    assert got(store, run.id).state is State.CANCELLED


def test_drop_frees_all_workflows_but_those_that_still_run(store: JournalStore, owner: str) -> None:
    busy, asleep, wanted, kept = (running(store, owner) for _ in range(4))
    move(store, asleep, State.SLEEPING, wake=9e9, free=False)
    do(store, Cancel(wanted.id))
    assert do(store, Drop(owner, (kept.id,))) == 3
    assert got(store, busy.id).state is State.QUEUED
    assert got(store, asleep.id).state is State.SLEEPING
    assert got(store, wanted.id).state is State.CANCELLED
    assert got(store, kept.id).owner == owner
    assert not put(store, busy, step())[0]


# --- steps --------------------------------------------------------------------------------------------------------


def test_steps_come_back_in_the_order_of_their_first_record(
    store: JournalStore, owner: str
) -> None:
    run = running(store, owner)
    texts = ['"ä\\u0000 \'"', "null", '"' + "x" * 100_000 + '"']
    steps = [
        step(f"c{n}/1", order=3 - n, value=text, ended=2.5 + n, attempts=n + 1, wake=7.0)
        for n, text in enumerate(texts)
    ]
    assert put(store, run, *steps) == [True] * 3
    assert store.steps(run.id) == steps[::-1]
    assert store.steps("unknown") == []


def test_a_step_changes_in_place(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    put(store, run, step(state=StepState.STARTED, value=None), step("2", order=2))
    done = step(state=StepState.DONE, value="5", attempts=3, ended=9.0)
    put(store, run, done)
    assert store.steps(run.id)[0] == done


def test_writes_of_a_former_owner_are_refused(store: JournalStore, owner: str, other: str) -> None:
    run = running(store, owner)
    late = WorkflowRecord(**{f: getattr(run, f) for f in WorkflowRecord.__slots__})
    do(store, Drop(owner))
    (again,) = acquire(store, owner)
    assert put(store, again, step()) == [True]
    assert put(store, late, step("2", order=2)) == [False]
    assert not move(store, late, State.DONE, output="1")
    assert do(store, Take(late.id, owner, late.epoch, "go", step("3", order=3))) is False
    assert not do(store, Move(run.id, other, again.epoch, State.DONE))
    assert [s.path for s in store.steps(run.id)] == ["1"]
    assert got(store, run.id).state is State.RUNNING


def test_an_end_is_kept(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    assert move(store, run, State.FAILED, error="{}", failed_step="4")
    found = got(store, run.id)
    assert (found.state, found.error, found.failed_step, found.owner) == (
        State.FAILED, "{}", "4", None
    )  # fmt: skip
    other = running(store, owner)
    assert move(store, other, State.DONE, output="[1]")
    assert got(store, other.id).output == "[1]"


# --- stepping in --------------------------------------------------------------------------------------------------


def test_workflow_without_an_owner_is_cancelled_at_once(store: JournalStore) -> None:
    id = new(store)
    assert do(store, Cancel(id)).state is State.CANCELLED
    assert do(store, Cancel(id)).state is State.CANCELLED
    assert do(store, Cancel("unknown")) is None


def test_owner_finds_the_cancellation_of_its_workflow(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    assert store.cancelled(owner) == []
    found = do(store, Cancel(run.id))
    assert (found.state, found.cancel) == (State.RUNNING, True)
    assert store.cancelled(owner) == [run.id]
    assert store.cancelled("another program else") == []


@pytest.mark.parametrize(
    ("state", "resumes"),
    [
        (State.FAILED, True), (State.CANCELLED, True), (State.DEAD, True), (State.BLOCKED, True),
        (State.DONE, False), (State.SLEEPING, False), (State.IN_DOUBT, False),
    ],
)  # fmt: skip
def test_what_has_ended_without_a_result_can_be_resumed(
    store: JournalStore, owner: str, state: State, resumes: bool
) -> None:
    run = running(store, owner)
    put(store, run, step("1"), step("2", order=2, state=StepState.FAILED))
    move(store, run, state, error="x", failed_step="2")
    assert do(store, Resume(run.id)) is resumes
    if resumes:
        found = got(store, run.id)
        assert (found.state, found.error, found.failed_step) == (State.QUEUED, None, None)
        assert [s.path for s in store.steps(run.id)] == ["1"]
    assert do(store, Resume("unknown")) is False


def test_a_fork_has_the_finished_steps_before(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    steps = [step(str(n), order=n) for n in range(1, 5)]
    steps[1].state = StepState.STARTED
    put(store, run, *steps)
    made = do(store, Fork(run.id, "copy", 4, "2"))
    assert got(store, "copy") == made
    assert (made.state, made.version, made.args, made.epoch) == (
        State.QUEUED,
        "2",
        run.args,
        0,
    )
    assert [s.path for s in store.steps("copy")] == ["1", "3"]
    assert do(store, Fork("unknown", "none", 1, None)) is None


def test_a_step_in_doubt_is_decided_once(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    put(store, run, step(state=StepState.STARTED, value=None))
    decided = step(state=StepState.DONE, value="7")
    assert not do(store, Resolve(run.id, "1", decided))
    move(store, run, State.IN_DOUBT)
    assert not do(store, Resolve(run.id, "2", decided))
    assert do(store, Resolve(run.id, "1", decided))
    (found,) = store.steps(run.id)
    assert (found.state, found.value, found.name) == (StepState.DONE, "7", "charge")
    assert got(store, run.id).state is State.QUEUED
    assert not do(store, Resolve(run.id, "1", None))


def test_a_step_in_doubt_can_be_forgotten(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    put(store, run, step(state=StepState.STARTED, value=None))
    move(store, run, State.IN_DOUBT)
    assert do(store, Resolve(run.id, "1", None))
    assert store.steps(run.id) == []


# --- signals ------------------------------------------------------------------------------------------------------


def take(store: JournalStore, run: WorkflowRecord, name: str = "go", **fields: Any) -> Any:
    assert run.owner is not None
    pending = step(name=f"wait for {name}", state=StepState.PENDING, value=None, **fields)
    return do(store, Take(run.id, run.owner, run.epoch, name, pending, at=5.0))


def test_signals_are_taken_in_their_order(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    sent = [Send(run.id, "go", "1"), Send(run.id, "stop", "2"), Send(run.id, "go", "3")]
    assert store.apply(sent) == [True] * 3
    assert sorted(store.signalled(owner)) == [(run.id, "go"), (run.id, "stop")]
    assert [take(store, run), take(store, run), take(store, run)] == ["1", "3", None]
    (found,) = store.steps(run.id)
    assert found.state is StepState.PENDING
    assert take(store, run, "stop") == "2"
    assert [(s.state, s.value, s.ended) for s in store.steps(run.id)] == [
        (StepState.DONE, "2", 5.0)
    ]
    assert store.signalled(owner) == []


def test_signal_wakes_the_workflow_that_waits_for_it(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    assert take(store, run) is None
    move(store, run, State.WAITING)
    do(store, Send(run.id, "other", "1"))
    assert got(store, run.id).state is State.WAITING
    do(store, Send(run.id, "go", "1"))
    assert got(store, run.id).state is State.QUEUED


def test_a_signal_that_comes_while_its_workflow_is_put_aside_is_not_overlooked(
    store: JournalStore, owner: str
) -> None:
    run = running(store, owner)
    assert take(store, run) is None
    do(store, Send(run.id, "go", "1"))
    move(store, run, State.WAITING)
    assert got(store, run.id).state is State.QUEUED


def test_what_has_ended_gets_no_signals(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    do(store, Send(run.id, "go", "1"))
    move(store, run, State.FAILED)
    assert not do(store, Send(run.id, "go", "1"))
    assert not do(store, Send("unknown", "go", "1"))
    do(store, Resume(run.id))
    (again,) = acquire(store, owner)
    assert take(store, again) is None


# --- the watch ----------------------------------------------------------------------------------------------------


def test_attention_says_whether_an_owner_would_find_something(
    store: JournalStore, owner: str
) -> None:
    assert store.attention(owner) == (False, None)
    new(store)
    assert store.attention(owner)[0]
    (run,) = acquire(store, owner)
    assert store.attention(owner) == (False, None)
    wake = time.time() + 60
    move(store, run, State.SLEEPING, wake=wake)
    assert store.attention(owner) == (False, wake)


# --- batches, threads, opening ------------------------------------------------------------------------------------


class Impossible(Op):
    """No store knows how to write it."""


def test_a_batch_is_written_whole_or_not_at_all(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    record = WorkflowRecord(id="late", name="billing", version=None, args="", hash="")
    with pytest.raises(Exception):  # noqa: B017, PT011 - which one is the store's business
        store.apply([PutStep(run.id, owner, run.epoch, step()), Create(record), Impossible()])
    assert store.steps(run.id) == []
    assert store.get("late") is None
    assert put(store, run, step()) == [True]


def test_answers_come_in_the_order_of_the_writes(store: JournalStore, owner: str) -> None:
    run = running(store, owner)
    ops: list[Op] = [PutStep(run.id, owner, run.epoch, step(str(n), order=n)) for n in range(1, 40)]
    ops.insert(7, PutStep(run.id, owner, 99, step("late", order=50)))
    assert store.apply(ops) == [True] * 7 + [False] + [True] * 32


def test_several_stores_and_threads_acquire_each_workflow_once(
    opened: Callable[[], JournalStore],
) -> None:
    stores = [opened() for _ in range(4)]
    ids = {new(stores[n % 4]) for n in range(40)}
    acquired: list[str] = []

    def work(store: JournalStore) -> None:
        me = store.join()
        while found := acquire(store, me, 3):
            for run in found:
                assert put(store, run, step()) == [True]
                assert move(store, run, State.DONE, output="1")
                acquired.append(run.id)
        store.leave(me)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(acquired) == sorted(ids)


def test_what_is_written_is_there_after_closing_and_opening(
    opened: Callable[[], JournalStore],
) -> None:
    first = opened()
    id = new(first)
    first.open()  # twice does no harm
    first.close()
    with pytest.raises(JournalError):
        first.get(id)
    with pytest.raises(JournalError):
        first.apply([Cancel(id)])
    first.open()
    assert got(first, id) == got(opened(), id)
