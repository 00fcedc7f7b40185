"""Writes the golden files: `python -m tests.protocol.update`, when the protocol is meant to change.

A new message gets its file. The file of one that changed moves to `past/`: peers of yesterday still send it;
before a first release, delete it instead and run this again.
"""

import itertools
from pathlib import Path

from tests.protocol import examples

HERE = Path(__file__).parent
PAST = HERE / "past"


def main() -> None:
    for name, kind in examples.messages().items():
        golden, text = HERE / f"{name}.json", examples.wire(examples.example(kind))
        if golden.exists() and golden.read_text(encoding="utf-8") != text:
            golden.rename(_free(name))
            print(f"changed: {name}")
        if not golden.exists():
            golden.write_text(text, encoding="utf-8")
            print(f"written: {golden.name}")


def _free(name: str) -> Path:
    PAST.mkdir(exist_ok=True)
    return next(path for number in itertools.count(1) if not (path := PAST / f"{name}.{number}.json").exists())


if __name__ == "__main__":
    main()
