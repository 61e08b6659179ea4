#!/usr/bin/env bash
# Does the frozen language model in the loop of phase 1 make an encoder that clones better? Six encoders by
# model_in_the_loop.py, three at a time on one GPU, and one table of their clones.
#
#   research/model_in_the_loop.sh CHECKPOINT TRUE SPEECH WHISPER OUTPUT [OPTION or key=value...]
#
# CHECKPOINT: a stand-in that talks; TRUE: its true encoder. SPEECH: a folder with talk.csv (columns path, speaker,
# text) beside its clips. WHISPER: openai-whisper's name of a model, or a local .pt. OUTPUT gets a folder and a log for
# each arm, and voices/ with the table; what is there is not made again. What comes after it is for all arms: options of
# model_in_the_loop.py and changes to configs/demo.yaml; for a mid-size stand-in train.precision=bf16
# optimizer.learning_rate=5e-4. STEPS (1600), ARMS (all six).
set -eu
[ $# -ge 5 ] || { echo "usage: $0 CHECKPOINT TRUE SPEECH WHISPER OUTPUT [OPTION or key=value...]" >&2; exit 2; }
[ -f "$3/talk.csv" ] || { echo "$3: there must be talk.csv in it." >&2; exit 2; }
mkdir -p "$5"
checkpoint=$(realpath "$1") true=$(realpath "$2") speech=$(realpath "$3") output=$(realpath "$5")
whisper=$4 steps=${STEPS:-1600}
[ -f "$whisper" ] && whisper=$(realpath "$whisper")
overrides=("${@:6}")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}  # several processes share the cores
speakers=w_m390,w_f391,w_m392,w_f393,w_m394,w_f395,w_m396,w_f397,w_m398,w_f399,w_m400,w_f401,w_m402,w_f403,w_m404
arms=${ARMS:-sound_match model model_without_match anchors model_anchors contrast}
last=checkpoints/step_$(printf %08d "$steps")/encoder.safetensors

arm() {  # arm NAME OPTIONS...: in the background, as soon as fewer than three others are at work
    [[ " $arms " != *" $1 "* || -f $output/$1/$last ]] && return
    while [ "$(jobs -rp | wc -l)" -ge 3 ]; do wait -n || true; done
    python research/model_in_the_loop.py --checkpoint "$checkpoint" --true "$true" --output "$output/$1" \
        --generated "$output/generated" device=auto "data.data_root=$speech" data.batch_size=24 data.num_workers=3 \
        'data.sources=[{kind: manifest, path: talk.csv}]' "data.validation.speakers=[$speakers]" \
        data.validation.clips=32 train.ema_decay=0.99 train.max_steps="$steps" \
        train.save_every_steps=$((steps / 2)) loss.codes=0 match.codes=presets \
        "${overrides[@]}" "${@:2}" >"$output/$1.log" 2>&1 || echo "$1 failed: $(tail -n 1 "$output/$1.log")" &
}

[ -f "$output/generated/manifest.jsonl" ] || python generate_clips.py --checkpoint "$checkpoint" \
    --texts assets/sentences_talk.tsv --per-voice 40 --max-sec 8 --output "$output/generated"
arm sound_match
arm model --pairs 8
arm model_without_match --pairs 8 loss.match=0
arm anchors --anchors 8
arm model_anchors --pairs 8 --anchors 8
arm contrast --pairs 8 --contrast --semantic 0.3 --flow 4  # weaker gradients: what the copy has learnt alone
wait

encoders=()
for arm in $arms; do
    tail -n 1 "$output/$arm.log"
    [ -f "$output/$arm/$last" ] && encoders+=(--encoder "$arm=$output/$arm")
done
python research/clone_needs.py --checkpoint "$checkpoint" --true "$true" --data "$speech/talk.csv" \
    --speakers $speakers --per-voice 2 --whisper "$whisper" "${encoders[@]}" --output "$output/voices"
