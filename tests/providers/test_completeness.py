"""Every provider is whole: a module, a simulator, a contract class, a section."""

import ast
import configparser
import importlib
import keyword
import re

import pytest
from tests.documents import HOME
from tests.providers.contract import ProviderContract
from tests.providers.vendors.server import Vendor

from gpubroker.providers import registry

WITHOUT_HTTP = {
    "local": "its pods are this machine's processes: tests/providers/test_local.py",
    "kubernetes": "its truth is a real API server: tests/cluster",
}
VENDORS = [name for name in registry.names() if name not in WITHOUT_HTTP]


def test_there_are_vendors() -> None:
    assert "runpod" in VENDORS
    assert set(WITHOUT_HTTP) <= set(registry.names())


@pytest.mark.parametrize("name", VENDORS)
def test_a_vendor_has_a_simulator_and_passes_the_contract(name: str) -> None:
    module = importlib.import_module(f"tests.providers.vendors.{name}{'_' if keyword.iskeyword(name) else ''}")
    simulators = [
        member
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Vendor) and member is not Vendor
    ]
    assert [simulator.provider.name for simulator in simulators] == [name]
    tests = importlib.import_module(f"tests.providers.test_{name}")
    contracts = [
        member
        for member in vars(tests).values()
        if isinstance(member, type) and issubclass(member, ProviderContract) and member is not ProviderContract
    ]
    assert [contract.vendor for contract in contracts] == simulators
    provider = registry.adapter(name)
    assert provider.name == name
    assert set(simulators[0].variables) == set(provider.credentials)


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
