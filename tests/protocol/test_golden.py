"""What travels between processes of different ages stays readable."""

import json
from pathlib import Path

import pytest

from conpaas.core.errors import PeerError
from conpaas.core.messages.base import Message, from_peer
from tests.protocol import examples

HERE = Path(__file__).parent
MESSAGES = examples.messages()
FILES = sorted(HERE.glob("*.json"))
PAST = sorted((HERE / "past").glob("*.json"))
UPDATE = "if this is meant: python -m tests.protocol.update"


def kind_of(file: Path) -> type[Message]:
    return MESSAGES[".".join(file.name.split(".")[:2])]


def test_every_message_has_a_golden_file_and_every_file_a_message() -> None:
    assert {file.stem for file in FILES} == set(MESSAGES), UPDATE


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_written_as_its_golden_file(name: str) -> None:
    golden = (HERE / f"{name}.json").read_text(encoding="utf-8")

    assert examples.wire(examples.example(MESSAGES[name])) == golden, UPDATE


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_message_that_was_read_is_written_as_it_was(file: Path) -> None:
    text = file.read_text(encoding="utf-8")

    assert examples.wire(from_peer(kind_of(file), text)) == text


@pytest.mark.parametrize("file", [*FILES, *PAST], ids=lambda file: file.stem)
def test_yesterdays_message_still_parses_as_does_one_of_a_newer_peer(file: Path) -> None:
    kind, body = kind_of(file), json.loads(file.read_text(encoding="utf-8"))

    assert isinstance(from_peer(kind, json.dumps(body)), kind)
    assert from_peer(kind, json.dumps({**body, "of a newer peer": [1]})) == from_peer(kind, json.dumps(body))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_person_who_misspells_a_field_is_told(file: Path) -> None:
    body = json.loads(file.read_text(encoding="utf-8"))

    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        kind_of(file).model_validate_json(json.dumps({**body, "of a typing error": 1}))


def test_a_peer_that_sends_rubbish_is_an_expected_error() -> None:
    for rubbish in (b"", b"\xff\xfe", b"[]", b"null", b'{"ok": {}}', b"{" * 10_000):
        with pytest.raises(PeerError, match="malformed"):
            from_peer(MESSAGES["model.Ack"], rubbish)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_secret_is_only_written_to_the_wire(file: Path) -> None:
    message = from_peer(kind_of(file), file.read_text(encoding="utf-8"))
    hidden = json.loads(message.model_dump_json())

    for name, field in type(message).model_fields.items():
        if "SecretStr" in str(field):
            assert hidden[name] == "**********"
