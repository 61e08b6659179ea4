"""The command lines of the scripts. This imports nothing that takes time, so that --help is there at once."""

import argparse
import math
import os

from voxtral.errors import UserError

VARIABLE = "$VOXTRAL_CKPT"
# What options mean in more than one script.
SHARED = {
    "--refine": {
        "metavar": "SECONDS",
        "type": float,
        "default": 0.0,
        "help": "fit the codes of the recording to it, at most so long and 40 steps (default: 0, the encoder's)",
    },
    "--cfg-alpha": {
        "metavar": "WEIGHT",
        "type": float,
        "default": 1.2,
        "help": "more than 1 pushes the speech towards voice and text (default: 1.2, as in serving)",
    },
    "--whisper": {
        "metavar": "MODEL",
        "help": "for word errors: openai-whisper's name of a model (base: downloaded once, 145 MB), or a local .pt",
    },
    "--speaker-model": {
        "metavar": "FILE",
        "default": "resemblyzer",
        "help": "for likeness of voices: a pretrained.pt (default: the one in the resemblyzer package)",
    },
    "--device": {"default": "auto", "help": "auto, cpu or cuda (default: auto)"},
}


def script_parser(
    description: str, examples: str | None = None, checkpoint: bool = False, module: str | None = None
) -> argparse.ArgumentParser:
    """Shows its texts as they are written. checkpoint: with --checkpoint, by default $VOXTRAL_CKPT; module: for what is
    no script of its own."""
    parser = argparse.ArgumentParser(
        module and f"python -m {module}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            metavar="DIR",
            type=_or_variable,
            default=VARIABLE,
            help="folder of the checkpoint (default: %(default)s)",
        )
    return parser


def _or_variable(folder: str) -> str | None:
    """The default is looked up when a command line is read, and not when a script is imported."""
    return os.environ.get(VARIABLE[1:]) if folder == VARIABLE else folder


def add_shared(parser: argparse.ArgumentParser, *names: str, **changes) -> None:
    """Options of SHARED; changes: of their keys, such as another default."""
    for name in names:
        parser.add_argument(name, **SHARED[name] | changes)


def check_options(options: argparse.Namespace, checkpoint: bool = True, **least: float) -> None:
    """Raises UserError for a number (by its name in `options`) that is lower than its least or not finite, and unless
    `checkpoint` is False where none was given."""
    if checkpoint and not options.checkpoint:
        raise UserError("no checkpoint: pass --checkpoint, or set VOXTRAL_CKPT.")
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and not lowest <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {lowest} or more.")


def settings(options: argparse.Namespace) -> dict:
    """All options, as JSON can hold them."""
    known = (int, float, list, type(None))
    return {name: value if isinstance(value, known) else str(value) for name, value in vars(options).items()}


def training_command_line(description: str, default: str, example: str) -> argparse.ArgumentParser:
    """--config and key=value overrides. default: the YAML; example: of an override."""
    parser = script_parser(description)
    parser.add_argument("--config", default=default, help="YAML with the run's settings (default: %(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"settings that override the YAML, such as {example}"
    )
    return parser
