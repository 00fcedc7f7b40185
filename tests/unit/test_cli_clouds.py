"""Clouds on the command line: choosing one, and what administrators do with them."""

import json
import os
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from conpaas.cli.root import root
from conpaas.core.messages import public
from conpaas.core.messages.model import Cost, Wanted
from conpaas.core.states import NodeState
from tests.fakes.api import TOKEN, FakeApi, node, serving_in_thread

Run = Callable[..., Result]
NEEDED = ("--set", "region=north-2", "--secret", "secret_key=-")


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with serving_in_thread(FakeApi()) as running:
        yield running


@pytest.fixture
def run(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `conpaas` with some words, logged in."""
    for name in [name for name in os.environ if name.startswith("CONPAAS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("CONPAAS_URL", api.url)
    monkeypatch.setenv("CONPAAS_TOKEN", TOKEN)

    def invoke(*words: str, stdin: str = "") -> Result:
        return CliRunner().invoke(root, list(words), input=stdin, prog_name="conpaas")

    return invoke


def calls(api: FakeApi, end: str) -> list[Any]:
    return [body for path, _, body in api.calls if path.endswith(end)]


def refused(result: Result, message: str, hint: str) -> None:
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert hint in result.stderr


# -- looking


def test_clouds_are_listed_with_limit_and_price(run: Run) -> None:
    text = run("cloud", "ls").stdout

    assert re.search(r"local +Local +local +default +3 of 10 +0\.0208 EUR/h +small large +yes", text)
    assert "no: no account" in text


def test_sizes_are_listed_with_prices_and_free_for_nothing(run: Run) -> None:
    text = run("cloud", "sizes", "local").stdout

    assert re.search(r"small +default +1 +1G +0\.0208 EUR/h$", text, re.MULTILINE)
    assert re.search(r"large +8 +16G +40G +free$", text, re.MULTILINE)
    assert run("cloud", "sizes", "ec2").stdout == "ec2 has no sizes to choose from.\n"
    refused(run("cloud", "sizes", "mars"), "there is no cloud 'mars'", "there are: local, ec2")


def test_show_says_all_of_an_account_but_its_secrets(run: Run) -> None:
    text = run("cloud", "show", "north").stdout

    assert "north (The North)" in text
    assert re.search(r"secret_key +\*+$", text, re.MULTILINE)
    assert re.search(r"prices +small=0\.02 USD/h$", text, re.MULTILINE)
    assert re.search(r"limit per user +5$", text, re.MULTILINE)
    assert "not set: token, subnets" in text
    assert re.search(r"deployment +dep-1$", text, re.MULTILINE)
    document = json.loads(run("cloud", "show", "north", "--json").stdout)
    assert (document["settings"]["region"], document["deployment"]) == ("north-1", "dep-1")
    refused(run("cloud", "show", "mars"), "there is no cloud 'mars'", "there are: north")


def test_kinds_of_clouds_are_listed(run: Run) -> None:
    assert re.search(r"north +North +Cold\.", run("cloud", "types").stdout)


# -- adding


def test_a_cloud_is_tried_and_then_added(run: Run, api: FakeApi) -> None:
    words = ("--set", "subnets=a,b", "--set", "networks=1, 2", "--set", "bid=0.05", "--set", "spot=true")
    more = ("--title", "Far", "--price", "small=0.02", "--price", "*=1", "--currency", "EUR", "--limit", "9")

    result = run("cloud", "add", "north", "n2", *NEEDED, *words, *more, "--user-limit", "2", stdin="hush\n")

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "✓ the endpoint: north-1.example.org",
        "✓ the credentials",
        "  cores: 4 of 20 used",
        "added n2 (Far)",
    ]
    (tried,), (added,) = calls(api, "/admin/examine"), calls(api, "/admin/clouds")
    assert tried == added
    assert added.settings == {
        "region": "north-2",
        "secret_key": "hush",
        "subnets": ["a", "b"],
        "networks": [1, 2],
        "bid": 0.05,
        "spot": True,
    }
    assert added.options == public.CloudOptions(
        title="Far",
        prices={"small": Decimal("0.02"), "*": Decimal(1)},
        currency="EUR",
        instances=9,
        user_instances=2,
    )


def test_how_often_a_provider_is_called_can_be_said_and_taken_back(run: Run, api: FakeApi) -> None:
    run("cloud", "edit", "north", "--rate", "create=0.5", "--rate", "list=2")
    options = public.CloudOptions(rates={"create": 0.5, "list": 2})
    api.accounts["north"] = api.accounts["north"].model_copy(update={"options": options})
    run("cloud", "edit", "north", "--rate", "list=")

    assert [form.options.rates for form in calls(api, "/admin/clouds/north")] == [
        {"create": 0.5, "list": 2},
        {"create": 0.5},
    ]


def test_a_cloud_that_fails_its_test_is_not_added_unless_told_to(run: Run, api: FakeApi) -> None:
    wrong = public.FindingView(name="the credentials", ok=False, detail="revoked", hint="renew them")
    api.examination = public.Examination(findings=(wrong,))

    result = run("cloud", "add", "north", "n2", *NEEDED, stdin="hush")

    refused(result, "n2 is not added: the credentials: revoked", "renew them")
    assert result.stdout.splitlines() == ["✗ the credentials: revoked", "    renew them"]
    assert calls(api, "/admin/clouds") == []

    assert run("cloud", "add", "north", "n2", *NEEDED, "--no-check", stdin="hush").exit_code == 0
    assert len(calls(api, "/admin/clouds")) == 1


def test_nothing_is_asked_for_a_cloud_whose_name_is_taken(run: Run, api: FakeApi) -> None:
    result = run("cloud", "add", "north", "north", "--set", "region=a", stdin="typed\n")

    refused(result, "there is a cloud 'north'", "choose another name")
    assert "secret_key" not in result.output
    assert calls(api, "/admin/examine") == calls(api, "/admin/clouds") == []


def test_secrets_come_from_a_prompt_a_file_or_standard_input(run: Run, api: FakeApi, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("-----BEGIN\nabc\n-----END\n")

    run("cloud", "add", "north", "n2", "--set", "region=a", "--secret", f"secret_key=@{key}")
    prompted = run("cloud", "add", "north", "n3", "--set", "region=a", stdin="typed\n")

    assert [form.settings["secret_key"] for form in calls(api, "/admin/clouds")] == [key.read_text(), "typed"]
    assert "typed" not in prompted.output


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("add", "north", "n2"), "North needs more: region: Such as `north-1`.", "--set region=…"),
        (("add", "south", "n2"), "there is no driver 'south'", "there are: north"),
        (("add", "north", "n2", "--set", "regoin=a"), "there is no setting 'regoin'", "region, secret_key"),
        (("add", "north", "n2", "--set", "secret_key=a"), "'secret_key' is a secret", "--secret secret_key"),
        (("add", "north", "n2", "--secret", "secret_key=a"), "is no secret", "secret_key=@FILE"),
        (("add", "north", "n2", "--secret", "region"), "'region' is not a secret", "--set region=VALUE"),
        (("add", "north", "n2", "--secret", "secret_key=@/nowhere"), "cannot read '/nowhere'", "name a text file"),
        (("add", "north", "n2", "--set", "hosts=@/nowhere"), "cannot read '/nowhere'", "name a text file"),
        (("add", "north", "n2", "--set", "networks=a"), "'a' is not a value of networks", "integer"),
        (("add", "north", "n2", "--set", "spot=maybe"), "'maybe' is not a value of spot", "boolean"),
        (("edit", "north", "--price", "small=cheap"), "'cheap' is not a price of small", "t3.small=0.02"),
        (("edit", "north", "--currency", "euro"), "currency", "correct"),
        (("edit", "north", "--rate", "create=often"), "'often' is not a number of calls per second of create", "0.5"),
        (("edit", "north", "--rate", "make=1"), "'create', 'delete'", "correct"),
        (("edit", "north", "--unset", "region"), "'region' cannot be unset", "another 'region'"),
        (("edit", "north", "--unset", "colour"), "there is no setting 'colour'", "region"),
        (("edit", "north"), "there is nothing to change", "--help"),
        (("add", "north", "North!", *NEEDED), "name", "correct 'name'"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_kept(
    run: Run, api: FakeApi, words: tuple[str, ...], message: str, hint: str
) -> None:
    refused(run("cloud", *words, stdin="hush"), message, hint)
    assert [path for path, _, _ in api.calls if not path.endswith("/examine")] == []


def test_a_list_that_cannot_be_read_is_not_repeated_for_there_may_be_secrets_in_it(run: Run) -> None:
    result = run("cloud", "add", "north", "n2", "--set", 'hosts=[{"key": "hush"')

    refused(result, "this is not a value of hosts", "JSON")
    assert "hush" not in result.output


def test_a_list_of_hosts_is_read_from_a_file(run: Run, api: FakeApi, tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text('[{"address": "10.0.0.1"}]')

    assert run("cloud", "add", "north", "n2", *NEEDED, "--set", f"hosts=@{file}", stdin="hush").exit_code == 0

    assert calls(api, "/admin/clouds")[0].settings["hosts"] == [{"address": "10.0.0.1"}]


# -- changing


def test_edit_changes_only_what_is_given(run: Run, api: FakeApi) -> None:
    assert run("cloud", "edit", "north", "--user-limit", "none", "--price", "large=2").stdout == "changed north\n"

    (form,) = calls(api, "/admin/clouds/north")
    assert form.settings == api.accounts["north"].settings
    assert form.options == public.CloudOptions(
        title="The North", prices={"small": Decimal("0.02"), "large": Decimal(2)}, user_instances=None
    )
    assert calls(api, "/admin/examine") == []  # what the provider sees is as before


def test_edit_takes_settings_and_prices_back(run: Run, api: FakeApi) -> None:
    api.accounts["north"] = api.accounts["north"].model_copy(
        update={"settings": {"region": "a", "secret_key": "**********", "token": "**********", "spot": True}}
    )

    words = ("--unset", "spot", "--unset", "token", "--price", "small=")
    assert run("cloud", "edit", "north", *words).exit_code == 0

    (form,) = calls(api, "/admin/clouds/north")
    assert form.settings == {"region": "a", "secret_key": "**********", "token": ""}
    assert form.options.prices == {}
    assert calls(api, "/admin/examine") == [form]  # new settings are tried first


def test_a_cloud_is_disabled_and_enabled(run: Run, api: FakeApi) -> None:
    assert run("cloud", "disable", "north").stdout == "north takes no new instances\n"
    assert run("cloud", "enable", "north").stdout == "north takes new instances\n"

    assert [form.options.enabled for form in calls(api, "/admin/clouds/north")] == [False, True]
    assert all(form.options.user_instances == 5 for form in calls(api, "/admin/clouds/north"))


def test_removing_asks_first(run: Run, api: FakeApi) -> None:
    assert run("cloud", "rm", "north", stdin="n\n").exit_code == 1
    assert api.calls == []

    assert run("cloud", "rm", "north", "--yes").stdout == "removed north\n"
    assert len(calls(api, "/admin/clouds/north")) == 1


def test_a_test_that_fails_is_an_error_with_a_tick_list(run: Run, api: FakeApi) -> None:
    assert run("cloud", "test", "north").exit_code == 0
    fine = api.examination.findings[0]
    api.examination = public.Examination(findings=(fine, public.FindingView(name="the image", ok=False, detail="none")))

    result = run("cloud", "test", "north")

    assert result.stdout.splitlines() == ["✓ the endpoint: north-1.example.org", "✗ the image: none"]
    refused(result, "north cannot be used: the image: none", "conpaas cloud edit")
    assert json.loads(run("cloud", "test", "north", "--json").stdout)["findings"][1]["ok"] is False


# -- services on clouds


def test_create_says_where_on_what_and_what_takes_over(run: Run, api: FakeApi) -> None:
    words = ("--cloud", "ec2", "--size", "t3.small", "--fallback", "local", "--fallback", "north")
    assert run("create", "php", *words).exit_code == 0

    form = api.calls[0][2]
    assert (form.cloud, form.size, form.fallback) == ("ec2", "t3.small", ("local", "north"))


SPREAD = Wanted(running=True, roles={"web": 3}, places={"web": {"ec2": 2}}, cloud="local", sizes={"local": "small"})


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (("web=+2", "--cloud", "ec2"), ({"web": 2}, "ec2")),
        (("web=3", "--cloud", "ec2"), ({"web": 1}, "ec2")),
        (("web=3", "--cloud", "local"), ({"web": 2}, "local")),
        (("web=1", "--cloud", "north"), ({"web": 1}, "north")),
        (("web=4",), ({"web": 1}, None)),
    ],
)
def test_how_many_there_shall_be_is_counted_on_the_cloud_that_is_named(
    run: Run, api: FakeApi, words: tuple[str, ...], change: tuple[dict[str, int], str | None]
) -> None:
    api.add("blog", wanted=SPREAD)

    assert run("scale", "blog", *words).exit_code == 0

    assert (api.calls[0][2].roles, api.calls[0][2].cloud) == change


def test_move_goes_to_another_cloud_with_progress(run: Run, api: FakeApi) -> None:
    api.add("blog", wanted=SPREAD)

    result = run("move", "blog", "--to", "ec2", "--size", "ec2=large", "--fallback", "local")

    assert result.stdout == "move blog: done\n"
    assert result.stderr.splitlines()[-1] == "move blog: 2 of 2 nodes serving"
    path, headers, body = api.calls[0]
    assert path == "/api/v1/services/svc-1/move"
    assert headers["If-Match"] == '"7"'
    assert (body.cloud, body.sizes, body.fallback) == ("ec2", {"local": "small", "ec2": "large"}, ("local",))


def test_move_leaves_alone_what_is_not_named(run: Run, api: FakeApi) -> None:
    api.add("blog", wanted=SPREAD)

    run("move", "blog", "--to", "ec2", "--no-wait")
    run("move", "blog", "--size", "local=", "--no-fallback", "--no-wait")

    first, second = (body for _, _, body in api.calls)
    assert (first.cloud, first.sizes, first.fallback) == ("ec2", None, None)
    assert (second.cloud, second.sizes, second.fallback) == (None, {}, ())
    assert run("move", "blog", "--fallback", "a", "--no-fallback").exit_code == 2


def test_status_says_where_how_far_and_what_it_costs(run: Run, api: FakeApi) -> None:
    price = Cost(hourly={"USD": Decimal("0.0208")}, total={"USD": Decimal("0.1")})
    booting = node(4, state=NodeState.BOOTING).model_copy(
        update={"meant_for": "ec2", "stage": "unpacking", "size": "small", "cost": price}
    )
    wanted = SPREAD.model_copy(update={"fallback": ("local",)})
    api.add("blog", nodes=(node(1, kind="manager"), booting), cost=price, wanted=wanted)

    text = run("status", "blog").stdout

    assert re.search(r"price +0\.0208 USD/h, 0\.10 USD so far$", text, re.MULTILINE)
    assert re.search(r"fallback +local$", text, re.MULTILINE)
    assert re.search(r"sizes +local=small$", text, re.MULTILINE)
    assert re.search(
        r"BOOTING .* local \(meant for ec2\) +small +0\.0208 USD/h +0\.10 USD .* unpacking$", text, re.MULTILINE
    )
    assert re.search(r"shop +1 +0\.04 USD/h +1\.50 USD", run("app", "ls").stdout)


def complete(line: str) -> list[str]:
    words = line.split()
    count = len(words) if line.endswith(" ") else len(words) - 1
    env = {"_CONPAAS_COMPLETE": "zsh_complete", "COMP_WORDS": line, "COMP_CWORD": str(count)}
    result = CliRunner().invoke(root, [], env=env, prog_name="conpaas", complete_var="_CONPAAS_COMPLETE")
    return [word for word in result.output.splitlines() if word not in {"plain", "_", ""}]


def test_clouds_drivers_sizes_and_settings_are_completed(run: Run, api: FakeApi) -> None:
    assert complete("conpaas cloud add n") == ["north"]
    assert complete("conpaas cloud edit n") == ["north"]
    assert complete("conpaas cloud sizes l") == ["local"]
    assert complete("conpaas create php --cloud local --size s") == ["small"]
    assert complete("conpaas create php --cloud ec2 --size s") == []
    assert complete("conpaas create php --size ") == ["small", "large"]
    assert complete("conpaas move blog --size l") == ["local=small", "local=large"]
    assert complete("conpaas cloud add north n2 --set r") == ["region="]
    assert complete("conpaas cloud edit north --secret s") == ["secret_key"]
