#!/usr/bin/env bash
# Train all embedded models at once, by the clock, and pack them into small files.
#
#     bash train/emoji/all.sh WORK_DIR OUT [cuda|cpu]
#
# Run it from the repository's root: the pictures, then autoencoder and judge side by side while the
# denoisers compile, then UNet, flow transformer and SiT side by side on the cached latents, then the
# fine-tunes and the figures. The denoisers end 30 + AUTOENCODER + TRAIN seconds after the start, 390 with the
# defaults, whatever the machine; the fine-tunes and the figures come after that. The shipped models had
# further training: see "After all.sh" in train/emoji/README.md. A part that fails does not stop the others;
# OUT/log.txt says how each ended.
#
# QUICK=1           a few steps of everything, to try it
# AUTOENCODER, TRAIN, JUDGE, STYLE    seconds of each training
# EMOJI_FONT        the font's file;  ARTWORK: folder of the clay style's images;  PYTHON: the interpreter
set -uo pipefail
work=$1 out=$2 device=${3:-cuda}
python=${PYTHON:-python3}
autoencoder=${AUTOENCODER:-90} train=${TRAIN:-270} judge=${JUDGE:-40} style=${STYLE:-20}
artwork=${ARTWORK:-runs/fluent} per_object=300 scales="1 1.5 2 3 4 6" count=2
[ -z "${QUICK:-}" ] || per_object=12 scales="" count=1
mkdir -p "$work" "$out" "$work/logs" "$work/loras" "$work/sheets"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-3} TORCHINDUCTOR_COMPILE_THREADS=5
began=$(date +%s)

say() { echo "$(($(date +%s) - began)) s  $*" | tee -a "$out/log.txt"; }

part() {  # part NAME COMMAND...: run it, its output in logs/NAME.txt; say what it printed last and how it ended
    local name=$1 status; shift
    "$@" >>"$work/logs/$name.txt" 2>&1; status=$?
    [ $status = 0 ] || say "$name FAILED ($status): $(tail -n 3 "$work/logs/$name.txt" | tr '\r\n' '  ')"
    grep -aE 'PSNR|accuracy|compiled|frechet|pictures of' "$work/logs/$name.txt" | while read -r line; do say "$name: $line"; done
    say "$name ended"
    return $status
}

limit() {  # limit SECONDS BATCH_SIZE: for how long to train from now
    if [ -n "${QUICK:-}" ]; then echo "--steps 4 --batch_size 4 --device $device"
    else echo "--until $(($(date +%s) + $1)) --batch_size $2 --device $device"; fi
}

pack() {  # pack NAME PATHS...: a tar of what there is of work's PATHS, in pieces of 15 MiB if need be
    local name=$1; shift
    (cd "$work" && tar -c $(ls -d "$@" 2>/dev/null)) >"$work/$name.tar"
    if [ "$(stat -c %s "$work/$name.tar")" -gt $((15 * 1024 * 1024)) ] && [ "$name" = unet ]
    then split -b 15m "$work/$name.tar" "$out/$name.tar."
    else cp "$work/$name.tar" "$out/$name.tar"; fi
}

model() {  # model NAME MODULE PACK FOLDER SCALE OPTIONS...: train it, pack its network, measure it
    local name=$1 module=$2 file=$3 network=$4 scale=$5; shift 5
    local command=("$python" -m "train.emoji.$module" --work_dir "$work" --output_dir "$work/$name" "$@")
    if [ "$device" = cuda ] && [ -z "${NO_COMPILE:-}" ]
    then part "$name" "${command[@]}" --compile || part "$name" "${command[@]}" || return
    else part "$name" "${command[@]}" || return; fi
    pack "$file" "$name/$network"
    touch "$work/$name.done"
    part "sheet-$name" "$python" -m train.emoji.sheet --model "$work/$name" --pictures "$work/pictures" \
        --judge "$work/classifier.safetensors" --scale "$scale" --scales $scales --n "$count" --output "$work/sheets/$name.webp" --device "$device"
}

fine_tune() {  # fine_tune STYLE: the LoRA of a style and its judge
    part "style-$1" "$python" -m train.emoji.style --pictures "$work/$1/pictures" --backbone "$work/emoji" \
        --output_dir "$work/loras/emoji-$1" $(limit "$style" 64)
}

[ -e "$work/text_encoder" ] || cp -r assets/emoji/text_encoder assets/emoji/tokenizer "$work"

# The denoisers compile while the autoencoder learns, and then wait for its latents.
end=$((began + 30 + autoencoder + train))
if [ -n "${QUICK:-}" ]; then options="--steps 4 --batch_size 4 --device $device"
else options="--until $end --batch_size 128 --device $device"; fi
model emoji denoiser unet unet 3 $options & unet=$!
model emoji-flow flow flow transformer 3 $options & flow=$!
model emoji-sit sit sit transformer 3 $options & sit=$!

render=("$python" -m train.emoji.render --device "$device")
part render "${render[@]}" --output_dir "$work/pictures" --per_object $per_object --held_out_per_pair $((8 * count))
(
    for name in clay ink; do
        part "render-$name" "${render[@]}" --style $name --artwork "$artwork" --per_object $((per_object / 5)) \
            --held_out_per_pair 4 --output_dir "$work/$name/pictures"
    done
) & styles=$!
(
    part judge "$python" -m train.emoji.classifier --pictures "$work/pictures" --checkpoint "$work/classifier.pt" \
        --output "$work/classifier.safetensors" $(limit "$judge" 128)
    for name in clay ink; do
        timeout 60 bash -c "while ! [ -e '$work/$name/pictures/judge_classes.npy' ]; do sleep 1; done"
        part "judge-$name" "$python" -m train.emoji.classifier --pictures "$work/$name/pictures" \
            --checkpoint "$work/classifier-$name.pt" --start_from "$work/classifier.safetensors" \
            --output "$work/classifier-$name.safetensors" --lr 1e-3 $(limit 15 64)
    done
) & judges=$!
part autoencoder "$python" -m train.emoji.autoencoder --pictures "$work/pictures" --output_dir "$work" \
    $(limit "$autoencoder" 16)
pack base vae
wait $judges $styles
pack base vae classifier.safetensors classifier-clay.safetensors classifier-ink.safetensors
while ! [ -e "$work/emoji.done" ] && kill -0 $unet 2>/dev/null; do sleep 1; done
fine_tune clay & clay=$!
fine_tune ink & ink=$!
wait $clay $ink
pack styles loras/emoji-clay loras/emoji-ink
wait $unet $flow $sit
cp "$work"/*.log "$work/logs/"
pack report sheets logs
say "all ended: $(du -sm "$out" | cut -f1) MiB in $(ls "$out" | wc -l) files"
