"""Pairs of clips for phase 2: one is the reference of a prompt, the other is what the model is to say in that voice.

Both come with the codes that they were decoded from (generate_clips.py), so that what the encoder makes of the
reference can be compared frame by frame with what it should be.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from voxtral.audio import BadClip
from voxtral.clip_list import Clip
from voxtral.codec import VoxtralCodec, ceil_div
from voxtral.data import SpeechDataset
from voxtral.errors import DataError
from voxtral.known_codes import read_coded, read_codes
from voxtral.loader import Loader, TensorBatch
from voxtral.params import CodecParams
from voxtral.sources import DataConfig
from voxtral.tts import prompt_tokens

PADDING, TEXT, AUDIO, GENERATION = 0, 1, 2, 3  # kinds of positions
KINDS = {"audio": AUDIO, "text": TEXT, "generation": GENERATION}


@dataclass
class PairBatch(TensorBatch):
    """B sequences of up to S positions: prompt (text tokens, L_r + 1 rows of the reference), then L_s frames of speech.

    A sequence begins at position 0; causal attention keeps the padding behind it from being seen.
    """

    waveform: Tensor | None  # [B, 1, L_r * 1920] float32, the reference; None where its codes are known already:
    encoded: Tensor | None  # [B, 37, L_r] int64, what the frozen encoder makes of it
    reference: Tensor  # [B, 37, L_r] int64, the codes that it was decoded from
    n_reference: Tensor  # [B] int64, frames of it
    speech: Tensor  # [B, 37, L_s] int64, codes of what is said
    n_speech: Tensor  # [B] int64
    is_whole: Tensor  # [B] bool: END_AUDIO comes after the speech; it was not cut
    tokens: Tensor  # [B, S] int64, text tokens; AUDIO tokens where rows come
    kind: Tensor  # [B, S] int64: PADDING, TEXT, AUDIO, GENERATION (the last prompt token and the frames)
    place: Tensor  # [B, S] int64: which row or frame stands at a position
    begins: Tensor  # [B] int64: position of the last prompt token, which predicts frame 0
    n_tokens: int  # positions without padding
    indices: list[int]  # of the reference clips in the data set
    bad: list[tuple[str, str]]


class PairDataset(SpeechDataset):
    """Item (number, index): clip `index` as the reference, another clip of its voice, if possible with another text, as
    the speech, each cut to max_sec.

    With reference_sec (shortest, longest) no encoder is asked: the reference is a random crop of its own true codes.
    """

    def __init__(
        self,
        clips: list[Clip],
        tokenizer: MistralTokenizer,
        params: CodecParams,
        max_sec: float,
        seed: int,
        fixed: bool = False,
        reference_sec: Sequence[float] | None = None,
    ):
        """Raises DataError for clips without codes or text, with reference_sec also for a voice of one text only."""
        for clip in clips:
            if not clip.codes or not clip.text.strip():
                raise DataError(
                    f"{clip.path} comes without {'text' if clip.codes else 'codes'}: phase 2 needs clips "
                    "made by generate_clips.py, or a manifest with the columns path, codes and text."
                )
        self.params, self.reference_sec = params, reference_sec
        self.encoded: list[Tensor] | None = None
        self.max_frames = max(1, int(max_sec * params.frame_rate_hz))
        self.prompts = {}  # text -> its prompt with a single AUDIO token
        for text in dict.fromkeys(clip.text for clip in clips):
            self.prompts[text] = prompt_tokens(tokenizer, text, 1)
        self.of_voice = {}  # of no use while usable clips are sought
        super().__init__(clips, max_sec, seed, fixed, params=params)
        self._find_voices()
        single = [voice for voice, members in self.of_voice.items() if len({self.clips[i].text for i in members}) < 2]
        if reference_sec and single:
            raise DataError(
                f"{len(single)} speakers have one sentence only ({', '.join(sorted(single)[:3])}): a reference "
                "needs another clip of its speaker to be said after it; leave them out, or add clips."
            )

    def load(self, index: int, random: np.random.Generator) -> dict:
        """-> waveform or encoded, reference, speech, is_whole, and the sequence: tokens, kind, place [S]. Raises
        BadClip."""
        if self.reference_sec:
            reference = self._cropped(self.clips[index], random)
            student_input = {"encoded": reference}
        elif self.encoded:
            reference, _ = self._read_codes(self.clips[index])
            student_input = {"encoded": self.encoded[index].long()}
        else:
            reference, waveform = self.read(index)
            student_input = {"waveform": waveform}
        speaking = self._partner(index, random)
        speech, is_whole = self._read_codes(speaking)
        return {
            **student_input,
            "reference": reference,
            "speech": speech,
            "is_whole": is_whole,
            **sequence(*self.prompts[speaking.text], reference.shape[1] + 1, speech.shape[1]),
        }

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Clip `index` as a reference: its codes [37, L_r], its waveform [L_r * 1920]. Raises BadClip."""
        codes, waveform = read_coded(self.clips[index], self.params, self.max_frames)
        return codes, torch.from_numpy(waveform)

    @torch.no_grad()
    def encode(self, codec: VoxtralCodec, device, config: DataConfig) -> None:
        """Once for the whole run, what a frozen encoder makes of every clip. Clips that cannot be used are left out,
        and listed in `bad`. Raises DataError when none is left."""
        loader = Loader(_Waveforms(self), config, batch_size=config.batch_size, collate_fn=list)
        usable, encoded = [], []
        for items in tqdm(loader, desc="encoding", unit="batch", disable=None):
            self.bad += [(clip.path, found) for clip, found in items if isinstance(found, str)]
            items = [(clip, found) for clip, found in items if not isinstance(found, str)]
            if items:
                lengths = torch.tensor([len(waveform) for _, waveform in items], device=device)
                waveform = pad_sequence([waveform for _, waveform in items], batch_first=True)[:, None].to(device)
                codes = codec.encode(waveform, lengths).short().cpu()
                encoded += [
                    row[:, : ceil_div(n, self.params.frame_size)].clone() for row, n in zip(codes, lengths.tolist())
                ]
                usable += [clip for clip, _ in items]
        if not usable:
            raise DataError(f"None of the {len(self.clips)} clips can be used; the first: {': '.join(self.bad[0])}.")
        self.clips, self.encoded = usable, encoded
        self._find_voices()

    def _find_voices(self) -> None:
        self.of_voice = defaultdict(list)
        for index, clip in enumerate(self.clips):
            self.of_voice[clip.speaker].append(index)

    def _partner(self, index: int, random: np.random.Generator) -> Clip:
        clip, voice = self.clips[index], self.of_voice.get(self.clips[index].speaker, [index])
        others = [other for other in voice if self.clips[other].text != clip.text] or voice
        if self.fixed:
            return self.clips[next((other for other in others if other > index), others[0])]
        return self.clips[others[int(random.integers(len(others)))]]

    def _cropped(self, clip: Clip, random: np.random.Generator) -> Tensor:
        """A crop [37, L] of random length and place, or the beginning of a `fixed` clip. Raises BadClip."""
        codes = read_codes(clip.codes, self.params)
        shortest, longest = (max(1, round(sec * self.params.frame_rate_hz)) for sec in self.reference_sec)
        length = min(codes.shape[1], longest if self.fixed else int(random.integers(shortest, longest + 1)))
        start = 0 if self.fixed else int(random.integers(codes.shape[1] - length + 1))
        return codes[:, start : start + length]

    def _read_codes(self, clip: Clip) -> tuple[Tensor, bool]:
        """-> the first max_frames frames [37, L], whether these are all. Raises BadClip."""
        codes = read_codes(clip.codes, self.params)
        return codes[:, : self.max_frames], codes.shape[1] <= self.max_frames


def sequence(tokens: Tensor, is_audio: Tensor, n_rows: int, n_frames: int) -> dict:
    """Of prompt_tokens() with a single AUDIO token -> tokens, kind, place [S] and begins, as PairBatch has them, for
    n_rows of a reference and n_frames of speech."""
    n_before = int(is_audio.int().argmax())
    after = tokens[n_before + 1 :]
    return {
        "tokens": torch.cat(
            [tokens[: n_before + 1], tokens[n_before].expand(n_rows - 1), after, tokens[n_before].expand(n_frames)]
        ),
        "kind": torch.tensor(
            [TEXT] * n_before + [AUDIO] * n_rows + [TEXT] * (len(after) - 1) + [GENERATION] * (1 + n_frames)
        ),
        "place": torch.tensor([0] * n_before + [*range(n_rows)] + [0] * len(after) + [*range(n_frames)]),
        "begins": n_before + n_rows + len(after) - 1,
    }


class _Waveforms(Dataset):
    """Item: (clip, its waveform, or why it cannot be used)."""

    def __init__(self, pairs: PairDataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Clip, Tensor | str]:
        try:
            return self.pairs.clips[index], self.pairs.read(index)[1]
        except BadClip as error:
            return self.pairs.clips[index], error.reason


def collate_pairs(items: list[dict]) -> PairBatch:
    """Items of PairDataset -> PairBatch."""

    def padded(key: str) -> Tensor:
        return pad_sequence([item[key] for item in items], batch_first=True)

    def padded_codes(key: str) -> Tensor:
        return pad_sequence([item[key].T for item in items], batch_first=True).transpose(1, 2)

    is_encoded = "encoded" in items[0]
    return PairBatch(
        None if is_encoded else padded("waveform")[:, None],
        padded_codes("encoded") if is_encoded else None,
        padded_codes("reference"),
        torch.tensor([item["reference"].shape[1] for item in items]),
        padded_codes("speech"),
        torch.tensor([item["speech"].shape[1] for item in items]),
        torch.tensor([item["is_whole"] for item in items]),
        padded("tokens"),
        padded("kind"),
        padded("place"),
        torch.tensor([item["begins"] for item in items]),
        sum(len(item["tokens"]) for item in items),
        [item["index"] for item in items],
        [entry for item in items for entry in item["bad"]],
    )


def fixed_batches(dataset: PairDataset, batch_size: int) -> list[PairBatch]:
    """All items of a `fixed` data set, in order."""
    items = [dataset[0, index] for index in range(len(dataset))]
    return [collate_pairs(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]


def hold_out_texts(train: list[Clip], validation: list[Clip]) -> list[Clip]:
    """The training clips whose text no validation clip has. Raises DataError when none is left."""
    texts = {clip.text for clip in validation}
    kept = [clip for clip in train if clip.text not in texts]
    if not kept:
        raise DataError(
            "every training clip has a text of a validation clip: lower data.validation.clips, or generate "
            "clips of more sentences."
        )
    return kept
