"""Bad rows, distinguished from a bad model, table or mail server."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from shared.dead_letters import Limit, isolate
from shared.errors import Outage, Poison

BAD = Poison("bad row")


def limit() -> Limit:
    return Limit(ratio=0.5, consecutive=5)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 9))
def test_each_poisonous_row_is_found_and_no_other(rows: list[int], poisonous: int) -> None:
    calls = 0

    def work(part: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        if poisonous in part:
            raise Poison("bad")
        return [10 * row for row in part]

    results = isolate(rows, work)

    assert [isinstance(result, Poison) for result in results] == [row == poisonous for row in rows]
    assert [result for result in results if not isinstance(result, Poison)] == [10 * r for r in rows if r != poisonous]
    assert calls <= 1 + 2 * rows.count(poisonous) * max(1, len(rows)).bit_length()


def refused() -> None:
    raise Outage("even a good row is refused")


def accepted() -> None: ...


def test_a_few_bad_rows_are_bad_rows() -> None:
    counted = limit()
    for _ in range(100):
        counted.check([0] * 9 + [BAD], reference=refused)
    counted.check([BAD] * 3 + [0], reference=refused)  # with the one before, one less than too many


def test_rows_refused_one_after_the_other_are_not_the_rows() -> None:
    counted = limit()
    counted.check([0] * 20 + [BAD, BAD], reference=refused)
    counted.check([BAD, BAD], reference=refused)

    with pytest.raises(Outage, match=r"1 of 2 rows refused, too many for bad rows .* First refusal: bad row"):
        counted.check([BAD, 0], reference=refused)


def test_most_rows_refused_are_not_the_rows() -> None:
    with pytest.raises(Outage, match="6 of 9 rows refused"):
        limit().check([BAD, BAD, 0] * 3, reference=refused)


def test_what_was_too_much_is_not_counted_twice() -> None:
    counted = limit()
    counted.check([0] * 20, reference=refused)
    for _ in range(10):  # the same batch again and again
        with pytest.raises(Outage):
            counted.check([BAD] * 5, reference=refused)

    counted.check([BAD] * 4, reference=refused)


def test_however_many_rows_are_refused_beside_a_good_one_they_are_the_cause() -> None:
    counted = limit()
    with capture_logs() as logs:
        for _ in range(3):
            counted.check([BAD] * 20, reference=accepted)

    (line,) = [each for each in logs if each["log_level"] == "error"]  # once, not for each batch
    assert line["rows"] == "20 of 20 rows refused"
    assert line["first_reason"] == "bad row"
