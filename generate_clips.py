"""Lets the checkpoint speak with its own voices, as training data: every clip with the codes that it was decoded from.

No recording has such ground truth. train_encoder.py reads the folder as a source of kind `generated`. Run it again
after an interruption, or with a larger --per-voice, and it makes what is missing. Under torchrun, every process makes
its share.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from voxtral.command_line import add_shared, check_options, script_parser

EXAMPLES = """examples:
  # 100 clips of every voice, about 6 s each
  python generate_clips.py --checkpoint Voxtral-4B-TTS-2603 --output data/generated --per-voice 100

  # two voices, own texts (one a line; LANGUAGE<TAB>TEXT binds a text to the voices named LANGUAGE_...)
  python generate_clips.py --output data/mine --per-voice 20 --voices de_female anna --texts texts.tsv

  # all GPUs of a machine
  torchrun --nproc-per-node 8 generate_clips.py --output data/generated --per-voice 1000
"""
SENTENCES = Path(__file__).parent / "assets" / "sentences.tsv"

COMMAND_LINE = script_parser(__doc__, EXAMPLES, checkpoint=True)
option = COMMAND_LINE.add_argument
option("--output", metavar="DIR", type=Path, required=True, help="folder of clips and manifest.jsonl")
option("--per-voice", metavar="N", type=int, required=True, help="clips of every voice")
option("--voices", metavar="NAME", nargs="+", help="which voices (default: all of the checkpoint)")
option(
    "--texts", metavar="FILE", type=Path, default=SENTENCES, help="what to say (default: sentences in nine languages)"
)
option("--batch-size", metavar="N", type=int, default=32, help="clips made at once (default: 32)")
option("--max-sec", type=float, default=30.0, help="a clip without END_AUDIO by then is dropped (default: 30)")
option("--seed", type=int, default=0, help="other texts per voice, other noise (default: 0)")
add_shared(COMMAND_LINE, "--device")

if __name__ == "__main__":
    COMMAND_LINE.parse_args()  # --help and mistyped options: before imports that take seconds

from tqdm import tqdm

from voxtral.clips import ClipFolder, PlannedClip, defect, plan
from voxtral.errors import UserError, one_sentence
from voxtral.processes import Process, stoppable_process
from voxtral.sources import CODEC_FRAME_SEC
from voxtral.streaming import decode_batch
from voxtral.text import read_sentences
from voxtral.tts import TTS, Request, named_voice
from voxtral.voices import list_voices

SORTED_BATCHES = 8  # so many batches are sorted by length of text: the items of one then end at about the same time
LINE_SEC = 30  # between lines of progress, where there is no bar
WRITERS = 8  # threads


def chosen_voices(checkpoint: str, names: list[str] | None) -> list[str]:
    """The voices to use: those named, or all that serving would find. Raises UserError when there is none."""
    if names:
        return list(dict.fromkeys(name.lower() for name in names))
    usable = [voice.name for voice in list_voices(checkpoint) if not voice.problem]
    if not usable:
        raise UserError(f"{checkpoint} has no voice: register one with patch_tokenizer.py.")
    return usable


def batches_of(clips: list[PlannedClip], batch_size: int) -> list[list[PlannedClip]]:
    """Batches of texts of similar length."""
    window = SORTED_BATCHES * batch_size
    batches = []
    for start in range(0, len(clips), window):
        ordered = sorted(clips[start : start + window], key=lambda clip: len(clip.text))
        batches += [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return batches


def make_batch(tts: TTS, folder: ClipFolder, clips: list[PlannedClip], voices: dict, max_frames: int) -> float:
    """Speaks, judges and writes one batch; returns the seconds of audio that were kept."""
    rate = tts.codec.params.sampling_rate
    takes = tts.generate([Request(clip.text, voices[clip.voice], clip.seed) for clip in clips], max_frames)
    audio = decode_batch(tts.codec, [take.codes for take in takes])
    defects = [defect(take, samples, rate) for take, samples in zip(takes, audio)]
    kept = [
        (clip, take.codes, samples) for clip, take, samples, reason in zip(clips, takes, audio, defects) if not reason
    ]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda item: folder.save_audio(*item, rate), kept))
    folder.record(clips, defects, [len(samples) / rate for samples in audio])
    return sum(len(samples) for _, _, samples in kept) / rate


def generate(options, process: Process) -> None:
    sentences = read_sentences(options.texts)
    names = chosen_voices(options.checkpoint, options.voices)
    voices = {name: named_voice(options.checkpoint, name) for name in names}
    folder = ClipFolder(options.output, process.rank)
    clips = plan(names, sentences, options.per_voice, options.seed)
    mine = folder.missing(clips[process.rank :: process.world_size])
    n_made = 0
    if mine:
        tts = TTS.from_checkpoint(options.checkpoint, process.device)
        max_frames = max(1, round(options.max_sec * tts.codec.params.frame_rate_hz))
        started, seconds, reported = time.perf_counter(), 0.0, 0.0
        with tqdm(total=len(mine), unit="clip", disable=None if process.is_main else True) as bar:
            for batch in batches_of(mine, options.batch_size):
                seconds += make_batch(tts, folder, batch, voices, max_frames)
                elapsed = time.perf_counter() - started
                n_made += len(batch)
                bar.update(len(batch))
                bar.set_postfix_str(f"{seconds / elapsed:.1f} s of audio per second")
                if bar.disable and elapsed - reported > LINE_SEC:
                    reported = elapsed
                    print(
                        f"process {process.rank}: {n_made} of {len(mine)} clips, "
                        f"{seconds / elapsed:.1f} s of audio per second",
                        flush=True,
                    )
                if process.stopping():
                    print(f"process {process.rank}: stopped; the same command goes on", flush=True)
                    break
    dropped = folder.write_manifest()
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())) or "none"
    print(
        f"process {process.rank}: {n_made} clips made now; {folder.path} has {len(folder.records)} of them, "
        f"{len(folder.records) - dropped.total()} kept; dropped: {reasons}"
    )


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_args(arguments)

    with one_sentence():
        check_options(options, per_voice=1, batch_size=1, seed=0, max_sec=CODEC_FRAME_SEC)
        with stoppable_process(options.device) as process:
            generate(options, process)


if __name__ == "__main__":
    main()
