"""Plug-ins are found by looking, inside the package and by entry points, and nothing else is."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conpaas.core import plugins
from conpaas.core.cloud import CloudType
from conpaas.core.errors import NotFoundError
from conpaas.core.service import PACKAGE, ServiceType


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of plug-ins that are strings with names."""
    folder = tmp_path / "gadgets"
    folder.mkdir()
    (folder / "__init__.py").write_text("class Gadget:\n    def __init__(self, name): self.name = name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._discover.cache_clear()
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in {"gadgets", "outside"}]:
        del sys.modules[name]
    plugins._discover.cache_clear()


class HasName:
    name: str


def names(package: str = "gadgets", kind: type[object] = object) -> list[str]:
    plugins._discover.cache_clear()
    return sorted(plugins.discover(package, "GADGET", kind))


def test_modules_and_folders_with_the_constant_are_plug_ins_and_others_are_not(package: Path) -> None:
    (package / "one.py").write_text("from gadgets import Gadget\nGADGET = Gadget('one')\n")
    (package / "two").mkdir()
    (package / "two" / "__init__.py").write_text("from gadgets import Gadget\nGADGET = Gadget('two')\n")
    (package / "_helpers.py").write_text("SOMETHING = 1\n")
    (package / "empty.py").write_text("GADGET = None\n")
    assert names() == ["one", "two"]


def test_a_new_file_is_a_new_plug_in(package: Path) -> None:
    assert names() == []
    (package / "three.py").write_text("from gadgets import Gadget\nGADGET = Gadget('three')\n")
    assert names() == ["three"]


def test_a_distribution_from_outside_registers_by_entry_point(package: Path) -> None:
    outside = package.parent
    (outside / "outside.py").write_text("from gadgets import Gadget\nGADGET = Gadget('far')\n")
    info = outside / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gadgets]\nfar = outside:GADGET\n")
    assert names() == ["far"]


def test_a_constant_of_the_wrong_kind_is_an_error_that_names_it(package: Path) -> None:
    (package / "one.py").write_text("from gadgets import Gadget\nGADGET = Gadget('one')\n")
    with pytest.raises(TypeError, match="plug-in one of gadgets: GADGET is no HasName"):
        names(kind=HasName)


def test_a_plug_in_that_is_broken_says_so(package: Path) -> None:
    (package / "one.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        names()


def test_what_was_found_is_not_changed_by_who_asks(package: Path) -> None:
    (package / "one.py").write_text("from gadgets import Gadget\nGADGET = Gadget('one')\n")
    plugins.discover("gadgets", "GADGET", object).clear()
    assert list(plugins.discover("gadgets", "GADGET", object)) == ["one"]


def test_ours_are_found() -> None:
    services = plugins.discover(PACKAGE, "SERVICE", ServiceType)
    assert {"php", "echo"} <= set(services)
    assert all(name == service.name for name, service in services.items())
    assert "local" in plugins.discover("conpaas.cloud", "CLOUD", CloudType)


def test_a_reference_is_loaded() -> None:
    assert plugins.load("conpaas.core.plugins:load") is plugins.load


@pytest.mark.parametrize(
    "reference",
    ["conpaas.core.nothing:x", "conpaas.core.plugins:nothing", "nothing:x", "conpaas.core.plugins", "a:b:c"],
)
def test_a_reference_to_nothing_is_an_error_with_its_value(reference: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        plugins.load(reference)
    assert caught.value.value == reference
