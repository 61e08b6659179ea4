"""Two more ways to learn from clips with known codes, which withheld_encoder.py tries in its rows j and n. Each stands
in for CodeMatching in train_encoder.py, weighs as loss.match does, and adds to the statistics of known codes, which
both keep."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from voxtral.codec import CodecOutput, VoxtralCodec, valid_mask  # noqa: E402
from voxtral.losses import clip_mean, codebook_distance, codebook_scale  # noqa: E402
from voxtral.matching import CodeMatching  # noqa: E402

SEMANTIC_WEIGHT, LEVELS_WEIGHT = 1.5, 6.0  # times loss.match=0.3: 0.45 and 1.8 beside a mel distance of weight 1
ADVERSARY_WEIGHT = 0.1
ADVERSARY_CHANNELS, ADVERSARY_LEARNING_RATE = 256, 3e-4
GRADIENT_PENALTY = 1.0


class _Windows(CodeMatching):
    """CodeMatching that also draws stretches of the known codes. A draw hangs on the step alone, so a resumed run sees
    the ones that it would have seen."""

    def __init__(self, codes: list[Tensor], codec: VoxtralCodec, device):
        super().__init__(codes, codec, device)
        self.stream = torch.cat(codes, dim=1).to(device)  # [1 + acoustic_dim, frames], clip after clip

    def windows(self, n: int, n_frames: int) -> Tensor:
        """-> codes [n, 1 + acoustic_dim, n_frames]; the stream starts again at its end."""
        generator = torch.Generator(self.stream.device).manual_seed(self.steps)
        starts = torch.randint(self.stream.shape[1], (n, 1), generator=generator, device=self.stream.device)
        frames = (starts + torch.arange(n_frames, device=starts.device)) % self.stream.shape[1]
        return self.stream[:, frames].transpose(0, 1)


class KnownClips(_Windows):
    """Row j: as many clips again, made by the decoder of known codes, from which the encoder must find these codes.

    Semantic: cross-entropy of the codebook's entries by their squared distance, in units of codebook_scale. Acoustic:
    L1 of what tanh gives, in units of [-1, 1].
    """

    def __init__(self, codes: list[Tensor], codec: VoxtralCodec, device):
        super().__init__(codes, codec, device)
        self.codec = codec
        self.scale = codebook_scale(codec.quantizer.semantic_codebook.embedding).item()

    def __call__(self, output: CodecOutput, n_frames: Tensor) -> Tensor:
        codes, semantic = self.windows(len(output.codes), output.codes.shape[-1]), self.codec.params.semantic_dim
        with torch.no_grad():
            waveform = self.codec.decode(codes)
        with torch.autocast(waveform.device.type, torch.bfloat16, enabled=waveform.is_cuda, cache_enabled=False):
            latent = self.codec.encode_latent(waveform)
        found = self.quantizer.squash(latent.float())
        distance = codebook_distance(found[:, :semantic], self.quantizer.semantic_codebook.embedding)
        semantic_loss = F.cross_entropy(-distance / self.scale, codes[:, 0].flatten())
        levels_loss = F.l1_loss(found[:, semantic:], self.quantizer.decode(codes)[:, semantic:])
        return super().__call__(output, n_frames) + SEMANTIC_WEIGHT * semantic_loss + LEVELS_WEIGHT * levels_loss


class Adversary(_Windows):
    """Row n: a small network learns to tell sequences of the encoder's quantized latents from those of known codes (a
    step of its own at every call), and the encoder to deceive it; logistic losses, with a penalty on its gradient at
    the known ones (Mescheder et al. 2018), without which all levels are driven to their ends. It sees channels in units
    of the known codes' deviation, some 1.2 s at a time."""

    def __init__(self, codes: list[Tensor], codec: VoxtralCodec, device):
        super().__init__(codes, codec, device)
        sizes = [len(self.mean), ADVERSARY_CHANNELS, ADVERSARY_CHANNELS, ADVERSARY_CHANNELS]
        hidden = [
            layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Conv1d(a, b, 5, padding=2), nn.LeakyReLU(0.2))
        ]
        self.network = nn.Sequential(*hidden, nn.Conv1d(ADVERSARY_CHANNELS, 1, 3, padding=1)).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=ADVERSARY_LEARNING_RATE, betas=(0.5, 0.9))

    def __call__(self, output: CodecOutput, n_frames: Tensor) -> Tensor:
        def score(sequence: Tensor) -> Tensor:  # [B, D, L] -> [B, 1, L]; padding shows the same to both
            return self.network(sequence * valid)

        valid = valid_mask(n_frames, output.codes.shape[-1])[:, None]
        real = self.normalize(
            self.quantizer.decode(self.windows(len(output.codes), output.codes.shape[-1]))
        ).requires_grad_()
        fake = self.heard(output)
        real_score = score(real)
        (slope,) = torch.autograd.grad(real_score.sum(), real, create_graph=True)
        penalty = GRADIENT_PENALTY / 2 * slope.square().sum(dim=1, keepdim=True)
        told_apart = clip_mean(F.softplus(-real_score) + F.softplus(score(fake.detach())) + penalty, n_frames)
        self.optimizer.zero_grad()
        told_apart.backward()
        self.optimizer.step()
        self.network.requires_grad_(False)
        deceived = clip_mean(F.softplus(-score(fake)), n_frames)
        self.network.requires_grad_(True)
        return super().__call__(output, n_frames) + ADVERSARY_WEIGHT * deceived

    def state_dict(self) -> dict:
        return super().state_dict() | {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


KNOWN = {"statistics": CodeMatching, "clips": KnownClips, "adversary": Adversary}  # what rows call `known`
