"""Makes today's protocol the previous one, which the next version must understand: `python -m tests.protocol.release`.

To be run when a version is released. `previous/` then holds an example of every message as that version writes it,
and, in `schemas.json`, what it takes when it reads.
"""

import json
from pathlib import Path

from tests.protocol import examples

PREVIOUS = Path(__file__).parent / "previous"
SCHEMAS = PREVIOUS / "schemas.json"


def main() -> None:
    PREVIOUS.mkdir(exist_ok=True)
    for old in PREVIOUS.glob("*.json"):
        old.unlink()
    schemas = {}
    for name, kind in examples.messages().items():
        (PREVIOUS / f"{name}.json").write_text(examples.wire(examples.example(kind)), encoding="utf-8")
        schemas[name] = kind.model_json_schema(mode="validation")
    SCHEMAS.write_text(json.dumps(schemas, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
