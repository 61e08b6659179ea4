"""Text and a voice -> speech, in plain PyTorch, after serving: prompt, batched frame loop, codes (spec sections 5, 6).

A batch gives every request what it would get alone, up to rounding: its noise hangs on its own seed and the frame.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mistral_common.protocol.speech.request import SpeechRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from torch import Tensor

from voxtral.acoustic import CFG_ALPHA
from voxtral.cached_backbone import CachedBackbone
from voxtral.errors import UserError, reason_of, shown
from voxtral.generation import FrameLoop, Models, prompt_slots
from voxtral.params import END_AUDIO, N_SPECIAL_IDS, CheckpointError, round_up
from voxtral.streaming import decode_batch
from voxtral.tables import is_unicode
from voxtral.text import says_something
from voxtral.voices import embedding_file, list_voices, load_pt

FIRST_BLOCK, BLOCK = 4, 8  # frames between looks for END_AUDIO, each of which waits for the device; the first is short
SLOT_MULTIPLE = 256  # of the cache, so that batches with prompts of similar length share one


class TTSError(UserError):
    """A request that cannot be spoken; the message says why."""


@dataclass(frozen=True)
class Request:
    """`voice` [N, dim]: rows of a voice embedding, END_AUDIO row included; `seed`: whole numbers >= 0 that the noise
    hangs on; `cfg_alpha`: weight of the velocity that sees the prompt, against the one that does not."""

    text: str
    voice: Tensor
    seed: Sequence[int] = (0,)
    cfg_alpha: float = CFG_ALPHA


@dataclass
class Take:
    """What a request has given so far: `codes` [37, L] int64 on the CPU, and whether END_AUDIO has come. A finished
    take that is not `ended` was cut off at the length limit."""

    codes: Tensor
    ended: bool = False


class TTS:
    """A checkpoint that speaks."""

    def __init__(self, folder, models: Models):
        self.folder, self.models = Path(folder), models
        self.backbone = CachedBackbone(models.backbone)
        self.tokenizer = load_tokenizer(self.folder)
        self._loop: FrameLoop | None = None

    @classmethod
    def from_checkpoint(cls, folder, device="cpu", dtype: torch.dtype | None = None) -> "TTS":
        """dtype of backbone and acoustic transformer; None: bfloat16 on a GPU, float32 on the CPU.

        Raises CheckpointError for a file or tensor that is missing, damaged or does not fit.
        """
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
        return cls(folder, Models.from_checkpoint(folder, device, dtype))

    @property
    def codec(self):
        return self.models.codec

    def prompt(self, text: str, voice: Tensor) -> Tensor:
        """-> [S, dim] embeddings: the rows of `voice` [N, dim] in the place of the N AUDIO tokens, a look-up elsewhere.

        Raises TTSError for an empty text.
        """
        tokens, is_audio = prompt_tokens(self.tokenizer, text, len(voice))
        prompt = self.models.backbone.embed_text(tokens.to(self.backbone.device))
        prompt[is_audio] = voice.to(prompt.device, prompt.dtype)
        return prompt

    @torch.no_grad()
    def takes(self, requests: Sequence[Request], max_frames: int) -> Iterator[list[Take]]:
        """Speaks a batch; yields its takes whenever they have grown (each time the same objects), at last whole.

        An item stops at END_AUDIO or after max_frames. Raises TTSError for an empty text, or when the model's context
        is too short for prompt and frames.
        """
        prompts = [self.prompt(request.text, request.voice) for request in requests]
        loop = self._loop_for(prompts, max_frames)
        dim = self.codec.params.acoustic_dim
        noises = torch.stack([noise(request.seed, max_frames, dim) for request in requests])
        loop.start(prompts, noises, torch.tensor([[request.cfg_alpha] for request in requests]))
        takes = [Take(loop.ids.new_empty(loop.ids.shape[-1], 0, device="cpu")) for _ in requests]
        done = 0
        while done < max_frames and not all(take.ended for take in takes):
            n_frames = min(BLOCK if done else FIRST_BLOCK, max_frames - done)
            for _ in range(n_frames):
                loop.step()
            block = loop.ids[:, done : done + n_frames].cpu()  # the only wait for the device
            done += n_frames
            for take, ids in zip(takes, block):
                if not take.ended:
                    ends = (ids[:, 0] == END_AUDIO).nonzero()
                    take.ended = len(ends) > 0
                    kept = ids[: ends[0, 0]] if take.ended else ids
                    take.codes = torch.cat([take.codes, kept.T - N_SPECIAL_IDS], dim=1)
            yield takes

    def generate(self, requests: Sequence[Request], max_frames: int) -> list[Take]:
        """Speaks a batch to its end; see `takes`."""
        for takes in self.takes(requests, max_frames):
            pass
        return takes

    def warm_up(self, requests: Sequence[Request], max_frames: int) -> None:
        """Leaves the one-time costs of a batch like this behind: capturing its CUDA graph, loading kernels."""
        next(self.takes(requests, max_frames))
        decode_batch(self.codec, [torch.zeros(self.codec.params.n_codebooks, FIRST_BLOCK, dtype=torch.long)])

    def _loop_for(self, prompts: list[Tensor], max_frames: int) -> FrameLoop:
        """The loop of the batch before where it fits, else a new one in its place."""
        needed = prompt_slots(prompts) + max_frames
        context = self.models.backbone.params.raw.get("max_seq_len", math.inf)
        if needed > context:
            raise TTSError(
                f"prompt and audio would take {needed} positions, but the model's context has {context}: "
                "shorten the text or the length limit."
            )
        loop = self._loop
        n_prompts = len(prompts)
        if not (loop and len(loop.ids) == n_prompts and loop.max_frames >= max_frames and loop.cache.n_slots >= needed):
            self._loop = loop = None  # frees its memory first
            n_slots = round_up(needed, SLOT_MULTIPLE)
            self._loop = FrameLoop(self.backbone, self.models.acoustic, self.codec, n_prompts, n_slots, max_frames)
        return self._loop


def prompt_tokens(tokenizer: MistralTokenizer, text: str, n_rows: int) -> tuple[Tensor, Tensor]:
    """-> token ids [S] int64 of spec section 5, and which of them [S] bool are the n_rows AUDIO tokens.

    Raises TTSError for a text in which there is nothing to say, or that is no Unicode.
    """
    if not says_something(text):
        raise TTSError("there is no text to speak.")
    if not is_unicode(text):
        raise TTSError(f"the text is not UTF-8: {shown(text[:60])}")
    audio = tokenizer.instruct_tokenizer.audio_encoder
    # Under this name mistral_common makes room for the rows at hand, be they of a known voice or of a reference.
    audio.audio_config.voice_num_audio_tokens["/rows"] = n_rows
    tokens = torch.tensor(tokenizer.encode_speech_request(SpeechRequest(input=text, voice="/rows")).tokens)
    return tokens, tokens == audio.audio_token


def named_voice(folder, name: str) -> Tensor:
    """The embedding [N, dim] of a voice of the checkpoint. Raises TTSError for one that serving would not find."""
    voices = {voice.name: voice for voice in list_voices(folder)}
    name = name.lower()  # as serving does
    if name not in voices:
        raise TTSError(f"{folder} has no voice {name}: its voices are {', '.join(voices)}.")
    if voices[name].problem:
        raise TTSError(f"voice {name} of {folder} is broken ({voices[name].problem}): register it again.")
    return load_pt(embedding_file(folder, name))


def noise(seed: Sequence[int], n_frames: int, dim: int) -> Tensor:
    """[n_frames, dim] float32 from N(0, 1); row k depends on the seed and k alone."""
    return torch.from_numpy(np.random.default_rng(list(seed)).standard_normal((n_frames, dim), dtype=np.float32))


def load_tokenizer(folder: Path) -> MistralTokenizer:
    """Raises CheckpointError when tekken.json is missing or is not that of a Voxtral TTS checkpoint."""
    path = folder / "tekken.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: download it again.")
    try:
        tokenizer = MistralTokenizer.from_file(str(path))
    except Exception as error:  # it asserts, looks up and indexes what the file says
        raise CheckpointError(f"{path} cannot be read ({reason_of(error)}): download it again.") from error
    audio = tokenizer.instruct_tokenizer.audio_encoder
    if audio is None or audio.audio_config.voice_num_audio_tokens is None:
        raise CheckpointError(f"{path} knows no voices: is it of a Voxtral TTS checkpoint?")
    return tokenizer
