"""A number can be traced to the code that made it, or says that it cannot."""

import re

from flextok import provenance


def test_versions_are_known_and_missing_packages_said(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert provenance.package_versions()["torch"].startswith("2.")
    assert provenance.package_versions()["no-such-package"] is None


def test_the_revision_is_a_commit_or_nothing(monkeypatch):
    revision = provenance.git_revision()
    assert revision is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", revision)
    monkeypatch.setenv("PATH", "")
    assert provenance.git_revision() is None
