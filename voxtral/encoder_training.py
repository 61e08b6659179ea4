"""What train_encoder.py's steps are made of: which parts of the codec learn, and the pass of one micro-batch."""

from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from voxtral.asr import WhisperTeacher, asr_distillation_loss
from voxtral.asr_cache import AsrCache
from voxtral.codec import CodecOutput, VoxtralCodec, ceil_div, mask_samples, valid_mask
from voxtral.config import EncoderConfig
from voxtral.data import SAMPLE_RATE, Batch
from voxtral.discriminator import AdversarialLosses, Discriminators, crop, random_crops
from voxtral.known_codes import CodeMatching
from voxtral.losses import DECAYING, SoundLosses, codebook_scale, codes_loss, commitment_loss
from voxtral.processes import Process
from voxtral.quantizer import QuantizationDraws
from voxtral.run import SideStream


class TrainingModel(nn.Module):
    """The codec, and the projection of its semantic part to Whisper's width that is trained along with it."""

    def __init__(self, codec: VoxtralCodec, whisper_width: int | None):
        super().__init__()
        self.codec = codec
        self.asr_projection = nn.Linear(codec.params.semantic_dim, whisper_width) if whisper_width else nn.Identity()

    def forward(self, waveform, lengths, semantic_draws, acoustic_draws, noise) -> tuple[Tensor, ...]:
        """-> fields of CodecOutput, projected semantic embeddings [B, whisper_width, L]. Tensors only: it may be a
        graph."""
        output = self.codec(waveform, lengths, QuantizationDraws(semantic_draws, acoustic_draws, noise))
        projected = self.asr_projection(output.semantic_quantized.transpose(1, 2)).transpose(1, 2)
        return output.reconstruction, output.latent, output.codes, output.semantic_quantized, projected


def choose_trainable(codec: VoxtralCodec, parts: list[str]) -> None:
    """Of encoder and decoder, `parts` require gradients and nothing else does; a codebook follows an average."""
    codec.requires_grad_(False)
    parameters = {"encoder": codec.encoder_parameters(), "codebook": []}
    parameters["decoder"] = [*codec.decoder_blocks.parameters(), *codec.output_proj.parameters()]
    for parameter in (parameter for part in parts for parameter in parameters[part]):
        parameter.requires_grad_(True)


@torch.no_grad()
def start_codebook(codec: VoxtralCodec, batches: list[Batch], seed: int) -> None:
    """A codebook that learns starts from latents of all validation clips, so that it does not hang on the batch
    size."""
    latent = codec.encode_latent(torch.cat([b.waveform for b in batches]), torch.cat([b.lengths for b in batches]))
    semantic = latent[:, : codec.params.semantic_dim].transpose(1, 2).flatten(0, 1)
    codec.quantizer.semantic_codebook.start_from(semantic, torch.Generator().manual_seed(seed))


def update_codebook(codec: VoxtralCodec, output: CodecOutput, n_frames: Tensor, step: int) -> None:
    """Moves the codebook towards the latents of a batch whose clips have n_frames [B]."""
    semantic = output.latent[:, : codec.params.semantic_dim].transpose(1, 2).flatten(0, 1)
    valid = valid_mask(n_frames, output.latent.shape[-1]).flatten()
    codec.quantizer.semantic_codebook.update(semantic, valid, torch.Generator(semantic.device).manual_seed(step))


class WeightAverage:
    """`codec`: an exponential moving average of the parameters that learn, over a tenth of the steps so far and at most
    1 / (1 - decay) of them: a longer memory would hold a young encoder back."""

    def __init__(self, codec: VoxtralCodec, decay: float):
        self.codec, self.decay = deepcopy(codec), decay
        parameters = zip(self.codec.parameters(), codec.parameters(), strict=True)
        self.averages, self.learned = zip(*((mine, one) for mine, one in parameters if one.requires_grad), strict=True)
        self.codebooks = list(zip(self.codec.quantizer.buffers(), codec.quantizer.buffers(), strict=True))

    @torch.no_grad()
    @record_function("weight averaging")
    def update(self, step: int) -> None:
        """After step number `step`, the first is 0; a codebook, which follows an average of its own, is copied."""
        torch._foreach_lerp_(self.averages, self.learned, 1 - min(self.decay, step / (step + 10)))
        for mine, one in self.codebooks:
            mine.copy_(one)


class MicroStep:
    """Forward and backward of one micro-batch: adds its share to the gradients of model and discriminators.

    On a GPU, codec, losses of the sound, discriminators and Whisper are one CUDA graph each in place of thousands of
    small launches, recorded when this is made: before a loader's threads use the GPU, too. A graph writes its outputs
    and gradients into the same memory at each replay. `autocast`: without a cache of weights. discriminators, teacher
    (with its cache) and matching: None where their loss has no weight.
    """

    def __init__(
        self,
        config: EncoderConfig,
        process: Process,
        autocast: torch.autocast,
        model: TrainingModel,
        discriminators: Discriminators | None,
        teacher: WhisperTeacher | None,
        asr_cache: AsrCache | None,
        matching: CodeMatching | None,
    ):
        self.config, self.process, self.autocast, self.model = config, process, autocast, model
        self.discriminators, self.teacher, self.asr_cache, self.matching = discriminators, teacher, asr_cache, matching
        self.params, self.quantizer = model.codec.params, model.codec.quantizer
        self.scale = codebook_scale(self.quantizer.semantic_codebook.embedding)
        self.sound_losses = SoundLosses(config.loss, config.train.stft_fft_sizes, self.params.sampling_rate)
        self.sound_losses.to(process.device)
        self.side_stream = SideStream(process.device)
        self.n_samples = round(config.data.max_sec * SAMPLE_RATE)
        self.n_frames = ceil_div(self.n_samples, self.params.frame_size)
        self.crop_samples = round(min(config.discriminator.crop_sec, config.data.max_sec) * SAMPLE_RATE)
        if discriminators:
            self.adversarial = AdversarialLosses(discriminators)
        if process.device.type == "cuda":
            if config.train.compile:
                self._compile()
            if config.train.cuda_graphs:
                self._record_graphs(config.data.batch_size)
        if process.world_size > 1:
            self.model = DistributedDataParallel(self.model, broadcast_buffers=False)
            if discriminators:
                self.adversarial = DistributedDataParallel(self.adversarial, broadcast_buffers=False)

    def _compile(self) -> None:
        """Fuses kernels, each of these as a whole."""
        modules = [self.model, self.sound_losses]
        modules += [self.adversarial] if self.discriminators else []
        modules += [self.teacher.model.encoder] if self.teacher else []
        for module in modules:
            module.forward = torch.compile(module.forward, dynamic=False, fullgraph=True)

    def _record_graphs(self, n_clips: int) -> None:
        """Puts graphs in the place of the functions. What they are recorded with has the shapes of every batch."""
        record, device = torch.cuda.make_graphed_callables, self.process.device
        if self.teacher:
            self.teacher.record(n_clips)
        audio = torch.zeros(n_clips, 1, self.n_samples, device=device)
        audio_crop = audio[..., : self.crop_samples].clone()
        lengths = torch.full((n_clips,), self.n_samples, device=device)
        draws = QuantizationDraws.sample(0, n_clips, self.params.acoustic_dim, self.n_frames, device)
        sound_losses = record(self.sound_losses, (audio.clone().requires_grad_(), audio.clone(), lengths.clone()))
        self.sound_losses = lambda *tensors, weightless: sound_losses(*tensors)  # a graph holds all of them
        with self.autocast:
            self.model = record(self.model, (audio, lengths, *vars(draws).values()))
            if self.discriminators:
                fake = audio_crop.clone().requires_grad_()
                self.adversarial = record(self.adversarial, (audio_crop, fake, lengths / self.n_samples))

    def __call__(
        self, step: int, micro: int, batch: Batch, log_zero_weights: bool
    ) -> tuple[dict[str, Tensor], CodecOutput, Tensor]:
        """Micro-batch number `micro` of a step -> scalars by the names under which they are logged, the codec's output,
        frames of each clip [B]. log_zero_weights: losses of the sound of weight 0 are among the scalars in any case."""
        accumulation = self.config.train.accumulation
        seed = hash((self.config.seed, step, micro)) & 0x7FFFFFFF
        n_frames = ceil_div(batch.lengths, self.params.frame_size)
        synchronizes = self.process.world_size == 1 or micro == accumulation - 1
        with nullcontext() if synchronizes else self.model.no_sync():
            targets = self.asr_cache and batch.targets
            needs_teacher = self.teacher and not targets
            if needs_teacher:  # Whisper hears the batch beside all else
                with self.side_stream, record_function("Whisper"):
                    targets = self.teacher(batch.waveform, batch.lengths, self.n_frames)
            output, projected = self.run_codec(batch, seed)
            reconstruction = mask_samples(output.reconstruction, batch.lengths)
            # Cut here, backward of what the waveform's losses hang on comes while Whisper may still be busy.
            decoded = reconstruction.detach().requires_grad_()
            decoded.grad = torch.zeros_like(decoded)
            losses, scalars, adversary = {}, {}, []
            if self.discriminators:
                hinge, feature = self._discriminate(batch, decoded, seed + 1)
                scalars["loss/discriminator"], adversary = hinge.detach().clone(), [hinge]
                if step >= self.config.discriminator.warmup_steps:
                    losses["feature"] = feature
            with record_function("losses of the sound"):
                losses |= self.sound_losses(decoded, batch.waveform, batch.lengths, weightless=log_zero_weights)
                weighted = self._weighted(losses, step)
            torch.autograd.backward([loss / accumulation for loss in adversary + weighted])
            with record_function("losses of the codes"):
                of_codes = self.code_losses(batch, output, n_frames)
                if self.teacher:
                    self.side_stream.wait()
                    of_codes["asr"] = asr_distillation_loss(projected.float(), targets)
                weighted_codes = self._weighted(of_codes, step)
            roots = [reconstruction, *(loss / accumulation for loss in weighted_codes)]
            torch.autograd.backward(roots, [decoded.grad, *[None] * len(weighted_codes)])
        if self.asr_cache and needs_teacher:
            self.asr_cache.write(batch.files, targets)
        # Copies: a graph reuses its memory.
        scalars |= {f"loss/{name}": loss.detach().clone() for name, loss in (losses | of_codes).items()}
        return {"loss/total": sum(weighted + weighted_codes).detach(), **scalars}, output, n_frames

    def _weighted(self, losses: dict[str, Tensor], step: int) -> list[Tensor]:
        """Those that have a weight, times it."""
        decay = self.config.train.reconstruction_decay**step
        weights = {name: w * (decay if name in DECAYING else 1.0) for name, w in vars(self.config.loss).items() if w}
        return [weights[name] * loss for name, loss in losses.items() if name in weights]

    def run_codec(self, batch: Batch, seed: int) -> tuple[CodecOutput, Tensor]:
        """With stochastic quantization -> its output, projected semantic embeddings [B, whisper_width, L]."""
        n_clips, process = self.config.data.batch_size, self.process
        shape = (n_clips, self.params.acoustic_dim, self.n_frames)
        draws = QuantizationDraws.sample(seed, *shape, process.device, process.rank, process.world_size)
        with self.autocast, record_function("codec"):
            *fields, projected = self.model(batch.waveform, batch.lengths, *vars(draws).values())
        return CodecOutput(*fields), projected

    def _discriminate(self, batch: Batch, reconstruction: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """AdversarialLosses of random crops."""
        process, n_samples = self.process, self.crop_samples
        with record_function("discriminators"), self.autocast:
            starts, share = random_crops(batch.lengths, n_samples, seed, process.rank, process.world_size)
            target, fake = (crop(waveform, starts, n_samples) for waveform in (batch.waveform, reconstruction))
            return self.adversarial(target, fake, share)

    def code_losses(self, batch: Batch, output: CodecOutput, n_frames: Tensor) -> dict[str, Tensor]:
        """Commitment, and those of known codes that this run has."""
        semantic = output.latent[:, : self.params.semantic_dim]
        losses = {"commit": commitment_loss(semantic, output.semantic_quantized, n_frames)}
        if self.matching:
            losses["match"] = self.matching(output, n_frames)
        if batch.codes is not None:
            losses["codes"] = codes_loss(output.latent, batch.codes, self.quantizer, self.scale)
        return losses
