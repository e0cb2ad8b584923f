"""What is counted, and how much of it is kept."""

from __future__ import annotations

from endor.runtime.stats import KEPT_FORWARDS, StatsRecorder


def test_only_the_last_forwards_have_a_record_but_all_count() -> None:
    stats = StatsRecorder()
    for number in range(KEPT_FORWARDS + 10):
        stats.begin_forward()
        stats.disk_bytes += number
        stats.end_forward()
    assert [record.disk_bytes for record in stats.per_forward] == list(range(10, KEPT_FORWARDS + 10))
    assert stats.snapshot().forwards == KEPT_FORWARDS + 10
    assert stats.snapshot().disk_bytes == sum(range(KEPT_FORWARDS + 10))
