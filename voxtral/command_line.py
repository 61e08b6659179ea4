"""The command lines of the scripts. This imports nothing that takes time, so that --help is there at once."""

import argparse
import os


def script_parser(description: str, examples: str | None = None, checkpoint: bool = False) -> argparse.ArgumentParser:
    """Shows its texts as they are written. checkpoint: with --checkpoint, by default $VOXTRAL_CKPT."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            metavar="DIR",
            default=os.environ.get("VOXTRAL_CKPT"),
            help="folder of the checkpoint (default: $VOXTRAL_CKPT)",
        )
    return parser


def training_command_line(description: str, default: str, example: str) -> argparse.ArgumentParser:
    """--config and key=value overrides. default: the YAML; example: of an override."""
    parser = script_parser(description)
    parser.add_argument("--config", default=default, help="YAML with the run's settings (default: %(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"settings that override the YAML, such as {example}"
    )
    return parser
