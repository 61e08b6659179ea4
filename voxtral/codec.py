"""The Voxtral codec: encoder, quantizer, decoder, and the voice embedding that serving builds from them.

`VoxtralCodec.state_dict()` keys are the checkpoint's tensor names without `audio_tokenizer.`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from voxtral.checkpoint import CODEC_PREFIX, EMBEDDING_NAME, ENCODER_PREFIXES, Checkpoint, SafetensorsFile, check_shapes
from voxtral.layers import CausalConv1d, CausalConvTranspose1d, Transformer
from voxtral.params import EMPTY_AUDIO, END_AUDIO, N_SPECIAL_IDS, CheckpointError, CodecParams, integers
from voxtral.quantizer import QuantizationDraws, Quantizer


@dataclass
class CodecOutput:
    """What a training step needs of one pass through the codec (L frames, T = L * 1920 samples)."""

    reconstruction: Tensor  # [B, 1, T]
    latent: Tensor  # [B, latent_dim, L] before quantization
    codes: Tensor  # [B, 1 + acoustic_dim, L] int64
    semantic_quantized: Tensor  # [B, semantic_dim, L] with straight-through gradient


class VoxtralCodec(nn.Module):
    """Waveform [B, 1, T] at 24 kHz <-> codes [B, 37, ceil(T / 1920)] (spec section 3)."""

    def __init__(self, params: CodecParams):
        super().__init__()
        self.params = params
        self.has_encoder = False
        self.input_proj = CausalConv1d(
            params.pretransform_patch_size, params.dim, params.patch_proj_kernel_size, pad_mode="reflect"
        )
        self.encoder_blocks = nn.ModuleList()
        window = params.attn_sliding_window_size
        stages = list(
            zip(
                integers(params.encoder_transformer_lengths_str),
                integers(params.encoder_convs_kernels_str),
                integers(params.encoder_convs_strides_str),
            )
        )
        for i, (n_layers, kernel, stride) in enumerate(stages):
            last = i == len(stages) - 1
            self.encoder_blocks.append(Transformer(params, n_layers, window))
            out_channels = params.latent_dim if last else params.dim
            self.encoder_blocks.append(CausalConv1d(params.dim, out_channels, kernel, stride))
            window = window // 2 if stride > 1 else window

        self.quantizer = Quantizer(params)

        self.decoder_blocks = nn.ModuleList()
        stages = zip(
            integers(params.decoder_transformer_lengths_str),
            integers(params.decoder_convs_kernels_str),
            integers(params.decoder_convs_strides_str),
        )
        for i, (n_layers, kernel, stride) in enumerate(stages):
            window = window * 2 if stride > 1 else window
            self.decoder_blocks.append(
                CausalConv1d(params.latent_dim, params.dim, kernel, stride)
                if i == 0
                else CausalConvTranspose1d(params.dim, params.dim, kernel, stride)
            )
            self.decoder_blocks.append(Transformer(params, n_layers, window))
        self.output_proj = CausalConv1d(
            params.dim, params.pretransform_patch_size, params.patch_proj_kernel_size, pad_mode="reflect"
        )
        # Part of the checkpoint, not of `audio_tokenizer.`: set by from_checkpoint, outside the state dict.
        self.register_buffer("audio_embedding", None, persistent=False)

    @classmethod
    def from_checkpoint(
        cls, folder, device="cpu", dtype: torch.dtype = torch.float32, with_encoder: bool = True
    ) -> "VoxtralCodec":
        """Reads the codec and the audio embedding table, and no other tensor, from a checkpoint folder.

        Without encoder tensors there, or with_encoder=False, the encoder is freshly initialised and `has_encoder` is
        False.
        Raises CheckpointError for a file or tensor that is missing, damaged or of a wrong shape.
        """
        checkpoint = Checkpoint(folder)
        codec = cls(checkpoint.params.codec)
        codec.has_encoder = with_encoder and bool(checkpoint.encoder_names)
        ignored = () if codec.has_encoder else ENCODER_PREFIXES
        expected = {name: t.shape for name, t in codec.tensors().items() if not name.startswith(ignored)}
        expected[EMBEDDING_NAME] = (checkpoint.params.audio_embedding_size, checkpoint.params.dim)
        prefixes = CODEC_PREFIX, EMBEDDING_NAME
        found = {n: s for n, s in checkpoint.shapes.items() if n.startswith(prefixes) and not n.startswith(ignored)}
        check_shapes(found, expected, checkpoint.folder)
        tensors = checkpoint.read(expected)
        codec.audio_embedding = tensors.pop(EMBEDDING_NAME)
        codec.load_state_dict({name.removeprefix(CODEC_PREFIX): t for name, t in tensors.items()}, strict=False)
        return codec.to(device, dtype).eval()

    @classmethod
    def start(cls, folder, encoder: str | None) -> tuple["VoxtralCodec", str]:
        """The codec of a checkpoint folder as phase 1 begins with it, and in words which encoder that is. `encoder`:
        None: fresh; "checkpoint": the folder's own; or an encoder.safetensors. Raises CheckpointError."""
        codec = cls.from_checkpoint(folder, with_encoder=encoder == "checkpoint")
        if encoder is None:
            return codec, "fresh weights"
        if encoder != "checkpoint":
            codec.load_encoder(SafetensorsFile(encoder).read(), encoder)
            return codec, encoder
        if not codec.has_encoder:
            raise CheckpointError(
                f"encoder is checkpoint, but {folder} holds none: leave encoder at null, or name a file."
            )
        return codec, f"the one in {folder}"

    def load_encoder(self, tensors: dict[str, Tensor], where="the encoder file") -> None:
        """Takes encoder tensors under their full checkpoint names. Raises CheckpointError unless all are there and
        fit."""
        self._load(tensors, self.encoder_tensors(), where)
        self.has_encoder = True

    def load_decoder(self, tensors: dict[str, Tensor]) -> None:
        """Takes all other tensors of the codec likewise."""
        self._load(tensors, self.decoder_tensors(), "the decoder file")

    def _load(self, tensors: dict[str, Tensor], own: dict[str, Tensor], where) -> None:
        found, expected = ({name: t.shape for name, t in each.items()} for each in (tensors, own))
        check_shapes(found, expected, where)
        self.load_state_dict({name.removeprefix(CODEC_PREFIX): t for name, t in tensors.items()}, strict=False)

    def tensors(self) -> dict[str, Tensor]:
        """The state dict under full checkpoint names."""
        return {CODEC_PREFIX + name: t for name, t in self.state_dict().items()}

    def encoder_tensors(self) -> dict[str, Tensor]:
        """Those of the encoder (114 in the full model)."""
        return {name: t for name, t in self.tensors().items() if name.startswith(ENCODER_PREFIXES)}

    def decoder_tensors(self) -> dict[str, Tensor]:
        """All others: quantizer and decoder."""
        return {name: t for name, t in self.tensors().items() if not name.startswith(ENCODER_PREFIXES)}

    def encoder_parameters(self) -> list[nn.Parameter]:
        return [*self.input_proj.parameters(), *self.encoder_blocks.parameters()]

    # ------------------------------------------------------------ encoder

    def encode_latent(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, 1, T] -> [B, latent_dim, L], L = ceil(ceil(T / 240) / 8); nothing is squashed here.

        With `lengths` [B] (samples), every clip is encoded as if it were alone; frames beyond ceil(length / 1920)
        carry no meaning.
        """
        patch = self.params.pretransform_patch_size
        if lengths is not None:
            waveform = mask_samples(waveform, lengths)
            lengths = ceil_div(lengths, patch)
        x = F.pad(waveform, (0, -waveform.shape[-1] % patch))
        x = x.view(x.shape[0], -1, patch).transpose(1, 2).to(self.dtype)  # [B, 240, patches]
        x = self.input_proj(x)
        for block in self.encoder_blocks:
            if lengths is not None and isinstance(block, CausalConv1d):
                x = hold_last(x, lengths)  # what `replicate` padding shows a clip that ends here
                lengths = ceil_div(lengths, block.stride)
            x = block(x)
        return x

    @torch.no_grad()
    def served_latent(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """encode_latent() as serving computes it -> [B, latent_dim, L] bfloat16. The waveform is rounded to bf16 too.

        Without autocast's cache: the weights that it keeps here have no gradient for a training step around this.
        """
        with torch.autocast(waveform.device.type, torch.bfloat16, cache_enabled=False):
            return self.encode_latent(waveform.bfloat16(), lengths).bfloat16()

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, 1, T] -> codes [B, 1 + acoustic_dim, L] int64, semantic first, as serving makes them: in bf16 from the
        waveform to the levels, whatever dtype the weights have. `lengths`: see encode_latent."""
        return self.quantizer.encode(self.served_latent(waveform, lengths))

    # ------------------------------------------------------------ decoder

    def decode_latent(self, quantized: Tensor) -> Tensor:
        """Quantized latent [B, latent_dim, L] -> waveform [B, 1, L * 1920]"""
        x = quantized.to(self.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        return self.output_proj(x).transpose(1, 2).reshape(x.shape[0], 1, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, 1 + acoustic_dim, L] -> waveform [B, 1, L * 1920]"""
        return self.decode_latent(self.quantizer.decode(codes))

    # ------------------------------------------------------------ what the LLM sees

    def embed_codes(self, codes: Tensor, table: Tensor | None = None) -> Tensor:
        """Codes [B, 1 + acoustic_dim, L] -> [B, L, dim]: the sum of one table row per codebook (spec section 4).

        table: one of the shape of the checkpoint's, in its place."""
        offsets = codebook_offsets(self.params).to(codes.device)
        table = self.audio_embedding if table is None else table
        return F.embedding(codes.transpose(1, 2) + N_SPECIAL_IDS + offsets, table).sum(dim=2)

    def voice_rows(self, codes: Tensor, n_frames: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Codes [B, 1 + acoustic_dim, L], the first n_frames [B] of them, or all -> [B, L + 1, dim]: row n_frames is
        the END_AUDIO frame that serving expects; those after it carry no meaning. table: see embed_codes."""
        if n_frames is None:
            n_frames = codes.new_tensor([codes.shape[-1]])
        end = torch.full_like(codes[:1, :, :1], EMPTY_AUDIO - N_SPECIAL_IDS)
        end[:, 0] = END_AUDIO - N_SPECIAL_IDS
        at_end = torch.arange(codes.shape[-1] + 1, device=codes.device) == n_frames[:, None, None]
        return self.embed_codes(torch.where(at_end, end, F.pad(codes, (0, 1))), table)

    def voice_embedding(self, waveform: Tensor) -> Tensor:
        """[1, 1, T] -> [ceil(T / 1920) + 1, dim], END_AUDIO row last."""
        return self.voice_rows(self.encode(waveform))[0]

    # ------------------------------------------------------------ training

    def forward(self, waveform: Tensor, lengths: Tensor, draws: QuantizationDraws) -> CodecOutput:
        """One training pass with stochastic quantization (paper section 2.1)."""
        latent = self.encode_latent(waveform, lengths)
        mixed, codes, semantic = self.quantizer(latent, draws)
        return CodecOutput(
            self.decode_latent(mixed).float()[..., : waveform.shape[-1]], latent.float(), codes, semantic
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.output_proj.conv.parametrizations.weight.original1.dtype


def codebook_offsets(params: CodecParams) -> Tensor:
    """[1 + acoustic_dim] int64: the row of the audio embedding table where each codebook starts."""
    levels = params.acoustic_codebook_size + N_SPECIAL_IDS
    starts = params.semantic_codebook_size + N_SPECIAL_IDS + levels * torch.arange(params.acoustic_dim)
    return torch.cat([torch.zeros(1, dtype=torch.long), starts])


def ceil_div(a, b):
    return -(-a // b)


def valid_mask(lengths: Tensor, n: int) -> Tensor:
    """[B] -> [B, n] bool: positions below lengths[i], of samples, frames or tokens."""
    return torch.arange(n, device=lengths.device) < lengths[:, None]


def mask_samples(waveform: Tensor, lengths: Tensor) -> Tensor:
    """[B, 1, T] with everything from sample lengths[i] on set to zero."""
    return waveform * valid_mask(lengths, waveform.shape[-1])[:, None]


def hold_last(x: Tensor, lengths: Tensor) -> Tensor:
    """[B, C, T] whose positions from lengths[i] on repeat position lengths[i] - 1."""
    last = (lengths - 1)[:, None, None]
    held = x.gather(2, last.expand(-1, x.shape[1], 1))
    return torch.where(torch.arange(x.shape[-1], device=x.device) <= last, x, held)
