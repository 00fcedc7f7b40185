"""Make a key and its signing request: `python -m conpaas.core.keymaker KEY_FILE CSR_FILE`.

A program of its own, so that the daemons that need a key never load `cryptography` (10 MB for ever).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from conpaas.core import files, tls
from conpaas.core.errors import ConpaasError


def make(key_file: Path, csr_file: Path) -> None:
    """Write a new private key (mode 0600, never wider) and then its signing request; each is whole or absent.

    Raises DiskFullError.
    """
    key_pem, csr_pem = tls.make_key_and_csr()
    files.write_atomically(key_file, key_pem, mode=0o600)
    files.write_atomically(csr_file, csr_pem)


def main(arguments: Sequence[str]) -> int:
    """Run the program; return its exit code: 0 done, 1 could not write, 2 wrong arguments."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m conpaas.core.keymaker KEY_FILE CSR_FILE\n")
        return 2
    try:
        make(Path(arguments[0]), Path(arguments[1]))
    except (ConpaasError, OSError) as exc:
        sys.stderr.write(f"cannot write the key: {exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
