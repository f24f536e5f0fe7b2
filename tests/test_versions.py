from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hermes_atropos.errors import ConfigurationError, UnsupportedVersionError
from hermes_atropos.hermes.versions import SUPPORTED, check_versions

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a release's metadata where Python finds it before the one that is really installed."""

    def install(distribution: str, version: str) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_the_installed_releases_are_supported():
    check_versions()


@pytest.mark.parametrize("version", ["0.13.0", "0.15.2", "0.19.0", "0.19.7"])
def test_supported_releases_of_hermes_pass(install, version):
    install("hermes-agent", version)
    check_versions()


@pytest.mark.parametrize(
    ("distribution", "version"),
    [
        ("hermes-agent", "0.12.9"),
        ("hermes-agent", "0.20.0"),
        ("hermes-agent", "0.20.0rc1"),
        ("hermes-agent", "1.0"),
        ("atroposlib", "0.3.0"),
        ("atroposlib", "0.5.0"),
    ],
)
def test_other_releases_are_refused_by_name_with_the_remedy(install, distribution, version):
    install(distribution, version)
    with pytest.raises(UnsupportedVersionError) as caught:
        check_versions()
    message = str(caught.value)
    assert message.startswith(f"{distribution} {version} is installed")
    assert f"pip install '{distribution}{SUPPORTED[distribution]}'" in message
    assert isinstance(caught.value, ConfigurationError)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UnsupportedVersionError, match=r"^hermes-agent is not installed: pip install"):
        check_versions()


def test_the_distribution_asks_for_the_same_ranges():
    dependencies = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    for distribution, supported in SUPPORTED.items():
        assert distribution + supported in dependencies


def test_checking_imports_neither_package():
    code = (
        "import sys, hermes_atropos.hermes.versions as v; v.check_versions(); "
        "assert not {'run_agent', 'atroposlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
