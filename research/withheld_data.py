"""A stand-in, its withheld encoder, and the speech that encoders against it are trained and measured on: what
withheld_encoder.py and code_limits.py have in common."""

import argparse
import sys
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluate import choose_clips
from voxtral.command_line import script_parser
from voxtral.errors import UserError
from voxtral.sources import Clip, DataConfig, SourceConfig, find_clips, split_validation

N_NAMED = 8  # speakers in a message, at most


def withheld_parser(description: str, examples: str, n_clips: int, output: str) -> argparse.ArgumentParser:
    """n_clips, output: defaults of --clips and --output."""
    parser = script_parser(description, examples)
    add = parser.add_argument
    add("--standin", metavar="DIR", required=True, help="checkpoint without encoder (make_standin.py)")
    add("--withheld", metavar="FILE", required=True, help="its true encoder")
    add("--data", metavar="CONFIG", required=True, help="YAML of train_encoder.py or make_standin.py")
    add(
        "--eval", metavar="WHAT", help="folder, manifest or config to measure on (default: held-out speakers of --data)"
    )
    add("--clips", metavar="N", type=int, default=n_clips, help="to measure on, of all speakers (default: %(default)s)")
    add("--output", metavar="DIR", type=Path, default=Path(output), help="(default: %(default)s)")
    add("overrides", nargs="*", metavar="key=value", help="changes to the config of --data")
    return parser


def training_clips(data: DataConfig) -> list[Clip]:
    """All that is trained on."""
    return [clip for source in split_validation(find_clips(data)[0], data.validation)[0] for clip in source]


def unseen_clips(options, data: DataConfig) -> list[Clip]:
    """The clips to measure on, of as many speakers as possible. Raises UserError where training hears a speaker."""
    if not options.eval:
        clips = [clip for source in find_clips(data)[0] for clip in source if clip.speaker in data.validation.speakers]
    elif Path(options.eval).suffix in (".csv", ".tsv", ".jsonl"):
        manifest = Path(options.eval)
        source = SourceConfig(kind="manifest", path=manifest.name)
        clips = find_clips(DataConfig(data_root=str(manifest.parent), sources=[source]))[0][0]
    else:
        clips = choose_clips(options.eval, [], everything=True)[0]
    trained_on = sorted({clip.speaker for clip in clips} & {clip.speaker for clip in training_clips(data)})
    if trained_on:
        raise UserError(
            f"--eval {options.eval}: the encoders are trained on {', '.join(trained_on[:N_NAMED])}; measure on "
            "speakers that they never hear."
        )
    by_speaker = defaultdict(list)
    for clip in clips:
        by_speaker[clip.source, clip.speaker].append(clip)
    turns = zip_longest(*by_speaker.values())  # the first clip of every speaker, then the second, ...
    return [clip for turn in turns for clip in turn if clip][: options.clips]
