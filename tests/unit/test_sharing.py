"""Who makes room for whom, as each driver works it out for itself."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.pool.room import Resources, fit, take
from orchestrator.pool.sharing import Decision, Note, Place, decide

ONE = {"CPU": 1.0}


def held(number: int, node: str, bundle: dict[str, float] = ONE) -> Place:
    return Place(number, "held", [bundle], [node])


def waiting(number: int, *bundles: dict[str, float], apart: bool = False) -> Place:
    return Place(number, "waiting", list(bundles) or [ONE], None, apart)


def away(number: int, bundle: dict[str, float] = ONE) -> Place:
    return Place(number, "away", [bundle], ["x"])


def decisions(free: dict[str, Resources], *notes: Note) -> list[Decision]:
    return [decide(note, notes, free) for note in notes]


def test_the_lowest_gives_up_as_many_as_wait() -> None:
    lowest = Note(-1, 1, [held(n, "x") for n in range(3)])
    middle = Note(0, 0, [held(n, "y") for n in range(3)])
    high = Note(1, 2, [waiting(0), waiting(1)])
    found = decisions({"x": {}, "y": {}}, lowest, middle, high)
    assert found == [Decision(give_up={1, 2}), Decision(), Decision()]
    many = Note(1, 2, [waiting(n) for n in range(5)])
    found = decisions({"x": {}, "y": {}}, lowest, middle, many)
    assert found == [Decision(give_up={0, 1, 2}), Decision(give_up={1, 2}), Decision()]


def test_nobody_gives_up_for_an_equal() -> None:
    first, second = Note(0, 1, [held(0, "x")]), Note(0, 2, [waiting(0)])
    assert not any(decisions({"x": {}}, first, second))


def test_who_came_last_gives_up_first() -> None:
    first, last = Note(0, 1, [held(0, "x")]), Note(0, 2, [held(0, "x")])
    found = decisions({"x": {}}, first, last, Note(1, 3, [waiting(0)]))
    assert found == [Decision(), Decision(give_up={0}), Decision()]


def test_nothing_is_given_up_for_what_has_room_or_never_can() -> None:
    low = Note(0, 1, [held(0, "x"), held(1, "y")])
    assert not any(decisions({"x": ONE}, low, Note(1, 2, [waiting(0)])))
    assert not any(decisions({"x": {}, "y": {}}, low, Note(1, 2, [waiting(0, {"CPU": 2.0})])))
    assert not any(decisions({"x": {}, "y": {}}, low, Note(1, 2, [waiting(0, {"tpu": 1.0})])))
    kept = Note(0, 1, [Place(0, "kept", [ONE, ONE], ["x", "y"])])
    assert not any(decisions({"x": {}, "y": {}}, kept, Note(1, 2, [waiting(0)])))


def test_room_that_was_promised_is_not_made_twice() -> None:
    low = Note(0, 1, [held(0, "x"), Place(1, "leaving", [ONE], ["x"])])
    assert not any(decisions({"x": {}}, low, Note(1, 2, [waiting(0)])))
    found = decisions({"x": {}}, low, Note(1, 2, [waiting(0), waiting(1)]))
    assert found[0] == Decision(give_up={0})


def test_only_what_helps_is_given_up() -> None:
    """A worker without a GPU is of no use to one that needs it, whichever comes first."""
    gpu = {"CPU": 1.0, "GPU": 1.0}
    low = Note(0, 1, [held(0, "x", gpu), held(1, "x"), held(2, "y", gpu)])
    free = {"x": {"CPU": 3.0}, "y": {}}
    assert decisions(free, low, Note(1, 2, [waiting(0, gpu)]))[0].give_up in ({0}, {2})
    big = waiting(0, {"CPU": 4.0, "GPU": 1.0})
    assert decisions(free, low, Note(1, 2, [big]))[0] == Decision(give_up={0})


def test_a_gang_gets_all_its_room_or_none() -> None:
    low = Note(0, 1, [held(0, "x"), held(1, "x"), held(2, "y")])
    free: dict[str, Resources] = {"x": {}, "y": {}, "z": ONE}
    assert decisions(free, low, Note(1, 2, [waiting(0, ONE, ONE)]))[0].give_up in ({1}, {2})
    apart = Note(1, 2, [waiting(0, ONE, ONE, ONE, apart=True)])
    assert decisions(free, low, apart)[0] == Decision(give_up={1, 2})
    assert not any(decisions(free, low, Note(1, 2, [waiting(0, *[ONE] * 5)])))
    gang = Note(0, 1, [Place(0, "held", [ONE, ONE], ["x", "y"])])
    both = Note(1, 2, [waiting(0), waiting(1)])
    assert decisions({"x": {}, "y": {}}, gang, both)[0] == Decision(give_up={0})


def test_what_was_given_up_is_taken_back_where_there_is_room() -> None:
    low = Note(0, 1, [away(0), away(1)])
    # Not what others of higher rank wait for.
    high = Note(1, 2, [waiting(0)])
    assert not any(decisions({"x": ONE}, low, high))
    assert decisions({"x": {"CPU": 2.0}}, low, high)[0] == Decision(take_back={0})
    later = Note(0, 2, [away(0)])
    assert decisions({"x": {"CPU": 2.0}}, later, low) == [Decision(), Decision(take_back={0, 1})]


def test_what_was_given_up_is_asked_for_again_when_nobody_before_waits() -> None:
    """In Ray's queue, whose length is what a cluster grows by: there may be no room till somebody asks."""
    low, high = Note(0, 1, [away(0), away(1)]), Note(1, 2, [held(0, "x")])
    assert decisions({"x": {}}, low, high)[0] == Decision(take_back={0, 1})
    later = Note(0, 3, [away(0)])
    assert decisions({"x": {}}, low, later) == [Decision(take_back={0, 1}), Decision()]


def test_what_is_only_promised_is_not_taken_back() -> None:
    """Who it was given up for may have taken it already, and not said so."""
    low = Note(0, 1, [Place(0, "leaving", [ONE], ["x"]), away(1)])
    assert not any(decisions({"x": {}}, low))


def test_who_must_wait_longer_does_not_stand_in_the_way() -> None:
    """Ray would give the next room to whoever is first in its own queue."""
    low, high = Note(0, 1, [waiting(0), waiting(1)]), Note(1, 2, [waiting(0)])
    assert decisions({"x": {}}, low, high) == [Decision(withdraw={0, 1}), Decision()]
    assert decisions({"x": {}}, low) == [Decision()]
    assert decisions({"x": ONE}, low, high) == [Decision(withdraw={0, 1}), Decision()]


def test_a_lost_node_gives_no_room() -> None:
    low = Note(0, 1, [held(0, "lost"), held(1, "x"), Place(2, "leaving", [ONE], ["lost"])])
    assert decisions({"x": {}}, low, Note(1, 2, [waiting(0)]))[0] == Decision(give_up={1})


SIZES = st.integers(1, 3)
HOLDERS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("xyz"), SIZES), max_size=5)


@settings(max_examples=40)
@given(HOLDERS, st.fixed_dictionaries({name: st.integers(0, 2) for name in "xyz"}), SIZES)
def test_as_few_as_will_do(
    holders: list[tuple[int, str, int]], free: dict[str, int], size: int
) -> None:
    """Against all that could be given up for one place that waits."""
    notes = [
        Note(priority, number, [held(0, node, {"CPU": float(cpus)})])
        for number, (priority, node, cpus) in enumerate(holders)
    ]
    asks = Note(2, len(holders), [waiting(0, {"CPU": float(size)})])
    nodes = {name: {"CPU": float(cpus)} for name, cpus in free.items()}
    given_up = {
        note.arrival for note in notes if decide(note, [*notes, asks], nodes).give_up == {0}
    }

    def helps(chosen: set[int]) -> bool:
        left = {name: dict(room) for name, room in nodes.items()}
        for number in chosen:
            (place,) = notes[number].places
            assert place.nodes is not None
            take(left[place.nodes[0]], place.bundles[0], -1.0)
        return fit(asks.places[0].bundles, left) is not None

    lower = [note.arrival for note in notes if note.priority < 2]
    ways = [
        set(way) for n in range(len(lower) + 1) for way in combinations(lower, n) if helps(set(way))
    ]
    assert given_up <= set(lower)
    if not ways:
        assert not given_up
    else:
        assert helps(given_up)
        assert not any(way < given_up for way in ways)
