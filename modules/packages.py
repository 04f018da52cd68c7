"""Which optional packages a feature needs, and what is installed. Nothing here imports the packages themselves."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"

_GPTQ = ("gptqmodel==7.6.0", "optimum==2.3.0")  # 7.7 wants a torch and a pillow that Gradio 6.31 refuses

# Feature → pip requirements. The features are the checkpoints' quant_method, attn_implementation's values, and where
# a LoRA's examples come from.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "gptq": _GPTQ,
    "awq": _GPTQ,
    "flash_attention_2": ("flash-attn",),
    "hqq": ("hqq",),
    "aqlm": ("aqlm",),
    "vptq": ("vptq",),
    "quanto": ("optimum-quanto",),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed-tensors",),
    "auto-round": ("auto-round",),
    "eetq": ("kernels",),
    "hub-datasets": ("datasets==5.2.0",),
}


def missing(feature: str) -> tuple[str, ...]:
    """The pip requirements of ``feature`` that are not installed; ``()`` for a feature that needs none.

    Looks anew each time, so that a package installed while the server runs is seen without a restart.
    """
    importlib.invalidate_caches()
    return tuple(requirement for requirement in EXTRAS.get(feature, ()) if not _installed(_name(requirement)))


def install_line(*requirements: str) -> str:
    """The command that installs them where this Python finds them: in ``.venv``, as start.sh makes it, or elsewhere."""
    own = Path(sys.prefix) == REQUIREMENTS.parent / ".venv"
    pip = str(Path(".venv", "Scripts" if sys.platform == "win32" else "bin", "pip")) if own else "pip"
    return f"{pip} install {' '.join(requirements)}"


def installed_versions(requirements: Path = REQUIREMENTS) -> dict[str, str]:
    """The installed version of each package named in ``requirements``; ``""`` where one is missing."""
    importlib.invalidate_caches()
    return {name: version(name) for name in _names(requirements)}


def _names(requirements: Path) -> Iterator[str]:
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if requirement := line.split("#")[0].strip():
            yield _name(requirement)


def _name(requirement: str) -> str:
    return re.split(r"[\s=<>!~;\[@]", requirement, maxsplit=1)[0]


def _installed(name: str) -> bool:
    # A package built by hand or by conda may lack pip's metadata, so the module counts too.
    return bool(version(name)) or importlib.util.find_spec(name.replace("-", "_")) is not None


def version(name: str) -> str:
    """The installed version of a package; "" where it is missing, or lacks pip's metadata."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
