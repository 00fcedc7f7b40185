"""Writes what the documentation says of the code, out of the code: `python docs/generate.py [--check]`.

The pages of `docs/reference/` are made whole. In every other page, the fenced block behind a comment such as
`<!-- snippet: conpaas/core/service.py Engine -->` is replaced by the source of what the comment names. With `--check`
nothing is written, and the exit code is 1 if something is stale.
"""

import ast
import enum
import json
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from conpaas.cli.managerc import managerc
from conpaas.cli.root import root
from conpaas.core import cloud, errors, plugins, service
from conpaas.core.cloud import CloudType
from conpaas.core.messages import agent, internal, manager, public
from conpaas.core.messages.base import Endpoint, Message, Who
from conpaas.core.messages.public import CloudOptions
from conpaas.core.service import ServiceType
from conpaas.core.states import NODE_MOVES, SERVICE_MOVES, TRANSIENT, NodeState, OperationState, ServiceState
from conpaas.core.timings import Timings
from conpaas.director.settings import DirectorSettings, Limits
from conpaas.director.views import ACTIONS
from conpaas.sdk import OperationFailedError

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
HEAD = "<!-- Made by docs/generate.py out of the code: change it there. -->\n"

_PLAIN: Mapping[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    datetime: "time",
    Path: "path",
    SecretStr: "secret text",
    Decimal: "decimal number",
    IPv4Address: "address",
    IPv6Address: "address",
    IPv4Network: "network",
    IPv6Network: "network",
    Any: "any JSON",
}
_STATES: Mapping[type[enum.Enum], str] = {
    ServiceState: "[state of a service](states.md#services)",
    NodeState: "[state of a node](states.md#nodes)",
    OperationState: "[state of an operation](states.md#operations)",
}
_WHO: Mapping[Who, str] = {
    Who.ANYONE: "anyone",
    Who.USER: "every user",
    Who.OWNER: "the owner",
    Who.ADMIN: "administrators",
    Who.DIRECTOR: "the director",
    Who.MANAGER: "the service's manager",
    Who.AGENT: "the service's agents",
}
_SNIPPET = re.compile(r"<!-- snippet: (?P<path>\S+) (?P<symbol>\S+) -->\n\n?```python\n(?P<code>.*?)```", re.DOTALL)


# -- Markdown -------------------------------------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; no cell breaks it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def sentences(text: str) -> str:
    """Return a docstring as Markdown, one sentence per line."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", textwrap.dedent(text).strip())]
    return "\n\n".join(re.sub(r"(?<=[.!?]) (?=[A-Z`'])", "\n", part) for part in paragraphs)


def first_sentence(text: str | None) -> str:
    """Return what a docstring says first."""
    return sentences(text or "").partition("\n")[0]


# -- messages and settings ------------------------------------------------------------------------------------------


def type_words(annotation: Any) -> str:
    """Say what values a field takes."""
    for words in (_PLAIN, _STATES):
        if annotation in words:
            return words[annotation]
    if get_origin(annotation) is not None:
        return _generic_words(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Message):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    raise TypeError(f"docs/generate.py has no words for {annotation!r}")


def _generic_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return type_words(arguments[0])
    if origin in {tuple, list}:
        return f"list of {type_words(arguments[0])}"
    words = ["nothing" if part is types.NoneType else type_words(part) for part in arguments]
    if origin is dict:
        return "JSON object" if arguments[1] is Any else f"{words[1]}, by {words[0]}"
    return " or ".join(words)


def _messages_in(annotation: Any) -> Iterator[type[Message]]:
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, Message):
        yield annotation
    for part in get_args(annotation):
        yield from _messages_in(part)


def _bounds(schema: Mapping[str, Any]) -> str:
    """Say the limits that the JSON Schema of a field sets."""
    for part in schema.get("anyOf", ()):
        if part.get("type") != "null":
            return _bounds(part)
    words = [f"{word} {_number(schema[key])}" for key, word in _BOUNDS.items() if key in schema]
    return f"({', '.join(words)})" if words else ""


_BOUNDS: Mapping[str, str] = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "minLength": "characters: at least",
    "maxLength": "characters: at most",
}


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    factory = field.default_factory
    if factory is not None and factory.__doc__ and isinstance(factory, types.FunctionType):
        return first_sentence(factory.__doc__).removeprefix("Return ")
    value = field.get_default(call_default_factory=True, validated_data={})
    return f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    match value:
        case BaseModel():
            return "{}"
        case bool() | None:
            return json.dumps(value)
        case int() | float():
            return _number(value)
        case dict():
            return "{" + ", ".join(f"{key} = {_shown(it)}" for key, it in value.items()) + "}"
        case tuple() | list():
            return "[" + ", ".join(_shown(it) for it in value) + "]"
        case _:
            return json.dumps("" if isinstance(value, SecretStr) else str(value))


def field_rows(kind: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type with limits, default and meaning of each field."""
    properties = kind.model_json_schema().get("properties", {})
    for name, field in kind.model_fields.items():
        words = " ".join(filter(None, (type_words(field.annotation), _bounds(properties.get(name, {})))))
        yield name, words, _default(field), field.description or ""


def message_section(kind: type[Message]) -> str:
    """Describe one message."""
    rows = [(f"`{name}`", words, default, what) for name, words, default, what in field_rows(kind)]
    fields = table(("field", "value", "default", "meaning"), rows) if rows else "It has no fields.\n"
    return f"### {kind.__name__}\n\n{sentences(kind.__doc__ or '')}\n\n{fields}"


def messages_of(endpoints: Iterable[Endpoint]) -> list[type[Message]]:
    """Return every message that the endpoints use, those inside others included, by name."""
    queue = [kind for it in endpoints for kind in (it.request, it.query, it.response) if kind is not None]
    found: dict[str, type[Message]] = {}
    while queue:
        kind = queue.pop()
        if kind.__name__ in found and found[kind.__name__] is not kind and _same(found[kind.__name__], kind):
            continue
        if found.setdefault(kind.__name__, kind) is not kind:
            raise TypeError(f"two messages are called {kind.__name__}: they need headings of their own")
        for field in kind.model_fields.values():
            queue.extend(part for part in _messages_in(field.annotation) if found.get(part.__name__) is not part)
    return [found[name] for name in sorted(found)]


def _same(one: type[Message], other: type[Message]) -> bool:
    return list(field_rows(one)) == list(field_rows(other))


# -- endpoints ------------------------------------------------------------------------------------------------------


def endpoints_of(module: types.ModuleType) -> dict[str, Endpoint]:
    """Return the endpoints that a module declares, in its order."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Endpoint)}


def _takes(endpoint: Endpoint) -> str:
    parts = []
    if endpoint.request is not None:
        parts.append(type_words(endpoint.request))
    if endpoint.query is not None:
        parts.append(f"query: {type_words(endpoint.query)}")
    if endpoint.upload:
        parts.append("a stream of bytes")
    return ", ".join(parts)


def _gives(endpoint: Endpoint) -> str:
    if endpoint.download:
        return "a stream of bytes"
    if endpoint.response is None:
        return ""
    words = type_words(endpoint.response)
    return f"events, each a {words}" if endpoint.events else words


def endpoint_table(endpoints: Mapping[str, Endpoint], *, prefix: str = "", scopes: bool = False) -> str:
    """Describe endpoints: what each is for, who may call it, what it takes and gives."""
    headings = ["call", "what", "allowed to", "takes", "gives"]
    rows = []
    for endpoint in endpoints.values():
        allowed = ", ".join(_WHO[who] for who in sorted(endpoint.allow, key=list(Who).index))
        if scopes and Who.ANYONE not in endpoint.allow:
            allowed += f" ({endpoint.scope})"
        call = f"`{endpoint.method} {endpoint.path.removeprefix(prefix)}`"
        rows.append((call, endpoint.summary, allowed, _takes(endpoint), _gives(endpoint)))
    return table(headings, rows)


def protocol_page() -> str:
    """Describe the calls between director, managers and agents."""
    parts = [
        HEAD,
        "# Calls between director, managers and agents\n",
        (
            "Over HTTPS with mutual TLS; [protocol.md](../protocol.md) tells what holds for all of them.\n"
            "`managerc` gives the manager's commands as the service's owner.\n"
        ),
    ]
    everything: dict[str, Endpoint] = {}
    for title, module in (("The manager", manager), ("The agent", agent), ("The director, for instances", internal)):
        endpoints = endpoints_of(module)
        everything |= endpoints
        parts += [f"## {title}\n", sentences(module.__doc__ or "") + "\n", endpoint_table(endpoints)]
    parts += ["## Messages\n", *(message_section(kind) for kind in messages_of(everything.values()))]
    parts += ["## The contextualization document\n", message_section(internal.Context), message_section(Timings)]
    return "\n".join(parts)


def api_page() -> str:
    """Describe the public API."""
    endpoints = endpoints_of(public)
    tags: dict[str, dict[str, Endpoint]] = {}
    for name, endpoint in endpoints.items():
        tags.setdefault(endpoint.tags[0], {})[name] = endpoint
    parts = [
        HEAD,
        "# The public API\n",
        (
            f"All paths are below `{public.P}` of the director.\n"
            "The same as an OpenAPI 3.1 document: `/api/v1/openapi.json`; to be tried in a browser: `/api/v1/docs`.\n"
            "In brackets stands the scope that an API token needs; a session has all scopes of its user.\n"
            "Errors are [problem documents](errors.md).\n"
        ),
    ]
    for tag, of_tag in tags.items():
        parts += [f"## Calls: {tag}\n", endpoint_table(of_tag, prefix=public.P, scopes=True)]
    parts += ["## Messages\n", *(message_section(kind) for kind in messages_of(endpoints.values()))]
    return "\n".join(parts)


# -- the other pages ------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Describe every setting of the director."""
    nested: dict[str, tuple[str, type[Message]]] = {"limits": ("Limits", Limits), "timings": ("Timings", Timings)}
    rows = [
        (f"`{name}`", words, default, what)
        for name, words, default, what in field_rows(DirectorSettings)
        if name not in nested
    ]
    headings = ("setting", "value", "default", "meaning")
    parts = [
        HEAD,
        "# Settings of the director\n",
        (
            "They are read from `director.toml` in the data folder (or the file that `--settings` names), "
            "then from the environment as `CONPAAS_` and the setting's name in capitals, "
            "then from the options of `conpaas run director`; the last one wins.\n"
            "Names that end in `_s` are in seconds, those that end in `_bytes` in bytes.\n"
            "Settings of clouds are in [clouds.md](clouds.md).\n"
        ),
        table(headings, rows),
    ]
    for name, (title, kind) in nested.items():
        inner = [(f"`{name}.{field}`", words, default, what) for field, words, default, what in field_rows(kind)]
        parts += [
            f"## {title}\n",
            (
                f"{sentences(kind.__doc__ or '')}\n"
                f"In the file: a table `[{name}]`; in the environment: `CONPAAS_{name.upper()}__NAME`.\n"
            ),
            table(headings, inner),
        ]
    return "\n".join(parts)


def error_classes() -> list[type[errors.ConpaasError]]:
    """Return every class of expected errors, in the order of the tree; a driver's own ones are its own business."""
    tree: list[type[errors.ConpaasError]] = []

    def walk(kind: type[errors.ConpaasError]) -> None:
        package, _, module = kind.__module__.rpartition(".")
        if package.startswith("conpaas") and not module.startswith("_"):
            tree.append(kind)
            for below in kind.__subclasses__():
                walk(below)

    walk(errors.ConpaasError)
    return tree


def errors_page() -> str:
    """Describe every expected error."""
    rows = [
        (
            f"`{kind.code}`",
            str(kind.status),
            f"`{kind.__name__}`",
            first_sentence(kind.__doc__),
            kind.default_hint or "as the error says",
        )
        for kind in error_classes()
    ]
    exits = re.sub(r"; ", "\n- ", (root.epilog or "").removeprefix("Exit codes: ").rstrip("."))
    parts = [
        HEAD,
        "# Errors\n",
        (
            "Every expected error has a code, a status, the value that is wrong, and a hint what to do next.\n"
            "On the wire it is an RFC 9457 problem document (`application/problem+json`) with the members "
            "`type`, `title`, `status`, `detail`, `code`, `value` and `hint`; the SDK raises the class again.\n"
            "What to do about each is told in [operating.md](../operating.md#troubleshooting-by-error-code).\n"
        ),
        table(("code", "status", "class", "meaning", "hint"), rows),
        (
            "All are in `conpaas.core.errors`, but for "
            f"`{OperationFailedError.__name__}`, which is in `{OperationFailedError.__module__.rpartition('.')[0]}`.\n"
        ),
        "## Exit codes of the command line\n",
        f"- {exits}\n",
    ]
    return "\n".join(parts)


def states_page() -> str:
    """Draw the state charts."""
    buttons = [(f"`{state}`", ", ".join(f"`{action}`" for action in actions)) for state, actions in ACTIONS.items()]
    transient = ", ".join(f"`{state}`" for state in ServiceState if state in TRANSIENT)
    over = ", ".join(f"`{state}`" for state in OperationState if state is not OperationState.RUNNING)
    return "\n".join(
        (
            HEAD,
            "# States\n",
            "One function moves: `conpaas.core.states.check_move`.\nWho calls it records time, reason and actor.\n",
            "## Services\n",
            chart(SERVICE_MOVES, first=ServiceState.INIT),
            f"{transient} are transient: something is under way.\n",
            "What the buttons of the UI offer in each state; by API, stop and terminate work in every state:\n",
            table(("state", "actions"), buttons),
            "## Nodes\n",
            "A node is an instance that does something for its service; the manager's instance has the same states.\n",
            chart(NODE_MOVES, first=NodeState.REQUESTED),
            "## Operations\n",
            f"An operation is `{OperationState.RUNNING}` until it is one of {over}; it never leaves these.\n",
        )
    )


def chart(moves: Mapping[Any, frozenset[Any]], *, first: enum.Enum) -> str:
    """Draw a table of moves, in Mermaid."""
    lines = [f"    [*] --> {first.value}"]
    for old in type(first):
        lines += [f"    {old.value} --> {new.value}" for new in type(first) if new in moves[old]]
        lines += [f"    {old.value} --> [*]"] * (not moves[old])
    return "```mermaid\nstateDiagram-v2\n" + "\n".join(lines) + "\n```\n"


def services_page() -> str:
    """Describe the service types that come with ConPaaS."""
    parts = [
        HEAD,
        "# Service types\n",
        "Those that come with ConPaaS; [adding-a-service.md](../adding-a-service.md) tells how to write another.\n",
    ]
    for name, kind in sorted(plugins.discover(service.PACKAGE, "SERVICE", ServiceType).items()):
        if kind.planner.startswith("conpaas."):
            parts += [f"## {name}: {kind.title}\n", f"{kind.description}\n", *_service_type(kind)]
    return "\n".join(parts)


def _service_type(kind: ServiceType) -> Iterator[str]:
    yield "### Roles\n"
    counts = (
        f"{role.minimum} to {role.maximum}, at first {role.initial}" if role.scalable else "in the manager's instance"
        for role in kind.roles
    )
    yield table(
        ("role", "title", "what it does", "dedicated nodes"),
        (
            (f"`{role.name}`", role.title, role.description, count)
            for role, count in zip(kind.roles, counts, strict=True)
        ),
    )
    yield "### Settings\n"
    yield table(
        ("setting", "value", "default", "meaning"),
        ((f"`{name}`", words, default, what) for name, words, default, what in field_rows(kind.settings)),
    )
    yield "### Engines\n"
    yield "They come from the operating system of the instance; these are the names on Debian 12.\n"
    yield table(
        ("program", "package"),
        ((f"`{engine.program.replace('|', '` or `')}`", f"`{engine.package}`") for engine in kind.engines),
    )
    if kind.commands:
        yield "### Commands\n"
        yield table(("command", "title"), ((f"`{command.name}`", command.title) for command in kind.commands))


def clouds_page() -> str:
    """Describe the cloud drivers that come with ConPaaS."""
    parts = [
        HEAD,
        "# Clouds\n",
        (
            "A cloud is added with `conpaas cloud add`, on the administrator's page, "
            "or as a table `[clouds.NAME]` of the director's settings file: "
            "`driver` names the kind, the options of every account come next, and the rest is the driver's own.\n"
            "[adding-a-cloud.md](../adding-a-cloud.md) tells how to write a driver.\n"
        ),
        '```toml\n[clouds.local]\ndriver = "local"\nmax_instances = 32\n```\n',
    ]
    for name, kind in sorted(plugins.discover(cloud.PACKAGE, "CLOUD", CloudType).items()):
        if kind.settings.__module__.startswith("conpaas."):
            module = sys.modules[kind.settings.__module__]
            parts += [
                f"## {name}: {kind.title}\n",
                sentences((module.__doc__ or "").partition("\n\n")[0]) + "\n",
                _settings_table(kind.settings),
            ]
            for part in _parts_of(kind.settings):
                parts += [f"### {part.__name__}\n", sentences(part.__doc__ or "") + "\n", _settings_table(part)]
    parts += [
        "## Options of every account\n",
        sentences(CloudOptions.__doc__ or "") + "\n",
        _settings_table(CloudOptions),
    ]
    return "\n".join(parts)


def _settings_table(kind: type[BaseModel]) -> str:
    rows = ((f"`{field}`", words, default, what) for field, words, default, what in field_rows(kind))
    return table(("setting", "value", "default", "meaning"), rows)


def _parts_of(kind: type[BaseModel]) -> list[type[Message]]:
    """Return the messages that the fields of one consist of."""
    return list(dict.fromkeys(part for field in kind.model_fields.values() for part in _messages_in(field.annotation)))


# -- the command line -----------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Describe every command of `conpaas` and every action of `managerc`."""
    commands = list(_commands(root, "conpaas"))
    overview = [(f"[`{path}`](#{path.replace(' ', '-')})", _short(command)) for path, command in commands]
    actions = list(_commands(managerc, "managerc URL"))
    return "\n".join(
        (
            HEAD,
            "# The command line\n",
            sentences(root.help or "") + "\n",
            (
                "Every command has `--help`, and `--json` for documents instead of words; what asks has `--yes`.\n"
                f"{sentences(root.epilog or '')}\n"
                "`conpaas completion bash` (or `zsh`, `fish`) prints what completes names in your shell.\n"
            ),
            table(("command", "what it does"), overview),
            *(_command_section(path, command) for path, command in commands),
            "# managerc\n",
            sentences(sys.modules["conpaas.cli.managerc"].__doc__ or "") + "\n",
            "Its certificate is fetched by `conpaas cert`, or by itself if you are logged in.\n",
            *(_command_section(path, command) for path, command in actions),
        )
    )


def _short(command: click.Command) -> str:
    return first_sentence(command.help)


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group, info_name=path)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        elif command is not None:
            yield f"{path} {name}", command


def _command_section(path: str, command: click.Command) -> str:
    words, rows = [path], []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            name = parameter.metavar or (parameter.name or "").upper()
            words.append(name if parameter.required or "[" in name else f"[{name}]")
        elif isinstance(parameter, click.Option) and "--json" not in parameter.opts:
            rows.append((f"`{_option(parameter)}`", _option_help(parameter)))
    usage = " ".join([*words, *(["[OPTION]..."] if rows else [])])
    heading = f"## {path}" if path.startswith("conpaas") else f"## {path.rpartition(' ')[2]}"
    options = f"\n{table(('option', 'meaning'), rows)}" if rows else ""
    return f"{heading}\n\n```text\n{usage}\n```\n\n{sentences(command.help or '')}\n{options}"


def _option(option: click.Option) -> str:
    names = ", ".join(option.opts) + (f" / {', '.join(option.secondary_opts)}" if option.secondary_opts else "")
    if option.is_flag:
        return names
    if option.metavar:
        return f"{names} {option.metavar}"
    if isinstance(option.type, click.Choice):
        return f"{names} {'|'.join(str(choice) for choice in option.type.choices)}"
    own = option.type.get_metavar(option, click.Context(click.Command("")))
    return f"{names} {own or _METAVARS.get(type(option.type), 'TEXT')}"


_METAVARS: Mapping[Any, str] = {
    click.Path: "PATH",
    click.File: "FILE",
    click.IntRange: "N",
    type(click.INT): "N",
}


def _option_help(option: click.Option) -> str:
    words = [option.help or f"The {(option.name or '').replace('_', ' ')}."]
    if option.multiple:
        words.append("May be given several times.")
    if option.show_default and option.default is not None and not isinstance(option.default, (tuple, bool)):
        words.append(f"Default: `{option.default}`.")
    if option.prompt:
        words.append("Asked for if it is not given.")
    if option.envvar:
        words.append(f"Environment: `{option.envvar}`.")
    return " ".join(words)


# -- snippets -------------------------------------------------------------------------------------------------------


def with_snippets(page: str) -> str:
    """Return a page with the present source in each of its snippets."""

    def fresh(match: re.Match[str]) -> str:
        code = source_of(ROOT / match["path"], match["symbol"])
        return f"<!-- snippet: {match['path']} {match['symbol']} -->\n\n```python\n{code}\n```"

    return _SNIPPET.sub(fresh, page)


def source_of(path: Path, symbol: str) -> str:
    """Return the source of `Class`, `function`, `CONSTANT` or `Class.method` in a file; raise LookupError."""
    text = path.read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for name in symbol.split("."):
        found = [below for below in getattr(node, "body", ()) if name in _names(below)]
        if not found:
            raise LookupError(f"{path} has no {symbol}")
        node = found[0]
    first = min([node.lineno, *(it.lineno for it in getattr(node, "decorator_list", ()))])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines))


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return {getattr(node, "name", "")}


# -- all ------------------------------------------------------------------------------------------------------------


def pages() -> dict[Path, str]:
    """Return every page as it should be: those of the reference, and those with snippets."""
    made = {
        "settings": settings_page,
        "errors": errors_page,
        "protocol": protocol_page,
        "api": api_page,
        "cli": cli_page,
        "states": states_page,
        "services": services_page,
        "clouds": clouds_page,
    }
    found = {REFERENCE / f"{name}.md": make() for name, make in made.items()}
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        if path.parent != REFERENCE and path.exists():
            text = path.read_text(encoding="utf-8")
            if _SNIPPET.search(text):
                found[path] = with_snippets(text)
    return found


def stale() -> list[Path]:
    """Return the pages that are not as they should be."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main(arguments: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    if list(arguments) not in ([], ["--check"]):
        sys.stderr.write("usage: python docs/generate.py [--check]\n")
        return 2
    if arguments:
        for path in stale():
            sys.stderr.write(f"{path.relative_to(ROOT)} is stale: run 'python docs/generate.py'\n")
        return 1 if stale() else 0
    REFERENCE.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
