"""The rows of withheld_encoder.py: what each changes, and the training that comes of it."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from withheld_runs import Run, band_limited, thinned, with_layers  # noqa: E402

from voxtral.config import EncoderConfig, StandinConfig, check_encoder_config, load_config  # noqa: E402
from voxtral.data import SAMPLE_RATE  # noqa: E402
from voxtral.errors import UserError  # noqa: E402


@dataclass(frozen=True)
class Row:
    """`changes`: keys of the config, and six of this benchmark's own:
    quantization  stochastic: the paper's 50/25/25, as train_encoder.py does; always: every clip, as serving does
    training_hz   24000: clips as they are; 16000: copies with nothing above 8 kHz, as upsampled 16 kHz speech has
    start         fresh: as with the released checkpoint; true: the withheld encoder, to see whether training keeps it
    speech        1: all clips; 0.1: every tenth, heard ten times as often
    layers        of the encoder's four stages; own: the stand-in's, as serving builds it
    known         what loss.match takes from known codes: statistics, as train_encoder.py does; or a loss of
                  withheld_losses.py
    """

    what: str
    of: str  # the row that it changes; the two together show what the change does
    changes: str


# a to d build the paper's recipe piece by piece, e to t change one thing of it, j and n one of cheap, o and on ask what
# limits it. Commitment is in all: without it nothing ties the semantic latent to the codebook. The paper's schedule of
# quantization is a piece as well: a and b quantize always (no key of the config says so: withheld_runs.py swaps the
# draws), c shows what the schedule is worth.
ROWS = {
    "a": Row(
        "reconstruction only",
        "",
        "loss.l1=1 loss.stft=1 loss.commit=0.1 loss.mel=0 loss.feature=0 loss.asr=0 "
        "loss.diversity=0 loss.speaker=0 loss.match=0 quantization=always training_hz=24000 start=fresh "
        "speech=1 layers=own known=statistics",
    ),
    "b": Row("+ discriminators with feature matching", "a", "loss.feature=1"),
    "c": Row("+ stochastic quantization", "b", "quantization=stochastic"),
    "d": Row("+ ASR distillation: the paper's recipe", "c", "loss.asr=1"),
    "e": Row("+ codebook diversity", "d", "loss.diversity=0.1"),
    "f": Row("+ speaker loss", "d", "loss.speaker=1"),
    "g": Row("no average of the weights", "d", "train.ema_decay=0"),
    "h": Row("+ mel distance", "d", "loss.mel=1"),
    "i": Row("16 kHz speech", "d", "training_hz=16000"),
    "k": Row("ten times the commitment", "d", "loss.commit=1"),
    "l": Row("learning rate 1e-3", "d", "optimizer.learning_rate=0.001"),
    "m": Row("+ statistics of known codes", "d", "loss.match=0.3"),
    "t": Row("started at the true encoder", "d", "start=true"),
    "best": Row("what helps, together", "d", "loss.mel=1 loss.match=0.3 loss.commit=1"),
    "cheap": Row("the same without discriminators and Whisper", "best", "loss.feature=0 loss.asr=0"),
    "j": Row("+ decoded clips with known codes", "cheap", "known=clips"),
    "n": Row("+ an adversary on sequences of codes", "cheap", "known=adversary"),
    "bestj": Row("best + decoded clips with known codes", "best", "known=clips"),
    "o": Row("a tenth of the speech", "cheap", "speech=0.1"),
    "half": Row("half of the encoder's layers", "cheap", "layers=1,1,1,1"),
    "double": Row("twice its layers", "cheap", "layers=4,4,4,4"),
}
TRUE_CHECKPOINT = "true_checkpoint"  # in OUTPUT: the stand-in with its true encoder, from which rows may start
KNOWN_CODES = "known_codes"  # in OUTPUT: codes of the preset voices, for loss.match


def changes_of(name: str) -> dict[str, str]:
    """All that a row sets: its own changes over those of the row that it changes."""
    row = ROWS[name]
    return (changes_of(row.of) if row.of else {}) | dict(change.split("=") for change in row.changes.split())


def schedule(steps: int) -> list[str]:
    """What configs state in steps, as shares of a run, so that rows compare at any length: five validations, two saves,
    an average of the weights that reaches back over a tenth of the run."""

    def share(parts: int) -> int:
        return -(-steps // parts)

    return [
        "train.trainable=[encoder]",
        f"train.ema_decay={max(0.0, 1 - 10 / steps)}",
        "train.n_samples=0",
        f"train.log_every_steps={min(10, share(5))}",
        f"train.validate_every_steps={share(5)}",
        f"train.save_every_steps={share(2)}",
        "train.keep_last=1",
        f"optimizer.warmup_steps={steps // 20}",
        f"discriminator.warmup_steps={steps // 8}",
    ]


def make_run(options, row: str, seed: int, steps: int, folder: Path) -> Run:
    """The run and its config. Raises UserError."""
    changes = changes_of(row)
    quantization, training_hz, start = (
        changes.pop("quantization"),
        int(changes.pop("training_hz")),
        changes.pop("start"),
    )
    speech, layers, known = float(changes.pop("speech")), changes.pop("layers"), changes.pop("known")
    # A stand-in's config will do: it names the speakers that the stand-in has not heard.
    loaded = load_config(
        StandinConfig,
        options.data,
        [*schedule(steps), *options.overrides, *(f"{key}={value}" for key, value in changes.items())],
    )
    config = EncoderConfig(**{field.name: getattr(loaded, field.name) for field in fields(EncoderConfig)})
    config.checkpoint = options.standin if start == "fresh" else str(options.output / TRUE_CHECKPOINT)
    config.encoder = None if start == "fresh" else "checkpoint"
    if layers != "own":
        config.checkpoint = with_layers(options.standin, layers, options.output)
    config.output_dir, config.resume = str(folder), True
    config.seed, config.train.max_steps = seed, steps
    config.match.codes = str(options.output / KNOWN_CODES)
    check_encoder_config(config)
    if not config.data.validation.speakers:
        raise UserError(
            f"{options.data}: data.validation.speakers is empty; name the speakers that neither the "
            "stand-in nor the encoders are trained on."
        )
    if training_hz != SAMPLE_RATE:
        config.data = band_limited(config.data, options.output / "band_limited")
    if speech != 1:
        config.data = thinned(config.data, options.output / f"speech_{speech:g}", round(1 / speech))
    return Run(row, seed, config, quantization, known)
