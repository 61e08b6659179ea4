"""The command line of a training script. It imports nothing that takes time, so that --help is there at once."""

import argparse


def training_command_line(description: str, default: str, example: str) -> argparse.ArgumentParser:
    """--config and key=value overrides. default: the YAML; example: of an override."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=default, help="YAML with the run's settings (default: %(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"settings that override the YAML, such as {example}"
    )
    return parser
