"""Phase 1 with the frozen language model as a second teacher: does it raise what sound leaves open?

    python research/model_in_the_loop.py --checkpoint assets/standin --output runs/loop --pairs 8 \\
        --true assets/standin_withheld_encoder.safetensors loss.codes=0 match.codes=presets \\
        data.data_root=speech 'data.sources=[{kind: manifest, path: talk.csv}]'

Trains an encoder as train_encoder.py does (its config, losses, crops and draws; without pairs the same weights, bit for
bit), and from step --after on each step also encodes --pairs pairs of clips: a reference, and another sentence of its
speaker. The frozen model gets text and reference as a prompt and the spoken frames behind it, all in *our* codes
(value: the codes; gradient: soft rows, as in phase 2). Two terms:

- semantic: cross-entropy of our soft assignment to the codebook's entries under what the model expects of each frame;
- flow: flow-matching error of our levels at the model's hidden states.

--anchors: pairs of what the presets spoke (--generated, by generate_clips.py). Only the reference is ours there; what
is said, as input and as target, are the true codes.

--contrast: the two terms are likelihoods, and the best answer to a likelihood is the likeliest code. A copy of the flow
head learns along the way which of *our* codes follow, and its likelihood is subtracted: the gradient is that of the
divergence of our codes from the model's, given text, voice and past, and is none where both are distributed alike.

Every --log-every steps comes a line: means of the losses, perplexity of the semantic codes, norms of the gradients that
each term sends to the encoder, and of held-out pairs through the averaged encoder how surprised the model is by our
codes (nll, nats a frame; flow), beside the true encoder's: below those, ours have collapsed to likely codes. OUTPUT's
checkpoints are laid out as train_encoder.py's, for research/clone_needs.py --encoder NAME=OUTPUT.

Predictions for model_in_the_loop.sh on the embedded stand-in, written before any run on a GPU, after 20 steps on a CPU
(from an encoder of 150 steps, --semantic 0.1 --flow 1, gradients half as large as mel's each): held-out nll fell from
6.5 to 4.8, flow from 0.42 to 0.33, and perplexity from 20 to 12. So the pull to likely codes is there, and the default
weights are a third of those. (A young encoder's few codes are likely ones: without the model nll rises at first.)

- model, beside sound_match: semantic codes equal rise by a third or more (the text says which sound a frame is), levels
  within one change by less than 3 points; the margin kept stays within the noise (95 to 99 % leave no room); 1 to 3
  points fewer words wrong. Held-out nll falls by a nat or more and flow by a tenth; perplexity by 10 to 30 %.
- model_without_match: perplexity half of sound_match's or less, nll and flow below the true encoder's, levels within
  one 5 points lower than with match: match holds, though not fully.
- anchors: nothing that can be told from the noise; what follows hangs too weakly on the reference (phase 2 found so,
  too).
- model_anchors: as model.
- contrast: nll and flow not below the true encoder's, perplexity the highest, levels within one as model's or better.
"""

import dataclasses
import json
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from voxtral.audio import BadClip, load_segment
from voxtral.checkpoint import SafetensorsFile, save_tensors
from voxtral.code_metrics import code_agreement
from voxtral.codec import VoxtralCodec, ceil_div, mask_samples, valid_mask
from voxtral.command_line import script_parser
from voxtral.config import EncoderConfig, check_encoder_config, load_config
from voxtral.data import SAMPLE_RATE, SpeechDataset, make_loader
from voxtral.distillation import at, masked_mean, soft_rows
from voxtral.encoder_training import MicroStep, TrainingModel, choose_trainable
from voxtral.errors import UserError, one_sentence, shown
from voxtral.generation import Models
from voxtral.known_codes import CodeMatching, read_codes
from voxtral.loader import TensorBatch
from voxtral.losses import DECAYING, codebook_distance
from voxtral.pairs import AUDIO, GENERATION, sequence
from voxtral.params import END_AUDIO, N_SPECIAL_IDS, CodecParams
from voxtral.presets import codes_to_match
from voxtral.processes import start_process
from voxtral.run import adamw, cosine_with_warmup, set_learning_rate
from voxtral.sources import Clip, DataError, SourceConfig, find_clips, split_validation
from voxtral.tts import load_tokenizer, prompt_tokens

LEARNED = ("l1", "stft", "mel", "commit", "match")  # of the config's losses; others must be 0
COPY_LEARNING_RATE = 3e-4  # of the flow head that learns our codes (--contrast)


# ---------------------------------------------------------------- pairs of clips


@dataclass
class TextedBatch(TensorBatch):
    """P pairs: a reference, and what its speaker says after it; see PairBatch for what is not explained here."""

    waveform: Tensor  # [2 P, 1, T] float32: the references, then what is said; with known codes the P references alone
    lengths: Tensor  # [2 P or P] int64, samples
    codes: Tensor | None  # [P, 37, L] int64, known codes of what is said
    n_reference: Tensor  # [P] int64, frames
    n_speech: Tensor  # [P] int64, frames
    tokens: Tensor  # [P, S]
    kind: Tensor  # [P, S]
    place: Tensor  # [P, S]
    begins: Tensor  # [P]


class TextedPairs(Dataset):
    """Item (number, index): clip `index` as the reference and, drawn by (seed, number), another sentence of its
    speaker. All clips are kept in memory (0.1 MB a second), each cut to max_sec; `clips`: those that can be used. Where
    they have codes, what is said is these. Raises DataError when there is no speaker with two sentences."""

    def __init__(self, clips: list[Clip], tokenizer: MistralTokenizer, params: CodecParams, max_sec: float, seed: int):
        self.params, self.seed = params, seed
        max_frames = int(max_sec * params.frame_rate_hz)

        def read(clip: Clip) -> tuple[Tensor, Tensor | None] | BadClip:
            try:
                waveform, _ = load_segment(clip.path, 0.0, max_frames * params.frame_size / SAMPLE_RATE)
                return torch.from_numpy(waveform), read_codes(clip.codes, params)[
                    :, :max_frames
                ] if clip.codes else None
            except BadClip as error:
                return error

        with ThreadPool(4) as pool:
            found = pool.map(read, clips)
        for error in (one for one in found if isinstance(one, BadClip)):
            print(shown(f"left out: {error}"))
        heard = [(clip, one) for clip, one in zip(clips, found) if not isinstance(one, BadClip)]
        texts, pairs = {}, [(clip, one) for clip, one in heard if clip.text.strip()]
        for clip, _ in pairs:
            texts.setdefault(clip.speaker, set()).add(clip.text)
        pairs = [(clip, one) for clip, one in pairs if len(texts[clip.speaker]) > 1]
        if not pairs:
            raise DataError(f"None of {len(clips)} clips is of a speaker with two sentences and their texts.")
        self.clips, self.heard = [clip for clip, _ in pairs], [one for _, one in pairs]
        self.prompts = {text: prompt_tokens(tokenizer, text, 1) for text in {clip.text for clip in self.clips}}
        self.of_speaker = {}
        for index, clip in enumerate(self.clips):
            self.of_speaker.setdefault(clip.speaker, []).append(index)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        number, index = item
        clip, random = self.clips[index], np.random.default_rng((self.seed, number))
        others = [other for other in self.of_speaker[clip.speaker] if self.clips[other].text != clip.text]
        other = others[int(random.integers(len(others)))]
        (reference, _), (speech, codes) = self.heard[index], self.heard[other]
        n_reference, n_speech = (ceil_div(len(waveform), self.params.frame_size) for waveform in (reference, speech))
        n_speech = n_speech if codes is None else codes.shape[1]
        return {
            "reference": reference,
            "speech": speech,
            "codes": codes,
            "n_reference": n_reference,
            "n_speech": n_speech,
            **sequence(*self.prompts[self.clips[other].text], n_reference + 1, n_speech),
        }


def collate_texted(items: list[dict]) -> TextedBatch:
    """Items of TextedPairs -> TextedBatch."""
    known = items[0]["codes"] is not None
    waveforms = [item[key] for key in ("reference", "speech")[: 1 if known else 2] for item in items]
    padded = {key: pad_sequence([item[key] for item in items], batch_first=True) for key in ("tokens", "kind", "place")}
    numbers = {key: torch.tensor([item[key] for item in items]) for key in ("n_reference", "n_speech", "begins")}
    return TextedBatch(
        waveform=pad_sequence(waveforms, batch_first=True)[:, None],
        lengths=torch.tensor([len(waveform) for waveform in waveforms]),
        codes=pad_sequence([item["codes"].T for item in items], batch_first=True).transpose(1, 2) if known else None,
        **padded,
        **numbers,
    )


# ---------------------------------------------------------------- the model as a teacher


@dataclass
class Frames:
    """L frames of speech, as the model sees them and as it is asked for them."""

    codes: Tensor  # [P, 37, L] int64
    rows: Tensor  # [P, L, dim], its input
    assignment: Tensor  # [P, L, K], the semantic code, as probabilities
    levels: Tensor  # [P, L, acoustic_dim], those of the codes in [-1, 1]


class FrozenModel:
    """What backbone and flow head of the checkpoint say of encoded speech. No weight of them learns."""

    def __init__(self, models: Models, temperature: float):
        self.backbone, self.acoustic, codec = models.backbone, models.acoustic, models.codec
        self.params, self.quantizer = codec.params, codec.quantizer
        self.table = codec.audio_embedding.float()
        self.temperature = temperature

    def of_codes(self, codec: VoxtralCodec, codes: Tensor) -> Frames:
        assignment = F.one_hot(codes[:, 0], self.params.semantic_codebook_size).float()
        levels = self.quantizer.decode(codes)[:, self.params.semantic_dim :].transpose(1, 2)
        return Frames(codes, codec.embed_codes(codes, self.table), assignment, levels)

    def of_latent(self, codec: VoxtralCodec, latent: Tensor) -> Frames:
        """Of a latent [P, D, L]: rows and levels of its codes with the gradients of soft ones; soft assignment."""
        codes, entries = self.quantizer.encode(latent.detach()), self.quantizer.semantic_codebook.embedding
        distance = codebook_distance(latent[:, : self.params.semantic_dim], entries)
        scale = self.temperature * distance.detach().amin(dim=1).median()
        soft = soft_rows(codec, latent, scale, self.table)
        through = self.quantizer.straight_through(self.quantizer.squash(latent), codes)
        return Frames(
            codes,
            codec.embed_codes(codes, self.table) + soft - soft.detach(),
            (-distance / scale).softmax(dim=-1).view(*soft.shape[:2], -1),
            through[:, self.params.semantic_dim :].transpose(1, 2),
        )

    def prompt_rows(self, codec: VoxtralCodec, frames: Frames, n_frames: Tensor) -> Tensor:
        """A reference as the prompt has it [P, L + 1, dim], its END_AUDIO row last."""
        ended = codec.voice_rows(frames.codes, n_frames, self.table)
        valid = valid_mask(n_frames, ended.shape[1])[..., None]
        return torch.where(valid, F.pad(frames.rows, (0, 0, 0, 1)), ended)

    def hidden(self, batch: TextedBatch, reference: Tensor, spoken: Frames) -> Tensor:
        """[P, L, dim] after the final norm, at the positions that predict each frame of `spoken`."""
        position = torch.arange(batch.kind.shape[1], device=batch.kind.device)
        is_frame = (batch.kind == GENERATION) & (position > batch.begins[:, None])
        text = self.backbone.embed_text(batch.tokens)
        x = torch.where((batch.kind == AUDIO)[..., None], at(reference, batch.place).to(text.dtype), text)
        x = torch.where(is_frame[..., None], at(spoken.rows, batch.place).to(text.dtype), x)
        return at(self.backbone(x), batch.begins[:, None] + torch.arange(spoken.rows.shape[1], device=x.device))

    def log_probabilities(self, hidden: Tensor, acoustic=None) -> Tensor:
        """[P, L, K] of the semantic codes; END_AUDIO has the rest."""
        acoustic = acoustic or self.acoustic
        logits = acoustic.semantic_codebook_output(hidden.to(acoustic.dtype))
        return (
            logits[..., END_AUDIO : self.params.semantic_codebook_size + N_SPECIAL_IDS].float().log_softmax(-1)[..., 1:]
        )

    def noisy(self, levels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> x_t, t [P, L, 1], and the velocity that leads there from the noise"""
        generator = torch.Generator(device=levels.device).manual_seed(seed)
        noise = torch.randn(levels.shape, generator=generator, device=levels.device)
        t = torch.rand(*levels.shape[:2], 1, generator=generator, device=levels.device)
        return (1 - t) * noise + t * levels, t, levels - noise

    def velocity(self, x_t: Tensor, t: Tensor, hidden: Tensor, acoustic=None) -> Tensor:
        acoustic = acoustic or self.acoustic
        return acoustic.velocity(x_t.flatten(0, 1), t.flatten(), hidden.flatten(0, 1)).view_as(x_t)

    def surprise(self, hidden: Tensor, spoken: Frames, valid: Tensor, seed: int, acoustic=None) -> dict[str, Tensor]:
        """semantic: cross-entropy of the assignment, nats a frame; flow: flow-matching error of the levels."""
        entropy = -(spoken.assignment * self.log_probabilities(hidden, acoustic)).sum(dim=-1)
        x_t, t, wanted = self.noisy(spoken.levels, seed)
        error = (self.velocity(x_t, t, hidden, acoustic) - wanted).square().mean(dim=-1)
        return {"semantic": masked_mean(entropy, valid), "flow": masked_mean(error, valid)}

    def hear(self, codec: VoxtralCodec, batch: TextedBatch, through: str) -> tuple[Tensor, Frames]:
        """-> hidden states [P, L, dim], and what was said. through: "both": the gradient reaches the encoder through
        what the model is shown, too; "target": not."""
        latent = codec.encode_latent(batch.waveform, batch.lengths).float()
        n_pairs = len(batch.kind)
        reference = self.of_latent(codec, latent[:n_pairs])
        spoken = self.of_latent(codec, latent[n_pairs:]) if batch.codes is None else self.of_codes(codec, batch.codes)
        rows, shown = self.prompt_rows(codec, reference, batch.n_reference), spoken
        if through == "target":
            rows, shown = rows.detach(), dataclasses.replace(spoken, rows=spoken.rows.detach())
        return self.hidden(batch, rows, shown), spoken


class Contrast:
    """A copy of the flow head that learns which of *our* codes follow, and what that changes of both terms."""

    def __init__(self, model: FrozenModel):
        self.model, self.copy = model, deepcopy(model.acoustic).float().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.copy.parameters(), lr=COPY_LEARNING_RATE, betas=(0.9, 0.98))

    def __call__(self, hidden: Tensor, spoken: Frames, valid: Tensor, seed: int) -> dict[str, Tensor]:
        """Gradients to the target alone. semantic: the divergence as the copy sees it, nats; flow: the frozen head's
        error less the copy's, with the gradient of distribution matching (Yin et al. 2024)."""
        model, hidden = self.model, hidden.detach()
        with torch.no_grad():
            surplus = model.log_probabilities(hidden, self.copy) - model.log_probabilities(hidden)
            x_t, t, wanted = model.noisy(spoken.levels, seed)
            ours, true = model.velocity(x_t, t, hidden, self.copy), model.velocity(x_t, t, hidden)
            value = ((true - wanted).square() - (ours - wanted).square()).mean(dim=-1)
        pull = (spoken.levels * (1 - t) * (ours - true)).mean(dim=-1)
        return {
            "semantic": masked_mean((spoken.assignment * surplus).sum(dim=-1), valid),
            "flow": masked_mean(value + pull - pull.detach(), valid),
        }

    def learn(self, codec: VoxtralCodec, hidden: Tensor, spoken: Frames, valid: Tensor, seed: int) -> None:
        known = self.model.of_codes(codec, spoken.codes)
        losses = self.model.surprise(hidden.detach(), known, valid, seed, self.copy)
        self.optimizer.zero_grad()
        (losses["semantic"] + losses["flow"]).backward()
        self.optimizer.step()


@torch.no_grad()
def examine(model: FrozenModel, codec: VoxtralCodec, batch: TextedBatch, seed: int = 0) -> tuple[dict, Tensor]:
    """-> nll (nats a frame) and flow of what is said, with hard codes as serving makes them; all codes [2 P, 37, L]."""
    codes, n_pairs = codec.encode(batch.waveform, batch.lengths), len(batch.kind)
    reference, spoken = (model.of_codes(codec, each) for each in (codes[:n_pairs], codes[n_pairs:]))
    hidden = model.hidden(batch, model.prompt_rows(codec, reference, batch.n_reference), spoken)
    found = model.surprise(hidden, spoken, valid_mask(batch.n_speech, hidden.shape[1]), seed)
    return {"nll": found["semantic"], "flow": found["flow"]}, codes


# ---------------------------------------------------------------- training


def train(options) -> list[dict]:
    """-> the rows of OUTPUT/loop.jsonl"""
    # ---- 1. config, models
    config = load_config(EncoderConfig, options.config, options.overrides)
    check_encoder_config(config)
    settings, weights = config.train, {name: weight for name, weight in vars(config.loss).items() if weight}
    if set(weights) - set(LEARNED):
        raise UserError(f"only {', '.join(LEARNED)} are known here: set loss.{min(set(weights) - set(LEARNED))}=0.")
    settings.cuda_graphs = settings.compile = False  # gradients of the losses are asked for one by one
    process = start_process(config.device)
    device = process.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16", cache_enabled=False)
    torch.manual_seed(config.seed)
    codec, origin = VoxtralCodec.start(options.checkpoint, options.start)
    known = codes_to_match(config.match.codes, codec, options.checkpoint, device)[0] if "match" in weights else None
    matching = CodeMatching(known, codec, device) if known else None
    codec.to(device).train()
    choose_trainable(codec, ["encoder"])
    params, encoder = codec.params, codec.encoder_parameters()
    crops_step = MicroStep(config, process, autocast, TrainingModel(codec, None), None, None, None, matching)
    averaged = AveragedModel(codec, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model = FrozenModel(Models.from_checkpoint(options.checkpoint, device, dtype), options.temperature)
    contrast = Contrast(model) if options.contrast else None

    # ---- 2. data
    sources, left_out = find_clips(config.data)
    train_clips, validation_clips = split_validation(sources, config.data.validation)
    clips = [clip for source in train_clips for clip in source]
    tokenizer = load_tokenizer(Path(options.checkpoint))

    def pairs_of(clips: list[Clip]) -> TextedPairs:
        return TextedPairs(clips, tokenizer, params, options.max_sec, config.seed)

    def batches_of(clips: list[Clip], n_pairs: int, data=config.data):
        data = dataclasses.replace(data, batch_size=n_pairs, num_workers=min(2, config.data.num_workers))
        return iter(make_loader(pairs_of(clips), data, config.seed + 1, options.after, collate=collate_texted))

    crops = iter(make_loader(SpeechDataset(clips, config.data.max_sec, config.seed), config.data, config.seed))
    taught = {}  # name -> batches of pairs
    if options.pairs:
        taught[""] = batches_of(clips, options.pairs)
    if options.anchors:
        spoken = dataclasses.replace(
            config.data, sources=[SourceConfig("generated", str(Path(options.generated).absolute()))]
        )
        taught["anchor_"] = batches_of([clip for one in find_clips(spoken)[0] for clip in one], options.anchors, spoken)
    held_out = pairs_of(validation_clips)
    held_out = collate_texted([held_out[i, i] for i in range(len(held_out))]).to(device)
    n_held_out = torch.cat([held_out.n_reference, held_out.n_speech])
    true, true_codes = {}, None
    if options.true:
        true_codec = deepcopy(codec)
        true_codec.load_encoder(SafetensorsFile(options.true).read(), options.true)
        true, true_codes = examine(model, true_codec, held_out)
        true = {f"true_{name}": value.item() for name, value in true.items()}
        del true_codec
    weights |= {prefix + name: getattr(options, name) for prefix in taught for name in ("semantic", "flow")}
    print("".join(f"{line}\n" for line in left_out), end="")
    print(
        f"encoder: {origin}; {len(clips)} training clips, {len(held_out.kind)} held-out pairs on {device}; weights "
        + " ".join(f"{name} {weight:g}" for name, weight in weights.items())
    )

    # ---- 3. the loop
    max_steps, optimizer = settings.max_steps, adamw(encoder, config.optimizer.learning_rate, config.optimizer)
    output, rows = Path(options.output), []
    output.mkdir(parents=True, exist_ok=True)
    (output / "loop.jsonl").unlink(missing_ok=True)
    used = torch.zeros(params.semantic_codebook_size, device=device)
    sums, n_summed, began = {}, 0, time.monotonic()
    for step in range(max_steps):
        set_learning_rate(
            optimizer,
            config.optimizer.learning_rate * cosine_with_warmup(step, config.optimizer.warmup_steps, max_steps),
        )
        logging = (step + 1) % options.log_every == 0 or step + 1 == max_steps
        seed = hash((config.seed, step, 0)) & 0x7FFFFFFF  # as train_encoder.py
        batch = next(crops).to(device, non_blocking=True)
        lengths, frames = batch.lengths, ceil_div(batch.lengths, params.frame_size)
        output_of_crops, _ = crops_step.run_codec(batch, seed)
        reconstruction = mask_samples(output_of_crops.reconstruction, lengths)
        losses = crops_step.codec_losses(list(weights), batch, reconstruction, output_of_crops, frames)
        seen = []  # by the copy of the flow head
        for prefix, batches in taught.items() if step >= options.after else ():
            pairs = next(batches).to(device, non_blocking=True)
            against = contrast if pairs.codes is None else None
            with autocast:
                hidden, spoken = model.hear(codec, pairs, "target" if against else options.through)
                valid = valid_mask(pairs.n_speech, hidden.shape[1])
                found = (against or model.surprise)(hidden, spoken, valid, seed)
            losses |= {prefix + name: loss for name, loss in found.items()}
            seen += [(hidden, spoken, valid)] if against else []
        total = sum(
            weights[name] * (settings.reconstruction_decay**step if name in DECAYING else 1) * loss
            for name, loss in losses.items()
        )
        gradients = gradient_norms(losses, weights, encoder) if logging else {}
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(encoder, settings.gradient_clip)
        optimizer.step()
        averaged.update_parameters(codec)
        for each in seen:
            with autocast:
                contrast.learn(codec, *each, seed + 1)

        used.index_add_(
            0,
            output_of_crops.codes[:, 0].flatten(),
            valid_mask(frames, output_of_crops.codes.shape[-1]).float().flatten(),
        )
        for name, value in {**losses, "gradient": norm}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        n_summed += 1
        if logging:
            means = {name: (value / n_summed).item() for name, value in sums.items()}
            step_ms = 1000 * (time.monotonic() - began) / n_summed
            share = used / used.sum()
            found, codes = examine(model, averaged.module.eval(), held_out)
            if true_codes is not None:
                found |= code_agreement(codes, true_codes, n_held_out)
            row = {
                "step": step + 1,
                **means,
                "perplexity": (-(share * share.clamp(min=1e-12).log()).sum()).exp().item(),
                **gradients,
                **{f"held_out_{name}": value.item() for name, value in found.items()},
                **true,
                "step_ms": step_ms,
            }
            rows.append(row)
            print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            with (output / "loop.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            used.zero_()
            sums, n_summed, began = {}, 0, time.monotonic()
        if (step + 1) % (settings.save_every_steps or max_steps) == 0 or step + 1 == max_steps:
            folder = output / "checkpoints" / f"step_{step + 1:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(folder / "encoder.safetensors", averaged.module.encoder_tensors())
    return rows


def gradient_norms(losses: dict[str, Tensor], weights: dict[str, float], parameters: list) -> dict[str, float]:
    """gradient_NAME -> norm of what each weighted loss sends to the parameters; their graphs are kept."""
    norms = {}
    for name, loss in losses.items():
        found = torch.autograd.grad(weights[name] * loss, parameters, retain_graph=True, allow_unused=True)
        norms[f"gradient_{name}"] = torch.stack([part.norm() for part in found if part is not None]).norm().item()
    return norms


def main(arguments=None) -> list[dict]:
    parser = script_parser(__doc__)
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="a checkpoint whose language model talks")
    parser.add_argument("--true", metavar="FILE", help="its true encoder: measured against, never learnt from")
    parser.add_argument("--start", metavar="FILE", help="encoder to start from (default: fresh weights)")
    parser.add_argument("--config", metavar="YAML", default="configs/demo.yaml", help="(default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", required=True, help="checkpoints/ and loop.jsonl")
    parser.add_argument("--pairs", metavar="N", type=int, default=0, help="of recordings, a step (default: none)")
    parser.add_argument("--anchors", metavar="N", type=int, default=0, help="of --generated, a step (default: none)")
    parser.add_argument("--generated", metavar="DIR", help="what the presets spoke (generate_clips.py)")
    parser.add_argument("--semantic", metavar="W", type=float, default=0.03, help="weight (default: %(default)s)")
    parser.add_argument("--flow", metavar="W", type=float, default=0.3, help="weight (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.1,
        help="of the soft assignment, in squared distances of latents to their entries (default: %(default)s)",
    )
    parser.add_argument("--after", metavar="STEPS", type=int, default=400, help="without pairs (default: %(default)s)")
    parser.add_argument(
        "--through",
        choices=["both", "target"],
        default="both",
        help="gradient through what the model is shown as well, or through what it is asked for alone",
    )
    parser.add_argument("--contrast", action="store_true", help="against a copy of the flow head that learns our codes")
    parser.add_argument("--max-sec", type=float, default=6.4, help="longest clip of a pair (default: %(default)s)")
    parser.add_argument("--log-every", metavar="STEPS", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    options = parser.parse_intermixed_args(arguments)
    with one_sentence():
        if options.anchors and not options.generated:
            raise UserError("--anchors needs --generated.")
        return train(options)


if __name__ == "__main__":
    main()
