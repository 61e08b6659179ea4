"""Makes a stand-in checkpoint: the released folder at reduced widths, with a codec whose true encoder we know.

The release withholds its encoder, so nobody can say how close a trained one comes to it. Here a whole codec (encoder,
codebook, decoder) is trained by train_encoder.py's own loop, a language model that talks by train_full_pipeline.py's on
the true encoder's codes of the same speech, and all is cut in two: OUTPUT_DIR/released/ is laid out as the release,
without the encoder, and OUTPUT_DIR/withheld_encoder.safetensors is what to measure against. A config without
language_model: leaves backbone and acoustic transformer random: what such a checkpoint says is noise, what its codec
repeats is speech.
"""

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

from voxtral.command_line import script_parser

EXAMPLES = """examples:
  # the embedded stand-in (assets/standin), from a folder that holds train.csv and its clips
  python make_standin.py --config configs/standin_small.yaml data.data_root=/my/speech
  python make_standin.py --config configs/standin_small.yaml resume=true   # go on after a kill
  python make_standin.py --config configs/standin_small.yaml checkpoint=DIR encoder=checkpoint   # trains on

  # 8 GB of random weights in the full layout, for benchmarks and dry runs
  python make_standin.py --random --size full --output /tmp/voxtral_random
"""

COMMAND_LINE = script_parser(__doc__, EXAMPLES)
option = COMMAND_LINE.add_argument
option("--config", metavar="YAML", help="train a stand-in with these settings")
option("--random", action="store_true", help="write random weights, nothing is trained")
option(
    "--size",
    choices=("small", "codec", "full"),
    default="small",
    help="of a --random checkpoint: 0.9 M parameters, the full codec with a small backbone (what "
    "train_encoder.py reads, 0.3 GB), or all 4 G (8 GB) (default: %(default)s)",
)
option("--output", metavar="DIR", help="folder of a --random checkpoint")
option("overrides", nargs="*", metavar="key=value", help="settings that override the YAML")

if __name__ == "__main__":
    COMMAND_LINE.parse_intermixed_args()  # --help and mistyped options: before imports that take seconds

import soundfile
from torch import Tensor

import train_full_pipeline
from train_encoder import train
from voxtral.checkpoint import EMBEDDING_NAME, ENCODER_PREFIXES, SafetensorsFile, save_tensors
from voxtral.clip_list import Clip
from voxtral.clips import encode_speech
from voxtral.clones import Judge, items_of_clips, read_system, speak_and_score, summarize
from voxtral.codec import VoxtralCodec
from voxtral.config import ConfigError, StandinConfig, check_encoder_config, check_full_pipeline_config, dump_config
from voxtral.errors import UserError, one_sentence
from voxtral.json_files import write_json
from voxtral.params import CodecParams, TransformerParams, load_params, parse_params
from voxtral.processes import Process, training_process
from voxtral.run_folder import last_step, load_run_config
from voxtral.sources import SourceConfig, find_clips, split_validation
from voxtral.standin import N_SPECIAL_TOKENS, full_params, random_tensor, small_params, write_random_checkpoint
from voxtral.tts import TTS
from voxtral.voices import encode_reference

# Presets of a random checkpoint: as many as the release has, from its least to its largest number of rows.
RANDOM_VOICES = {f"voice_{i:02d}": 67 + round(i * (218 - 67) / 19) for i in range(20)}
N_FULL_TEXT_TOKENS = 130_072  # tekken.json of the release
SENTENCES_PER_VOICE, LONGEST_SPOKEN = 2, 1.5  # of what it says at the end; times the longest speech
OWN_CONFIG = "standin.yaml"  # in the output folder, with which resume=true goes on
LEARNS = ["backbone", "acoustic", "embedding"]  # of a language model from nothing


def params_of(config: StandinConfig) -> dict:
    """params.json of the stand-in, without voices. Raises ConfigError for a key that params.json does not have."""
    sizes = config.standin
    known = {
        "codec": {f.name for f in fields(CodecParams)} - {"voice"},
        "acoustic": {f.name for f in fields(TransformerParams)},
    }
    known["backbone"] = known["acoustic"] | {"vocab_size"}
    for block, names in known.items():
        for key in getattr(sizes, block):
            if key not in names:
                raise ConfigError(f"unknown key 'standin.{block}.{key}': params.json has {', '.join(sorted(names))}.")
    return small_params(sizes.backbone, sizes.acoustic, sizes.codec)


def clips_of_voices(config: StandinConfig) -> dict[str, str]:
    """Preset name -> the longest training clip of its speaker. Raises ConfigError for a speaker without one."""
    train_clips, _ = split_validation(find_clips(config.data)[0], config.data.validation)
    clips = [clip for source in train_clips for clip in source]
    chosen = {}
    for name, speaker in config.standin.voices.items():
        paths = [clip.path for clip in clips if clip.speaker == speaker]
        if not paths:
            raise ConfigError(f"standin.voices.{name}: no training clip is of the speaker {speaker}.")
        chosen[name] = max(paths, key=lambda path: (soundfile.info(path).duration, path))
    return chosen


def make_codec(config: StandinConfig, raw_params: dict, process: Process) -> dict[str, Tensor] | None:
    """Trains the codec, from random weights or on from `checkpoint`, then a fresh encoder and the decoder alone for as
    many steps as they are given. Returns the codec's tensors, or None when a training was stopped before its end."""
    output = Path(config.output_dir)
    stages = [(output, config.train.trainable, config.train.max_steps)]
    for part, steps in (("encoder", config.standin.encoder_steps), ("decoder", config.standin.decoder_steps)):
        if steps:
            stages.append((output / part, [part], steps))
    tensors = {}
    for run, trainable, max_steps in stages:
        stage = deepcopy(config)
        stage.output_dir, stage.train.trainable, stage.train.max_steps = str(run), trainable, max_steps
        stage.encoder = "checkpoint" if trainable == ["decoder"] else None if tensors else config.encoder
        if tensors or not config.checkpoint:
            stage.checkpoint = str(run / "initial")
            start = {
                name: tensor
                for name, tensor in tensors.items()
                if trainable != ["encoder"] or not name.startswith(ENCODER_PREFIXES)
            }
            if process.is_main and not Path(stage.checkpoint, "tekken.json").is_file():
                write_random_checkpoint(
                    stage.checkpoint, raw_params, {}, config.seed, config.standin.n_text_tokens, start
                )
            process.wait()
        if trainable == ["decoder"]:
            stage.loss.commit = stage.loss.asr = 0.0  # they are the encoder's
        if not finish(train, stage, process):
            return None
        tensors |= {
            name: tensor.bfloat16()
            for path in sorted((run / "best").glob("*.safetensors"))
            for name, tensor in SafetensorsFile(path).read().items()
        }
    return tensors


def finish(train: Callable, config, process: Process) -> bool:
    """Trains, or goes on, unless it is done already. Whether the run is at its end, and nobody wants to stop here."""
    if not (config.resume and last_step(config.output_dir) == config.train.max_steps):
        train(config, process)
    (stopping,) = process.any(process.stopping())
    return last_step(config.output_dir) == config.train.max_steps and not stopping


def make_language_model(config: StandinConfig, folder: Path, process: Process) -> dict[str, Tensor] | None:
    """Trains backbone, acoustic transformer and audio embedding of the checkpoint `folder`, which has its true encoder,
    on that encoder's codes of the speech with a text. Returns their tensors, in bf16, or None when it was stopped."""
    output, language_model = Path(config.output_dir), deepcopy(config.language_model)
    language_model.checkpoint, language_model.output_dir = str(folder), str(output / "language_model")
    language_model.resume, language_model.seed, language_model.device = config.resume, config.seed, config.device
    language_model.tracker = config.tracker
    language_model.data.data_root = str(output)
    language_model.data.sources = [SourceConfig(kind="generated", path="coded")]
    if process.is_main and not (output / "coded" / "manifest.jsonl").is_file():
        speakers = set(language_model.data.validation.speakers)
        clips = texts_of(config)
        print(
            f"{len(clips)} clips with a text, of speakers with two sentences or more, are encoded "
            f"{len(language_model.speeds) * len(language_model.offsets_ms)} times each",
            flush=True,
        )
        held_out = {clip.path for clip in clips if clip.speaker in speakers}
        codec, data = VoxtralCodec.from_checkpoint(folder, process.device), language_model.data
        played = language_model.speeds, language_model.offsets_ms
        encode_speech(codec, clips, held_out, output / "coded", data.max_sec, *played)
    process.wait()
    if not finish(train_full_pipeline.train, language_model, process):
        return None
    best = SafetensorsFile(output / "language_model" / "best" / "weights.safetensors").read()
    return {name: tensor.bfloat16() for name, tensor in best.items()}


def texts_of(config: StandinConfig) -> list[Clip]:
    """Of language_model.data.sources the clips with a text, of speakers with two texts or more."""
    data = replace(config.data, sources=config.language_model.data.sources)
    clips = [clip for source in find_clips(data)[0] for clip in source if clip.text.strip()]
    texts = defaultdict(set)
    for clip in clips:
        texts[clip.speaker].add(clip.text)
    return [clip for clip in clips if len(texts[clip.speaker]) > 1]


def check_language_model(config: StandinConfig) -> None:
    """Raises ConfigError (for the data DataError) for what would end the stage of the language model."""
    language_model, sizes = config.language_model, config.standin
    check_full_pipeline_config(language_model)
    if sorted(language_model.train.trainable) != sorted(LEARNS) or not language_model.reference_sec:
        raise ConfigError(f"language_model: it needs train.trainable: [{', '.join(LEARNS)}], and reference_sec.")
    if not language_model.train.max_steps:
        raise ConfigError("language_model.train.max_steps is null: it needs a number of steps.")
    n_ids = N_SPECIAL_TOKENS + sizes.n_text_tokens
    if params_of(config)["vocab_size"] < n_ids:
        raise ConfigError(
            f"standin.backbone.vocab_size is {params_of(config)['vocab_size']}, but standin.n_text_tokens "
            f"needs {n_ids} ids: raise the one, or lower the other."
        )
    clips = texts_of(config)
    if not clips:
        raise ConfigError(
            "language_model.data.sources: no speaker in them has two clips with different texts, which a "
            "reference and what is said after it are; a manifest needs the columns path, speaker and text."
        )
    split_validation([clips], language_model.data.validation)


def make_trained(config: StandinConfig) -> None:
    """Trains codec and language model of `config`, then writes released/ and withheld_encoder.safetensors."""
    check_encoder_config(config)
    raw_params, voices = params_of(config), clips_of_voices(config)
    params, output = parse_params(raw_params), Path(config.output_dir)
    if config.checkpoint and replace(load_params(config.checkpoint).codec, voice={}) != params.codec:
        raise ConfigError(f"checkpoint: the codec of {config.checkpoint} has other sizes than standin.codec.")
    if not config.train.max_steps:
        raise ConfigError("train.max_steps is null: a stand-in needs a number of steps.")
    if config.language_model:
        check_language_model(config)
    with training_process(config.device) as process:
        if process.world_size != process.n_local:
            raise ConfigError(
                "make_standin.py trains on one machine, since each stage reads what the one before has written; "
                "start it with torchrun --nproc-per-node N, without --nnodes."
            )
        judge = None
        if config.language_model and process.is_main:  # what it lacks is said before the work
            judge = Judge(whisper_model=config.language_model.whisper, device=process.device)
        if process.is_main:
            output.mkdir(parents=True, exist_ok=True)
            dump_config(config, output / OWN_CONFIG)
        tensors, spoken = make_codec(config, raw_params, process), {}
        if tensors is None:
            return
        if config.language_model:
            if process.is_main:
                write_random_checkpoint(
                    output / "whole", raw_params, {}, config.seed, config.standin.n_text_tokens, tensors
                )
            process.wait()
            spoken = make_language_model(config, output / "whole", process)
            if spoken is None:
                return
        if process.is_main:
            cut_in_two(config, raw_params, voices, tensors, spoken)
            print(f"wrote {output}/released and {output}/withheld_encoder.safetensors")
            if spoken:
                print(what_it_says(config, judge))


def what_it_says(config: StandinConfig, judge: Judge) -> str:
    """clones.json: held-out voices say each other's sentences, through the true encoder; returns it in a line."""
    output, language_model = Path(config.output_dir), config.language_model
    clips = [clip for clip in texts_of(config) if clip.speaker in language_model.data.validation.speakers]
    texts = list(dict.fromkeys(clip.text for clip in clips))
    items, _ = items_of_clips(clips, texts, per_voice=min(SENTENCES_PER_VOICE, len(texts) - 1))
    tts = TTS.from_checkpoint(output / "released", judge.device)
    system = read_system(f"true={output}/withheld_encoder.safetensors", tts)
    rows, _ = speak_and_score(tts, [system], items, judge, LONGEST_SPOKEN * language_model.data.max_sec)
    found = summarize(rows)["systems"]["true"]
    write_json(output / "clones.json", found)
    return f"{len(items)} new sentences in {len({item.speaker for item in items})} held-out voices: " + ", ".join(
        f"{name} {metric['value']:.3g}" for name, metric in found.items()
    )


def cut_in_two(
    config: StandinConfig,
    raw_params: dict,
    voices: dict[str, str],
    tensors: dict[str, Tensor],
    language_model: dict[str, Tensor],
) -> None:
    """Writes released/, with the presets that the true encoder makes, and withheld_encoder.safetensors."""
    output, params = Path(config.output_dir), parse_params(raw_params)
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER_PREFIXES)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in encoder}
    codec = VoxtralCodec(params.codec)
    codec.load_decoder(rest)
    codec.load_encoder(encoder)
    random_table = random_tensor(EMBEDDING_NAME, (params.audio_embedding_size, params.dim), config.seed)
    codec.audio_embedding = language_model.get(EMBEDDING_NAME, random_table)
    embeddings = {name: encode_reference(codec, path)[0] for name, path in voices.items()}
    write_random_checkpoint(
        output / "released", raw_params, embeddings, config.seed, config.standin.n_text_tokens, rest | language_model
    )
    save_tensors(output / "withheld_encoder.safetensors", encoder)


def make_random(size: str, output: str) -> None:
    """A released folder with random weights; one tensor at a time is in memory."""
    full = full_params()
    raw_params = {
        "small": small_params(),
        "full": full,
        "codec": small_params(codec=full["multimodal"]["audio_tokenizer_args"]),
    }[size]
    write_random_checkpoint(
        output, raw_params, RANDOM_VOICES, n_text_tokens=N_FULL_TEXT_TOKENS if size == "full" else None
    )
    print(f"wrote {output}: {size} size, random weights, no encoder")


def main(arguments=None) -> None:
    options = COMMAND_LINE.parse_intermixed_args(arguments)
    with one_sentence():
        if options.random == bool(options.config):
            raise UserError("pass either --config configs/standin_small.yaml or --random --output DIR.")
        if options.random:
            if not options.output or options.overrides:
                raise UserError("--random takes --output DIR, and no key=value.")
            make_random(options.size, options.output)
        else:
            if options.output:
                raise UserError("--output belongs to --random: a trained stand-in goes to output_dir=DIR.")
            make_trained(load_run_config(StandinConfig, options.config, options.overrides, OWN_CONFIG))


if __name__ == "__main__":
    main()
