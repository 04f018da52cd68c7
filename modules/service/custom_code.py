"""Whether a model's own Python code may run, and the refusal where it may not."""

from __future__ import annotations

from collections.abc import Mapping

from modules.errors import CustomCodeRefused
from modules.library import ModelFacts
from modules.options import LoadOptions
from modules.settings import CodeApprovals

APPROVED = "allowed code"  # the layer of options that a yes to a model's files is


def approved(approvals: CodeApprovals, facts: ModelFacts | None) -> bool:
    """Whether somebody has said yes to exactly the model's files."""
    return facts is not None and approvals.allowed(facts.model.name, facts.code_files)


def owner_allows(options: LoadOptions, origin: Mapping[str, str]) -> bool:
    """Whether a flag or settings.yaml allows code, whatever it is."""
    return options.trust_remote_code and origin.get("trust_remote_code") in ("flag", "settings.yaml")


def allowed(
    approvals: CodeApprovals, facts: ModelFacts | None, options: LoadOptions, origin: Mapping[str, str]
) -> bool:
    """Whether code runs with these options: the option is on, and its owner's or by a yes to exactly these files."""
    on = facts is not None and options.trust_remote_code
    return on and (owner_allows(options, origin) or approved(approvals, facts))


def refused(facts: ModelFacts) -> CustomCodeRefused:
    """The refusal, which names the files."""
    files = ", ".join(f"{file.name} (SHA-256 {file.sha256[:12]}…)" for file in facts.code_files)
    return CustomCodeRefused(f"{facts.model.name} brings Python code that nobody has allowed yet: {files}.")
