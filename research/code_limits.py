"""How far do decoder and losses ask for the true encoder's codes at all, and what keeps trained encoders from them?

shuffle  The true codes, but the semantic ones, or the acoustic ones, taken from other frames: what does the decoder
         make of each? Codes that it hardly hears cannot be found by listening to it.
noise    The true latents, disturbed by so much of their own deviation: which agreement of the codes goes with which
         nearness, and what does the sound tell of it?
descent  No encoder: the latents of every clip start at the true ones and follow the gradient of the reconstruction
         losses (loss.l1, loss.stft, loss.mel, loss.commit of the config) through the frozen decoder. If they walk away
         from the true codes while the sound gets better, then sound alone does not tell which codes are the true ones.
echo     The true encoder hears what the decoder makes of its own codes: how many come back? A trained encoder that was
         taught by decoded clips with known codes is taught that, and not what the true one does with speech.
told     A fresh encoder is told the true latents of the training speech, which nobody with the real checkpoint can: how
         many codes of unseen speakers does it find? What is missing then is for lack of data, size or steps; what a
         trained encoder misses beyond that, sound and statistics do not tell it.
encoders Trained encoders (--encoder FILE ...): do they err alike, and in which directions of the true latents?

Needs a stand-in checkpoint and its withheld encoder, minutes on two CPU cores. OUTPUT gets results.json, table.md and
limits.png (with --encoder also errors.png).
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path[:0] = [str(folder) for folder in list(Path(__file__).parents)[:2]]
from withheld_encoder import training_clips, unseen_clips

from voxtral.checkpoint import SafetensorsFile, write_text
from voxtral.code_metrics import code_agreement
from voxtral.codec import VoxtralCodec, ceil_div, valid_mask
from voxtral.command_line import script_parser
from voxtral.config import EncoderConfig, StandinConfig, load_config
from voxtral.data import Batch, SpeechDataset, make_loader, validation_batches
from voxtral.errors import UserError, one_sentence
from voxtral.evaluation import fresh_encoder
from voxtral.evaluation_report import markdown
from voxtral.json_files import finite
from voxtral.losses import MelDistance, commitment_loss, l1_loss, stft_loss
from voxtral.plots import save_figure
from voxtral.processes import start_process
from voxtral.run import cosine_with_warmup, set_learning_rate
from voxtral.run_folder import environment
from voxtral.sources import Clip

NOISE = (0.05, 0.1, 0.2, 0.3, 0.5)  # of the deviation of every latent channel
N_SHOWN = 6  # points of a descent
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
        self.mel_distance = MelDistance(codec.params.sampling_rate).to(codec.audio_embedding.device)
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

    def unsquash(self, seen: Tensor) -> Tensor:
        """A latent that Quantizer.squash() gives `seen` of."""
        semantic = self.codec.params.semantic_dim
        return torch.cat([seen[:, :semantic], seen[:, semantic:].clamp(-0.9999, 0.9999).atanh()], dim=1)

    def agreement(self, codes: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        """Shares of equal codes, mean over frames."""
        sums, n_frames = {}, sum(frames.sum().item() for frames in self.frames)
        for ours, theirs, frames in zip(codes, expected, self.frames):
            for name, value in code_agreement(ours, theirs, frames).items():
                sums[name] = sums.get(name, 0.0) + frames.sum().item() * value.item()
        return {name: total / n_frames for name, total in sums.items()}

    @torch.no_grad()
    def measure(self, latents: list[Tensor]) -> dict[str, float]:
        """COLUMNS but the loss: mean over clips for the sound, over frames for the codes."""
        codes = [self.codec.quantizer.encode(latent) for latent in latents]
        mel = 0.0
        for batch, ours in zip(self.batches, codes):
            decoded = self.codec.decode(ours)[..., : batch.waveform.shape[-1]].float()
            mel += len(batch.lengths) * self.mel_distance(decoded, batch.waveform, batch.lengths).item()
        return {"mel": mel / sum(len(batch.lengths) for batch in self.batches)} | self.agreement(codes, self.codes)

    def loss(self, i: int, latent: Tensor) -> Tensor:
        """The reconstruction losses of the config at step 0, nothing quantized; clips weigh alike in any batch."""
        batch, weights, semantic = self.batches[i], self.config.loss, self.codec.params.semantic_dim
        decoded = self.codec.decode_latent(self.codec.quantizer.squash(latent))[..., : batch.waveform.shape[-1]].float()
        quantized = self.codec.quantizer.decode(self.codec.quantizer.encode(latent.detach()))[:, :semantic]
        losses = {
            "l1": lambda: l1_loss(decoded, batch.waveform, batch.lengths),
            "stft": lambda: stft_loss(decoded, batch.waveform, batch.lengths, self.config.train.stft_fft_sizes),
            "mel": lambda: self.mel_distance(decoded, batch.waveform, batch.lengths),
            "commit": lambda: commitment_loss(latent[:, :semantic], quantized, self.frames[i]),
        }
        return sum(getattr(weights, name) * loss() for name, loss in losses.items() if getattr(weights, name))

    # ------------------------------------------------------------ the measurements

    def shuffle(self) -> list[dict]:
        generator, semantic = torch.Generator().manual_seed(0), self.codec.params.semantic_dim
        rows = []
        for name, part in (("semantic", slice(None, semantic)), ("acoustic", slice(semantic, None))):
            latents = [true.clone() for true in self.true]
            for i, latent in enumerate(latents):
                values = latent[:, part].transpose(1, 2)  # a view of [B, L, channels]
                chosen = values[self.valid(i)]
                values[self.valid(i)] = chosen[torch.randperm(len(chosen), generator=generator).to(chosen.device)]
            rows.append({"measurement": f"{name} codes shuffled", "at": 1} | self.measure(latents))
        return rows

    def noise(self) -> list[dict]:
        generator = torch.Generator().manual_seed(0)
        rows = []
        for share in (0.0, *NOISE):
            latents = [
                self.unsquash(
                    self.codec.quantizer.squash(true)
                    + share * self.deviation * torch.randn(true.shape, generator=generator).to(true.device)
                )
                if share
                else true
                for true in self.true
            ]
            rows.append({"measurement": "noise", "at": share} | self.measure(latents))
        return rows

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

    @torch.no_grad()
    def echo(self) -> list[dict]:
        again = [
            self.encode(self.codec.decode(codes)[..., : batch.waveform.shape[-1]], batch.lengths)
            for codes, batch in zip(self.codes, self.batches)
        ]
        return [{"measurement": "echo", "at": 1} | self.measure(again)]

    def told(self, clips: list[Clip], steps: int) -> dict:
        """The loss: L1 of the latents as the decoder sees them, in deviations of each channel."""
        config, quantizer, device = self.config, self.codec.quantizer, self.deviation.device
        student = deepcopy(self.codec)
        student.load_encoder(fresh_encoder(self.codec, config.seed), "a fresh encoder")
        parameters = student.requires_grad_(False).encoder_parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.optimizer.learning_rate,
            betas=tuple(config.optimizer.betas),
            weight_decay=config.optimizer.weight_decay,
            fused=device.type == "cuda",
        )
        batches = iter(
            make_loader(
                SpeechDataset(clips, config.data.max_sec, config.seed, speed=config.data.speed),
                config.data,
                config.seed,
            )
        )
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
        return {"measurement": "told", "at": steps} | self.measure(latents) | {"loss": loss.item()}

    @torch.no_grad()
    def encoders(self, files: list[Path]) -> list[dict]:
        """Errors are those of the acoustic latents, in deviations of each channel: their size (root mean square), their
        correlation with those of the first file, and their mean square along each principal direction of the true
        latents, over the variance of these there."""
        student, semantic = deepcopy(self.codec), self.codec.params.semantic_dim
        true = self.together(self.true)[semantic:] / self.deviation[semantic:]
        variances, directions = torch.linalg.eigh(true.cov())
        rows, first = [], None
        for i, file in enumerate(files):
            student.load_encoder(SafetensorsFile(file).read(), file)
            latents = [student.encode_latent(batch.waveform, batch.lengths).float() for batch in self.batches]
            error = self.together(latents)[semantic:] / self.deviation[semantic:] - true
            codes = [self.codec.quantizer.encode(latent) for latent in latents]
            first = first or (error, codes)
            alike = (
                torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(error, first[0])]).mean().item()
            )
            spread = (directions.T @ error).square().mean(dim=1) / variances
            rows.append(
                {"measurement": f"encoder {'/'.join(file.parent.parts[-2:])}", "at": i}
                | self.measure(latents)
                | {
                    "error": error.square().mean().sqrt().item(),
                    "error_correlation": alike,
                    "levels_as_first": self.agreement(codes, first[1])["levels_equal"],
                    "error_by_direction": spread.flip(0).tolist(),
                }
            )
        return rows


def table(rows: list[dict]) -> str:
    names = {"noise": "noise, of the deviation", "descent": "descent, step", "told": "told, steps"}
    lines = [
        [
            names.get(row["measurement"], row["measurement"]),
            f"{row['at']:g}",
            f"{row['mel']:.3f}",
            *(f"{row[name]:.1%}" for name in ("semantic_equal", "levels_equal", "levels_within_1")),
            f"{row['loss']:.3f}" if "loss" in row else "",
        ]
        for row in rows
    ]
    return markdown(["", "at", *COLUMNS.values()], lines)


def figure_of(rows: list[dict]) -> Figure:
    """Agreement with the true codes against noise and along the descent; the mel distance beside it."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axis, (name, label) in zip(
        figure.subplots(1, 2),
        (("noise", "noise, of the latents' deviation"), ("descent", "step of the descent from the true latents")),
    ):
        chosen = [row for row in rows if row["measurement"] == name]
        for column in ("semantic_equal", "levels_equal", "levels_within_1"):
            axis.plot(
                [row["at"] for row in chosen],
                [row[column] for row in chosen],
                marker="o",
                markersize=3,
                label=COLUMNS[column],
            )
        axis.set_xlabel(label)
        axis.set_ylabel("share of the true codes")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        beside = axis.twinx()
        beside.plot(
            [row["at"] for row in chosen],
            [row["mel"] for row in chosen],
            color="black",
            linestyle="--",
            label="mel distance",
        )
        beside.set_ylim(0, 1.3 * max(row["mel"] for row in chosen))
        beside.set_ylabel("mel distance (dashed)")
        axis.legend(fontsize=8, loc="lower left")
    return figure


def errors_table(rows: list[dict]) -> str:
    return markdown(
        ["", "error, of the deviation", "correlation with the first one's", "levels as the first one's"],
        [
            [
                row["measurement"],
                f"{row['error']:.3f}",
                f"{row['error_correlation']:.2f}",
                f"{row['levels_as_first']:.1%}",
            ]
            for row in rows
        ],
    )


def errors_figure(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        axis.plot(
            range(1, 1 + len(row["error_by_direction"])),
            row["error_by_direction"],
            marker="o",
            markersize=3,
            label=row["measurement"],
        )
    axis.axhline(1, color="black", linewidth=0.8, linestyle="--", label="what the mean would miss")
    axis.set_yscale("log")
    axis.set_xlabel("principal direction of the true acoustic latents, the largest first")
    axis.set_ylabel("mean square error / variance")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def main(arguments=None) -> None:
    parser = script_parser(__doc__, EXAMPLES)
    parser.add_argument("--standin", metavar="DIR", required=True, help="checkpoint without encoder (make_standin.py)")
    parser.add_argument("--withheld", metavar="FILE", required=True, help="its true encoder")
    parser.add_argument(
        "--data",
        metavar="CONFIG",
        required=True,
        help="YAML of train_encoder.py or make_standin.py: held-out speakers, data.max_sec, losses",
    )
    parser.add_argument("--eval", metavar="WHAT", help="other speech to measure on: a folder, a manifest or a config")
    parser.add_argument(
        "--clips", metavar="N", type=int, default=32, help="spread over the speakers (default: %(default)s)"
    )
    parser.add_argument("--steps", metavar="N", type=int, default=120, help="of the descent (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", metavar="R", type=float, default=0.02, help="of the descent (default: %(default)s)"
    )
    parser.add_argument(
        "--told",
        metavar="N,...",
        default="200",
        help="steps of encoders that are told the true latents (default: %(default)s; 0: none)",
    )
    parser.add_argument(
        "--encoder", metavar="FILE", type=Path, action="append", default=[], help="a trained encoder, again for more"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("runs/code_limits"), help="(default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config of --data")
    options = parser.parse_intermixed_args(arguments)
    with one_sentence():
        for name, value in (("--clips", options.clips), ("--steps", options.steps)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be 1 or more.")
        told = options.told.split(",")
        if not all(steps.isdecimal() for steps in told):
            raise UserError(f"--told is {options.told}; write numbers of steps as 500,2000.")
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
            *limits.shuffle(),
            *limits.noise(),
            *limits.descent(options.steps, options.learning_rate),
            *limits.echo(),
            *(limits.told(trained_on, int(steps)) for steps in told if int(steps)),
        ]
        trained = limits.encoders(options.encoder)
        rows += trained
        report = environment(process) | {
            "clips": sum(len(batch.lengths) for batch in batches),
            "rows": rows,
            "options": {name: str(value) for name, value in vars(options).items()},
        }
        write_text(options.output / "results.json", json.dumps(finite(report), indent=2) + "\n")
        text = table(rows) + (f"\n{errors_table(trained)}" if trained else "")
        write_text(options.output / "table.md", text)
        save_figure(figure_of(rows), options.output / "limits.png")
        if trained:
            save_figure(errors_figure(trained), options.output / "errors.png")
        print(f"\n{text}\n{report['clips']} clips; written to {options.output}/")


if __name__ == "__main__":
    main()
