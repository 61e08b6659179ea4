"""Registers voices in a Voxtral checkpoint, so that serving knows them by name after its next start.

A voice is made of a recording (prepared, then encoded with the checkpoint's injected encoder) or of a ready embedding
(.pt, .safetensors). It is written into the checkpoint alone: params.json, tekken.json and voice_embedding/NAME.pt. No
installed package is changed.
"""

import os
from pathlib import Path

from voxtral.command_line import add_shared, check_options, script_parser

EXAMPLES = """examples:
  # every recording and embedding of a folder; a file's name is the voice's name
  VOXTRAL_VOICE_DIR=my_voices python patch_tokenizer.py --checkpoint Voxtral-clone

  # single voices; the same name again replaces the voice
  python patch_tokenizer.py --checkpoint Voxtral-clone --voice anna=anna.wav --voice ben=ben.pt

  python patch_tokenizer.py --checkpoint Voxtral-clone --list
  python patch_tokenizer.py --checkpoint Voxtral-clone --remove anna
"""

COMMAND_LINE = script_parser(__doc__, EXAMPLES, checkpoint=True)
option = COMMAND_LINE.add_argument
option(
    "--voice-dir",
    metavar="DIR",
    help="register every recording and embedding in it (default: $VOXTRAL_VOICE_DIR, unless "
    "--voice, --remove or --list is given)",
)
option("--voice", metavar="NAME=FILE", action="append", default=[], help="register one voice; repeatable")
option("--remove", metavar="NAME", action="append", default=[], help="remove a voice; repeatable")
option("--list", action="store_true", help="show all voices, and where their three places disagree")
add_shared(COMMAND_LINE, "--refine")
option("--force", action="store_true", help="allow replacing or removing presets")

if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

from voxtral.codec import VoxtralCodec
from voxtral.errors import one_sentence, shown
from voxtral.params import load_params
from voxtral.remarks import Remarks
from voxtral.voices import (
    EMBEDDING_SUFFIXES,
    VoiceError,
    check_name,
    encode_reference,
    end_audio_row,
    list_voices,
    load_embedding,
    register,
    remove,
    voice_files,
)


def parse_voices(pairs: list[str]) -> dict[str, Path]:
    """["anna=a.wav"] -> {"anna": Path("a.wav")}. Raises VoiceError for a pair without =, or a name given twice."""
    voices = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise VoiceError(f"--voice {pair}: write NAME=FILE.")
        if name in voices:
            raise VoiceError(f"--voice {name} is given twice.")
        voices[name] = Path(file)
    return voices


def register_all(checkpoint: str, voices: dict[str, Path], refine_sec: float, force: bool) -> None:
    """Nothing is written before every voice has been read, checked and encoded."""
    for name in voices:
        check_name(checkpoint, name, force)
    params, codec, end_row = load_params(checkpoint), None, end_audio_row(checkpoint)
    embeddings = {}
    for name, path in voices.items():
        if path.suffix.lower() in EMBEDDING_SUFFIXES:
            embeddings[name], lines = load_embedding(path, params, end_row)
        else:
            codec = codec or VoxtralCodec.from_checkpoint(checkpoint)
            embeddings[name], reference = encode_reference(codec, path, refine_sec)
            lines = [f"{reference.seconds:.2f} s", *reference.notes, *(f"warning: {w}" for w in reference.warnings)]
        print(f"{name}: {shown(path)}, {len(embeddings[name])} rows" + "".join(f"\n  {line}" for line in lines))
    for name, embedding in embeddings.items():
        changed = register(checkpoint, name, embedding, voices[name].name, force)
        print(f"{name}: {'registered' if changed else 'was registered so already'}")
    print("restart the server to use new voices")


def show(checkpoint: str) -> None:
    row = "{:<24} {:>6} {:>6} {:>8}  {:<11} {}".format
    print(row("voice", "index", "rows", "seconds", "kind", "state"))
    for voice in list_voices(checkpoint):
        rows = voice.n_rows or voice.n_tokens
        seconds = f"{(rows - 1) / load_params(checkpoint).codec.frame_rate_hz:.1f}" if rows else ""
        kind, index = "preset" if voice.is_preset else "registered", "" if voice.index is None else voice.index
        print(row(voice.name, index, rows or "", seconds, kind, voice.problem or "ok"))


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_args(arguments)

    with one_sentence():
        check_options(options, refine=0)
        named = parse_voices(options.voice)
        folder = options.voice_dir
        if folder is None and not (named or options.remove or options.list):
            folder = os.environ.get("VOXTRAL_VOICE_DIR")
        remarks = Remarks()
        voices = {**(voice_files(folder, remarks) if folder else {}), **named}
        print("".join(f"{line}\n" for line in remarks.lines()), end="")
        if not (voices or options.remove or options.list):
            raise VoiceError("nothing to do: set VOXTRAL_VOICE_DIR, or pass --voice, --remove or --list.")
        for name in options.remove:
            remove(options.checkpoint, name, options.force)
            print(f"{name}: removed")
        if voices:
            register_all(options.checkpoint, voices, options.refine, options.force)
        if options.list:
            show(options.checkpoint)


if __name__ == "__main__":
    main()
