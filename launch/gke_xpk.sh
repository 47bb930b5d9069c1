#!/usr/bin/env bash
# Runs a job on a slice of a GKE cluster, through XPK (pip install xpk; it needs kubectl, docker and gcloud beside it).
#
#   ./launch/gke_xpk.sh create_cluster --accelerator=v5litepod-16 [--slices=1] [--spot]
#   ./launch/gke_xpk.sh run    NAME --accelerator=... -- python -m latent_delib.train --config=... --workdir=gs://...
#   ./launch/gke_xpk.sh keep   NAME --accelerator=... [--delete] -- python -m latent_delib.train ...
#   ./launch/gke_xpk.sh status [NAME]
#   ./launch/gke_xpk.sh logs   NAME
#   ./launch/gke_xpk.sh delete NAME
#   ./launch/gke_xpk.sh delete_cluster
#
# `run` adds --distributed, makes an image of this folder (Dockerfile), pushes it as gcr.io/PROJECT/latent_delib:TIME, and
# returns once the job is queued. Kubernetes itself starts the job again, from the same image, after a preemption, a
# signal, code 69 (another process was lost, or a store or the Hub does not answer), 75 (stopped, and saved) or the codes
# that XPK adds (42, 127 and more), and not after code 1.
# `keep` does `run` unless NAME is there, and waits for its end.
#
#   --accelerator=TYPE   as XPK names them: v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N
#   --slices=1           how many such slices the cluster has, or the job takes; mesh.data is a multiple of it
#   --image=IMAGE        runs this image, made before, instead of making one
#   --spot               for the cluster: cheaper, and taken away at any time; without it on demand
#   --restarts=1000      how often Kubernetes may start the job again; preemptions count
#   --delete             `keep` deletes the job when it is done or has failed
#   --dry_run            prints the commands, one per line, and runs none
#
# Environment: LATENT_DELIB_PROJECT, LATENT_DELIB_ZONE, LATENT_DELIB_CLUSTER; see also common.sh.
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
accelerator='' slices=1 image='' spot='' restarts=1000 delete=''
parse "accelerator slices image spot restarts delete" "$@"
action=${REST[0]:-} name=${REST[1]:-}
[[ " create_cluster run keep status logs delete delete_cluster " == *" $action "* ]] ||
  die "no action '$action'; --help has them all"
[[ $name =~ ^([a-z]([-a-z0-9]{0,38}[a-z0-9])?)?$ && ${#REST[@]} -le 2 ]] ||
  die "expected an action and a name of a-z, 0-9 and -, found '${REST[*]}'; --help tells more"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: expected 1 or more"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "--restarts=$restarts: expected 0 or more"
environment LATENT_DELIB_PROJECT "the Google Cloud project"
environment LATENT_DELIB_ZONE "the zone of the cluster's slices, such as us-central1-a"
environment LATENT_DELIB_CLUSTER "the name of the GKE cluster"
installed xpk "pipx install xpk"
at=(--cluster="$LATENT_DELIB_CLUSTER" --project="$LATENT_DELIB_PROJECT" --zone="$LATENT_DELIB_ZONE")

xpk_workload() { retry xpk workload "$1" "${at[@]}" "${@:2}"; }
listed() { # STATUS; grep -q would end xpk at the match
  xpk_workload list --filter-by-job="$name" --filter-by-status="$1" | grep -E "^$name( |\$)" >/dev/null
}

make_image() {
  installed docker "https://docs.docker.com/engine/install; or name an --image"
  image=gcr.io/$LATENT_DELIB_PROJECT/latent_delib:$(date +%Y%m%d-%H%M%S)
  call docker build --platform=linux/amd64 --build-arg=EXTRAS="tpu${LATENT_DELIB_EXTRAS:+,$LATENT_DELIB_EXTRAS}" \
    --tag="$image" .
  retry docker push "$image"
}

run() {
  [[ -n $image ]] || make_image
  # `exec`, because XPK passes SIGTERM to what it has started itself, not to the children of that.
  xpk_workload create --workload="$name" --tpu-type="$accelerator" --num-slices="$slices" --docker-image="$image" \
    --command="exec $(quote "${COMMAND[@]}")" --max-restarts="$restarts" --restart-on-exit-codes=69,75 \
    --termination-grace-period-seconds=300
}

keep() {
  local code=0
  ! listed FINISHED || xpk_workload delete --workload="$name" --force # an earlier job of this name
  listed EVERYTHING || run
  for ((try = 1; try <= RETRIES; try++)); do
    code=0
    call xpk workload list "${at[@]}" --wait-for-job-completion="$name" || code=$?
    case $code in
      0 | 125) # XPK takes a job of a longer name for this one
        [[ -n $dry_run ]] || listed FINISHED || { try=0 && pause && continue; }
        ;;&
      0) say "== the job $name is done" && break ;;
      125) say "== the job $name failed; \`logs $name\` has the reason" && break ;;
      124) try=0 ;; # it waits a week at most
    esac
    pause
  done
  [[ $code == 0 || $code == 125 ]] || die "the end of $name cannot be seen; the job goes on"
  [[ -z $delete ]] || xpk_workload delete --workload="$name" --force
  ((!code)) || exit 1
}

case $action in
  create_cluster | run | keep) [[ -n $accelerator ]] || die "--accelerator is missing" ;;&
  run | keep | logs | delete) [[ -n $name ]] || die "$action: the name of the job is missing" ;;&
  run | keep) job slice ;;&
  create_cluster)
    [[ -n $spot ]] && spot=--spot
    retry xpk cluster create "${at[@]}" --tpu-type="$accelerator" --num-slices="$slices" "${spot:---on-demand}"
    ;;
  run) run ;;
  keep) keep ;;
  status) xpk_workload list ${name:+--filter-by-job="$name"} ;;
  logs)
    xpk_workload list --filter-by-job="$name" # which gives kubectl its credentials
    call kubectl logs --selector="xpk.google.com/workload=$name" --all-containers --prefix --follow --tail=20 \
      --max-log-requests=1000
    ;;
  delete) xpk_workload delete --workload="$name" --force ;;
  delete_cluster) call xpk cluster delete "${at[@]}" ;;
esac
