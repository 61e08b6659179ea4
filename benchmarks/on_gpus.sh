#!/usr/bin/env bash
# The figures of README.md and RESULTS.md that need GPUs: speed of phase 1, and the withheld-encoder benchmark with its
# mid-size stand-in. Meant for half an hour on a machine with two GPUs; on one, what is meant for the second waits for the first.
#
#   benchmarks/on_gpus.sh SPEECH WHISPER OUTPUT
#
# SPEECH: a folder with train.csv and eval.csv (columns path and speaker). WHISPER: openai-whisper's name of a model, or a
# local .pt. OUTPUT gets a log for each part, and what the parts write. In a hurry: MID_STEPS, ROW_STEPS, SEEDS, MINUTES.
set -u
[ $# -eq 3 ] || { echo "usage: $0 SPEECH WHISPER OUTPUT" >&2; exit 2; }
[ -f "$1/train.csv" ] && [ -f "$1/eval.csv" ] || { echo "$1: there must be train.csv and eval.csv in it." >&2; exit 2; }
mkdir -p "$3"
speech=$(realpath "$1") whisper=$2 output=$(realpath "$3")
[ -f "$whisper" ] && whisper=$(realpath "$whisper")
cd "$(dirname "$0")/.."
mid_steps=${MID_STEPS:-3000} row_steps=${ROW_STEPS:-600} seeds=${SEEDS:-0,1,2} minutes=${MINUTES:-14}
gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
train=("data.data_root=$speech" data.num_workers=13 "asr.model=$whisper")
clips=('data.sources=[{kind: manifest, path: train.csv}]' "${train[@]}")

part() {  # part NAME GPUS COMMAND...: its output in OUTPUT/NAME.log, its seconds in OUTPUT/parts.txt; never fatal
    local name=$1 began=$SECONDS
    CUDA_VISIBLE_DEVICES=$2 "${@:3}" >"$output/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - began)) s" | tee -a "$output/parts.txt"
}

# The mid-size stand-in.
standin() {
    part standin_mid 0 python make_standin.py --config configs/standin_mid.yaml "${train[@]}" train.max_steps="$mid_steps" \
        train.validate_every_steps="$mid_steps" train.save_every_steps="$mid_steps" output_dir="$output/standin_mid"
}

# How fast phase 1 is, and whether what makes it fast changes what it learns.
speed() {
    local gpu=$1
    local growth=(--random-full "${clips[@]}" loss.asr=0 discriminator.crop_sec=0.5 --steps 12 --warm-up 5)
    local curve=("${clips[@]}" "checkpoint=$output/random" data.batch_size=32 train.max_steps=200 train.validate_every_steps=50
        train.save_every_steps=200 train.log_every_steps=5 train.n_samples=0 train.ema_decay=0.9 optimizer.warmup_steps=20
        discriminator.warmup_steps=20)
    part gpu_tests "$gpu" python -m pytest -q tests -k "recorded or graph or gpu"
    part random "$gpu" python make_standin.py --random --size codec --output "$output/random"
    part curve_fast "$gpu" python train_encoder.py "${curve[@]}" output_dir="$output/curve_fast" discriminator.crop_sec=0.5
    part curve_fast_seed "$gpu" python train_encoder.py "${curve[@]}" output_dir="$output/curve_fast_seed" discriminator.crop_sec=0.5 seed=1
    part curve_slow "$gpu" python train_encoder.py "${curve[@]}" output_dir="$output/curve_slow" discriminator.crop_sec=4 train.cuda_graphs=false
    part growth_batch "$gpu" python benchmarks/train_step.py "${growth[@]}" --growth batch=4,8,16,32,64 \
        --output "$output/growth_batch"
    part growth_seconds "$gpu" python benchmarks/train_step.py "${growth[@]}" data.batch_size=8 \
        --growth seconds=1,2,4,8,16,30 --output "$output/growth_seconds"
}

# Rows of the ablation on all GPUs, then what a longer run brings, and what the losses ask for at all.
withheld() {
    local mid=(--standin "$output/standin_mid/released" --withheld "$output/standin_mid/withheld_encoder.safetensors"
        --data configs/standin_mid.yaml --eval "$speech/eval.csv" "${train[@]}")
    local all; all=$(seq -s, 0 $((gpus - 1)))
    part withheld "$all" python benchmarks/withheld_encoder.py "${mid[@]}" --metrics mel,stft,estoi --steps "$row_steps" --seeds "$seeds" --minutes "$minutes" \
        --output "$output/withheld"
    part withheld_long "$all" python benchmarks/withheld_encoder.py "${mid[@]}" --metrics mel,stft,estoi --steps $((4 * row_steps)) --seeds 0 --rows best,cheap \
        --output "$output/withheld_long"
    part limits 0 python benchmarks/code_limits.py "${mid[@]}" --output "$output/limits"
}

# One process and two, the same clips a GPU.
processes() {
    local full=(--random-full "${clips[@]}" loss.asr=0 data.batch_size=16 discriminator.crop_sec=0.5 data.num_workers=6 --steps 40)
    part one_process 0 python benchmarks/train_step.py "${full[@]}" --output "$output/one_process"
    if [ "$gpus" -gt 1 ]; then
        part two_processes 0,1 torchrun --nproc-per-node 2 benchmarks/train_step.py "${full[@]}" --output "$output/two_processes"
    fi
}

if [ "$gpus" -gt 1 ]; then
    speed 1 &
    standin
    wait
else
    speed 0
    standin
fi
withheld
processes
