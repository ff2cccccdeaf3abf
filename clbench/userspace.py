"""Where the user's working folder meets the suite."""

from __future__ import annotations

import sys
from pathlib import Path

from clbench.errors import UserError

#: Folders of plug-ins; the suite's and the user's are one namespace each.
PLUGINS = ("strategies", "scenarios")


def suite() -> Path:
    """The folder that holds the suite's plug-ins: site-packages, or the checkout."""
    return Path(__file__).resolve().parents[1]


def configuration() -> Path:
    """The suite's configuration folder: in the wheel, or beside the package in a checkout."""
    packaged = Path(__file__).resolve().parent / "conf"
    return packaged if packaged.is_dir() else suite() / "conf"


def join(folder: Path) -> Path | None:
    """Makes the user's own strategies, scenarios and configuration known.

    Args:
        folder: The user's working folder.

    Returns:
        The user's `conf` folder, to be appended to Hydra's search path; None if there is none
        or it is the suite's own.

    Raises:
        UserError: If a file of the user's would hide one of the suite's.
    """
    folder = folder.resolve()
    if folder != suite():
        for name in PLUGINS:
            _guard_code(folder / name, suite() / name)
        _guard_configuration(folder / "conf", configuration())
        search_last(folder)
    else:
        # This checkout's plug-ins, not those of another installed copy, for this engine.
        sys.path[:] = [str(folder), *(p for p in sys.path if p and Path(p).resolve() != folder)]
    own = folder / "conf"
    return own if own.is_dir() and own != configuration() else None


def search_last(folder: Path) -> None:
    """Puts a folder at the end of the import path: a torch.py there must not become PyTorch."""
    folder = folder.resolve()
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != folder] + [str(folder)]


def _guard_code(own: Path, ours: Path) -> None:
    if (own / "__init__.py").exists():
        raise UserError(
            f"{own / '__init__.py'} hides all {ours.name} of the suite. Delete it: "
            f"{ours.name}/ is a namespace folder and needs none."
        )
    clash = {f.name for f in own.glob("*.py")} & {f.name for f in ours.glob("*.py")}
    if clash:
        name = sorted(clash)[0]
        raise UserError(
            f"{own / name} has the name of a file of the suite ({ours.name}/{name}), so Python "
            "would find only one of them. Rename yours."
        )


def _guard_configuration(own: Path, ours: Path) -> None:
    for group in ours.iterdir() if own.is_dir() else ():
        for file in sorted((own / group.name).rglob("*.yaml")) if group.is_dir() else ():
            if (ours / file.relative_to(own)).exists():
                raise UserError(
                    f"{file} has the name of a configuration of the suite "
                    f"({file.relative_to(own)}), and the suite's would be used instead. Rename "
                    "yours; to change values use the command line."
                )
