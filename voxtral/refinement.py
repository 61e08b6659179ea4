"""A reference's acoustic latents, refined on that recording alone: down the gradient of the mel distance, through the
frozen decoder. For voices that are registered, or spoken without a server: `ref_audio` meets nothing but the encoder.
"""

import time

import torch
from torch import Tensor

from voxtral.codec import VoxtralCodec
from voxtral.losses import MelDistance

LEARNING_RATE = 0.02  # of Adam; latents are of the order of 1
MAX_STEPS = 40  # RESULTS.md


@torch.enable_grad()
def refined_codes(codec: VoxtralCodec, waveform: Tensor, seconds: float) -> tuple[Tensor, str]:
    """[1, 1, T] -> codes [1, 1 + acoustic_dim, L] int64 after MAX_STEPS steps, or as many as fit into `seconds`; what
    was done. Semantic codes stay the encoder's."""
    started, n_semantic = time.monotonic(), codec.params.semantic_dim
    mel_distance = MelDistance(codec.params.sampling_rate).to(waveform.device)
    length = torch.tensor([waveform.shape[-1]], device=waveform.device)
    with torch.no_grad():
        semantic, acoustic = codec.encode_latent(waveform).float().tensor_split([n_semantic], dim=1)
    acoustic = acoustic.clone().requires_grad_()
    optimizer, distances = torch.optim.Adam([acoustic], LEARNING_RATE, betas=(0.9, 0.99)), []
    for _ in range(MAX_STEPS + 1):
        latent = torch.cat([semantic, acoustic], dim=1)
        codes = codec.quantizer.encode(latent.detach())
        quantized = codec.quantizer.straight_through(codec.quantizer.squash(latent), codes)
        loss = mel_distance(codec.decode_latent(quantized).float()[..., : waveform.shape[-1]], waveform, length)
        distances.append(loss.item())
        if len(distances) > MAX_STEPS or time.monotonic() - started > seconds:
            break
        (acoustic.grad,) = torch.autograd.grad(loss, acoustic)  # of nothing else: the codec's weights keep theirs
        optimizer.step()
    return codes, (
        f"refined in {len(distances) - 1} steps: mel distance to the recording {distances[0]:.2f}, now "
        f"{distances[-1]:.2f}"
    )


def reference_codes(codec: VoxtralCodec, waveform: Tensor, refine_sec: float) -> tuple[Tensor, list[str]]:
    """[1, 1, T] -> refined_codes(), or with 0 seconds the encoder's; what was done."""
    if not refine_sec:
        return codec.encode(waveform), []
    codes, note = refined_codes(codec, waveform, refine_sec)
    return codes, [note]
