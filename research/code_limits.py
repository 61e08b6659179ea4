"""How far do decoder and losses ask for the true encoder's codes at all, and what keeps trained encoders from them?

descent  No encoder: the latents of every clip start at the true ones and follow the gradient of the reconstruction
         losses (loss.l1, loss.stft, loss.mel, loss.commit of the config) through the frozen decoder. If they walk away
         from the true codes while the sound gets better, then sound alone does not tell which codes are the true ones.
supervised  A fresh encoder is given the true latents of the training speech, which nobody with the real checkpoint can:
         how many codes of unseen speakers does it find? What is missing then is for lack of data, size or steps; what a
         trained encoder misses beyond that, sound and statistics do not tell it.
encoders Trained encoders (--encoder FILE ...): in which directions of the true latents do they err?

Needs a stand-in checkpoint and its withheld encoder, minutes on two CPU cores. OUTPUT gets results.json and table.md.
"""

import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

sys.path[:0] = [str(folder) for folder in list(Path(__file__).parents)[:2]]
from withheld_data import training_clips, unseen_clips, withheld_parser

from voxtral.checkpoint import SafetensorsFile, write_text
from voxtral.code_metrics import code_agreement
from voxtral.codec import VoxtralCodec, ceil_div, valid_mask
from voxtral.command_line import check_options
from voxtral.config import EncoderConfig, StandinConfig, load_config
from voxtral.data import Batch, SpeechDataset, make_loader, validation_batches
from voxtral.encoder_training import choose_trainable
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation import fresh_encoder
from voxtral.evaluation_report import markdown
from voxtral.json_files import write_json
from voxtral.losses import SoundLosses, commitment_loss
from voxtral.processes import start_process
from voxtral.run import cosine_with_warmup, set_learning_rate
from voxtral.run_folder import environment
from voxtral.sources import Clip

N_SHOWN = 6  # points of a descent
N_WIDEST = 5  # directions
COLUMNS = {
    "mel": "mel ↓",
    "semantic_equal": "semantic =",
    "levels_equal": "levels =",
    "levels_within_1": "levels ±1",
    "loss": "loss",
}

EXAMPLES = """examples:
  # the embedded stand-in, its held-out synthetic voices
  python research/code_limits.py --standin assets/standin --withheld assets/standin_withheld_encoder.safetensors \\
      --data configs/demo.yaml

  # a stand-in of your own, on people, with the losses that it was trained with (those of its config)
  python research/code_limits.py --standin runs/standin_mid/released --data configs/standin_mid.yaml \\
      --withheld runs/standin_mid/withheld_encoder.safetensors --eval /my/speech/eval.csv data.data_root=/my/speech
"""


class Limits:
    """Batches of unseen clips, their true latents, and what other latents would be worth."""

    def __init__(self, codec: VoxtralCodec, batches: list[Batch], config: EncoderConfig):
        self.codec, self.config = codec, config
        sound = SoundLosses(config.loss, config.train.stft_fft_sizes, codec.params.sampling_rate)
        self.sound_losses = sound.to(codec.audio_embedding.device)
        self.batches = [batch.to(codec.audio_embedding.device) for batch in batches]
        self.frames = [ceil_div(batch.lengths, codec.params.frame_size) for batch in self.batches]
        self.true = [self.encode(batch.waveform, batch.lengths) for batch in self.batches]
        self.codes = [codec.quantizer.encode(latent) for latent in self.true]
        self.deviation = self.together(self.true).std(dim=1, keepdim=True)  # [latent_dim, 1]

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        return self.codec.encode_latent(waveform, lengths).float()

    def valid(self, i: int) -> Tensor:
        """[B, L]: frames of batch i that are not padding."""
        return valid_mask(self.frames[i], self.true[i].shape[-1])

    def together(self, latents: list[Tensor]) -> Tensor:
        """[latent_dim, frames] of all clips, as the decoder sees them."""
        return torch.cat(
            [self.codec.quantizer.squash(latent).transpose(1, 2)[self.valid(i)] for i, latent in enumerate(latents)]
        ).T

    def agreement(self, codes: list[Tensor]) -> dict[str, float]:
        """Shares of codes that equal the true ones, mean over frames."""
        sums, n_frames = Counter(), sum(frames.sum().item() for frames in self.frames)
        for ours, true, frames in zip(codes, self.codes, self.frames):
            for name, value in code_agreement(ours, true, frames).items():
                sums[name] += frames.sum().item() * value.item()
        return {name: total / n_frames for name, total in sums.items()}

    @torch.no_grad()
    def measure(self, latents: list[Tensor]) -> dict[str, float]:
        """COLUMNS but the loss: mean over clips for the sound, over frames for the codes."""
        codes = [self.codec.quantizer.encode(latent) for latent in latents]
        mel = 0.0
        for batch, ours in zip(self.batches, codes):
            decoded = self.codec.decode(ours)[..., : batch.waveform.shape[-1]].float()
            mel += len(batch.lengths) * self.sound_losses.mel_distance(decoded, batch.waveform, batch.lengths).item()
        return {"mel": mel / sum(len(batch.lengths) for batch in self.batches)} | self.agreement(codes)

    def loss(self, i: int, latent: Tensor) -> Tensor:
        """The reconstruction losses of the config at step 0, nothing quantized; clips weigh alike in any batch."""
        batch, weights, semantic = self.batches[i], self.config.loss, self.codec.params.semantic_dim
        decoded = self.codec.decode_latent(self.codec.quantizer.squash(latent))[..., : batch.waveform.shape[-1]].float()
        quantized = self.codec.quantizer.decode(self.codec.quantizer.encode(latent.detach()))[:, :semantic]
        losses = self.sound_losses(decoded, batch.waveform, batch.lengths, weightless=False)
        losses["commit"] = commitment_loss(latent[:, :semantic], quantized, self.frames[i])
        return sum(getattr(weights, name) * loss for name, loss in losses.items())

    # ------------------------------------------------------------ the measurements

    def descent(self, steps: int, learning_rate: float) -> list[dict]:
        latents = [true.clone().requires_grad_() for true in self.true]
        optimizer = torch.optim.Adam(latents, lr=learning_rate)
        shown = {round(steps * i / N_SHOWN) for i in range(N_SHOWN + 1)}
        rows, n_clips = [], sum(len(batch.lengths) for batch in self.batches)
        for step in range(steps + 1):
            optimizer.zero_grad()
            total = 0.0
            for i, latent in enumerate(latents):
                loss = len(latent) * self.loss(i, latent)  # every clip's latents follow the gradient of its own loss
                loss.backward()
                total += loss.item()
            if step in shown:
                rows.append(
                    {"measurement": "descent", "at": step}
                    | self.measure([latent.detach() for latent in latents])
                    | {"loss": total / n_clips}
                )
                print(
                    f"descent, step {step}: " + "  ".join(f"{COLUMNS[name]} {rows[-1][name]:.3f}" for name in COLUMNS),
                    flush=True,
                )
            optimizer.param_groups[0]["lr"] = learning_rate * cosine_with_warmup(step, 0, steps)
            optimizer.step()
        return rows

    def supervised(self, clips: list[Clip], steps: int) -> dict:
        """The loss: L1 of the latents as the decoder sees them, in deviations of each channel."""
        config, quantizer, device = self.config, self.codec.quantizer, self.deviation.device
        student = deepcopy(self.codec)
        student.load_encoder(fresh_encoder(self.codec, config.seed), "a fresh encoder")
        choose_trainable(student, ["encoder"])
        parameters = student.encoder_parameters()
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.optimizer.learning_rate,
            betas=tuple(config.optimizer.betas),
            weight_decay=config.optimizer.weight_decay,
            fused=device.type == "cuda",
        )
        dataset = SpeechDataset(clips, config.data.max_sec, config.seed, speed=config.data.speed)
        batches = iter(make_loader(dataset, config.data, config.seed))
        for step in range(steps):
            set_learning_rate(optimizer, config.optimizer.learning_rate * cosine_with_warmup(step, steps // 20, steps))
            batch = next(batches).to(device, non_blocking=True)
            wanted = self.encode(batch.waveform, batch.lengths)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                found = student.encode_latent(batch.waveform, batch.lengths).float()
            frames = valid_mask(ceil_div(batch.lengths, self.codec.params.frame_size), wanted.shape[-1])
            error = ((quantizer.squash(found) - quantizer.squash(wanted)).abs() / self.deviation).mean(dim=1)  # [B, L]
            loss = (error * frames).sum() / frames.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.train.gradient_clip)
            optimizer.step()
        with torch.no_grad():
            latents = [student.encode_latent(batch.waveform, batch.lengths).float() for batch in self.batches]
        return {"measurement": "supervised", "at": steps} | self.measure(latents) | {"loss": loss.item()}

    @torch.no_grad()
    def encoders(self, files: list[Path]) -> list[dict]:
        """error_by_direction: mean square error of the acoustic latents along each principal direction of the true
        ones, the widest first, over the variance of these there; 1 is what saying the mean would miss."""
        student, semantic = deepcopy(self.codec), self.codec.params.semantic_dim
        true = self.together(self.true)[semantic:] / self.deviation[semantic:]
        variances, directions = torch.linalg.eigh(true.cov())
        rows = []
        for file in files:
            student.load_encoder(SafetensorsFile(file).read(), file)
            latents = [student.encode_latent(batch.waveform, batch.lengths).float() for batch in self.batches]
            error = self.together(latents)[semantic:] / self.deviation[semantic:] - true
            by_direction = ((directions.T @ error).square().mean(dim=1) / variances).flip(0)
            rows.append(
                {"measurement": f"encoder {'/'.join(file.parent.parts[-2:])}", "at": ""}
                | self.measure(latents)
                | {"error_by_direction": by_direction.tolist()}
            )
        return rows


def table(rows: list[dict]) -> str:
    names = {"descent": "descent, step", "supervised": "supervised, steps"}
    lines = []
    for row in rows:
        by_direction = row.get("error_by_direction", [])
        lines.append(
            [
                names.get(row["measurement"], row["measurement"]),
                str(row["at"]),
                f"{row['mel']:.3f}",
                *(f"{row[name]:.1%}" for name in ("semantic_equal", "levels_equal", "levels_within_1")),
                f"{row['loss']:.3f}" if "loss" in row else "",
                *(f"{mean(part):.0%}" if part else "" for part in (by_direction[:N_WIDEST], by_direction[N_WIDEST:])),
            ]
        )
    widest = f"error / variance, {N_WIDEST} widest directions"
    return markdown(["", "at", *COLUMNS.values(), widest, "the other directions"], lines)


def main(arguments=None) -> None:
    parser = withheld_parser(__doc__, EXAMPLES, n_clips=32, output="runs/code_limits")
    add = parser.add_argument
    add("--steps", metavar="N", type=int, default=120, help="of the descent (default: %(default)s)")
    add("--learning-rate", metavar="R", type=float, default=0.02, help="of the descent (default: %(default)s)")
    add(
        "--supervised",
        metavar="N,...",
        default="200",
        help="steps of supervised encoders (default: %(default)s; 0: none)",
    )
    add("--encoder", metavar="FILE", type=Path, action="append", default=[], help="a trained encoder; repeatable")
    options = parser.parse_intermixed_args(arguments)
    with one_sentence():
        check_options(options, False, clips=1, steps=1)
        supervised = options.supervised.split(",")
        if not all(steps.isdecimal() for steps in supervised):
            raise UserError(f"--supervised is {options.supervised}; write numbers of steps as 500,2000.")
        config = load_config(StandinConfig, options.data, options.overrides)
        if not any(getattr(config.loss, name) for name in ("l1", "stft", "mel")):
            raise UserError(f"{options.data}: the descent needs loss.l1, loss.stft or loss.mel.")
        batches = validation_batches(unseen_clips(options, config.data), config.data)
        process = start_process(config.device)
        codec = VoxtralCodec.from_checkpoint(options.standin)
        for file in [*options.encoder, options.withheld]:  # whether they fit is known before minutes are spent
            codec.load_encoder(SafetensorsFile(file).read(), file)
        limits = Limits(codec.to(process.device).requires_grad_(False), batches, config)
        if options.encoder and sum(map(torch.sum, limits.frames)) <= codec.params.acoustic_dim:
            raise UserError(
                f"--clips {options.clips}: so few frames have no {codec.params.acoustic_dim} principal directions; "
                "take more."
            )
        options.output.mkdir(parents=True, exist_ok=True)
        trained_on = training_clips(config.data)
        rows = [
            *limits.descent(options.steps, options.learning_rate),
            *(limits.supervised(trained_on, int(steps)) for steps in supervised if int(steps)),
            *limits.encoders(options.encoder),
        ]
        report = environment(process) | {
            "clips": sum(len(batch.lengths) for batch in batches),
            "rows": rows,
            "options": {name: str(value) for name, value in vars(options).items()},
        }
        text = table(rows)
        write_json(options.output / "results.json", report)
        write_text(options.output / "table.md", text)
        print(f"\n{text}\n{report['clips']} clips; written to {options.output}/")


if __name__ == "__main__":
    main()
