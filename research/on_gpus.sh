#!/usr/bin/env bash
# The figures of RESULTS.md and benchmarks/README.md that need GPUs: speed of phase 1, the withheld-encoder benchmark
# with its mid-size stand-in. Meant for half an hour on a machine with two GPUs; on one, what is meant for the second
# waits for the first.
#
#   research/on_gpus.sh SPEECH WHISPER OUTPUT
#
# SPEECH: a folder with train.csv, talk.csv and eval.csv (columns path and speaker). WHISPER: openai-whisper's name of a
# model, or a local .pt. OUTPUT gets a log for each part, and what the parts write. In a hurry: MID_STEPS, ROW_STEPS,
# SEEDS, MINUTES (after so many no training begins or goes on), and STAGES, some of those below, one after the other on
# all GPUs; of a,b+c,d two lists run beside each other, the first on the first GPU, the second on the last. rows,
# longer, longest and judge need the stand-in.
set -u
[ $# -eq 3 ] || { echo "usage: $0 SPEECH WHISPER OUTPUT" >&2; exit 2; }
for name in train talk eval; do
    [ -f "$1/$name.csv" ] || { echo "$1: there must be train.csv, talk.csv and eval.csv in it." >&2; exit 2; }
done
mkdir -p "$3"
speech=$(realpath "$1") whisper=$2 output=$(realpath "$3")
[ -f "$whisper" ] && whisper=$(realpath "$whisper")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # several processes share the cores
mid_steps=${MID_STEPS:-2500} row_steps=${ROW_STEPS:-500} seeds=${SEEDS:-0,1,2} minutes=${MINUTES:-26}
stages=${STAGES:-processes standin,rows+growth,curves,longer,longest,judge}
gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
last=$((gpus - 1))
local_files=("data.data_root=$speech" "asr.model=$whisper")
clips=('data.sources=[{kind: manifest, path: train.csv}]' "${local_files[@]}")
growth=(train.compile=false --config configs/encoder_paper.yaml --random-full "${clips[@]}" loss.asr=0
    discriminator.crop_sec=0.5 data.num_workers=6 --steps 12 --warm-up 5)
heard=(train.compile=false data.batch_size=24 optimizer.learning_rate=5e-4 discriminator.channels=16
    discriminator.crop_sec=1 asr.context_sec=5)
mid=(--standin "$output/standin_mid/released" --withheld "$output/standin_mid/withheld_encoder.safetensors"
    --data configs/standin_mid.yaml --eval "$speech/eval.csv" "${local_files[@]}" "${heard[@]}" data.num_workers=3)

part() {  # part NAME COMMAND...: on $on; its output in OUTPUT/NAME.log, its seconds in OUTPUT/parts.txt; never fatal
    local name=$1 began=$SECONDS
    CUDA_VISIBLE_DEVICES=$on "${@:2}" >"$output/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - began)) s" | tee -a "$output/parts.txt"
}

withheld() {  # withheld NAME OPTIONS...: for as long as MINUTES allow
    while [[ $stages == *standin* ]] && ! grep -qs ^standin_mid: "$output/parts.txt" &&
        [ $SECONDS -lt $((60 * minutes)) ]; do sleep 1; done
    local left=$((60 * minutes > SECONDS ? minutes - SECONDS / 60 : 0))
    part "$1" python research/withheld_encoder.py "${mid[@]}" --max-sec 6 --metrics mel,stft,estoi --minutes "$left" \
        "${@:2}" --output "$output/$1"
}

standin() {  # its codec alone: nothing here lets it speak
    part standin_mid python make_standin.py --config configs/standin_mid.yaml "${local_files[@]}" "${heard[@]}" \
        data.num_workers=4 loss.feature=1 loss.asr=1 discriminator.warmup_steps=500 train.ema_decay=0.998 \
        train.max_steps="$mid_steps" train.validate_every_steps="$mid_steps" train.save_every_steps="$mid_steps" \
        output_dir="$output/standin_mid" language_model=null
}

# Does what makes phase 1 fast change what it learns? The same clips with another seed say how much is chance.
curves() {
    local curve=(--config configs/encoder_paper.yaml train.compile=false "${clips[@]}" data.num_workers=13
        "checkpoint=$output/random" data.batch_size=16 train.max_steps=200 train.validate_every_steps=50
        train.save_every_steps=200 train.log_every_steps=5 train.n_samples=0 train.ema_decay=0.9
        optimizer.warmup_steps=20 discriminator.warmup_steps=20)
    part random python make_standin.py --random --size codec --output "$output/random"
    part curve_fast python train_encoder.py "${curve[@]}" output_dir="$output/curve_fast" discriminator.crop_sec=0.5
    part curve_slow python train_encoder.py "${curve[@]}" output_dir="$output/curve_slow" discriminator.crop_sec=4 \
        train.cuda_graphs=false
    part curve_seed python train_encoder.py "${curve[@]}" output_dir="$output/curve_seed" discriminator.crop_sec=0.5 \
        seed=1
    part loss_curves python research/loss_curves.py "$output"/curve_{fast,slow,seed} --output "$output/loss_curves.png"
}

# Rows of the ablation, two on each GPU: one starts or reads while the other computes. What most hangs on comes first.
rows() {
    local here=(${on//,/ }) row_names=paper,paper+mel+match,mel+match,paper+mel
    row_names+=,paper_without_whisper,paper+commit,paper_from_true
    withheld withheld --steps "$row_steps" --seeds "$seeds" --rows "$row_names" \
        --at-once $((2 * ${#here[@]}))
}

# What longer runs bring.
longer() { withheld withheld_4 --steps $((4 * row_steps)) --seeds 0 --rows paper+mel+match,mel+match; }
longest() { withheld withheld_8 --steps $((8 * row_steps)) --seeds 0 --rows paper+mel+match; }

# Two processes; growth_batch has one with the same clips a GPU.
processes() {
    if [ "$gpus" -gt 1 ]; then
        part two_processes torchrun --nproc-per-node 2 benchmarks/train_step.py "${growth[@]}" \
            --growth batch=16,64 --output "$output/two_processes"
    fi
}

# The longer runs on more scores, people and synthetic voices; what the losses ask for at all.
judge() {
    local run file encoders=()
    for run in withheld_4 withheld_8; do
        local files=(--checkpoint "$output/standin_mid/released" --data configs/standin_mid.yaml --max-sec 6
            --reference-encoder "$output/standin_mid/withheld_encoder.safetensors"
            --encoder "$output/$run/paper+mel+match_seed0/encoder.safetensors"
            --metrics mel,stft,sisdr,estoi,speaker "data.data_root=$speech")
        part "people_$run" python evaluate.py "${files[@]}" --all 'data.sources=[{kind: manifest, path: eval.csv}]' \
            --output "$output/people_$run"
        part "synthetic_$run" python evaluate.py "${files[@]}" --output "$output/synthetic_$run"
    done
    for file in "$output"/withheld/{paper+mel+match,mel+match}_seed{0,1} \
        "$output"/withheld_{4,8}/paper+mel+match_seed0; do
        [ -f "$file/encoder.safetensors" ] && encoders+=(--encoder "$file/encoder.safetensors")  # not all had the time
    done
    part limits python research/code_limits.py "${mid[@]}" "${encoders[@]}" --output "$output/limits" \
        --supervised "$row_steps,$((4 * row_steps))"
}

# Speed and memory against batch and length; GPU-only tests.
growth() {
    part growth_batch python benchmarks/train_step.py "${growth[@]}" --growth batch=4,8,16,32,64,128 \
        --output "$output/growth_batch"
    part growth_seconds python benchmarks/train_step.py "${growth[@]}" data.batch_size=8 \
        --growth seconds=1,2,4,8,16,30 --output "$output/growth_seconds"
    part gpu_tests python -m pytest -q tests -k "recorded or graph or gpu"
}

for stage in $stages; do
    first=${stage%+*} second=${stage#*+}  # the same without a +
    if [ "$first" = "$second" ]; then
        on=$(seq -s, 0 "$last")
        "$stage"
    else
        (on=0; for one in ${first//,/ }; do "$one"; done) &
        [ "$gpus" -gt 1 ] || wait
        (on=$last; for one in ${second//,/ }; do "$one"; done)
        wait
    fi
done
