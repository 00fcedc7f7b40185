"""The image of virtual machines, made of what is under test: once, until that changes."""

import functools
import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).parents[2] / "bootstrap/image/build"


@functools.cache
def built_image() -> Path:
    """Return the folder of the image; the first time on a computer it takes some minutes."""
    argv = [str(BUILD), "--engines", "php", "--python", sys.executable]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
