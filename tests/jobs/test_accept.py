"""``winnow accept`` over tables made by hand: what the promise rests on, what it costs to look, what is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from audited import NUM_AUDIT, NUM_OTHERS, TASK, Audited
from winnow.errors import CallError
from winnow.risk import least_sample, share_of_look, upper_bound
from winnow_jobs import Workspace
from winnow_jobs.accept import statistics_of
from winnow_jobs.cli.main import cli


@pytest.fixture
def audited(tmp_path: Path) -> Audited:
    return Audited(tmp_path)


def test_a_small_audit_is_refused_and_costs_nothing(audited: Audited) -> None:
    audited.say(range(40))
    result = audited.accept()
    assert (result.status, result.run_id, result.num_audited, result.num_wrong) == ("refused", None, 40, None)
    assert result.num_needed == least_sample(0.05, share_of_look(0.05, 1)) - 40
    assert "the audit is too small" in result.verdict
    assert audited.workspace.query("SELECT * FROM runs WHERE job = 'accept'").num_rows == 0


def test_what_is_right_is_accepted_with_a_bound(audited: Audited) -> None:
    audited.say(range(200))
    result = audited.accept()
    assert (result.status, result.look, result.num_audited, result.num_wrong) == ("finished", 1, 200, 0)
    claim = result.claims["*"]
    assert (claim.threshold, claim.num_audited, claim.num_wrong) == (0.0, 200, 0)
    assert claim.bound == pytest.approx(upper_bound(0, 200, share_of_look(0.05, 1)))
    assert (result.num_accepted, result.num_left) == (NUM_OTHERS, 0)
    assert audited.results() == {
        "accepted": NUM_OTHERS,
        "person": 200,
        "prediction": 100,
    }  # the reserve is no part of it
    (row,) = audited.workspace.query("SELECT DISTINCT model, threshold, bound, task FROM accepted").to_pylist()
    assert row == {"model": audited.model, "threshold": 0.0, "bound": claim.bound, "task": TASK}

    again = audited.accept()
    assert (again.status, again.run_id, again.look, again.claims) == ("nothing to do", result.run_id, 1, result.claims)
    assert audited.workspace.query("SELECT * FROM runs WHERE job = 'accept'").num_rows == 1


def test_only_the_complete_prefix_counts(audited: Audited) -> None:
    audited.say(n for n in range(300) if n != 90)
    assert audited.accept().num_audited == 90
    audited.say([90], event="skipped")
    result = audited.accept()
    assert (result.num_audited, result.num_wrong) == (300, 1)  # a skip is an answer, and an error


def test_unsure_answers_are_not_sure_enough_and_the_last_look_counts(audited: Audited) -> None:
    wrong = [n for n in range(300) if Audited.confidence(n) < 0.7][::2]
    audited.say(range(150), wrong=wrong)
    first = audited.accept(max_error=0.1)
    assert (first.status, first.look) == ("finished", 1)
    audited.say(range(150, 300), wrong=wrong)
    second = audited.accept(max_error=0.1)
    assert (second.look, second.num_audited) == (2, 300)
    claim = second.claims["*"]
    assert 0.6 < claim.threshold <= 0.7
    assert claim.bound <= 0.1
    numbers = [n for n in range(NUM_AUDIT, NUM_AUDIT + NUM_OTHERS) if Audited.confidence(n) >= claim.threshold - 1e-6]
    rows = audited.workspace.query("SELECT image_id FROM results WHERE source = 'accepted'")["image_id"].to_pylist()
    assert sorted(rows) == sorted(audited.ids[n] for n in numbers)
    assert (second.num_accepted, second.num_left) == (len(numbers), NUM_OTHERS - len(numbers))

    # People change their answers: the look is the third, promises nothing, and takes back what stood before.
    audited.say(range(300), wrong=range(0, 300, 2), event="changed")
    third = audited.accept(max_error=0.1)
    assert (third.look, third.claims, third.num_accepted) == (3, {}, 0)
    assert third.num_needed >= 0
    assert "accepted" not in audited.results()


def test_a_look_says_how_good_the_rest_is_and_that_stays_as_it_was_said(audited: Audited) -> None:
    audited.say(range(200), wrong=range(10))
    first = audited.accept()
    accuracy = first.audit.accuracy
    assert (accuracy.num_hits, accuracy.num) == (190, 200)
    assert accuracy.low < 0.95 < accuracy.high
    assert first.audit.drift is None
    assert first.audit.curve[-1].error.num_hits == 10

    audited.say(range(200, 240), wrong=range(200, 215))  # nobody looks at these before they are paid for
    assert statistics_of(audited.workspace, first.run_id) == first.audit

    second = audited.accept()
    drift = second.audit.drift
    assert (drift.before.num_hits, drift.before.num, drift.new.num_hits, drift.new.num) == (190, 200, 25, 40)
    assert drift.alarm
    assert audited.accept().audit == second.audit  # looked at before: what was said then
    third = audited.accept(max_error=0.1)  # the same labels: drift is still against those of the first look
    assert (third.look, third.audit.drift) == (3, drift)


def test_a_look_without_a_claim_says_as_much_and_a_refusal_nothing(audited: Audited) -> None:
    audited.say(range(40))
    assert audited.accept().audit is None
    audited.say(range(40, 200), wrong=range(0, 200, 2))
    result = audited.accept()
    assert (result.claims, result.audit.accuracy.num_hits) == ({}, 120)


def test_classes_have_claims_of_their_own(audited: Audited) -> None:
    wrong = [n for n in range(300) if audited.label(n) == "cat"][::3]
    audited.say(range(300), wrong=wrong)
    result = audited.accept(per_class=True)
    assert list(result.claims) == ["dog"]
    labels = set(audited.workspace.query("SELECT label FROM results WHERE source = 'accepted'")["label"].to_pylist())
    assert labels == {"dog"}
    assert result.claims["dog"].bound == pytest.approx(upper_bound(0, 180, share_of_look(0.05, 1) / 2))


def test_what_people_said_is_not_accepted(audited: Audited) -> None:
    audited.say(range(200))
    audited.tables.add("labels", task=TASK, image_id=audited.ids[400], label="bee", audit=False)
    assert audited.accept().num_accepted == NUM_OTHERS - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_error": 0.0}, "--max-error 0 is not valid"), ({"confidence": 1.0}, "--confidence 1 is not valid")],
)
def test_a_wrong_call_says_what_is_valid(audited: Audited, options: dict[str, float], message: str) -> None:
    with pytest.raises(CallError, match=message):
        audited.accept(**options)
    with pytest.raises(CallError, match="task 'other' is unknown"):
        audited.workspace.accept("other", max_error=0.1)
    path = audited.workspace.config_path
    path.write_text(path.read_text().replace(f"[tasks.{TASK}]", f"[tasks.{TASK}]\nmultiple_choice = true"))
    with pytest.raises(CallError, match="may have several classes; only answers of one class an image"):
        Workspace(path).accept(TASK, max_error=0.1)


def test_the_command_speaks_to_people_and_machines(audited: Audited) -> None:
    def run(*arguments: str) -> str:
        command = ["--config", str(audited.workspace.config_path), "accept", TASK, "--max-error", "0.05", *arguments]
        return CliRunner().invoke(cli, command).output

    assert "refused: the audit is too small" in run()
    audited.say(range(200))
    output = run()
    assert "all classes: confidence from 0.000 on; 0 wrong of 200 audited" in output
    assert "500 of 500 images need no person: wrong at most 5.0% of the time, at a confidence of 95.0%" in output
    assert "accuracy without people: 100.0% (200 of 200 audit images), 95% interval 98.2% to 100.0%" in output
    assert "drift: nothing to compare with" in output
    assert "nothing to do: the same labels were looked at before" in run()
    found = json.loads(run("--json"))
    assert (found["num_accepted"], found["look"]) == (500, 1)
    assert found["audit"]["accuracy"]["num"] == found["audit"]["curve"][-1]["error"]["num"] == 200
