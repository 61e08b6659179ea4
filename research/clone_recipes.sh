#!/usr/bin/env bash
# Which recipe's encoder clones? Trains encoders by several against a stand-in that talks, lets voices that nothing has
# heard speak through each, and adapts the language model to one of them. RESULTS.md, "Which recipe clones?", is this on
# one GPU.
#
#   research/clone_recipes.sh SPEECH WHISPER OUTPUT
#
# SPEECH: a folder with talk.csv and eval.csv (columns path, speaker, text) beside their clips. WHISPER:
# openai-whisper's name of a model, or a local .pt. OUTPUT gets a run folder for each encoder, and of voices, phase2 and
# people a table. STEPS (1600).
set -eu
shopt -s nullglob
[ $# -eq 3 ] || { echo "usage: $0 SPEECH WHISPER OUTPUT" >&2; exit 2; }
for name in talk eval; do
    [ -f "$1/$name.csv" ] || { echo "$1: there must be talk.csv and eval.csv in it." >&2; exit 2; }
done
mkdir -p "$3"
speech=$(realpath "$1") whisper=$2 output=$(realpath "$3") steps=${STEPS:-1600}
[ -f "$whisper" ] && whisper=$(realpath "$whisper")
cd "$(dirname "$0")/.."
true=assets/standin_withheld_encoder.safetensors
speakers=w_m390,w_f391,w_m392,w_f393,w_m394,w_f395,w_m396,w_f397,w_m398,w_f399,w_m400,w_f401,w_m402,w_f403,w_m404
with_codes='data.sources=[{kind: manifest, path: talk.csv}, {kind: generated, path: '$output'/generated, weight: 4}]'
few_with_codes=${with_codes/weight: 4/weight: 0.6}
paper=(loss.stft=1 loss.feature=1 loss.asr=1 "asr.model=$whisper" asr.context_sec=5 discriminator.warmup_steps=250
    discriminator.channels=16 discriminator.crop_sec=1 train.precision=bf16)

encoder() {  # encoder NAME key=value...: two checkpoints of it
    [ -d "$output/$1" ] || python train_encoder.py --config configs/demo.yaml device=auto data.num_workers=4 \
        "match.codes=$output/generated" train.max_steps="$steps" train.validate_every_steps=$((steps / 2)) \
        train.save_every_steps=$((steps / 2)) train.n_samples=0 train.compile=false \
        train.max_total_loss=1e6 "output_dir=$output/$1" "${@:2}"
}
many() {  # many NAME key=value...: 24 clips a step, of the voices of SPEECH but those that are judged
    encoder "$1" "data.data_root=$speech" 'data.sources=[{kind: manifest, path: talk.csv}]' data.batch_size=24 \
        "data.validation.speakers=[$speakers]" train.ema_decay=0.99 loss.codes=0 "${@:2}"
}
few() {  # few NAME key=value...: 8 clips a step, half as many steps, the demo's voices
    steps=$((steps / 2)) encoder "$1" "${@:2}"
}

python generate_clips.py --checkpoint assets/standin --texts assets/sentences_talk.tsv --per-voice 40 --max-sec 8 \
    --output "$output/generated"
for seed in 0 1; do
    many sound_match_$seed seed=$seed
    many sound_match_codes_$seed seed=$seed loss.codes=4 "$with_codes"
    few few_codes_$seed seed=$seed "$few_with_codes"
done
many sound loss.match=0
many sound_codes loss.match=0 loss.codes=4 "$with_codes"
many paper_mel loss.match=0 "${paper[@]}"
many paper loss.match=0 loss.mel=0 "${paper[@]}"
few few 'data.sources=[{kind: manifest, path: talk.csv}]' loss.codes=0

encoders=()
for run in "$output"/*/checkpoints; do
    run=${run%/checkpoints}
    encoders+=(--encoder "$(basename "$run")=$run")
done
python research/clone_needs.py --checkpoint assets/standin --true $true --data "$speech/talk.csv" \
    --speakers $speakers --per-voice 2 --whisper "$whisper" "${encoders[@]}" --encoder untrained=untrained --errors \
    --output "$output/voices"

# Phase 2 on an encoder that keeps two thirds of the voice.
young=$output/sound_match_0/checkpoints/step_$(printf %08d $((steps / 2)))/encoder.safetensors
two() {  # two NAME key=value...
    python train_full_pipeline.py --config configs/demo_full_pipeline.yaml checkpoint=assets/standin "encoder=$young" \
        device=auto "data.data_root=$output" data.batch_size=8 train.max_steps=150 \
        train.validate_every_steps=150 train.save_every_steps=150 "output_dir=$output/$1" "${@:2}"
}
two seeds_loss 'train.trainable=[lora]' loss.semantic_kl=0 loss.mel=0 \
    optimizer.learning_rate=1e-3
two lora 'train.trainable=[lora]' loss.hidden=0 loss.preset_hidden=20 loss.preset_kl=20 loss.mel=0 \
    optimizer.learning_rate=1e-3
two along
said=(--checkpoint assets/standin --max-sec 8 --whisper "$whisper" --samples 0 --system true=$true)
python evaluate_clones.py "${said[@]}" --data "$speech/talk.csv" --speakers $speakers --per-voice 2 \
    --system "none=$young" --system "seeds_loss=$young,$output/seeds_loss/best/adapter" \
    --system "lora=$young,$output/lora/best/adapter" \
    --system "along=$output/along/best/encoder.safetensors" --output "$output/phase2"

# People: nobody in training was one.
last=checkpoints/step_$(printf %08d "$steps")/encoder.safetensors
python evaluate_clones.py "${said[@]}" --data "$speech/eval.csv" --sentences assets/sentences_talk.tsv --per-voice 1 \
    --system "sound_match=$output/sound_match_0/$last" --system "sound_match_codes=$output/sound_match_codes_0/$last" \
    --system "paper_mel=$output/paper_mel/$last" --system untrained=untrained --output "$output/people"
