"""Speaker embeddings, by whose cosine the voices of two clips are compared.

The encoder is Resemblyzer's GE2E network (Wan et al. 2018). Only the weights in its PyPI wheel are used, read
without importing the package, whose webrtcvad and librosa would be needed for nothing else.
"""

import importlib.util
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from voxtral.codec import ceil_div, mask_samples
from voxtral.errors import UserError

HOP = 160  # samples at 16 kHz: 10 ms
WINDOW_FRAMES = 160  # the network was trained on windows of 1.6 s
STEP_FRAMES = 77  # 1.3 windows per second, Resemblyzer's default
MIN_COVERAGE = 0.75  # share of a window that must lie inside the clip, except for the first one
MIN_RMS = 10 ** (-30 / 20)  # quieter clips are raised to -30 dBFS


class SpeakerEncoder(nn.Module):
    """Waveform [B, 1, T] at 24 kHz -> unit-norm embedding [B, 256], as Resemblyzer's `embed_utterance`.

    Windows of 1.6 s (the last one padded with silence) are embedded and averaged. Departure: long silences
    are not cut out first. `model`: resemblyzer, the installed wheel's weights, or the path of its pretrained.pt. Raises
    UserError without weights.
    """

    def __init__(self, model: str = "resemblyzer", device="cpu"):
        super().__init__()
        self.resample = torchaudio.transforms.Resample(24_000, 16_000)
        # librosa's default, which the network was trained on: power, Slaney bands, zeros beyond the ends.
        self.mel = torchaudio.transforms.MelSpectrogram(
            16_000, n_fft=400, hop_length=HOP, n_mels=40, norm="slaney", mel_scale="slaney", pad_mode="constant"
        )
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self._load(find_weights(model))
        self.requires_grad_(False).to(device).eval()

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
            for name in ("lstm", "linear"):
                own = [key for key in state if key.startswith(f"{name}.")]
                getattr(self, name).load_state_dict({key.removeprefix(f"{name}."): state[key] for key in own})
        except (LookupError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
            raise UserError(f"{path} is not Resemblyzer's pretrained.pt; give the file of its wheel.") from error

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """`lengths` [B]: valid samples; what lies beyond them does not change the embedding."""
        with torch.autocast(waveform.device.type, enabled=False):
            audio = self.resample(mask_samples(waveform.float(), lengths))
            lengths = ceil_div(lengths * 2, 3)
            audio = mask_samples(audio, lengths)  # the resampling filter rings on beyond the end
            power = audio.square().sum(dim=(1, 2)) / lengths
            gain = (MIN_RMS / power.clamp(min=1e-10).sqrt()).clamp(min=1.0)
            mel = self.mel(audio[:, 0] * gain[:, None])  # [B, 40, frames]
            n_windows = 1 + max(0, ceil_div(mel.shape[-1] - WINDOW_FRAMES, STEP_FRAMES))
            mel = F.pad(mel, (0, (n_windows - 1) * STEP_FRAMES + WINDOW_FRAMES - mel.shape[-1]))
            windows = mel.unfold(2, WINDOW_FRAMES, STEP_FRAMES).permute(0, 2, 3, 1)  # [B, n_windows, 160, 40]
            _, (hidden, _) = self.lstm(windows.flatten(0, 1).contiguous())
            embedding = F.normalize(F.relu(self.linear(hidden[-1])), dim=-1).unflatten(0, (-1, n_windows))
            start = torch.arange(n_windows, device=audio.device) * STEP_FRAMES
            covered = lengths[:, None] - start * HOP >= MIN_COVERAGE * WINDOW_FRAMES * HOP
            covered |= start == 0  # a clip shorter than a window has one all the same
            return F.normalize((embedding * covered[..., None]).sum(dim=1), dim=-1)

    @torch.no_grad()
    def embed(self, waveform: Tensor) -> Tensor:
        """A single waveform [T], on any device -> [256] on the CPU."""
        device = self.linear.weight.device
        return self(waveform[None, None].to(device), torch.tensor([len(waveform)], device=device))[0].cpu()


def find_weights(model: str) -> Path:
    """The path of the weights. Raises UserError when neither the package nor a file of that name is there."""
    if model != "resemblyzer":
        if not Path(model).is_file():
            raise UserError(f"{model} is neither 'resemblyzer' nor a file; give the path of its pretrained.pt.")
        return Path(model)
    spec = importlib.util.find_spec("resemblyzer")  # finds the package without importing it
    if spec is None:
        raise UserError(
            "likeness of voices needs the resemblyzer weights: pip install --no-deps resemblyzer, or give the path of "
            "its pretrained.pt."
        )
    return Path(spec.origin).parent / "pretrained.pt"
