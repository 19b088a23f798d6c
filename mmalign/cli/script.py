"""The body of ``scripts/train_<method>.py``: one method, started by ``accelerate launch``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mmalign.cli.hints import setting_hint
from mmalign.cli.outcome import conclude, debug_from_environment


def train_script(method: str, arguments: Sequence[str] | None = None) -> None:
    """Run ``--config PATH [key=value ...] [--resume]`` with one method and end the program.

    Args:
        method: the registered name; a file for another method is refused.
        arguments: the words after the script's name; those of this process unless given.

    Raises:
        SystemExit: always, with the exit codes of ``mmalign``.
    """
    parser = _parser(method)
    options = parser.parse_intermixed_args(arguments)
    folder = os.getcwd()
    if folder not in sys.path:  # as for ``mmalign``: classes of the user's own may lie here
        sys.path.append(folder)
    debug = options.debug or debug_from_environment()
    sys.exit(conclude(lambda: _train(method, options), debug=debug))


def _train(method: str, options: argparse.Namespace) -> int:
    from mmalign.cli.experiments import train_and_tell
    from mmalign.config import load_yaml
    from mmalign.errors import ConfigError

    section = load_yaml(options.config, options.overrides).values.get("method")
    named = section.get("name") if isinstance(section, dict) else None
    if isinstance(named, str) and named != method:
        raise ConfigError(
            f"method.name: this script trains '{method}', the file is for '{named}'; use scripts/train_{named}.py, "
            f"or: mmalign train {options.config}",
            source=options.config,
        )
    return train_and_tell(options.config, options.overrides, resume=options.resume)


class _Parser(argparse.ArgumentParser):
    """Says how settings are written where one was written as an option."""

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments" in message:
            option = next((word for word in message.split() if word.startswith("--")), None)
            message = message if option is None else f"{message}. {setting_hint(option)}"
        super().error(message)


def _parser(method: str) -> argparse.ArgumentParser:
    name = f"train_{method}.py"
    parser = _Parser(
        prog=name,
        description=f"Train with the method {method}.",
        epilog=f"Example: accelerate launch scripts/{name} --config configs/tiny/{method}.yaml optim.lr=1e-4",
    )
    parser.add_argument("--config", required=True, metavar="PATH", help="experiment file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. optim.lr=1e-4")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
