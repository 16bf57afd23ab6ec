"""The trained model that comes with the package, jv5-tiny: its files lie in models/jv5-tiny/ beside this module.

The name means these files wherever a model is named, and never anything else: nothing is fetched, and a folder of that
name in the current directory is neither taken for it nor hidden by it.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["PACKAGED", "find_packaged", "packaged_folder"]

PACKAGED = "jv5-tiny"


def packaged_folder() -> Path:
    """Returns the folder of jv5-tiny, a checkpoint in the layout of the base repositories."""
    return Path(__file__).parent / "models" / PACKAGED


def find_packaged(model: str | Path, **hub: object) -> Path | None:
    """Returns the packaged folder when a model is asked for by the name "jv5-tiny", else None.

    Args:
        model: as a caller gave it. A Path is always a path: Path("jv5-tiny") is a local folder, as is "./jv5-tiny".
        hub: options that choose among the files of a hub; None where not given.

    Raises:
        ValueError: an option of a hub is given, or a folder jv5-tiny in the current directory could be meant as well.
    """
    if not isinstance(model, str) or model != PACKAGED:
        return None
    for name, value in hub.items():
        if value is not None:
            shown = "" if name == "token" else f"={value!r}"
            raise ValueError(
                f"{name}{shown} is for hub ids, but {PACKAGED} comes with the package, in one version"
            )
    folder = packaged_folder()
    local = Path(PACKAGED)
    if local.is_dir() and local.resolve() != folder.resolve():
        raise ValueError(
            f"{PACKAGED} is the model that comes with the package, but there is also a folder "
            f"{local.resolve()}: write ./{PACKAGED} for the folder, {folder} for the model"
        )
    return folder
