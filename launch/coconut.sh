#!/usr/bin/env bash
# Trains latents by Coconut's curriculum (Hao et al. 2024), and asks questions after each stage. Stage k leaves the first k
# steps out of the replies and puts 1 + k * THOUGHTS latents behind the question; the last leaves out all steps. Arguments,
# --config.KEY=VALUE, go to train, all but train.steps (STEPS). Run again, it goes on where it stopped.
#
#   QUESTIONS=runs/questions/word_problems ./launch/coconut.sh    # the files QUESTIONS.train.jsonl and QUESTIONS.test.jsonl
#   THOUGHTS=2 STEPS=2000                                         # latents per step; training steps of each stage
#   FIRST=0 STAGES=3                                              # the first stage, and the one before the last
#   RUN=runs/coconut CONFIG=coconut                               # where to write; configs/CONFIG.py
#
# With --config.method.name=decoder there are no latents: the decoder learns to leave out its steps (Deng et al. 2024).
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
overrides "$@"
[[ "$*" != *--config.train.steps=* ]] || die "--config.train.steps: expected STEPS=N before the command instead"

questions=${QUESTIONS:-runs/questions/word_problems} thoughts=${THOUGHTS:-2} stages=${STAGES:-3} steps=${STEPS:-2000}
run=${RUN:-runs/coconut} config=${CONFIG:-coconut} first=${FIRST:-0}
for name in thoughts steps first stages; do
  [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || die "${name^^}=${!name}: expected a whole number"
done
[[ -e configs/$config.py ]] || die "CONFIG=$config: there is no configs/$config.py"
./launch/setup.sh eval report
[[ ${QUESTIONS:-} || -e $questions.train.jsonl ]] || python -m tools.make_questions --out=runs/questions
for split in train test; do
  [[ -e $questions.$split.jsonl ]] || die "QUESTIONS=$questions: there is no $questions.$split.jsonl"
done
model=augmented # what is asked
[[ "$*" != *--config.method.name=decoder* ]] || model=decoder
start= # the checkpoint that the next stage begins with

stage() { # NAME REMOVED LATENTS ARGUMENT...: trains one stage and measures it
  local workdir=$run/$1
  echo "== stage $1: without $2 steps, $3 latents"
  python -m latent_delib.train --config="$config" --workdir="$workdir" \
    --text="qa_steps-$2:$questions.train.jsonl" --held_out="qa_steps-$2:$questions.test.jsonl" \
    --config.data.token_files= --config.method.num_latents="$3" --config.train.steps="$steps" --config.method.start="$start" \
    --config.method.prompt_end=Answer: "${@:4}"
  python -m latent_delib.benchmark --workdir="$workdir" --out="$workdir" --model="$model" \
    --benchmarks="qa:$questions.test.jsonl"
  start=$workdir/checkpoints/$steps
}

for ((k = first; k <= stages; k++)); do
  stage "$k" "$k" $((1 + thoughts * k)) "$@" # of `feedback` the first is a token that begins the thoughts
done
stage last 1000 $((1 + thoughts * stages)) "$@"
