#!/usr/bin/env bash
# Trains and evaluates experiments of configs/paper.py, and makes the report over all that are there. Run again, it goes on
# where it stopped; finished experiments are skipped.
#
#   ./launch/paper.sh lab                           all of a protocol, seed 0; of lab, 14 to 24 hours on two CPU cores
#   ./launch/paper.sh lab/overlay lab/after@1       some; @1 is another seed
#   ./launch/paper.sh lab/overlay -- --config.train.steps=20    more arguments for train and evaluate
#   ./launch/paper.sh lab_58k/overlay lab_23k/overlay    the same proportions for smaller decoders, which are made first
#   ./launch/paper.sh questions                     four rows on Countdown, in thirteen minutes on two idle CPU cores
#   ./launch/paper.sh hops                          latents instead of written steps, four rows
#   ./launch/paper.sh mixed                         trained on text that holds problems, asked problems; four rows
#   ./launch/paper.sh plus_minus                    a real decoder, SmolLM2-135M, two rows, on two CPU cores
#   LATENT_DELIB_EXTRAS=cuda ./launch/gpu.sh ./launch/paper.sh b/overlay b/after      on a GPU: protocols lab_gpu and b
#
# configs/protocols.py has the protocols. The workdir of a run is runs/paper/PROTOCOL/NAME@SEED. Below it are
#   swap/               latents of another document: all experiments whose latents depend on the text, except inserted,
#                       whose keys contain a position
#   evaluations/        every checkpoint: overlay, after and before with any number of latents, adapt_*
#   longer/             the plain decoder reads as much more text as latents cost: overlay, after
#   delay1/ to delay3/  latents come late: overlay, after, delay
# Protocols problems, mixed, depth, questions, hops and plus_minus have swap/, and instead of the others
#   benchmarks.json     problems solved, with latents and without
#   text/               perplexity on text, after a decoder was trained on problems: decoder* of protocol problems
#   answers/            perplexity of the answers alone: protocol mixed
# More arguments make another experiment: its workdir is runs/trials/PROTOCOL/NAME@SEED,ARGUMENTS, and the report leaves
# it out.
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"

(($#)) || usage
for argument; do
  [[ $argument != --help && $argument != -h ]] || usage
done
names=$(sed -nE '/^EXPERIMENTS/,/^}/s/^    "(\w+)":.*/\1/p' configs/paper.py)
names=${names//$'\n'/ }

protocols='lab lab_58k lab_23k lab_gpu problems mixed depth questions hops plus_minus b'
wanted=()
all() { # PROTOCOL
  local few='' name
  case $1 in # a first look
    questions) few='overlay static_tokens feedback_fast decoder_fast' ;;
    hops) few='double overlay static_tokens decoder_fast' ;;
    mixed) few='overlay after static_tokens decoder' ;;
    plus_minus) few='overlay static_tokens' ;;
  esac
  if [[ -n $few ]]; then
    for name in $few; do wanted+=("$1/$name"); done
    return
  fi
  wanted+=("$1/overlay" "$1/after" "$1/decoder") # what the others are compared with, or start from
  for name in $names; do
    [[ $name != assistant || $1 =~ ^lab(_[0-9]|$) ]] || continue # it needs a second decoder of the same vocabulary
    [[ $name != distilled ]] || continue # it needs questions with steps: protocol hops
    [[ " overlay after decoder pretrain " == *" $name "* || $name == adapt_* ]] || wanted+=("$1/$name")
  done
  # Last: they want reasoning-gym, which is not everywhere. Two protocols have tasks of their own.
  [[ $1 == problems || $1 == depth ]] || wanted+=("$1/adapt_decoder" "$1/adapt_coprocessor")
}
while (($#)) && [[ $1 != -- ]]; do
  protocol=${1%%/*} name=${1#*/}
  if [[ " $protocols " != *" $protocol "* || ($1 == */* && " $names " != *" ${name%@*} "*) ]]; then
    die "$1: expected PROTOCOL, PROTOCOL/NAME or PROTOCOL/NAME@SEED; PROTOCOL one of $protocols, NAME one of $names"
  fi
  [[ $1 != *@* || $1 =~ @[0-9]+$ ]] || die "$1: expected a number after @"
  case ${1%@*} in
    */pretrain) die "$1: decoders are made automatically, before the experiments that need them" ;;
    lab_gpu/assistant | plus_minus/assistant | b/assistant) die "$1: needs a second decoder of the same vocabulary, and $protocol has none" ;;
    plus_minus/latent_tokens) die "$1: its answers are too short for latents after every 4 tokens" ;;
    hops/distilled) ;;
    */distilled) die "$1: needs questions with steps; only hops has them: hops/distilled" ;;
  esac
  if [[ $1 == */* ]]; then
    wanted+=("$1")
  else
    all "$1"
  fi
  shift
done
((${#wanted[@]})) || die "no experiment is named; --help tells more"
more=("${@:2}")
overrides "${more[@]}"
root=runs/paper suffix=''
if ((${#more[@]})); then
  root=runs/trials suffix=$(printf ',%s' "${more[@]#--config.}")
  suffix=${suffix//[^A-Za-z0-9.,=_-]/-}
fi
extras=(eval gguf mixture report tasks)
[[ " ${wanted[*]}" != *" lab_gpu/"* ]] || extras+=(hub) # its text
./launch/setup.sh "${extras[@]}"
run() { echo "== $*" && .venv/bin/python -m "$@"; }

prepare() { # PROTOCOL EXPERIMENT: the decoder and the tokens; lab, lab_58k and lab_23k share their tokens
  local gguf tokens=runs/paper/${1%%_[0-9]*}/tokens
  if [[ ! $1 =~ ^(depth|questions|hops|plus_minus)$ && ! -e runs/mixture/MIXTURE.md ]]; then
    run tools.make_mixture --out=runs/mixture
  fi
  if [[ $1 == lab_gpu && ! -e runs/paper/$1/tokenizer.model ]]; then
    run tools.make_vocabulary --text='runs/mixture/train/*.txt' --size=4096 --out="runs/paper/$1/tokenizer.model"
  fi
  if [[ $1 == problems && ! -e runs/problems ]]; then
    run tools.make_problems --out=runs/problems
  fi
  if [[ $1 == depth && ! -e runs/follow ]]; then
    run tools.make_problems --kinds=follow,far --train=1600000 --test=3000 --out=runs/follow
  fi
  if [[ $1/$2 == lab/assistant ]]; then
    prepare lab_58k overlay # its decoder
  fi
  if [[ $1 == mixed ]]; then
    prepare problems overlay # its decoder and its tokens
    tokens=runs/paper/problems/tokens
  fi
  local file=runs/questions/${1/questions/countdown}.train.jsonl
  if [[ $1 =~ ^(questions|hops|plus_minus)$ && ! -e $file ]]; then
    [[ ! -e runs/questions ]] || die "runs/questions has no ${file##*/}; remove the folder, and run this again"
    run tools.make_questions --out=runs/questions
  fi
  if [[ $1 =~ ^(plus_minus|b)$ && ! -e runs/smollm2_135m/decoder ]]; then
    gguf=$(./launch/get_smollm2.sh) # on a line of its own, or a failed download would go unnoticed
    run latent_delib.convert --source="$gguf" --out=runs/smollm2_135m/decoder --size=smollm2_135m
  fi
  local its_own=overlay
  case $1 in
    lab_* | problems | depth | questions | hops) its_own=pretrain ;; # the same text and vocabulary, and needs no decoder yet
  esac
  if [[ ! -e $tokens/meta.json ]]; then
    run latent_delib.prepare --config="configs/paper.py:$1/$its_own" --config.data.token_files= --out="$tokens"
  fi
  local others='' # the token files of experiments that read another text than `pretrain`
  case $1 in
    depth) others=far_tokens ;;
    hops) others=answer_tokens ;;
  esac
  if [[ -n $others && ! -e runs/paper/$1/$others/meta.json ]]; then
    run latent_delib.prepare --config="configs/paper.py:$1/overlay" --config.data.token_files= --out="runs/paper/$1/$others"
  fi
  if [[ $its_own == pretrain && ! -e runs/paper/$1/frozen/perplexity.json ]]; then
    run latent_delib.train --config="configs/paper.py:$1/pretrain" --workdir="runs/paper/$1/pretrain"
    run latent_delib.evaluate --config="configs/paper.py:$1/decoder" --workdir="runs/paper/$1/frozen"
  fi
  if [[ $2 == adapt_* ]]; then
    [[ -e runs/paper/$1/task_tokens/meta.json ]] ||
      run latent_delib.prepare --config="configs/paper.py:$1/$2" --config.data.token_files= --out="runs/paper/$1/task_tokens"
  fi
}

evaluate() { # OUT, then what goes to the command; what is there already stays
  [[ -e $1/perplexity.json ]] || run latent_delib.evaluate --config="$config" --workdir="$workdir" --out="$1" "${@:2}" "${more[@]}"
}

control() {
  if [[ $name == overlay || $name == after ]]; then
    evaluate "$workdir/longer" --config.evaluate.longer_prompt=32 # two passes for each of 16 latents
  fi
  if [[ $name =~ ^(overlay|after|before|adapt_) ]]; then
    run latent_delib.evaluate --config="$config" --workdir="$workdir" --steps=all "${more[@]}"
  fi
  if [[ $name == overlay || $name == after || $name == delay ]]; then
    for delay in 1 2 3; do evaluate "$workdir/delay$delay" --config.evaluate.delay="$delay"; done
  fi
}

solve() { # the problems; and, where the decoder itself was trained on them, the text that it read before
  local models=decoder,augmented problems=runs/problems benchmarks=sums,sorting,look_ups,brackets
  if [[ $protocol =~ ^(questions|hops|plus_minus)$ ]]; then
    benchmarks=qa:runs/questions/${protocol/questions/countdown}.test.jsonl
  fi
  if [[ $protocol == depth ]]; then
    problems=runs/follow benchmarks=follow_1,follow_2,follow_3,follow_4,follow_5,follow_6
  fi
  if [[ $name == decoder* || $name == adapt_decoder ]]; then
    models=decoder
  fi
  if [[ $name == decoder* && $protocol == problems ]]; then
    evaluate "$workdir/text" --config.data.validation="('files:runs/mixture/validation/*.txt',)" --config.method.prompt_end=
  fi
  if [[ $protocol == mixed && $models != decoder ]]; then # perplexity of the answers alone
    evaluate "$workdir/answers" --config.data.validation="('files:runs/problems/text/test/*.txt',)" --config.method.prompt_end==
  fi
  run latent_delib.benchmark --workdir="$workdir" --model="$models" --benchmarks="$benchmarks" --table=configs/problems.py \
    --tasks="$problems" --out="$workdir"
}

read_name() { # PROTOCOL/NAME@SEED
  protocol=${1%%/*} name=${1#*/} seed=0
  [[ $name != *@* ]] || seed=${name#*@}
  name=${name%@*}
  config=configs/paper.py:$protocol/$name workdir=$root/$protocol/$name@$seed$suffix
}

made=0 spent=0 # experiments, and seconds for them: decoders and tokens are made once
say_time_left() {
  local each left=0
  for each in "${wanted[@]}"; do
    read_name "$each"
    [[ -e $workdir/perplexity.json ]] || left=$((left + 1))
  done
  local minutes=$((spent * left / made / 60))
  echo "== $left of ${#wanted[@]} experiments left, about $((minutes / 60)) h $((minutes % 60)) min"
}

left_out=()
for each in "${wanted[@]}"; do
  read_name "$each"
  [[ -e $workdir/perplexity.json ]] && is_new='' || is_new=1
  if [[ $name == adapt_* && ! -e runs/tasks ]] && ! run tools.make_tasks --out=runs/tasks; then
    left_out+=("$each")
    continue
  fi
  prepare "$protocol" "$name"
  began=$SECONDS
  [[ -e $workdir/perplexity.json ]] || run latent_delib.train --config="$config" --workdir="$workdir" --config.seed="$seed" "${more[@]}"
  evaluate "$workdir"
  if [[ ! $name =~ ^((static|pause|latent)_tokens(_x4)?|.*_static|cartridge|inserted|decoder.*|adapt_decoder)$ ]]; then
    evaluate "$workdir/swap" --config.evaluate.swap
  fi
  if [[ $protocol =~ ^(problems|mixed|depth|questions|hops|plus_minus)$ ]]; then
    solve
  else
    control
  fi
  if [[ -n $is_new ]]; then
    made=$((made + 1)) spent=$((spent + SECONDS - began))
    say_time_left
  fi
done
[[ $root == runs/trials ]] || run latent_delib.report runs/paper --out=runs/paper/report
if ((${#left_out[@]})); then
  die "left out, because runs/tasks could not be made: ${left_out[*]}"
fi
