"""The command line, run as people run it, against a director as its clients see it."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from conpaas.cli.config import Config
from conpaas.cli.root import root
from conpaas.core.errors import BadInputError
from conpaas.core.messages.model import Cost
from conpaas.core.messages.public import Live
from conpaas.core.states import ServiceState
from tests.fakes.api import TOKEN, FakeApi, node, serving_in_thread

Run = Callable[..., Result]
SITE = "http://127.9.0.2:8080/"


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with serving_in_thread(FakeApi()) as running:
        yield running


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("CONPAAS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def run(api: FakeApi, home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `conpaas` with some words, logged in."""
    monkeypatch.setenv("CONPAAS_URL", api.url)
    monkeypatch.setenv("CONPAAS_TOKEN", TOKEN)

    def invoke(*words: str, stdin: str = "") -> Result:
        return CliRunner().invoke(root, list(words), input=stdin, prog_name="conpaas")

    return invoke


def lines(text: str) -> list[str]:
    return text.splitlines()


# -- who and where


def test_login_keeps_the_token_where_only_its_owner_reads_it(api: FakeApi, home: Path) -> None:
    result = CliRunner().invoke(root, ["login", api.url, "--username", "ada", "--password", "right"])

    assert result.output == f"logged in at {api.url} as ada\n"
    file = home / "conpaas" / "config.json"
    assert json.loads(file.read_text()) == {"url": api.url, "token": TOKEN}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert CliRunner().invoke(root, ["whoami"]).output == f"ada at {api.url}, 9999 credits\n"


def test_logout_forgets_the_token(api: FakeApi, home: Path) -> None:
    Config(home / "conpaas", api.url, TOKEN).save()

    assert CliRunner().invoke(root, ["logout"]).exit_code == 0

    assert Config.load().token is None
    assert Config.load().url == api.url


def test_the_kept_token_is_never_sent_to_another_director(home: Path) -> None:
    Config(home / "conpaas", "http://ours:9999", TOKEN).save()

    env = {"XDG_CONFIG_HOME": str(home)}
    assert Config.load(env).token == TOKEN
    assert Config.load({**env, "CONPAAS_URL": "http://theirs:9999"}).token is None
    assert Config.load({**env, "CONPAAS_URL": "http://theirs:9999", "CONPAAS_TOKEN": "own"}).token == "own"


def test_a_damaged_configuration_says_what_to_do(home: Path) -> None:
    (home / "conpaas").mkdir()
    (home / "conpaas" / "config.json").write_text("{")

    with pytest.raises(BadInputError, match="is damaged") as caught:
        Config.load()

    assert "log in again" in caught.value.hint


@pytest.mark.parametrize("words", [["ls"], ["status"], ["cert"]])
def test_without_a_login_the_exit_code_is_4(home: Path, words: list[str]) -> None:
    result = CliRunner().invoke(root, words)

    assert result.exit_code == 4
    assert lines(result.stderr) == [
        "error: you are not logged in at http://127.0.0.1:9999",
        "hint: log in first: 'conpaas login'",
    ]


def test_a_director_that_is_away_is_exit_code_5(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONPAAS_URL", "http://127.0.0.1:9")

    result = run("ls")

    assert result.exit_code == 5
    assert result.stderr.startswith("error: GET http://127.0.0.1:9/")


def test_wrong_words_are_exit_code_2(run: Run) -> None:
    assert run("start").exit_code == 2
    assert run("nonsense").exit_code == 2


# -- services


def test_ls_in_a_pipe_is_plain_columns(run: Run, api: FakeApi) -> None:
    elsewhere = node(4, "web").model_copy(update={"cloud": "ec2"})
    cost = Cost(hourly={"USD": Decimal("0.04")}, total={"USD": Decimal("1.5")})
    api.add("blog", nodes=(node(1, kind="manager"), node(3, "web"), elsewhere), cost=cost)
    api.add("empty", ServiceState.INIT, nodes=(), urls={})

    text = re.sub(r"Since +|\d+ days ago +", "| ", run("ls").stdout)
    assert lines(text) == [
        f"Name   Type  Application  State    | Instances  Cloud       Address{' ' * 17}Per hour    So far    Id",
        f"blog   php   shop         RUNNING  | 3          local, ec2  {SITE}  0.04 USD/h  1.50 USD  svc-1",
        f"empty  php   shop         INIT     | 0          local{' ' * 53}svc-2",
    ]


def test_ls_without_services_says_how_to_make_one(run: Run) -> None:
    assert run("ls").stdout == "You have no services: 'conpaas create' makes one.\n"
    assert run("ls", "--json").stdout == "[]\n"


def test_json_is_the_messages_documents_wherever_the_option_stands(run: Run, api: FakeApi) -> None:
    api.add("blog")

    before, after = run("--json", "ls"), run("ls", "--json")

    assert before.stdout == after.stdout
    assert json.loads(after.stdout)[0]["name"] == "blog"


def test_errors_with_json_are_problem_documents(run: Run) -> None:
    result = run("start", "blog", "--json")

    assert result.exit_code == 1
    assert result.stdout == ""
    assert json.loads(result.stderr)["code"] == "not-found"


def test_create_says_what_comes_next(run: Run, api: FakeApi) -> None:
    result = run("create", "php", "--name", "blog", "--cloud", "local", "--application", "shop")

    assert result.stdout == "created blog (svc-1); start it with 'conpaas start blog'\n"
    assert api.calls[0][2].application == "app-1"


def test_a_name_that_is_no_shell_word_is_shown_by_its_id(run: Run) -> None:
    assert "conpaas start svc-1" in run("create", "php", "--name", "it's $HOME").stdout


def test_a_name_that_is_too_long_is_an_error_and_not_a_crash(run: Run) -> None:
    result = run("create", "php", "--name", "x" * 10_000)

    assert result.exit_code == 1
    assert "80 characters" in result.stderr


def test_start_waits_with_a_line_for_each_step(run: Run, api: FakeApi) -> None:
    api.add("blog", ServiceState.INIT)

    result = run("start", "blog")

    assert result.stdout == "start blog: done\n"
    assert lines(result.stderr) == ["start blog: 1 of 2 nodes serving", "start blog: 2 of 2 nodes serving"]


def test_start_without_waiting_names_the_operation(run: Run, api: FakeApi) -> None:
    api.add("blog", ServiceState.INIT)

    assert re.fullmatch(r"start blog: begun, as operation key-\w+\n", run("start", "blog", "--no-wait").stdout)


def test_an_operation_that_fails_is_exit_code_3(run: Run, api: FakeApi) -> None:
    api.add("blog", ServiceState.INIT)
    api.fail_with = "no node booted"

    result = run("start", "blog")

    assert result.exit_code == 3
    assert "error: start failed: no node booted" in lines(result.stderr)


@pytest.mark.parametrize("verb", ["stop", "terminate"])
def test_what_destroys_asks_first(run: Run, api: FakeApi, verb: str) -> None:
    api.add("blog")

    refused = run(verb, "blog", stdin="n\n")
    assert refused.exit_code == 1
    assert api.calls == []

    assert run(verb, "blog", stdin="y\n").exit_code == 0
    assert run(verb, "blog", "--yes").exit_code == 0
    assert len(api.calls) == 2


def test_scale_takes_more_fewer_and_how_many(run: Run, api: FakeApi) -> None:
    api.add("blog")  # it has one proxy and one web node

    assert run("scale", "blog", "web=3", "php=+1", "proxy=-1").exit_code == 0

    assert api.calls[0][2].roles == {"web": 2, "php": 1, "proxy": -1}
    assert api.calls[0][1]["If-Match"] == '"7"'


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("web", "is not a change of roles"),
        ("web=abc", "is not a change of roles"),
        ("web=+0", "changes nothing"),
        ("web=-0", "changes nothing"),
        ("web=1", "as many nodes as that already"),
        ("web=10000000000", "is not a change of roles"),
        ("=1", "is not a change of roles"),
        ("Web=1", "is not a change of roles"),
    ],
)
def test_nonsense_in_a_scale_is_refused_before_anything_happens(
    run: Run, api: FakeApi, word: str, message: str
) -> None:
    api.add("blog")

    result = run("scale", "blog", word)

    assert result.exit_code == 1
    assert message in result.stderr
    assert "hint: write ROLE=+N" in result.stderr
    assert api.calls == []


def test_settings_without_words_are_shown(run: Run, api: FakeApi) -> None:
    api.add("blog")

    assert run("settings", "blog").stdout == "memory_limit=128M\n"
    assert json.loads(run("settings", "blog", "--json").stdout) == {"memory_limit": "128M"}


def test_settings_get_the_types_of_their_schema(run: Run, api: FakeApi) -> None:
    api.add("blog")

    words = ("memory_limit=64", "max_execution_time=60", "display_errors=true", "php_version=8.2")
    assert run("settings", "blog", *words).exit_code == 0

    assert api.calls[0][2].settings == {
        "memory_limit": "64",
        "max_execution_time": 60,
        "display_errors": True,
        "php_version": "8.2",
    }


@pytest.mark.parametrize(
    ("word", "message", "hint"),
    [
        ("memory=1", "no setting 'memory'", "memory_limit"),
        ("max_execution_time=long", "'long' is not a value", "integer"),
        ("memory_limit", "is not a setting", "KEY=VALUE"),
    ],
)
def test_settings_that_do_not_exist_or_fit_are_refused(
    run: Run, api: FakeApi, word: str, message: str, hint: str
) -> None:
    api.add("blog")

    result = run("settings", "blog", word)

    assert result.exit_code == 1
    assert message in result.stderr
    assert hint in result.stderr


def test_one_script_can_be_replaced_and_the_other_stays(run: Run, api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "start.sh").write_text("#!/bin/sh\ntrue\n")
    service = api.add("blog")
    wanted = service.wanted.model_copy(update={"stop_script": "#!/bin/sh\n"})
    api.services[service.id] = service.model_copy(update={"wanted": wanted})

    assert run("scripts", "blog", "--start", str(tmp_path / "start.sh")).exit_code == 0

    assert api.calls[0][2].start == "#!/bin/sh\ntrue\n"
    assert api.calls[0][2].stop == "#!/bin/sh\n"


# -- code


def test_upload_shows_the_version_and_how_to_activate_it(run: Run, api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "site.zip").write_bytes(b"zip")
    api.add("blog")

    result = run("upload", "blog", str(tmp_path / "site.zip"), "--description", "new")

    assert result.stdout == "code-1: site.zip; 'conpaas code activate svc-1 code-1' lets it serve\n"
    assert api.code["svc-1"][0].description == "new"


def test_upload_can_activate(run: Run, api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "site.zip").write_bytes(b"zip")
    api.add("blog")

    result = run("upload", "blog", str(tmp_path / "site.zip"), "--activate")

    assert lines(result.stdout) == ["code-1: site.zip", "code-1 is active"]
    assert [path for path, _, _ in api.calls] == ["/api/v1/services/svc-1/code/code-1/activate"]


def test_download_does_not_overwrite(run: Run, api: FakeApi, tmp_path: Path) -> None:
    api.add("blog")
    api.blobs["code-default"] = b"bytes"
    target = tmp_path / "out.tar.gz"

    assert run("code", "download", "blog", "code-default", str(target)).stdout == f"wrote {target}\n"
    assert target.read_bytes() == b"bytes"
    assert run("code", "download", "blog", "code-default", str(target)).exit_code == 1


def test_rollback_activates_the_version_before_the_active_one(run: Run, api: FakeApi) -> None:
    service = api.add("blog")
    newer = api.code[service.id][0].model_copy(update={"id": "code-2"})
    older = newer.model_copy(update={"id": "code-0", "active": False})
    api.code[service.id] = [newer, older]

    assert run("rollback", "blog").stdout == "roll blog back to code-0: done\n"


def test_rollback_of_the_first_version_is_refused(run: Run, api: FakeApi) -> None:
    api.add("blog")

    result = run("rollback", "blog")

    assert result.exit_code == 1
    assert "no earlier code version" in result.stderr


# -- looking


def test_status_of_a_service_shows_it_and_its_nodes(run: Run, api: FakeApi) -> None:
    api.add("blog", ServiceState.ADAPTING, reason="1 node is missing")

    text = re.sub(r"\d+ days ago", "long ago", run("status", "blog").stdout)

    assert "state                  ADAPTING, since long ago" in text
    assert "reason                 1 node is missing" in text
    assert "address (application)  http://127.9.0.2:8080/" in text
    assert re.search(r"^i-2 +proxy php +SERVING +127\.9\.0\.2", text, re.MULTILINE)


def test_status_without_a_name_shows_the_account(run: Run, api: FakeApi) -> None:
    api.add("blog")

    assert lines(run("status").stdout)[0] == f"ada at {api.url}: 9999 credits, 1 services"
    assert json.loads(run("status", "--json").stdout)["user"]["credits"] == 9999


def test_status_watch_in_a_pipe_is_a_line_for_each_change(run: Run, api: FakeApi) -> None:
    service = api.add("blog")
    stopping = service.model_copy(update={"state": ServiceState.EPILOGUE, "reason": "by its owner"})
    api.live = [
        Live(kind="service", service=service),
        Live(kind="service", service=stopping),
        Live(kind="removed", id=service.id),
    ]

    assert lines(run("status", "blog", "--watch").stdout) == ["blog: RUNNING", "blog: EPILOGUE by its owner"]


def test_logs_show_the_managers_unless_another_is_named(run: Run, api: FakeApi) -> None:
    api.add("blog")

    assert run("logs", "blog").stdout == "manager manager.log says hello\n"
    assert run("logs", "blog", "i-2").stdout == "ins-2 php.error.log says hello\n"
    assert "php.error.log" in run("logs", "blog", "--list").stdout


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("i-9",), "no log of a node 'i-9'", "ins-2, manager"),
        (("ins-2", "x.log"), "has no log 'x.log'", "php.error.log"),
    ],
)
def test_an_unknown_log_says_which_there_are(
    run: Run, api: FakeApi, words: tuple[str, ...], message: str, hint: str
) -> None:
    api.add("blog")

    result = run("logs", "blog", *words)

    assert message in result.stderr
    assert hint in result.stderr


def test_metrics_history_operations_and_states_are_tables(run: Run, api: FakeApi) -> None:
    api.add("blog")
    run("start", "blog")

    assert "12.50" in run("metrics", "blog").stdout
    assert "service-created" in run("history", "blog").stdout
    assert "2 of 2 nodes serving" in run("ops", "ls").stdout
    assert "user:ada" in run("states", "blog").stdout


def test_opening_a_service_without_a_site_is_an_error(run: Run, api: FakeApi) -> None:
    api.add("blog", ServiceState.STOPPED, urls={})

    result = run("open", "blog")

    assert result.exit_code == 1
    assert "conpaas start svc-1" in result.stderr


# -- the rest


def test_a_new_token_is_shown_once_and_alone(run: Run) -> None:
    assert run("token", "create", "ci", "--scope", "read").stdout == "s3cret\n"
    assert json.loads(run("token", "create", "ci", "--json").stdout)["secret"] == "s3cret"


def test_credits_can_be_granted_and_taken(run: Run) -> None:
    assert run("admin", "grant", "ada", "5").stdout == "ada has 10004 credits\n"
    assert run("admin", "grant", "ada", "-9").stdout == "ada has 9990 credits\n"


def test_clouds_that_cannot_be_used_say_why(run: Run) -> None:
    assert "no: no account" in run("cloud", "ls").stdout


def test_engines_are_listed_without_a_director(home: Path) -> None:
    result = CliRunner().invoke(root, ["engines", "ls", "--json"])

    assert result.exit_code == 0
    assert all({"type", "program", "package", "path"} == set(engine) for engine in json.loads(result.stdout))


def test_engines_of_an_unknown_type_are_refused(home: Path) -> None:
    result = CliRunner().invoke(root, ["engines", "install", "cobol"])

    assert result.exit_code == 1
    assert "no service type 'cobol'" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(home: Path, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "_CONPAAS_COMPLETE" in CliRunner().invoke(root, ["completion", shell]).output


def complete(line: str) -> list[str]:
    env = {"_CONPAAS_COMPLETE": "zsh_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    words = line.split()
    env["COMP_CWORD"] = str(len(words) if line.endswith(" ") else len(words) - 1)
    result = CliRunner().invoke(root, [], env=env, prog_name="conpaas", complete_var="_CONPAAS_COMPLETE")
    return [word for word in lines(result.output) if word not in {"plain", "_", ""}]


def test_services_roles_and_settings_are_completed(run: Run, api: FakeApi) -> None:
    api.add("blog")

    assert complete("conpaas start b") == ["blog"]
    assert complete("conpaas scale blog w") == ["web=+", "web=-", "web="]
    assert complete("conpaas settings blog mem") == ["memory_limit="]
    assert complete("conpaas code activate blog ") == ["code-default"]
    assert complete("conpaas create p") == ["php"]


def test_completion_without_a_director_is_empty_and_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONPAAS_URL", "http://127.0.0.1:9")

    assert complete("conpaas start b") == []


def every_command(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from every_command(found, (*path, name))
    else:
        yield path


@pytest.mark.parametrize("path", list(every_command(root)), ids=" ".join)
def test_every_command_has_help_and_json(home: Path, path: tuple[str, ...]) -> None:
    text = CliRunner().invoke(root, [*path, "--help"]).output

    assert len(lines(text)) > 4
    if path[0] not in {"run", "completion"}:
        assert "--json" in text


def test_a_daemon_loads_nothing_that_only_people_need(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from conpaas.__main__ import main\n"
        "try:\n"
        "    main(['run', 'agent', '--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "names = {'click', 'rich', 'cryptography', 'sqlalchemy', 'pydantic_settings', 'jinja2'}\n"
        "heavy = [name for name in names if sys.modules.get(name)]\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "--context FILE" in done.stdout
