from datetime import UTC, datetime

from trainer.record.incident import Incident, find_former_incidents

AT = datetime(2026, 1, 1, 8, tzinfo=UTC)


def test_an_incident_is_one_line():
    lost = Incident(kind="workers lost", attempt=2, at=AT, what="worker 1 was killed", log="incidents/0001.log")
    assert str(lost) == "attempt 2 was lost: worker 1 was killed (incidents/0001.log)"
    resumed = lost.model_copy(update={"log": "", "next_step": 8})
    assert str(resumed) == "attempt 2 was lost: worker 1 was killed; the run continued after step 8"
    damaged = Incident(kind="files damaged", attempt=2, at=AT, what="result.json is empty")
    assert str(damaged) == "recovered at 2026-01-01T08:00:00+00:00: result.json is empty"


def test_the_two_former_lists_become_one_in_the_order_of_time():
    result = {
        "recoveries": ["2026-01-01T08:00:00+00:00: a: first", "2026-01-03T08:00:00+00:00: third"],
        "lost_attempts": [{"attempt": 1, "ended": "2026-01-02T08:00:00Z", "reason": "second"}],
    }
    assert [one.get("what") or one["reason"] for one in find_former_incidents(result)] == [
        "a: first",
        "second",
        "third",
    ]
    assert find_former_incidents({}) == []
