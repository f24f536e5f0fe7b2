from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from hermes_atropos.errors import ConfigurationError, UnsupportedVersionError
from hermes_atropos.hermes import versions
from hermes_atropos.hermes.versions import SUPPORTED, check_versions, hermes_version

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture(autouse=True)
def forgotten():
    hermes_version.cache_clear()
    yield
    hermes_version.cache_clear()


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


@pytest.mark.parametrize("version", ["0.13.0", "0.15.2", "0.19.0", "0.19.7", "0.20.1.2", "0.22.2"])
def test_supported_releases_of_hermes_pass(install, version, recwarn):
    install("hermes-agent", version)
    check_versions()
    assert hermes_version() == Version(version)
    assert not recwarn.list


@pytest.mark.parametrize("version", ["0.23.0", "1.0", "0.0.0"])
def test_a_release_that_was_never_tried_is_warned_of(install, version, monkeypatch):
    """0.0.0 is the placeholder of a checkout, which its other files don't resolve here."""
    install("hermes-agent", version)
    monkeypatch.setattr(versions, "_owner", lambda: None)
    monkeypatch.setattr(versions, "_checkout", lambda: None)
    with pytest.warns(UserWarning, match="not with (0.23.0|1.0|a release that does not say which it is)$"):
        check_versions()


def test_one_that_is_too_old_is_refused_with_both_ways_to_get_another(install):
    install("hermes-agent", "0.12.9")
    with pytest.raises(UnsupportedVersionError, match=r"hermes-agent 0\.12\.9 is too old") as caught:
        check_versions()
    assert "pip install -e" in str(caught.value)
    assert "pip install 'hermes-atropos[hermes]'" in str(caught.value)
    assert isinstance(caught.value, ConfigurationError)


@pytest.mark.parametrize("version", ["0.3.0", "0.5.0"])
def test_another_atroposlib_is_refused_by_name_with_the_remedy(install, version):
    install("atroposlib", version)
    with pytest.raises(UnsupportedVersionError, match=f"^atroposlib {version} is installed") as caught:
        check_versions()
    assert f"pip install 'atroposlib{SUPPORTED['atroposlib']}'" in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "run_agent", raising=False)
    with pytest.raises(UnsupportedVersionError, match=r"^hermes-agent is not installed: install a clone"):
        check_versions()


def test_a_fork_and_a_checkout_say_which_release_they_are(tmp_path, monkeypatch):
    """The module decides: the distribution that owns it, else the pyproject.toml beside it."""
    (tmp_path / "run_agent.py").write_text("")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "hermes-agent"\nversion = "0.21.3"\n')
    monkeypatch.delitem(sys.modules, "run_agent", raising=False)
    monkeypatch.setattr(versions, "_distribution", lambda name: Version("0.22.2") if name == "a-fork" else None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(versions.metadata, "packages_distributions", lambda: {"run_agent": ["a-fork"]})
    assert hermes_version() == Version("0.22.2")
    hermes_version.cache_clear()
    monkeypatch.setattr(versions.metadata, "packages_distributions", dict)
    assert hermes_version() == Version("0.21.3")


def test_installing_the_library_installs_no_hermes():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith("hermes-agent")]
    assert project["optional-dependencies"]["hermes"] == ["hermes-agent>=0.13,<0.20; python_version < '3.14'"]
    assert f"atroposlib{SUPPORTED['atroposlib']}" in project["dependencies"]


@pytest.mark.parametrize("lazy_installs", [None, "0"])
def test_the_import_of_hermes_leaves_temporary_files_and_installs_to_the_user(tmp_path, lazy_installs):
    """From 0.21, Hermes' own import points TMPDIR into its home."""
    environ = {name: value for name, value in os.environ.items() if name not in versions.TOUCHED}
    environ |= {"HERMES_HOME": str(tmp_path)} | ({"HERMES_DISABLE_LAZY_INSTALLS": "0"} if lazy_installs else {})
    code = (
        "import os; from hermes_atropos.hermes.versions import TOUCHED; before = [os.environ.get(n) for n in TOUCHED]; "
        "import hermes_atropos; hermes_atropos.AtroposAIAgent; assert before == [os.environ.get(n) for n in TOUCHED]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)


def test_checking_imports_neither_package():
    code = (
        "import sys, hermes_atropos.hermes.versions as v; v.check_versions(); "
        "assert not {'run_agent', 'atroposlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
