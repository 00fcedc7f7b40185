"""Turning data into pages: the template environment, and the two ways a page leaves: whole, or as what changed."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from aiohttp import web
from markupsafe import Markup, escape

from conpaas.core import units
from conpaas.core.messages.public import UserView
from conpaas.core.states import NodeState, OperationState, ServiceState
from conpaas.sdk import prices
from conpaas.web import visits
from conpaas.web.static_files import StaticFiles
from conpaas.web.words import plural

TEMPLATES = Path(__file__).parent / "templates"

STATE_WORDS: Mapping[str, str] = {
    ServiceState.INIT: "Initialized",
    ServiceState.PROLOGUE: "starting",
    ServiceState.RUNNING: "running",
    ServiceState.ADAPTING: "adapting",
    ServiceState.EPILOGUE: "stopping",
    ServiceState.STOPPED: "stopped",
    ServiceState.ERROR: "error",
    NodeState.SERVING: "running",
    OperationState.RUNNING: "running",
}
"""What people read; other states are their own names in small letters."""

SINCE_WORDS: Mapping[str, str] = {
    ServiceState.INIT: "init",
    ServiceState.RUNNING: "started",
    ServiceState.STOPPED: "stopped",
}
TONES: Mapping[str, str] = {
    "RUNNING": "good",
    "SERVING": "good",
    "DONE": "good",
    "PROLOGUE": "busy",
    "ADAPTING": "busy",
    "EPILOGUE": "busy",
    "REQUESTED": "busy",
    "BOOTING": "busy",
    "CONFIGURING": "busy",
    "DRAINING": "busy",
    "DELETING": "busy",
    "DEGRADED": "bad",
    "LOST": "bad",
    "ERROR": "bad",
    "FAILED": "bad",
}
"""How a state feels: `good`, `busy`, `bad`, and `calm` for the rest."""


class Site:
    """What all pages share."""

    def __init__(self, files: StaticFiles, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._files = files
        self._now = now
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.globals.update(
            icon=self.icon, static=files.url, time=self.time, tone=tone, price=prices.price, room=units.show_room
        )
        self.environment.filters.update(
            state=state_words,
            since=lambda state: SINCE_WORDS.get(state, "since"),
            size=units.show_size,
            plural=plural,
            marked=marked,
            cost=prices.both,
            hourly=prices.hourly,
            so_far=prices.so_far,
        )

    def icon(self, name: str, label: str = "") -> Markup:
        """Return an icon; without a label it is decoration."""
        known = name if name in self._files.icons else "box"
        href = f"{self._files.url('vendor/icons.svg')}#{known}"
        spoken = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
        return Markup('<svg class="icon" {}><use href="{}"/></svg>').format(spoken, href)

    def time(self, when: datetime) -> Markup:
        """Return a moment as `11 minutes ago`, kept up to date by `time.js`."""
        words = units.ago((self._now() - when).total_seconds())
        return Markup('<time datetime="{}" title="{}">{}</time>').format(
            when.isoformat(), when.strftime("%Y-%m-%d %H:%M:%S UTC"), words
        )

    def render(self, template: str | Path, **context: Any) -> str:
        """Return a page as HTML; a template outside our folder (a service type's own) is named by its path."""
        if isinstance(template, Path):
            return self.environment.from_string(template.read_text(encoding="utf-8")).render(context)
        return self.environment.get_template(template).render(context)


SITE = web.AppKey("site", Site)


def state_words(state: str) -> str:
    """Return a state as people read it."""
    return STATE_WORDS.get(state, state.lower())


def tone(state: str) -> str:
    """Return how a state feels."""
    return TONES.get(state, "calm")


def marked(text: str) -> Markup:
    """Return a docstring's words with what is in `backticks` as code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def page(
    request: web.Request,
    template: str | Path,
    *,
    me: UserView | None = None,
    status: int = 200,
    **context: Any,
) -> web.Response:
    """Answer with a page; to `live.js`, which asks for the part that may change, without the frame around it."""
    visit = visits.of(request)
    html = request.config_dict[SITE].render(
        template,
        layout="part.html" if request.headers.get("X-Part") == "page" else "whole.html",
        me=me,
        csrf=visit.csrf,
        path=request.path,
        status=status,
        **context,
    )
    response = web.Response(text=html, content_type="text/html", status=status)
    visits.bind_stranger(request, response)
    return response


def done(request: web.Request, where: str, message: str = "") -> web.Response:
    """Answer an action: our scripts get a word to show and go on by themselves, a plain form is sent to `where`."""
    if wants_json(request):
        return web.json_response({"message": message, "location": where})
    return web.Response(status=303, headers={"Location": where})


def wants_json(request: web.Request) -> bool:
    """Tell whether one of our scripts asks."""
    return "application/json" in request.headers.get("Accept", "")
