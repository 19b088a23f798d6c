"""What to type instead of a setting written as an option, as other tools have it (``--learning_rate 1e-4``)."""

from __future__ import annotations


def setting_hint(option: str) -> str:
    """The sentence for an unknown option such as ``--optim.lr`` or ``--learning_rate=1e-4``."""
    from mmalign.config.othernames import OTHER_NAMES  # not before it is needed: the package brings pydantic

    name, _, value = option.lstrip("-").partition("=")
    name = OTHER_NAMES.get(name.replace("-", "_"), name)
    if name.startswith("--"):
        return f"That is {name} here."
    shown = f"{name}={value or 'VALUE'}" if "." in name else "optim.lr=1e-4"
    return f"Settings of the file are written without dashes, behind it: {shown}"
