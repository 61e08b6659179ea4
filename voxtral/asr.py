"""Whisper distillation of the semantic codes (paper section 2.1).

L_ASR = 1 - mean_l cos(sum_f A[l, f] z_f, h_l). A frozen Whisper transcribes the clip; h_l is its last
decoder layer's hidden state where it predicts text token l, A its cross-attention as a soft alignment of
tokens to codec frames, z_f the projected semantic embedding of frame f.
"""

import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
import torchaudio
import whisper
from torch import Tensor, nn
from whisper.model import disable_sdpa
from whisper.tokenizer import LANGUAGES, get_tokenizer

from voxtral.codec import ceil_div, mask_samples, valid_mask
from voxtral.errors import UserError
from voxtral.loader import TensorBatch

POSITIONS_PER_SEC = whisper.audio.TOKENS_PER_SECOND  # 50: the encoder makes one position of two mel frames
SAMPLES_PER_POSITION = 480  # at 24 kHz
POSITIONS_PER_FRAME = 4  # codec frames have 12.5 Hz
MEDIAN_WIDTH = 7  # positions, as in openai-whisper's word timing
warnings.filterwarnings("ignore", message=".*batching rule for aten::stft.*")  # its loop is no slower than ours


@dataclass
class AsrConfig:
    """Which Whisper teaches, and how much it sees and writes."""

    model: str = "base"  # openai-whisper model name, or the path of a local .pt
    language: str | None = None  # en, ar, ...; None: detected per clip
    context_sec: float = 10.0  # Whisper sees so many seconds instead of 30
    tokens_per_sec: float = 7.5  # cap on decoded tokens
    teacher_cache: str | None = None  # folder that keeps what Whisper said; clips are then cut at fixed places


@dataclass
class AsrTargets(TensorBatch):
    """What the loss needs of a batch: N text tokens (padded), Whisper's width W, codec frames."""

    hidden: Tensor  # [B, N, W] float32
    alignment: Tensor  # [B, N, n_frames] float32, >= 0, zero beyond a clip's end
    mask: Tensor  # [B, N] bool, False for padding; a clip in which nothing was heard has no True


class WhisperTeacher(nn.Module):
    """Frozen Whisper; float16 on CUDA, float32 on the CPU. `max_sec` is the longest clip it will be given.

    Departure: `context_sec` of context in place of Whisper's 30 s, for a quarter of the cost. It must leave
    room for silence after the clip: without it the decoder misses the end and loops.
    Raises UserError where the weights cannot be had or an `asr` key does not fit.
    """

    def __init__(self, config: AsrConfig, max_sec: float, device):
        super().__init__()
        self.model = load_whisper(config.model, device).requires_grad_(False).eval()
        dims = self.model.dims
        self.language = check_language(config, self.model.is_multilingual)
        native_sec = dims.n_audio_ctx / POSITIONS_PER_SEC
        needed_sec = min(2.5 * max_sec, native_sec)  # with 2 x, 1-2 % of clips still loop
        if not max_sec <= needed_sec <= config.context_sec <= native_sec:
            raise UserError(
                f"asr.context_sec is {config.context_sec}: with data.max_sec {max_sec} it must "
                f"be {needed_sec:g} to {native_sec:g} s, and data.max_sec no more than that."
            )
        dims.n_audio_ctx = round(config.context_sec * POSITIONS_PER_SEC)
        self.model.encoder.positional_embedding = self.model.encoder.positional_embedding[: dims.n_audio_ctx]
        self.max_samples = round(max_sec * 24_000)
        self.max_tokens = min(max(1, math.ceil(max_sec * config.tokens_per_sec)), dims.n_text_ctx // 2)

        self.dtype = torch.float32
        if self.model.device.type == "cuda":
            self.to_half()
        self.heads = self.model.alignment_heads.indices().T.tolist()  # (layer, head) pairs
        self.resample = torchaudio.transforms.Resample(24_000, 16_000).to(device)
        self.tokenizer = get_tokenizer(
            self.model.is_multilingual,
            num_languages=self.model.num_languages,
            language=self.language,
            task="transcribe",
        )
        prefix = self.tokenizer.sot_sequence_including_notimestamps
        self.n_prefix = len(prefix)
        for name, values in (
            ("prefix", torch.tensor(prefix)),
            ("suppressed", self.suppressed_logits()),
            ("languages", torch.tensor(self.tokenizer.all_language_tokens)),
        ):
            self.register_buffer(name, values.to(self.model.device), persistent=False)
        self.recorded = None  # `listen` as a CUDA graph

    def to_half(self) -> None:
        """All weights in float16, once: Whisper casts them at each call, and around its layer norms the activations
        too, though their kernel computes in float32 by itself."""
        self.dtype = torch.float16
        for module in self.model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding, nn.LayerNorm)):
                module.half()
            if isinstance(module, nn.LayerNorm):
                module.forward = partial(nn.LayerNorm.forward, module)
        # Logits of 51,865 tokens are no shape for tensor cores: rows of zeros, whose logits transcribe() cuts off.
        tokens = self.model.decoder.token_embedding
        tokens.weight = nn.Parameter(F.pad(tokens.weight, (0, 0, 0, -len(tokens.weight) % 8)), requires_grad=False)

    @property
    def width(self) -> int:
        """Size of the hidden states."""
        return self.model.dims.n_text_state

    def suppressed_logits(self) -> Tensor:
        """[2, n_vocab]: what the library adds to the logits of the first text token, and of the later ones; beyond
        it, tokens above the end of text (timestamps), which carry no text."""
        options = whisper.DecodingOptions(language=self.tokenizer.language, without_timestamps=True, fp16=False)
        logits = torch.zeros(2, 1, self.model.dims.n_vocab)
        for row, n_tokens in enumerate((self.n_prefix, self.n_prefix + 1)):
            for rule in whisper.decoding.DecodingTask(self.model, options).logit_filters:
                rule.apply(logits[row], torch.zeros(1, n_tokens))
        logits[:, :, self.tokenizer.eot + 1 :] = -torch.inf
        return logits[:, 0]

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths: Tensor, n_frames: int) -> AsrTargets:
        """Waveform [B, 1, T] at 24 kHz, valid samples [B], codec frames of T -> targets of the loss."""
        if waveform.shape[-1] > self.max_samples:
            raise ValueError(f"{waveform.shape[-1]} samples a clip exceed data.max_sec, {self.max_samples}.")
        with torch.autocast(waveform.device.type, enabled=False):
            mel = self.mel(waveform, lengths).to(self.dtype)
            hidden, scores, n_text = (self.recorded or self.listen)(mel)
            alignment = soft_alignment(scores, n_text, ceil_div(lengths, SAMPLES_PER_POSITION), n_frames)
            return AsrTargets(hidden, alignment, valid_mask(n_text, hidden.shape[1]))

    def record(self, n_clips: int) -> None:
        """Makes one CUDA graph of what is otherwise a hundred small launches a token, for batches of n_clips.

        It is captured on a stream of its own: graphs of one stream share cuBLAS's workspace (pytorch issue 193402), and
        this one is replayed beside the codec's, which changed what both computed (benchmarks/README.md).
        """
        dims = self.model.dims
        static = torch.zeros(n_clips, dims.n_mels, 2 * dims.n_audio_ctx, dtype=self.dtype, device=self.model.device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(static.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.listen(static)  # lazy initialization must not be captured
        with torch.cuda.graph(graph, stream=stream):
            outputs = self.listen(static)

        def replay(mel: Tensor) -> tuple[Tensor, ...]:
            static.copy_(mel)
            graph.replay()
            return outputs

        self.recorded = replay

    def mel(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """[B, 1, T] at 24 kHz -> [B, n_mels, 2 * n_audio_ctx]: the clip and silence after it."""
        audio = self.resample(mask_samples(waveform.float(), lengths))[:, 0]
        dims = self.model.dims
        audio = whisper.pad_or_trim(audio, dims.n_audio_ctx * whisper.audio.N_SAMPLES_PER_TOKEN)
        # One by one: the library sets its floor relative to the loudest value of all that it is given.
        return torch.vmap(lambda clip: whisper.log_mel_spectrogram(clip, dims.n_mels))(audio)

    @torch.no_grad()
    def listen(self, mel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n_mels, 2 * n_audio_ctx] -> hidden [B, N, W], scores [B, heads, N + 1, n_audio_ctx], n_text [B]."""
        features = self.model.encoder(mel)
        tokens, n_text = self.transcribe(features)
        return *self.read(tokens, features), n_text

    def transcribe(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Greedy decoding, as whisper.decode without timestamps -> tokens [B, n_prefix + N] with <|endoftext|> after
        the text, number of text tokens [B]; N = max_tokens, or fewer on the CPU where all have ended.

        Every step of the cache has shapes of its own, the same for every batch, so that all can be one CUDA graph.
        """
        n_clips, eot = len(features), self.tokenizer.eot
        tokens = F.pad(self.prefix.repeat(n_clips, 1), (0, self.max_tokens), value=eot)
        total = torch.zeros(n_clips, device=features.device)  # of the log probabilities
        ended = torch.zeros(n_clips, dtype=torch.bool, device=features.device)
        with ExitStack() as stack:
            cache, hooks = self.model.install_kv_cache_hooks()
            for hook in hooks:
                stack.callback(hook.remove)
            for i in range(self.n_prefix - 1 + self.max_tokens):
                logits = self.model.decoder(tokens[:, i : i + 1], features, kv_cache=cache)
                logits = logits[:, 0, : self.model.dims.n_vocab]
                n_written = i + 1 - self.n_prefix  # text tokens before the one that is predicted now
                if i == 0:
                    no_speech = logits.softmax(dim=-1)[:, self.tokenizer.no_speech]
                    if self.language is None:
                        tokens[:, 1] = self.languages[logits[:, self.languages].argmax(dim=1)]
                if n_written < 0:
                    continue
                best, token = (logits + self.suppressed[min(n_written, 1)]).log_softmax(dim=-1).max(dim=-1)
                total += torch.where(ended, 0.0, best)
                tokens[:, i + 1] = torch.where(ended, eot, token)
                ended = ended | (token == eot)
                if not features.is_cuda and ended.all():
                    tokens = tokens[:, : i + 1]
                    break
        n_text = (tokens[:, self.n_prefix :] != eot).sum(dim=1)
        # Where nobody speaks, Whisper makes words up; this is how whisper.transcribe tells silence.
        silent = (no_speech > 0.6) & (total / (n_text + 1) < -1.0)
        return tokens, torch.where(silent, 0, n_text)

    def read(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """One teacher-forced pass over what transcribe() gave -> hidden [B, N, W], scores [B, heads, N + 1,
        n_audio_ctx]; float32.

        The state that predicts a token stands one position before it: token l is predicted where token l - 1
        is the input, the first one at <|notimestamps|>. Row n_text predicts the end of the text.
        """
        states, scores = [], {}
        with ExitStack() as hooks, disable_sdpa():  # the fused attention does not return its scores
            hooks.enter_context(
                self.model.decoder.ln.register_forward_hook(lambda module, inputs, output: states.append(output))
            )
            for layer in {layer for layer, _ in self.heads}:
                hooks.enter_context(
                    self.model.decoder.blocks[layer].cross_attn.register_forward_hook(
                        lambda module, inputs, output, layer=layer: scores.update({layer: output[1]})
                    )
                )
            self.model.decoder(tokens, features)
        first = self.n_prefix - 1
        picked = torch.stack([scores[layer][:, head, first:] for layer, head in self.heads], dim=1)
        return states[0][:, first:-1].float(), picked.float()


def soft_alignment(scores: Tensor, n_text: Tensor, n_positions: Tensor, n_frames: int) -> Tensor:
    """Attention scores [B, heads, N + 1, positions] at 50 Hz -> alignment [B, N, n_frames] at 12.5 Hz.

    Softmax over a clip's positions, normalised over its tokens, median-filtered, averaged over heads,
    interpolated. The paper gives no formula for the token normalisation: here a position's mass is shared out
    among the clip's tokens and its end of text, which takes silence. openai-whisper's timing standardises
    instead, which gives negative weights.
    """
    inside = valid_mask(n_positions, scores.shape[-1])
    row = torch.arange(scores.shape[2], device=scores.device)
    weights = scores.masked_fill(~inside[:, None, None], -torch.inf).softmax(dim=-1)
    weights = weights * (row <= n_text[:, None])[:, None, :, None]
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-12)
    weights = weights[:, :, :-1] * (row[:-1] < n_text[:, None])[:, None, :, None]
    weights = F.pad(weights, (0, n_frames * POSITIONS_PER_FRAME - weights.shape[-1]))
    # The library's own median filter wants a Triton kernel on CUDA.
    windows = F.pad(weights, (MEDIAN_WIDTH // 2, MEDIAN_WIDTH // 2)).unfold(-1, MEDIAN_WIDTH, 1)
    weights = windows.sort(dim=-1).values[..., MEDIAN_WIDTH // 2].mean(dim=1)
    return F.interpolate(weights, size=n_frames, mode="linear")


def asr_distillation_loss(projected: Tensor, targets: AsrTargets) -> Tensor:
    """Mean over tokens of 1 - cos(sum_f A[l, f] z_f, h_l), then over clips. projected z [B, W, n_frames].

    A clip without tokens counts as 0, so that every clip has the same weight on any number of processes.
    """
    pooled = targets.alignment @ projected.float().transpose(1, 2)  # [B, N, W]
    distance = 1 - F.cosine_similarity(pooled, targets.hidden, dim=-1)
    n_tokens = targets.mask.sum(dim=1)
    return (torch.where(targets.mask, distance, 0.0).sum(dim=1) / n_tokens.clamp(min=1)).mean()


def load_whisper(model: str, device) -> whisper.Whisper:
    """A model by openai-whisper's name (downloaded once) or by path. Raises UserError with what to do."""
    if Path(model).is_file():
        try:
            loaded = whisper.load_model(model, device=device)
            heads = torch.load(model, map_location="cpu", weights_only=True).get("alignment_heads_dump")
        except (LookupError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
            raise UserError(
                f"asr.model: {model} is not an openai-whisper checkpoint; give another .pt file or the name of a model."
            ) from error
        if heads is None:
            warnings.warn(
                f"asr.model: {model} does not say which attention heads align words, so all of its "
                "upper layers are used; for models given by name the library knows them."
            )
        else:
            loaded.set_alignment_heads(heads)
        return loaded
    if model not in whisper.available_models():
        known = ", ".join(whisper.available_models())
        raise UserError(f"asr.model is '{model}', which is neither a file nor one of {known}.")
    try:
        return whisper.load_model(model, device=device)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"asr.model: Whisper '{model}' cannot be downloaded ({error}); a local .pt path can be given instead."
        ) from error


def check_language(config: AsrConfig, multilingual: bool) -> str | None:
    """The language to decode in; None: detect. Raises UserError for one that the model does not know."""
    if config.language not in (None, *LANGUAGES):
        raise UserError(f"asr.language is '{config.language}': it must be null or a code such as en or ar.")
    if not multilingual and config.language not in (None, "en"):
        raise UserError(f"asr.language is '{config.language}', but {config.model} knows English only.")
    return config.language if multilingual else "en"  # an English model cannot detect
