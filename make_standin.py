"""Makes a stand-in checkpoint: the released folder at reduced widths, with a codec whose true encoder we know.

The release withholds its encoder, so nobody can say how close a trained one comes to it. Here a whole codec (encoder,
codebook, decoder) is trained by train_encoder.py's own loop and cut in two: OUTPUT_DIR/released/ is laid out as the
release, without the encoder, and OUTPUT_DIR/withheld_encoder.safetensors is what to measure against. The backbone and
the acoustic transformer are random: what such a checkpoint says is noise, what its codec repeats is speech. Small ones
can be trained by train_full_pipeline.py's own loop, and put in afterwards; assets/README.md has the commands.
"""
import argparse
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import soundfile

from train_encoder import train
from voxtral.checkpoint import EMBEDDING_NAME, ENCODER_PREFIXES, SafetensorsFile, save_tensors
from voxtral.codec import VoxtralCodec
from voxtral.config import ConfigError, StandinConfig, check_encoder_config, load_config
from voxtral.errors import UserError, one_sentence
from voxtral.params import CodecParams, TransformerParams, load_params, parse_params
from voxtral.run import training_process
from voxtral.sources import find_clips, split_validation
from voxtral.standin import full_params, random_tensor, small_params, write_random_checkpoint
from voxtral.voices import encode_reference

# Presets of a random checkpoint: as many as the release has, from its least to its largest number of rows.
RANDOM_VOICES = {f"voice_{i:02d}": 67 + round(i * (218 - 67) / 19) for i in range(20)}
N_FULL_TEXT_TOKENS = 130_072  # tekken.json of the release

EXAMPLES = """examples:
  # the embedded stand-in (assets/standin), from a folder that holds train.csv and its clips
  python make_standin.py --config configs/standin_small.yaml data.data_root=/my/speech
  python make_standin.py --config configs/standin_small.yaml resume=true   # go on after a kill
  python make_standin.py --config configs/standin_small.yaml checkpoint=DIR   # DIR: a stand-in with its encoder, trained on

  # 8 GB of random weights in the full layout, for benchmarks and dry runs
  python make_standin.py --random --size full --output /tmp/voxtral_random
"""


def params_of(config: StandinConfig) -> dict:
    """params.json of the stand-in, without voices. Raises ConfigError for a key that params.json does not have."""
    sizes = config.standin
    known = {"codec": {f.name for f in fields(CodecParams)} - {"voice"},
             "acoustic": {f.name for f in fields(TransformerParams)}}
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


def cut_in_two(config: StandinConfig, raw_params: dict, voices: dict[str, str]) -> None:
    """Writes released/ and withheld_encoder.safetensors from the best codec of the run, rounded to bf16, and the language
    model of standin.language_model, if there is one."""
    output, language_model = Path(config.output_dir), {}
    if config.standin.language_model:
        language_model = {name: tensor.bfloat16() for name, tensor in SafetensorsFile(config.standin.language_model).read().items()}
    files = [SafetensorsFile(output / "best" / f"{part}.safetensors") for part in ("encoder", "decoder")]
    tensors = {name: tensor.bfloat16() for file in files for name, tensor in file.read().items()}
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER_PREFIXES)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in encoder}

    params = parse_params(raw_params)
    codec = VoxtralCodec(params.codec)
    codec.load_decoder(rest)
    codec.load_encoder(encoder)
    random_table = random_tensor(EMBEDDING_NAME, (params.audio_embedding_size, params.dim), config.seed)
    codec.audio_embedding = language_model.get(EMBEDDING_NAME, random_table)
    embeddings = {name: encode_reference(codec, path)[0] for name, path in voices.items()}
    write_random_checkpoint(output / "released", raw_params, embeddings, config.seed, config.standin.n_text_tokens,
                            rest | language_model)
    save_tensors(output / "withheld_encoder.safetensors", encoder)


def make_trained(config: StandinConfig) -> None:
    """Trains the codec of `config`, from random weights or on from `checkpoint`, then cuts it in two."""
    check_encoder_config(config)
    raw_params, voices = params_of(config), clips_of_voices(config)
    config, start = deepcopy(config), config.checkpoint
    if start and replace(load_params(start).codec, voice={}) != parse_params(raw_params).codec:
        raise ConfigError(f"checkpoint: the codec of {start} has other sizes than standin.codec.")
    config.checkpoint = start or str(Path(config.output_dir) / "initial")
    with training_process(config.device) as process:
        if process.is_main and not start:
            write_random_checkpoint(config.checkpoint, raw_params, {}, config.seed, config.standin.n_text_tokens)
        process.wait()
        train(config, process)
        if process.is_main:
            cut_in_two(config, raw_params, voices)
            print(f"wrote {config.output_dir}/released and {config.output_dir}/withheld_encoder.safetensors")


def make_random(size: str, output: str) -> None:
    """A released folder with random weights; one tensor at a time is in memory."""
    full = full_params()
    raw_params = {"small": small_params(), "full": full,
                  "codec": small_params(codec=full["multimodal"]["audio_tokenizer_args"])}[size]
    write_random_checkpoint(output, raw_params, RANDOM_VOICES,
                            n_text_tokens=N_FULL_TEXT_TOKENS if size == "full" else None)
    print(f"wrote {output}: {size} size, random weights, no encoder")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="YAML", help="train a stand-in with these settings")
    parser.add_argument("--random", action="store_true", help="write random weights, nothing is trained")
    parser.add_argument("--size", choices=("small", "codec", "full"), default="small",
                        help="of a --random checkpoint: 0.9 M parameters, the full codec with a small backbone (what "
                             "train_encoder.py reads, 0.3 GB), or all 4 G (8 GB) (default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="folder of a --random checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the YAML")
    options = parser.parse_intermixed_args(arguments)
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
            make_trained(load_config(StandinConfig, options.config, options.overrides))


if __name__ == "__main__":
    main()
