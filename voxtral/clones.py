"""Does a checkpoint clone? New sentences in the voices of reference recordings, through the product's own path, scored.

A clone is as good as its words (Whisper) and its voice: nearer to its own reference than to those of other speakers.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor
from tqdm import tqdm
from whisper.tokenizer import LANGUAGES

from voxtral.acoustic import CFG_ALPHA
from voxtral.adapters import merged_weights
from voxtral.asr import load_whisper
from voxtral.audio import SAMPLE_RATE
from voxtral.checkpoint import SafetensorsFile, check_shapes
from voxtral.clip_list import Clip
from voxtral.codec import VoxtralCodec
from voxtral.errors import UserError
from voxtral.evaluation import Averages, fresh_encoder
from voxtral.inject import original_files, stored_tensors
from voxtral.reference import BadReference, prepare_reference
from voxtral.refinement import reference_codes
from voxtral.remarks import Remarks
from voxtral.score_table import Metric
from voxtral.scores import SCORE_RATE, normaliser, transcribe, word_error_rate
from voxtral.sources import Absent, read_manifest
from voxtral.speaker import SpeakerEncoder
from voxtral.streaming import decode_batch
from voxtral.text import read_text
from voxtral.tts import TTS, Request

BATCH_SIZE = 32
METRICS = {
    "wer": Metric(
        "word error rate of Whisper's transcript against the text, greedy, normalised as Whisper does and "
        "numbers digit by digit; of all words together",
        False,
        weight="words",
    ),
    "own": Metric("cosine of Resemblyzer embeddings of the clone and of its own reference recording", True),
    "own_codec": Metric("the same with the reference after this system's encoder and the decoder", True),
    "others": Metric("mean cosine of the clone with the references of all other speakers"),
    "margin": Metric("own - others: what the clone has of this voice alone", True),
    "nearest": Metric("share of clones whose own reference is more similar than that of any other speaker", True),
    "ended": Metric("share of clones that ended by themselves, before the length limit", True),
    "seconds": Metric("length of a clone"),
}


# ---------------------------------------------------------------- who says what


@dataclass(frozen=True)
class Item:
    """`text` is to be said in the voice of the recording `reference` (a path), which is `speaker`'s."""

    name: str
    speaker: str
    reference: str
    text: str


def read_list(path, root=None) -> list[Item]:
    """The field's lists -> items. Seed-TTS-eval's meta.lst: utt|prompt_text|prompt_wav|text[|wav], where a prompt is a
    speaker; F5-TTS's LibriSpeech-PC list: ref_utt, ref_dur, ref_text, gen_utt, gen_dur, gen_text between tabs, with
    audio in SPEAKER/CHAPTER/UTT.flac. Paths are relative to `root`, or else to the folder of the list.

    Raises UserError for a line of another shape, an empty list, and prompt files that are missing.
    """
    folder, items = Path(root or Path(path).parent), []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        tabs, bars = line.split("\t"), line.split("|")
        if len(tabs) == 6 and tabs[0].count("-") == 2:
            speaker, chapter, _ = tabs[0].split("-")
            items.append(Item(tabs[3], speaker, str(folder / speaker / chapter / f"{tabs[0]}.flac"), tabs[5].strip()))
        elif len(bars) in (4, 5):
            items.append(Item(bars[0], bars[2], str(folder / bars[2]), bars[3].strip()))
        elif line.strip():
            raise UserError(
                f"{path}: line {number} has neither the 4 or 5 fields between | of Seed-TTS-eval nor the 6 "
                "between tabs of F5-TTS's LibriSpeech list."
            )
        if items and not items[-1].text:
            raise UserError(f"{path}: line {number} gives {items[-1].name} nothing to say.")
    if not items:
        raise UserError(f"{path} lists nothing.")
    prompts = list(dict.fromkeys(item.reference for item in items))
    missing = [prompt for prompt in prompts if not Path(prompt).is_file()]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(prompts)} prompt files are missing, first {missing[0]}: "
            "get the audio, or say with --root where it lies."
        )
    return items


def items_of_manifest(path, **choice) -> tuple[list[Item], list[str]]:
    """items_of_clips() of a CSV, TSV or JSON-lines manifest (columns path, speaker, text) in its order."""
    remarks = Remarks()
    try:
        clips = list(read_manifest(Path(path), 0, Path(path).parent, remarks))
    except Absent as error:
        raise UserError(f"manifest {path} does not exist.") from error
    items, bad = items_of_clips(clips, **choice)
    return items, remarks.lines() + bad


def items_of_clips(
    clips: list[Clip],
    sentences: list[str] | None = None,
    speakers: list[str] | None = None,
    prompts: int = 1,
    per_voice: int = 2,
    seed: int = 0,
) -> tuple[list[Item], list[str]]:
    """-> items, and why clips were passed over. The first `prompts` clips of each speaker with enough speech are the
    references; each says `per_voice` of the sentences, or else of what other speakers say in `clips`, drawn by `seed`.

    Raises UserError for speakers that nobody is called, when there is no reference, or too little to say.
    """
    known = list(dict.fromkeys(clip.speaker for clip in clips))
    unknown = [speaker for speaker in speakers or [] if speaker not in known]
    if unknown:
        raise UserError(
            f"nobody is called {', '.join(unknown)}; among the {len(known)} speakers are {', '.join(known[:8])}."
        )
    pool = clips if sentences is None else [Clip("", "", 0, text) for text in sentences]
    references, items, bad = [], [], []
    for speaker in known:
        if not speakers or speaker in speakers:
            references += islice(usable((clip for clip in clips if clip.speaker == speaker), bad), prompts)
    for number, reference in enumerate(references):
        order = np.random.default_rng((seed, number)).permutation(len(pool))
        texts = dict.fromkeys(pool[i].text.strip() for i in order if pool[i].speaker != reference.speaker)
        texts = [text for text in texts if text and text != reference.text.strip()][:per_voice]
        if len(texts) < per_voice:
            raise UserError(
                f"{reference.path} has only {len(texts)} of {per_voice} sentences to say: give more with "
                "--sentences, or ask for fewer with --per-voice."
            )
        stem = Path(reference.path).stem
        items += [Item(f"{stem}-{i}", reference.speaker, reference.path, text) for i, text in enumerate(texts, 1)]
    if not items:
        raise UserError(f"no clip can be a reference ({'; '.join(bad[:3]) or 'there is none'}).")
    return items, bad


def usable(clips: Iterable[Clip], bad: list[str]) -> Iterator[Clip]:
    """Those that can be a reference; why the others cannot goes to `bad`."""
    for clip in clips:
        try:
            prepare_reference(clip.path)
            yield clip
        except BadReference as error:
            bad.append(str(error))


# ---------------------------------------------------------------- the judge


def digit_words(text: str, language: str) -> str:
    """Normalised as Whisper does, every digit a word of its own: "one seven", "17" and "1-7" become "1 7".

    Whisper's English normaliser writes numbers in digits, but for a single 1, which it spells out.
    """
    text = re.sub(r"\d", r" \g<0> ", normaliser(language)(text))
    return " ".join("1" if word == "one" and language == "en" else word for word in text.split())


class Judge:
    """Hears voices, and with a Whisper model words: openai-whisper's name of one or a local .pt; None: no words.

    speaker_model: "resemblyzer", the installed package's weights, or the path of its pretrained.pt; language: what is
    spoken, such as en. Raises UserError for models that cannot be had and a language that Whisper does not know.
    """

    def __init__(
        self, speaker_model: str = "resemblyzer", whisper_model: str | None = None, device="cpu", language: str = "en"
    ):
        if language not in LANGUAGES:
            raise UserError(f"the language is '{language}': it must be one of Whisper's codes, such as en or ar.")
        self.device, self.language = device, language
        self.speaker = SpeakerEncoder(speaker_model, device)
        self.whisper = load_whisper(whisper_model, device) if whisper_model else None

    def embed(self, waveform: Tensor) -> Tensor:
        """[T] at 24 kHz -> unit-norm speaker embedding [256] on the CPU; zeros for a clone without audio, so that it is
        like nobody."""
        return self.speaker.embed(waveform) if len(waveform) else torch.zeros(self.speaker.linear.out_features)

    @torch.no_grad()
    def words(self, text: str, waveform: Tensor) -> dict[str, float | str]:
        """[T] at 24 kHz, what it should say -> wer, words (of the text), transcript; {} without Whisper."""
        if self.whisper is None:
            return {}
        transcript = ""
        if len(waveform):
            audio = soxr.resample(waveform.clamp(-1, 1).numpy(), SAMPLE_RATE, SCORE_RATE, quality="HQ")
            transcript, _ = transcribe(self.whisper, audio, self.language)
        # The texts are normalised: no language of their own.
        wer, words = word_error_rate(*(digit_words(each, self.language) for each in (text, transcript)), language="")
        return {"wer": wer, "words": words, "transcript": transcript}


# ---------------------------------------------------------------- systems


@dataclass(frozen=True)
class System:
    """What is compared: the checkpoint with these encoder tensors (full checkpoint names), and with the peft adapter in
    the folder `adapter` merged into its language model. `refine_sec`: for refined_codes(), 0: not refined. `change`:
    what becomes of a reference's codes [1, 37, L], for experiments on what cloning needs."""

    name: str
    encoder: dict[str, Tensor]
    adapter: str = ""
    refine_sec: float = 0.0
    change: Callable[[Tensor], Tensor] | None = None


def read_system(description: str, tts: TTS, seed: int = 0) -> System:
    """NAME=ENCODER[,ADAPTER], where ENCODER is a file, `own` (the checkpoint's) or `untrained` (fresh, by `seed`).

    Raises UserError for another shape, and CheckpointError for what is missing or does not fit.
    """
    name, _, parts = description.partition("=")
    encoder, _, adapter = parts.partition(",")
    if not re.fullmatch(r"[\w-]+", name) or not encoder:
        raise UserError(
            f"--system {description}: it must be NAME=ENCODER or NAME=ENCODER,ADAPTER, with a name of "
            "letters, digits, _ and -."
        )
    own = {name: tensor.clone() for name, tensor in tts.codec.encoder_tensors().items()}
    if encoder == "own":
        if not tts.codec.has_encoder:
            raise UserError(
                f"{tts.folder} has no encoder of its own: name one with --system, or put one in (inject_encoder.py)."
            )
        tensors = own
    elif encoder == "untrained":
        tensors = fresh_encoder(tts.codec, seed)
    else:
        tensors = SafetensorsFile(encoder).read()
        found, expected = ({name: t.shape for name, t in each.items()} for each in (tensors, own))
        check_shapes(found, expected, encoder)
    if adapter:
        # Only for its checks: peft lets adapters pass that do not fit.
        merged_weights(adapter, stored_tensors(original_files(tts.folder)), tts.models.backbone.params)
    return System(name, tensors, adapter)


def adapted(tts: TTS, adapter: str) -> TTS:
    """A second language model beside the first, with the adapter merged; codec and acoustic transformer are shared."""
    from peft import PeftModel  # takes seconds to import

    backbone = deepcopy(tts.models.backbone)
    backbone.model = PeftModel.from_pretrained(backbone.model, adapter).merge_and_unload()
    return TTS(tts.folder, replace(tts.models, backbone=backbone.eval()))


# ---------------------------------------------------------------- speaking and scoring


class References:
    """The recordings that items name, each once and prepared: their speakers, and what the judge hears in them.

    Raises BadReference for one that cannot be a reference.
    """

    def __init__(self, items: list[Item], judge: Judge):
        self.speaker_of = {item.reference: item.speaker for item in items}
        waveforms = (prepare_reference(path).waveform[0, 0] for path in self.speaker_of)
        self.embeddings = torch.stack([judge.embed(waveform) for waveform in waveforms])  # [references, 256]

    def compare(self, item: Item, clone: Tensor) -> dict[str, float]:
        """Speaker embedding [256] of a clone -> own, others, margin, nearest; NaN where there is no other speaker."""
        similar = dict(zip(self.speaker_of, (self.embeddings @ clone).tolist()))
        own = similar[item.reference]
        others = [value for path, value in similar.items() if self.speaker_of[path] != item.speaker]
        if not others:
            return {"own": own, "others": np.nan, "margin": np.nan, "nearest": np.nan}
        mean = float(np.mean(others))
        return {"own": own, "others": mean, "margin": own - mean, "nearest": float(own > max(others))}


def speak_and_score(
    tts: TTS,
    systems: list[System],
    items: list[Item],
    judge: Judge,
    max_sec: float = 20.0,
    seed: int = 0,
    n_samples: int = 0,
    cfg_alpha: float = CFG_ALPHA,
) -> tuple[list[dict], dict[str, list[Tensor]]]:
    """Every item by every system -> rows (system after system, each in the order of the items), and the audio [T] of
    the first n_samples items by system. Item n has the same noise in all systems; a clone lasts at most max_sec.

    `tts` is left as it was. Raises BadReference, and TTSError for what cannot be spoken.
    """
    references, rows, audio = References(items, judge), [], {}
    max_frames = round(max_sec * tts.codec.params.frame_rate_hz)
    before = {name: tensor.clone() for name, tensor in tts.codec.encoder_tensors().items()}
    had_encoder = tts.codec.has_encoder
    try:
        for system in systems:
            tts.codec.load_encoder(system.encoder, system.name)
            voices = {path: _voice(tts.codec, path, judge, system) for path in references.speaker_of}
            speaking = adapted(tts, system.adapter) if system.adapter else tts
            requests = [
                Request(item.text, voices[item.reference][0], (seed, number), cfg_alpha)
                for number, item in enumerate(items)
            ]
            progress = tqdm(_speak(speaking, requests, max_frames), system.name, len(items), unit="clip", disable=None)
            audio[system.name] = []
            for item, (clone, ended) in zip(items, progress, strict=True):
                embedding = judge.embed(clone)
                rows.append(
                    {
                        "system": system.name,
                        "item": item.name,
                        **{key: getattr(item, key) for key in ("speaker", "reference", "text")},
                        **judge.words(item.text, clone),
                        **references.compare(item, embedding),
                        "own_codec": (voices[item.reference][1] @ embedding).item(),
                        "ended": float(ended),
                        "seconds": len(clone) / SAMPLE_RATE,
                    }
                )
                if len(audio[system.name]) < n_samples:
                    audio[system.name].append(clone)
    finally:
        tts.codec.load_encoder(before)
        tts.codec.has_encoder = had_encoder
    return rows, audio


def _speak(tts: TTS, requests: list[Request], max_frames: int) -> Iterator[tuple[Tensor, bool]]:
    """Yields of every request its audio [T], and whether it ended by itself."""
    for start in range(0, len(requests), BATCH_SIZE):
        takes = tts.generate(requests[start : start + BATCH_SIZE], max_frames)
        for take, clone in zip(takes, decode_batch(tts.codec, [take.codes for take in takes])):
            yield clone, take.ended


@torch.no_grad()
def _voice(codec: VoxtralCodec, path: str, judge: Judge, system: System) -> tuple[Tensor, Tensor]:
    """A recording -> its voice embedding [N, dim] as registered voices are, and what the judge hears [256] in the audio
    of its codes."""
    waveform = prepare_reference(path).waveform.to(codec.audio_embedding.device)
    codes, _ = reference_codes(codec, waveform, system.refine_sec)
    codes = system.change(codes) if system.change else codes
    decoded = codec.decode(codes)[0, 0, : waveform.shape[-1]].float().cpu()
    return codec.voice_rows(codes)[0].bfloat16(), judge.embed(decoded)


# ---------------------------------------------------------------- averages


def summarize(rows: list[dict], seed: int = 0) -> dict:
    """Rows of speak_and_score -> {"systems": name -> metric -> {"value", "interval"}}, and of all systems but the first
    "differences" to it, paired, likewise, and "margin_kept": the share of the first one's margin.

    95 % intervals are bootstrapped over speakers (Averages), None with one speaker.
    """
    by_system = {}
    for row in rows:
        by_system.setdefault(row["system"], []).append(row)
    first, *others = by_system
    averages = Averages([row["speaker"] for row in by_system[first]], seed, METRICS)
    names = [name for name in METRICS if name in rows[0]]
    means = {system: {name: averages.means(clips, name) for name in names} for system, clips in by_system.items()}

    def summaries(values: dict[str, np.ndarray]) -> dict:
        return {name: averages.summary(value) for name, value in values.items()}

    with np.errstate(invalid="ignore", divide="ignore"):
        kept = {system: averages.summary(means[system]["margin"] / means[first]["margin"]) for system in others}
    return {
        "systems": {system: summaries(values) for system, values in means.items()},
        "differences": {
            system: summaries({name: means[system][name] - means[first][name] for name in names}) for system in others
        },
        "margin_kept": kept,
    }
