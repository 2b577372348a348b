"""Every provider is whole: a module, a simulator, a contract class, a section."""

import ast
import configparser
import importlib
import keyword
import re

import pytest
from tests.documents import HOME
from tests.providers.common import ProviderContract
from tests.providers.contract import HttpProviderContract
from tests.providers.vendors.server import Vendor

from gpubroker.providers import registry
from gpubroker.providers.http.adapter import HttpProvider

ELSEWHERE = {"kubernetes": "tests.cluster.test_contract"}
"""Whose truth is a real cluster's passes the contract there."""
VENDORS = [name for name in registry.names() if issubclass(registry.adapter(name), HttpProvider)]
LEAST_CHECKS = 60


def contract_of(name: str) -> type[ProviderContract]:
    """The one class of contract in the tests of a provider."""
    module = importlib.import_module(ELSEWHERE.get(name, f"tests.providers.test_{name}"))
    (only,) = [
        member
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, ProviderContract) and member.__module__ == module.__name__
    ]
    return only


def test_there_are_vendors() -> None:
    assert "runpod" in VENDORS
    assert set(registry.names()) - set(VENDORS) == {"kubernetes", "local"}


@pytest.mark.parametrize("name", registry.names())
def test_a_provider_passes_the_contract(name: str) -> None:
    assert contract_of(name).provider() is registry.adapter(name)
    assert registry.adapter(name).name == name


@pytest.mark.parametrize("name", VENDORS)
def test_a_vendor_has_a_simulator_and_more_than_sixty_checks(name: str) -> None:
    module = importlib.import_module(f"tests.providers.vendors.{name}{'_' if keyword.iskeyword(name) else ''}")
    (simulator,) = [
        member
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Vendor) and member is not Vendor
    ]
    contract = contract_of(name)
    assert issubclass(contract, HttpProviderContract)
    assert contract.vendor is simulator
    assert set(simulator.variables) == set(simulator.provider.credentials)
    assert contract.count_checks() >= LEAST_CHECKS


@pytest.mark.parametrize("name", registry.names())
def test_a_provider_is_described(name: str) -> None:
    sections = dict(
        re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (HOME / "docs/providers.md").read_text(), re.MULTILINE | re.DOTALL)
    )
    for variable in registry.adapter(name).credentials:
        assert f"`{variable}`" in sections[name]
    assert len(sections[name]) > 200


def test_providers_are_kept_from_one_another_without_a_list_of_them() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(HOME / ".importlinter")
    contract = contracts["importlinter:contract:providers"]
    assert (contract["type"], contract["modules"].split()) == ("independence", ["gpubroker.providers.*"])
    allowed = {line.rpartition(" -> ")[2] for line in contract["ignore_imports"].strip().splitlines()}
    assert allowed == {"gpubroker.providers.base", "gpubroker.providers.http.*"}


@pytest.mark.parametrize("name", VENDORS)
def test_an_adapter_is_one_small_file(name: str) -> None:
    text = (HOME / f"lib/gpubroker/providers/{name}.py").read_text()
    assert len(text.splitlines()) <= 250
    imported = {
        node.module
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module is not None
    }
    assert not [module for module in imported if module.startswith("gpubroker.store")]
    production = [path for path in (HOME / "lib").rglob("*.py") if path.stem != name]
    others = [path for path in production if re.search(rf"[\"']{name}[\"']", path.read_text())]
    assert others == [], "no other file names a vendor"
