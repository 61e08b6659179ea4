#!/usr/bin/env bash
# The figures of README.md and RESULTS.md that need GPUs: speed of phase 1, and the withheld-encoder benchmark with its
# mid-size stand-in. Meant for half an hour on a machine with two GPUs; on one, what is meant for the second waits for the first.
#
#   benchmarks/on_gpus.sh SPEECH WHISPER OUTPUT
#
# SPEECH: a folder with train.csv and eval.csv (columns path and speaker). WHISPER: openai-whisper's name of a model, or a
# local .pt. OUTPUT gets a log for each part, and what the parts write. In a hurry: MID_STEPS, ROW_STEPS, SEEDS, MINUTES, and
# STAGES, some of those below (a+b: beside each other on two GPUs); rows and what follows need the stand-in.
set -u
[ $# -eq 3 ] || { echo "usage: $0 SPEECH WHISPER OUTPUT" >&2; exit 2; }
[ -f "$1/train.csv" ] && [ -f "$1/eval.csv" ] || { echo "$1: there must be train.csv and eval.csv in it." >&2; exit 2; }
mkdir -p "$3"
speech=$(realpath "$1") whisper=$2 output=$(realpath "$3")
[ -f "$whisper" ] && whisper=$(realpath "$whisper")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # several processes share the cores
mid_steps=${MID_STEPS:-2500} row_steps=${ROW_STEPS:-500} seeds=${SEEDS:-0,1,2} minutes=${MINUTES:-9}
gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
all=$(seq -s, 0 $((gpus - 1)))
last=$((gpus - 1))
local_files=("data.data_root=$speech" "asr.model=$whisper")
clips=('data.sources=[{kind: manifest, path: train.csv}]' "${local_files[@]}")
growth=(--random-full "${clips[@]}" loss.asr=0 discriminator.crop_sec=0.5 --steps 12 --warm-up 5)
mid=(--standin "$output/standin_mid/released" --withheld "$output/standin_mid/withheld_encoder.safetensors"
    --data configs/standin_mid.yaml --eval "$speech/eval.csv" "${local_files[@]}" train.max_total_loss=1e6)

part() {  # part NAME GPUS COMMAND...: its output in OUTPUT/NAME.log, its seconds in OUTPUT/parts.txt; never fatal
    local name=$1 began=$SECONDS
    CUDA_VISIBLE_DEVICES=$2 "${@:3}" >"$output/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - began)) s" | tee -a "$output/parts.txt"
}

standin() {
    part standin_mid 0 python make_standin.py --config configs/standin_mid.yaml "${local_files[@]}" data.num_workers=13 train.max_steps="$mid_steps" \
        train.validate_every_steps="$mid_steps" train.save_every_steps="$mid_steps" output_dir="$output/standin_mid"
}

# Does what makes phase 1 fast change what it learns? The same clips with another seed say how much is chance.
curves() {
    local curve=("${clips[@]}" data.num_workers=13 "checkpoint=$output/random" data.batch_size=16 train.max_steps=200 train.validate_every_steps=50
        train.save_every_steps=200 train.log_every_steps=5 train.n_samples=0 train.ema_decay=0.9 optimizer.warmup_steps=20
        discriminator.warmup_steps=20)
    part random "$last" python make_standin.py --random --size codec --output "$output/random"
    part curve_fast "$last" python train_encoder.py "${curve[@]}" output_dir="$output/curve_fast" discriminator.crop_sec=0.5
    part curve_slow "$last" python train_encoder.py "${curve[@]}" output_dir="$output/curve_slow" discriminator.crop_sec=4 \
        train.cuda_graphs=false
    part curve_seed "$last" python train_encoder.py "${curve[@]}" output_dir="$output/curve_seed" discriminator.crop_sec=0.5 seed=1
    part loss_curves "$last" python benchmarks/loss_curves.py "$output"/curve_{fast,slow,seed} --output "$output/loss_curves.png"
}

# Rows of the ablation, two on each GPU: one starts or reads while the other computes. Rows that most hangs on come first.
rows() {
    part withheld "$all" python benchmarks/withheld_encoder.py "${mid[@]}" data.num_workers=4 --metrics mel,stft,estoi \
        --steps "$row_steps" --rows d,m,best,cheap,a,b,c,h,t,l,e,f,g,i,k,o,half,double --seeds "$seeds" --minutes "$minutes" \
        --at-once $((2 * gpus)) --output "$output/withheld"
}

# What longer runs bring.
longer() {
    part withheld_4 0 python benchmarks/withheld_encoder.py "${mid[@]}" data.num_workers=6 --metrics mel,stft,estoi \
        --steps $((4 * row_steps)) --seeds 0 --rows best,cheap --at-once 2 --output "$output/withheld_4"
}

longest() {
    part withheld_16 "$last" python benchmarks/withheld_encoder.py "${mid[@]}" data.num_workers=6 --metrics mel,stft,estoi \
        --steps $((16 * row_steps)) --seeds 0 --rows cheap --output "$output/withheld_16"
}

# Two processes; growth_batch has one with the same clips a GPU.
processes() {
    if [ "$gpus" -gt 1 ]; then
        part two_processes 0,1 torchrun --nproc-per-node 2 benchmarks/train_step.py "${growth[@]}" data.num_workers=13 \
            --growth batch=16,32 --output "$output/two_processes"
    fi
}

# What the losses ask for at all; the longest runs on more scores, people and synthetic voices.
judge() {
    local steps row system file encoders=()
    for file in withheld/cheap_seed{0,1} withheld_4/cheap_seed0 withheld_16/cheap_seed0 withheld_4/best_seed0; do
        file="$output/$file/encoder.safetensors"
        [ -f "$file" ] && encoders+=(--encoder "$file")  # there was not the time for each
    done
    part limits 0 python benchmarks/code_limits.py "${mid[@]}" data.num_workers=8 "${encoders[@]}" --output "$output/limits" \
        --told "$row_steps,$((4 * row_steps)),$((16 * row_steps))"
    for system in 4:best 16:cheap; do
        steps=${system%:*} row=${system#*:}
        local files=(--checkpoint "$output/standin_mid/released" --data configs/standin_mid.yaml --max-sec 6
            --reference-encoder "$output/standin_mid/withheld_encoder.safetensors" --metrics mel,stft,sisdr,estoi,speaker
            --encoder "$output/withheld_$steps/${row}_seed0/encoder.safetensors" "data.data_root=$speech")
        part "people_$row" 0 python evaluate.py "${files[@]}" --all 'data.sources=[{kind: manifest, path: eval.csv}]' \
            --output "$output/people_$row"
        part "synthetic_$row" 0 python evaluate.py "${files[@]}" --output "$output/synthetic_$row"
    done
}

# GPU-only tests; speed and memory against batch and length.
growth() {
    part gpu_tests "$last" python -m pytest -q tests -k "recorded or graph or gpu"
    part growth_batch "$last" python benchmarks/train_step.py "${growth[@]}" data.num_workers=13 --growth batch=4,8,16,32,64 \
        --output "$output/growth_batch"
    part growth_seconds "$last" python benchmarks/train_step.py "${growth[@]}" data.num_workers=13 data.batch_size=8 \
        --growth seconds=1,2,4,8,16,30 --output "$output/growth_seconds"
}

for stage in ${STAGES:-standin+curves rows longer+longest processes judge+growth}; do
    first=${stage%+*} second=${stage#*+}  # the same without a +
    if [ "$first" = "$second" ]; then
        "$first"
    elif [ "$gpus" -gt 1 ]; then
        "$first" &
        "$second"
        wait
    else
        "$first"
        "$second"
    fi
done
