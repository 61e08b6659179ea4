"""Phase 2's model: the LLM under true and under encoded references, and the losses between the two.

Teacher: the frozen base model, whose prompt holds the rows of the codes that a clip was decoded from. Student: the
model being adapted, whose prompt holds the rows of the codes that the encoder gives for that clip's waveform. Text and
speech behind the reference are the same, so every position has its counterpart.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from voxtral.acoustic import PREFIX as ACOUSTIC_PREFIX
from voxtral.checkpoint import EMBEDDING_NAME
from voxtral.code_metrics import code_agreement
from voxtral.codec import VoxtralCodec, codebook_offsets, valid_mask
from voxtral.config import DISTILLATION, PRESET, FullPipelineConfig
from voxtral.generation import Models
from voxtral.losses import MelDistance, codebook_scale
from voxtral.pairs import AUDIO, GENERATION, KINDS, PADDING, PairBatch
from voxtral.params import END_AUDIO, N_SPECIAL_IDS
from voxtral.quantizer import QuantizationDraws

BRANCHES = ("self_attn", "mlp", "attention", "feed_forward")  # of a layer of the backbone, of the acoustic transformer
CONDITION_DROP = 0.1  # share of frames whose velocity is trained without a hidden state: what guidance subtracts


@dataclass
class Pass:
    """What the model makes of a batch. `hidden` and `logits` are those of the positions that predict a frame: the last
    prompt token and all frames."""

    layers: list[Tensor]  # n_layers of [B, S, dim], before the final norm; none without a teacher to compare them with
    hidden: Tensor  # [B, L_s + 1, dim], after the final norm
    logits: Tensor  # [B, L_s + 1, 1 + K] float32, of END_AUDIO and the K semantic codes
    latent: Tensor | None  # [B, latent_dim, L_r], the encoder's, if it was at work


class FullPipeline(nn.Module):
    """Codec, backbone with LoRA, and acoustic transformer. `parts`: what can be trained, by name; of them,
    `train.trainable` requires gradients and nothing else does."""

    def __init__(self, models: Models, config: FullPipelineConfig):
        super().__init__()
        self.config = config
        self.weights = {name: weight for name, weight in vars(config.loss).items() if weight}
        self.codec, self.backbone, self.acoustic = models.codec, models.backbone, models.acoustic
        self.codec.audio_embedding = self.codec.audio_embedding.float()
        self.requires_grad_(False)
        self.mel_distance = MelDistance(self.codec.params.sampling_rate)
        self.scale = codebook_scale(self.codec.quantizer.semantic_codebook.embedding)
        self.base_table = self.codec.audio_embedding  # the teacher's
        self.table = nn.Parameter(self.base_table.clone(), requires_grad=False)
        self.parts = {
            "encoder": self.codec.encoder_parameters(),
            "embedding": [self.table],
            "backbone": list(self.backbone.parameters()),
            "acoustic": list(self.acoustic.parameters()),
        }
        self.adapter, self.base = None, self.backbone
        if "lora" in config.train.trainable:
            lora = config.lora
            shared = {id(tensor): tensor for tensor in models.backbone.state_dict(keep_vars=True).values()}
            self.base = deepcopy(models.backbone, shared)  # the same weights in modules that stay without LoRA
            adapter = LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
            )
            self.adapter = get_peft_model(self.backbone.model, adapter)
            self.parts["lora"] = [p for name, p in self.adapter.named_parameters() if "lora_" in name]
            for module in self.adapter.modules():
                if isinstance(module, BaseTunerLayer):
                    module.cast_input_dtype_enabled = False  # autocast sees to it, with fewer copies
        for part in config.train.trainable:
            for parameter in self.parts[part]:
                parameter.requires_grad_(True)
        layers = *self.backbone.model.layers, *self.acoustic.layers
        if config.train.dropout:
            for branch in (child for layer in layers for name, child in layer.named_children() if name in BRANCHES):
                add_dropout(branch, config.train.dropout)
        if config.train.compile and next(self.backbone.parameters()).is_cuda:
            for layer in layers:
                layer.compile(dynamic=True)
        if config.train.gradient_checkpointing:
            self.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})

    def trained(self) -> dict[str, Tensor]:
        """Name -> parameter, of all that is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------ passes

    def references(self, batch: PairBatch, of_encoder: bool, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> [B, L_r + 1, dim]: rows of the true codes, or of those that the encoder gives for the waveform; its
        latent."""
        if not of_encoder:
            return self.codec.voice_rows(batch.reference, batch.n_reference, table), None
        codes, latent = self.encode(batch)
        rows = self.codec.voice_rows(codes, batch.n_reference, table)
        if latent is not None and latent.requires_grad:
            # Serving sees the codes, so their rows are the value; the gradient is the soft one's.
            soft = F.pad(soft_rows(self.codec, latent, self.scale, table), (0, 0, 0, 1))
            rows = rows + torch.where(valid_mask(batch.n_reference, rows.shape[1])[..., None], soft - soft.detach(), 0)
        return rows, latent

    def encode(self, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """-> the encoder's codes [B, 37, L_r] of the references, and its latent, unless the codes were known."""
        if batch.encoded is not None:
            return batch.encoded, None
        lengths = batch.n_reference * self.codec.params.frame_size
        return self.codec.encode(batch.waveform, lengths), self.codec.encode_latent(batch.waveform, lengths).float()

    def run(self, batch: PairBatch, of_encoder: bool, adapted: bool) -> Pass:
        """One pass, with the encoder's reference or the true one, through the adapted model or the base model."""
        table = self.table if adapted else self.base_table
        rows, latent = self.references(batch, of_encoder, table)
        x = self.embed(batch, rows, table)
        backbone = self.backbone if adapted else self.base
        # Without a teacher nobody asks for the layers, and their hooks would keep torch.compile from its work.
        layers = [] if self.config.reference_sec else backbone.hidden_states(x)
        final = backbone.model.norm(layers[-1]) if layers else backbone(x)
        positions = batch.begins[:, None] + torch.arange(batch.speech.shape[-1] + 1, device=x.device)
        positions = positions.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[-1])
        hidden = final.gather(1, positions)
        end = self.codec.params.semantic_codebook_size + N_SPECIAL_IDS
        return Pass(layers, hidden, self.acoustic.semantic_codebook_output(hidden)[..., END_AUDIO:end].float(), latent)

    def embed(self, batch: PairBatch, references: Tensor, table: Tensor) -> Tensor:
        """The input of the backbone [B, S, dim]: text, reference and speech, each at its positions."""
        speech = self.codec.embed_codes(batch.speech, table)
        position = torch.arange(batch.kind.shape[1], device=batch.kind.device)
        is_frame = (batch.kind == GENERATION) & (position > batch.begins[:, None])
        text = self.backbone.embed_text(batch.tokens)
        x = torch.where((batch.kind == AUDIO)[..., None], at(references, batch.place).to(text.dtype), text)
        return torch.where(is_frame[..., None], at(speech, batch.place).to(text.dtype), x)

    # ------------------------------------------------------------ losses

    def forward(self, batch: PairBatch, seed: int) -> dict[str, Tensor]:
        """-> the losses that have a weight. `seed`: of the noise of `flow`."""
        teacher = student = preset = None
        if any(name in self.weights for name in DISTILLATION):
            with torch.no_grad():
                teacher = self.run(batch, of_encoder=False, adapted=False)
        if any(name not in PRESET for name in self.weights):
            student = self.run(batch, of_encoder=True, adapted=True)
        if any(name in PRESET for name in self.weights):
            preset = self.run(batch, of_encoder=False, adapted=True)
        return self.losses(batch, student, preset, teacher, seed)

    def losses(
        self, batch: PairBatch, student: Pass | None, preset: Pass | None, teacher: Pass | None, seed: int
    ) -> dict[str, Tensor]:
        """Those with a weight, each a mean over positions, then over clips; passes that none of them needs may be None.

        student, preset: the adapted model under the encoder's and under true references."""
        frame = torch.arange(batch.speech.shape[-1] + 1, device=batch.speech.device)
        speaks = frame < batch.n_speech[:, None]
        predicts = speaks | (batch.is_whole[:, None] & (frame == batch.n_speech[:, None]))  # END_AUDIO, too
        functions = {
            "hidden": lambda: layer_errors(student.layers, teacher.layers, batch.kind == AUDIO).mean(),
            "semantic_kl": lambda: masked_mean(divergence(student.logits, teacher.logits), predicts),
            "cross_entropy": lambda: masked_mean(
                F.cross_entropy(student.logits.transpose(1, 2), self.next_ids(batch) - END_AUDIO, reduction="none"),
                predicts,
            ),
            "preset_hidden": lambda: layer_errors(preset.layers, teacher.layers, batch.kind != PADDING).mean(),
            "preset_kl": lambda: masked_mean(divergence(preset.logits, teacher.logits), predicts),
            "flow": lambda: self.flow(batch, student, speaks, seed),
            "mel": lambda: self.mel_distance(
                self.decode(student.latent), batch.waveform, batch.n_reference * self.codec.params.frame_size
            ),
        }
        return {name: functions[name]() for name in self.weights}

    def decode(self, latent: Tensor) -> Tensor:
        """[B, latent_dim, L] -> [B, 1, L * 1920] float32, what the decoder makes of its codes; straight-through
        gradient."""
        never = latent.new_zeros(len(latent))  # passes through the quantizer unquantized
        mixed, _, _ = self.codec.quantizer(latent, QuantizationDraws(never, never, torch.zeros_like(latent[:, :1])))
        return self.codec.decode_latent(mixed).float()

    def next_ids(self, batch: PairBatch) -> Tensor:
        """[B, L_s + 1] semantic ids: of the frame after each position, at last END_AUDIO."""
        ids = F.pad(batch.speech[:, 0] + N_SPECIAL_IDS, (0, 1), value=END_AUDIO)
        past = torch.arange(ids.shape[1], device=ids.device) >= batch.n_speech[:, None]
        return ids.masked_fill(past, END_AUDIO)

    def flow(self, batch: PairBatch, student: Pass, speaks: Tensor, seed: int) -> Tensor:
        """Squared error of the velocity on the straight way from noise to the next frame's levels (flow matching, paper
        section 2.2)."""
        levels = self.codec.params.acoustic_codebook_size - 1
        target = batch.speech[:, 1:].transpose(1, 2).float() * 2 / levels - 1  # [B, L_s, acoustic_dim]
        generator = torch.Generator(device=target.device).manual_seed(seed)
        noise = torch.randn(target.shape, generator=generator, device=target.device)
        draws = torch.rand(2, *target.shape[:2], 1, generator=generator, device=target.device)
        x_t = (1 - draws[0]) * noise + draws[0] * target
        condition = student.hidden[:, :-1]
        if "acoustic" in self.config.train.trainable:
            condition = torch.where(draws[1] < CONDITION_DROP, 0, condition)
        velocity = self.acoustic.velocity(x_t.flatten(0, 1), draws[0].flatten(), condition.flatten(0, 1)).view_as(x_t)
        return masked_mean((velocity - (target - noise)).square().mean(dim=-1), speaks[:, :-1])


def add_dropout(module: nn.Module, share: float) -> None:
    """Of what `module` returns (of a tuple, the first), while it trains."""

    def drop(module, inputs, output):
        if isinstance(output, tuple):
            return F.dropout(output[0], share, module.training), *output[1:]
        return F.dropout(output, share, module.training)

    module.register_forward_hook(drop)


# ---------------------------------------------------------------- embeddings


def at(rows: Tensor, place: Tensor) -> Tensor:
    """rows [B, N, dim], place [B, S] -> [B, S, dim]; places beyond the rows give the last one."""
    return rows.gather(1, place.clamp(max=rows.shape[1] - 1)[..., None].expand(-1, -1, rows.shape[-1]))


def soft_rows(codec: VoxtralCodec, latent: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Latent [B, latent_dim, L] -> [B, L, dim], differentiable: the semantic rows weighed by a softmax over squared
    distances (in units of `scale`), and between the rows of the two nearest levels of each acoustic channel,
    linearly."""
    params, codebook = codec.params, codec.quantizer.semantic_codebook.embedding.to(latent.dtype)
    semantic, squashed = latent[:, : params.semantic_dim].transpose(1, 2), latent[:, params.semantic_dim :].tanh()
    distance = torch.cdist(semantic, codebook[None]).square()
    offsets = codebook_offsets(params).to(latent.device)
    first = offsets[0] + N_SPECIAL_IDS
    rows = (-distance / scale).softmax(dim=-1) @ table[first : first + params.semantic_codebook_size]
    level = (squashed + 1) / 2 * (params.acoustic_codebook_size - 1)
    below = level.detach().floor().clamp(max=params.acoustic_codebook_size - 2)
    share = (level - below).transpose(1, 2)[..., None]  # [B, L, acoustic_dim, 1]
    index = below.long().transpose(1, 2) + N_SPECIAL_IDS + offsets[1:]
    lower, upper = F.embedding(index, table), F.embedding(index + 1, table)
    return rows + (lower + share * (upper - lower)).sum(dim=2)


# ---------------------------------------------------------------- distances


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[..., B, S] -> [...], mean over the masked positions of each sequence, then over the sequences."""
    return (torch.where(mask, values, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).mean(dim=-1)


def layer_errors(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> Tensor:
    """Mean squared error [n_layers] of the layers [B, S, dim] at masked positions; all at once: few launches."""
    return masked_mean((torch.stack(student).float() - torch.stack(teacher).float()).square().mean(dim=-1), mask)


def variance(x: Tensor, mask: Tensor) -> Tensor:
    """Of all values of x [..., B, S, dim] at masked positions [B, S] -> [...]."""
    mean = masked_mean(x.float().mean(dim=-1), mask)
    return masked_mean(x.float().square().mean(dim=-1), mask) - mean.square()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Logits [..., K] -> KL(teacher || student) [...], nats."""
    return F.kl_div(student.log_softmax(dim=-1), teacher.log_softmax(dim=-1), log_target=True, reduction="none").sum(
        dim=-1
    )


# ---------------------------------------------------------------- validation


def clip_means(model: FullPipeline, batches: list[PairBatch], device, measure: Callable[[PairBatch], dict]) -> dict:
    """What measure() gives of every batch, tensors of any shape, averaged over clips, and the `loss/total`."""
    sums, n_clips = {}, 0
    for batch in batches:
        for name, value in measure(batch.to(device)).items():
            sums[name] = sums.get(name, 0) + value.double().cpu() * len(batch.kind)
        n_clips += len(batch.kind)
    means = {name: (value / n_clips).tolist() for name, value in sums.items()}
    return means | {"loss/total": sum(weight * means[f"loss/{name}"] for name, weight in model.weights.items())}


@torch.no_grad()
def compare(model: FullPipeline, batches: list[PairBatch], device) -> dict:
    """The adapted model on held-out pairs against the base model under true references.

    `ours`: under the encoder's references, what phase 2 is to mend. `preset`: under true ones, as a preset's prompt has
    them, what it must not harm. For both: top1, the share of equal most likely semantic ids, and kl (nats) of their
    distribution, where frames are predicted; mse, its normalized form and cosine of the layers by kind of position,
    the mean and a list by layer. semantic_equal, levels_equal, levels_within_1: the encoder's codes against the true
    ones. `loss/...`: the losses that have a weight, and `loss/total`.
    """

    def measure(batch: PairBatch) -> dict[str, Tensor]:
        teacher = model.run(batch, of_encoder=False, adapted=False)
        frame = torch.arange(teacher.hidden.shape[1], device=device)
        predicts = frame < batch.n_speech[:, None] + batch.is_whole[:, None]
        passes = {
            name: model.run(batch, of_encoder, adapted=True) for name, of_encoder in (("ours", True), ("preset", False))
        }
        losses = model.losses(batch, passes["ours"], passes["preset"], teacher, seed=0)
        values = {f"loss/{name}": loss for name, loss in losses.items()}
        values |= code_agreement(model.encode(batch)[0], batch.reference, batch.n_reference)
        for name, student in passes.items():
            same = (student.logits.argmax(dim=-1) == teacher.logits.argmax(dim=-1)).float()
            values[f"{name}_top1"] = masked_mean(same, predicts)
            values[f"{name}_kl"] = masked_mean(divergence(student.logits, teacher.logits), predicts)
            for kind, number in KINDS.items():
                mask = batch.kind == number
                errors = layer_errors(student.layers, teacher.layers, mask)
                variances = variance(torch.stack(teacher.layers), mask)
                ours, true = torch.stack(student.layers).float(), torch.stack(teacher.layers).float()
                cosines = masked_mean(F.cosine_similarity(ours, true, dim=-1), mask)
                values |= {
                    f"{name}_mse_{kind}_by_layer": errors,
                    f"{name}_normalized_{kind}_by_layer": errors / variances,
                    f"{name}_cosine_{kind}_by_layer": cosines,
                }
        return values

    metrics = clip_means(model, batches, device, measure)
    by_layer = {name: value for name, value in metrics.items() if isinstance(value, list)}
    return metrics | {name.removesuffix("_by_layer"): sum(value) / len(value) for name, value in by_layer.items()}


@torch.no_grad()
def held_out_losses(model: FullPipeline, batches: list[PairBatch], device) -> dict:
    """A language model from nothing on held-out pairs: `loss/...` that have a weight and `loss/total`; `top1`, how
    often the likeliest semantic id is the next one; `end_top1`, the same where the speech ends."""

    def measure(batch: PairBatch) -> dict[str, Tensor]:
        student = model.run(batch, of_encoder=True, adapted=True)
        frame = torch.arange(student.logits.shape[1], device=device)
        right = (student.logits.argmax(dim=-1) + END_AUDIO == model.next_ids(batch)).float()
        ends = (frame == batch.n_speech[:, None]) & batch.is_whole[:, None]
        losses = model.losses(batch, student, None, None, seed=0)
        return {f"loss/{name}": loss for name, loss in losses.items()} | {
            "top1": masked_mean(right, frame < batch.n_speech[:, None]),
            "end_top1": masked_mean(right, ends),
        }

    return clip_means(model, batches, device, measure)


# ---------------------------------------------------------------- back to the checkpoint


def native_tensors(model: FullPipeline) -> dict[str, Tensor]:
    """What is trained besides LoRA and encoder, under the checkpoint's names and in its order of rows."""
    trainable, tensors = model.config.train.trainable, {}
    if "embedding" in trainable:
        tensors[EMBEDDING_NAME] = model.table
    if "backbone" in trainable:
        tensors |= model.backbone.native_state_dict()
    if "acoustic" in trainable:
        tensors |= {ACOUSTIC_PREFIX + name: tensor for name, tensor in model.acoustic.state_dict().items()}
    return tensors
