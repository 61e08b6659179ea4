"""Speaks texts with a cloned voice: a reference recording, or a voice that the checkpoint knows by name.

No server is needed. The reference is cleaned and cut to at most 25 s, and encoded by the encoder that
inject_encoder.py put into the checkpoint.
"""

import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from voxtral.command_line import add_shared, check_options, script_parser

EXAMPLES = """examples:
  # a sentence in the voice of a recording (3 to 25 s of one clean speaker)
  python clone_voice.py --checkpoint Voxtral-clone --reference anna.wav --text "It works without a server." \\
      --output hello.wav

  # a whole chapter; the voice is kept as `anna`, for serving and for next time
  python clone_voice.py --checkpoint Voxtral-clone --reference anna.wav --text-file chapter.txt --output chapter.flac \\
      --save-voice anna

  # several texts in one batch: hello-1.wav, hello-2.wav
  python clone_voice.py --checkpoint Voxtral-clone --voice anna --text "Good morning." --text "Good night." \\
      --output hello.wav
"""

COMMAND_LINE = script_parser(__doc__, EXAMPLES, checkpoint=True)
option = COMMAND_LINE.add_argument
who = COMMAND_LINE.add_mutually_exclusive_group(required=True)
who.add_argument("--reference", metavar="FILE", help="recording of the voice; needs an injected encoder")
who.add_argument("--voice", metavar="NAME", help="voice of the checkpoint; patch_tokenizer.py --list shows them")
option("--text", metavar="TEXT", action="append", default=[], help="what to say; repeatable")
option("--text-file", metavar="FILE", action="append", default=[], help="one text, in UTF-8; repeatable")
option(
    "--output", metavar="FILE", type=Path, required=True, help=".wav, .flac or .ogg; of several texts with -1, -2, …"
)
add_shared(COMMAND_LINE, "--refine")
option("--save-voice", metavar="NAME", help="register the reference as a voice of the checkpoint")
option("--max-sec", type=float, default=60.0, help="longest audio of a piece of 300 characters (default: 60)")
option("--seed", type=int, default=0, help="another seed is another reading (default: 0)")
add_shared(COMMAND_LINE, "--cfg-alpha", "--device")

if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

import soundfile
import torch
from torch import Tensor

from voxtral.acoustic import CFG_ALPHA
from voxtral.checkpoint import atomic_path
from voxtral.codec import VoxtralCodec
from voxtral.errors import UserError, one_sentence, shown
from voxtral.processes import start_process
from voxtral.sources import CODEC_FRAME_SEC
from voxtral.streaming import StreamingDecoder
from voxtral.text import read_text, split_text
from voxtral.tts import TTS, Request, named_voice
from voxtral.voices import check_name, encode_reference, register

FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}
BATCH_SIZE = 16  # pieces of text spoken at once
PAUSE_SEC = 0.2  # between the pieces of a long text


class Piece(NamedTuple):
    """What is spoken in one go: `file` counts the outputs."""

    file: int
    text: str


def output_paths(output: Path, count: int) -> list[Path]:
    """out.wav, or out-1.wav, out-2.wav, … Raises UserError for a format that is not written."""
    if output.suffix.lower() not in FORMATS:
        raise UserError(f"--output {output}: the name must end in {', '.join(FORMATS)}.")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(1, count + 1)]


def reference_voice(checkpoint: str, path: str, device: torch.device, refine_sec: float) -> Tensor:
    """Recording -> voice embedding [N, dim] in bfloat16, as registered voices are; prints what was done to it."""
    embedding, reference = encode_reference(VoxtralCodec.from_checkpoint(checkpoint, device), path, refine_sec)
    print(f"reference: {shown(path)}, {reference.seconds:.2f} s, {len(embedding)} rows")
    for line in [*reference.notes, *(f"warning: {warning}" for warning in reference.warnings)]:
        print(f"  {line}")
    return embedding.bfloat16()


def speak(
    tts: TTS, pieces: list[Piece], voice: Tensor, seed: int, max_frames: int, cfg_alpha: float
) -> Iterator[tuple[int, Tensor]]:
    """Yields (index of the piece, samples [n] float32) in order, at least once per piece; the audio of the first piece
    of every batch while it is still being generated."""
    for start in range(0, len(pieces), BATCH_SIZE):
        batch = pieces[start : start + BATCH_SIZE]
        requests = [Request(piece.text, voice, (seed, start + i), cfg_alpha) for i, piece in enumerate(batch)]
        decoder = StreamingDecoder(tts.codec)
        for takes in tts.takes(requests, max_frames):
            for samples in decoder.extend(takes[0].codes[None]):
                yield start, samples[0]
        for i, take in enumerate(takes):
            yield start + i, torch.zeros(0)
            if i > 0:
                for samples in StreamingDecoder(tts.codec).extend(take.codes[None]):
                    yield start + i, samples[0]
            problem = ""
            if not take.ended:
                problem = f"no END_AUDIO within {max_frames / tts.codec.params.frame_rate_hz:g} s, cut off there"
            elif not take.codes.shape[1]:
                problem = "END_AUDIO came at once, there is no audio"
            if problem:
                print(f"warning: {problem}: {batch[i].text[:60]}", file=sys.stderr)


def write_all(
    tts: TTS,
    paths: list[Path],
    pieces: list[Piece],
    voice: Tensor,
    seed: int,
    max_frames: int,
    cfg_alpha: float = CFG_ALPHA,
) -> None:
    """Speaks all pieces and writes one file after the other; prints the speed."""
    rate, started, first_audio_sec, total = tts.codec.params.sampling_rate, time.perf_counter(), None, 0
    spoken = speak(tts, pieces, voice, seed, max_frames, cfg_alpha)
    for number, chunks in groupby(spoken, key=lambda chunk: pieces[chunk[0]].file):
        path, n_samples, last = paths[number], 0, None
        container, subtype = FORMATS[path.suffix.lower()]
        with atomic_path(path) as temporary:
            with soundfile.SoundFile(temporary, "w", rate, 1, format=container, subtype=subtype) as file:
                for index, samples in chunks:
                    if last not in (None, index):
                        file.write(torch.zeros(round(PAUSE_SEC * rate)).numpy())
                    file.write(samples.clamp(-1, 1).numpy())
                    n_samples, last = n_samples + len(samples), index
                    if len(samples) and first_audio_sec is None:
                        first_audio_sec = time.perf_counter() - started
        total += n_samples
        print(f"{path}: {n_samples / rate:.2f} s of audio")
    elapsed = time.perf_counter() - started
    if total:
        print(
            f"{elapsed:.2f} s for {total / rate:.2f} s of audio: real-time factor {elapsed * rate / total:.3f}, "
            f"first audio after {1000 * first_audio_sec:.0f} ms"
        )


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_args(arguments)

    with one_sentence():
        check_options(options, refine=0, max_sec=CODEC_FRAME_SEC, seed=0, cfg_alpha=0)
        texts = [*options.text, *(read_text(path) for path in options.text_file)]
        pieces = [Piece(i, piece) for i, text in enumerate(texts) for piece in split_text(text)]
        if len({piece.file for piece in pieces}) < max(1, len(texts)):
            raise UserError("nothing to say: pass --text or --text-file with some text in it.")
        paths = output_paths(options.output, len(texts))
        if options.refine and not options.reference:
            raise UserError("--refine needs --reference: a named voice is codes already.")
        if options.save_voice and not options.reference:
            raise UserError("--save-voice needs --reference: a named voice is there already.")
        if options.save_voice:
            check_name(options.checkpoint, options.save_voice)
        device = start_process(options.device).device

        if options.reference:
            voice = reference_voice(options.checkpoint, options.reference, device, options.refine)
        else:
            voice = named_voice(options.checkpoint, options.voice)
        if options.save_voice:
            register(options.checkpoint, options.save_voice, voice, Path(options.reference).name)
            print(f"{options.save_voice}: registered; restart the server to use it")

        tts = TTS.from_checkpoint(options.checkpoint, device)
        max_frames = max(1, round(options.max_sec * tts.codec.params.frame_rate_hz))
        if device.type == "cuda":
            tts.warm_up([Request(piece.text, voice) for piece in pieces[:BATCH_SIZE]], max_frames)
        write_all(tts, paths, pieces, voice, options.seed, max_frames, options.cfg_alpha)


if __name__ == "__main__":
    main()
