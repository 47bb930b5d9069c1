#!/usr/bin/env bash
# Trains method `feedback` by Coconut's curriculum (Hao et al. 2024), and asks questions after each stage. Stage k leaves
# the first k steps out of the replies and puts THOUGHTS latents for each behind the question; the last leaves out all.
# Arguments, --config.KEY=VALUE, go to train, all but train.steps (STEPS). Run again, it goes on where it stopped.
#
#   QUESTIONS=runs/questions/word_problems ./launch/coconut.sh    # the files QUESTIONS.train.jsonl and QUESTIONS.test.jsonl
#   THOUGHTS=2 STAGES=3 STEPS=2000                                # per step; before the last; of training in each
#   RUN=runs/coconut CONFIG=quickstart                            # where to write; configs/CONFIG.py
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
overrides "$@"
[[ "$*" != *--config.train.steps=* ]] || die "--config.train.steps: expected STEPS=N before the command instead"

questions=${QUESTIONS:-runs/questions/word_problems} thoughts=${THOUGHTS:-2} stages=${STAGES:-3} steps=${STEPS:-2000}
run=${RUN:-runs/coconut} config=configs/${CONFIG:=quickstart}.py
[[ -e $config ]] || die "CONFIG=$CONFIG: there is no $config"
./launch/setup.sh eval
[[ ${QUESTIONS:-} || -e $questions.train.jsonl ]] || python -m tools.make_questions --out=runs/questions
for split in train test; do
  [[ -e $questions.$split.jsonl ]] || die "QUESTIONS=$questions: there is no $questions.$split.jsonl"
done
start= # the checkpoint that the next stage begins with

stage() { # NAME REMOVED LATENTS ARGUMENT...: trains one stage and measures it
  local workdir=$run/$1
  echo "== stage $1: without $2 steps, $3 latents"
  python -m latent_delib.train --config="$config" --workdir="$workdir" \
    --text="qa_steps-$2:$questions.train.jsonl" --held_out="qa_steps-$2:$questions.test.jsonl" \
    --config.method.name=feedback --config.method.placement=after --config.method.prompt_end=Answer: \
    --config.method.num_latents="$3" --config.method.num_traces=5 --config.method.num_ahead=64 \
    --config.data.seq_len=512 --config.train.batch_size=2 --config.optimizer.learning_rate=3e-4 \
    --config.train.steps="$steps" --config.method.start="$start" "${@:4}"
  python -m latent_delib.benchmark --workdir="$workdir" --out="$workdir" --model=augmented \
    --benchmarks="qa:$questions.test.jsonl"
  start=$workdir/checkpoints/$steps
}

for ((k = 0; k <= stages; k++)); do
  stage "$k" "$k" $((1 + thoughts * k)) "$@" # the first latent is the token that begins the thoughts
done
stage last 1000 $((1 + thoughts * stages)) "$@"
