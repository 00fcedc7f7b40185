"""Solving the proof-of-work challenge of a registration, as the browser's widget does."""

import asyncio
from typing import Any

from altcha import Challenge, Payload, solve_challenge

from conpaas.core.errors import DeadlineError, PeerError

TIMEOUT_S = 90.0


async def solve(challenge: dict[str, Any]) -> str:
    """Solve a challenge of `Conpaas.captcha` in a thread; return what `Registration.captcha` takes.

    Raises DeadlineError if it takes longer than TIMEOUT_S, PeerError if it is no challenge.
    """
    try:
        parsed = Challenge.from_dict(challenge)
        solution = await asyncio.to_thread(solve_challenge, parsed, timeout=TIMEOUT_S)
    except (KeyError, TypeError, ValueError) as exc:
        raise PeerError(f"the captcha cannot be read: {exc}") from exc
    if solution is None:
        raise DeadlineError(f"the captcha was not solved within {TIMEOUT_S:g} s", hint="try again")
    return str(Payload(parsed, solution).to_base64())
