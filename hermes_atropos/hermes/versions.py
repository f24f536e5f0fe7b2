"""Which releases of hermes-agent and atroposlib this library works with: those that ``compat/check.py`` proves."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from hermes_atropos.errors import UnsupportedVersionError

__all__ = ["SUPPORTED", "check_versions", "hermes_version"]

#: Distribution name → supported releases; pyproject.toml asks for the same. hermes-agent's internals, which the agent
#: overrides, change from release to release; atroposlib has no server calls with token ids before 0.4.
SUPPORTED = {"hermes-agent": ">=0.13,<0.20", "atroposlib": ">=0.4,<0.5"}


def check_versions() -> None:
    """Refuse to run on upstream releases that were never tried. Reads package metadata only; imports neither package.

    Raises:
        UnsupportedVersionError: hermes-agent or atroposlib is missing, or of a release outside ``SUPPORTED``.
    """
    for distribution, supported in SUPPORTED.items():
        remedy = f"pip install '{distribution}{supported}' (compat/README.md lists what is proven)"
        try:
            installed = version(distribution)
        except PackageNotFoundError:
            raise UnsupportedVersionError(f"{distribution} is not installed: {remedy}") from None
        if not SpecifierSet(supported).contains(installed, prereleases=True):
            raise UnsupportedVersionError(
                f"{distribution} {installed} is installed, but hermes_atropos works with {supported}: {remedy}"
            )


def hermes_version() -> Version | None:
    """The release of hermes-agent that is installed; None where that is not known."""
    try:
        return Version(version("hermes-agent"))
    except (PackageNotFoundError, InvalidVersion):
        return None
