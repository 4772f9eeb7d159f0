"""What is told of the organs in a model."""

from __future__ import annotations

from testing.donors import tiny_organ, transplanted


def test_status_tells_where_organs_stand():
    b = tiny_organ(2, position=1, mode="replace")
    model = transplanted(("a", tiny_organ(1), {"position": 1}), ("b", b, {}))
    status = model.get_donor_status()
    assert [(s.active, s.position, s.mode, s.layers) for s in status.values()] == [
        (True, 1, "insert", [1, 2]),
        (True, 1, "replace", [3, 4]),
    ]
    assert status["a"].span == (1, 3) and status["a"].dtypes == ["float32"] and status["a"].devices == ["cpu"]
    assert status["a"].num_parameters == tiny_organ(1).num_parameters() and status["a"].num_trainable_parameters == 0
    model.set_donor("b")
    assert [(s.active, s.layers) for s in model.get_donor_status().values()] == [(False, []), (True, [1, 2])]
    with model.disable_donors():
        assert not any(s.active for s in model.get_donor_status().values())
