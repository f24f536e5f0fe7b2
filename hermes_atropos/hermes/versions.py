"""Which releases of hermes-agent and atroposlib are installed, and whether this library was tried with them.

Also the import of Hermes, which is to change nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from hermes_atropos.errors import UnsupportedVersionError

__all__ = ["SUPPORTED", "check_versions", "hermes_version", "import_hermes"]

#: Distribution name → the releases that ``compat/check.py`` proves. Before 0.4, atroposlib's servers take no token ids.
SUPPORTED = {"hermes-agent": ">=0.13,<0.23", "atroposlib": ">=0.4,<0.5"}

OLDEST_HERMES = Version("0.13")

HOW_TO_INSTALL = (
    "install a clone of https://github.com/NousResearch/hermes-agent in this environment (pip install -e), or its last "
    "release on PyPI (pip install 'hermes-atropos[hermes]'); compat/README.md lists what was tried"
)


def check_versions() -> None:
    """Refuse what cannot work, and warn of what was never tried. Imports neither package.

    Hermes of a release that was never tried may work: ``seams`` finds out.

    Raises:
        UnsupportedVersionError: hermes-agent or atroposlib is missing, or of a release that cannot work.
    """
    if importlib.util.find_spec("run_agent") is None:
        raise UnsupportedVersionError(f"hermes-agent is not installed: {HOW_TO_INSTALL}")
    hermes = hermes_version()
    if hermes is not None and hermes < OLDEST_HERMES:
        raise UnsupportedVersionError(f"hermes-agent {hermes} is too old, {OLDEST_HERMES} is needed: {HOW_TO_INSTALL}")
    if hermes is None or not SpecifierSet(SUPPORTED["hermes-agent"]).contains(hermes, prereleases=True):
        warnings.warn(
            f"hermes_atropos was tried with hermes-agent {SUPPORTED['hermes-agent']}, not with "
            f"{hermes or 'a release that does not say which it is'}",
            stacklevel=2,
        )
    remedy = f"pip install 'atroposlib{SUPPORTED['atroposlib']}'"
    try:
        atroposlib = metadata.version("atroposlib")
    except metadata.PackageNotFoundError:
        raise UnsupportedVersionError(f"atroposlib is not installed: {remedy}") from None
    if not SpecifierSet(SUPPORTED["atroposlib"]).contains(atroposlib, prereleases=True):
        raise UnsupportedVersionError(
            f"atroposlib {atroposlib} is installed, but hermes_atropos works with {SUPPORTED['atroposlib']}: {remedy}"
        )


#: What the import of Hermes changes in the process's environment, or acts on.
TOUCHED = ("HERMES_DISABLE_LAZY_INSTALLS", "TMPDIR", "TEMP", "TMP")


def import_hermes() -> None:
    """Import ``run_agent``, and leave the process's temporary folder and its packages as they are.

    From 0.21 the import points ``TMPDIR`` into Hermes' home, which Hermes prunes. From 0.22, in a checkout, it may
    bring the installed packages up to date and start the process anew, unless lazy installs are off.
    """
    before = {name: os.environ.get(name) for name in TOUCHED}
    os.environ.setdefault("HERMES_DISABLE_LAZY_INSTALLS", "1")
    try:
        importlib.import_module("run_agent")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@functools.cache
def hermes_version() -> Version | None:
    """The release of the Hermes that is imported as ``run_agent``; None where that is not known.

    That of the distribution ``hermes-agent``, of the one that owns the module (a fork), or of the checkout's own
    ``pyproject.toml``. A checkout may have the placeholder 0.0.0, which is not a release.
    """
    return _distribution("hermes-agent") or _owner() or _checkout()


def _distribution(name: str) -> Version | None:
    try:
        return _release(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def _owner() -> Version | None:
    owners = metadata.packages_distributions().get("run_agent", [])
    return next((found for owner in owners if (found := _distribution(owner))), None)


def _checkout() -> Version | None:
    spec = importlib.util.find_spec("run_agent")
    project = Path(spec.origin).with_name("pyproject.toml") if spec and spec.origin else None
    if project is None or not project.is_file():
        return None
    return _release(str(tomllib.loads(project.read_text("utf-8")).get("project", {}).get("version", "")))


def _release(version: str) -> Version | None:
    try:
        release = Version(version)
    except InvalidVersion:
        return None
    return release if release.release != (0, 0, 0) else None
