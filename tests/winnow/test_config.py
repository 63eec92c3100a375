"""winnow.toml: every fault in one message, nothing secret, nothing silent."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from winnow import errors
from winnow.config import Kind, load_config, parse_config
from winnow.errors import FAILURE_KINDS, CallError, ConfigError, ImageError, WinnowError


def test_all_faults_are_reported_at_once_with_key_value_and_what_is_valid() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            """
            [warehous]
            [storage."s3://"]
            endpoint = "127.0.0.1:8333"
            [tasks.objects]
            modle = "x"
            [tasks."Bad Name"]
            model = "x"
            [predict]
            batch_size = -1
            precision = "int8"
            max_pixels = "many"
            [splits]
            train = 0.5
            """
        )
    message = str(caught.value)
    assert message.startswith("winnow.toml has 9 faults")
    for part in (
        "warehous: unknown key; did you mean warehouse?",
        """storage."s3://".endpoint = '127.0.0.1:8333': must start with http:// or https://""",
        "tasks.objects.model: missing",
        "tasks.objects.modle: unknown key; did you mean model?",
        'tasks."Bad Name": a name starts with a lower-case letter',
        "predict.batch_size = -1",
        "predict.precision = 'int8': input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        "predict.max_pixels = 'many'",
        "splits: train + val + test must be 1.0; they add up to 0.7",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[storage.s3]\n", "section names are URL prefixes"),
        ('[storage."s3://"]\nendpoint = "http://key:secret@host"\n', "must not hold credentials"),
        ('[tasks.a]\nmodel = "m"\nclasses = ["cat"]\n', "at least two"),
        ('[tasks.a]\nmodel = "m"\nclasses = ["cat", "dog", "cat"]\n', "given twice: cat"),
        (
            '[tasks.a]\nmodel = "m"\nclasses = "dress"\n',
            """classes = 'dress': input should be a list, such as ["dress"]""",
        ),
        ("[predict]\nbatch_size = true\n", "predict.batch_size = True"),
        ("[policies.p]\nmargin = 0.5\nrandom = 0.4\n", "policies.p: the shares must add up to 1.0; they add up to 0.9"),
        ("[policies.p]\nmargn = 1.0\n", "did you mean margin?"),
        ('[select]\npolicy = "p"\n', "select.policy = 'p' is unknown; configured policies: default"),
        ('[select]\nembedding = "a"\n[tasks.a]\nmodel = "m"\n', "select.embedding = 'a' is no task with kind ="),
        ("[select]\naudit_share = 1.1\n", "select.audit_share = 1.1"),
        ("[predict\n", "is not valid TOML"),
    ],
)
def test_a_fault_says_what_is_valid(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"winnow\.toml") as caught:
        parse_config(text)
    assert part in str(caught.value)


def test_a_secret_in_an_endpoint_is_not_repeated_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config('[storage."s3://"]\nendpoint = "http://key:hunter2@host"\n')
    assert "hunter2" not in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="winnow init"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_unknown_task_lists_those_that_exist() -> None:
    config = parse_config('[tasks.objects]\nmodel = "torchvision/resnet18"\n')
    with pytest.raises(CallError, match="task 'object' is unknown; configured tasks: objects"):
        config.task("object")
    with pytest.raises(CallError, match=r"add a \[tasks.NAME\] section"):
        parse_config("").task("objects")


ALIKE = '[tasks.alike]\nkind = "embedding"\nmodel = "torchvision/resnet18"\n'


@pytest.mark.parametrize(
    ("text", "kind", "shares"),
    [
        ("", "classification", {"margin": 0.8, "class_balance": 0.1, "random": 0.1}),
        (ALIKE, "classification", {"margin": 0.5, "diversity": 0.3, "class_balance": 0.1, "random": 0.1}),
        (ALIKE, "segmentation", {"entropy": 0.5, "diversity": 0.3, "class_balance": 0.1, "random": 0.1}),
        (ALIKE + "[policies.default]\nrandom = 1.0\n", "segmentation", {"random": 1.0}),
    ],
)
def test_the_default_policy_needs_no_section(text: str, kind: Kind, shares: dict[str, float]) -> None:
    assert parse_config(text).policy("default", kind).shares() == shares


def test_unknown_policy_lists_those_that_exist() -> None:
    with pytest.raises(CallError, match="policy 'mine' is unknown; configured policies: default, own"):
        parse_config("[policies.own]\nrandom = 1.0\n").policy("mine", "classification")


def test_configuration_is_frozen() -> None:
    config = parse_config("")
    with pytest.raises(ValueError, match="frozen"):
        config.predict.batch_size = 3  # type: ignore[misc]


def all_errors(base: type[WinnowError] = WinnowError) -> list[type[WinnowError]]:
    return [base, *(found for child in base.__subclasses__() for found in all_errors(child))]


@pytest.mark.parametrize("kind", [error for error in all_errors() if error.__module__.startswith("winnow")])
def test_errors_survive_pickling(kind: type[WinnowError]) -> None:
    error = kind("missing", "gone") if issubclass(kind, ImageError) else kind("what is wrong")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.args == error.args


def test_every_kind_of_failure_has_a_meaning_and_systemic_ones_can_be_retried() -> None:
    for name, kind in FAILURE_KINDS.items():
        assert kind.meaning, name
        assert kind.retryable or not kind.systemic, name
    assert errors.FetchError("forbidden", "no").retryable
    assert not errors.DecodeError("corrupt", "no").retryable
