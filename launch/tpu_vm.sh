#!/bin/bash
# A run on Cloud TPU VMs, by a queued resource: one slice, or several (multislice) with --set=slices=N.
#
#   python experiments/launch.py --target=tpu_vm --print --set=name=mine --set=zone=us-east5-a \
#       --set=accelerator=v6e-16 --set=runtime=v2-alpha-tpuv6e --set=repository=https://... --set=nfs=10.0.0.2:/runs \
#       -- python experiments/train.py --config=... --workdir=/shared/mine > mine.sh
#   bash mine.sh         # waits for the TPUs and runs; after a preemption again: new TPUs, the run resumes
#   # with --workdir=gs://..., leave out --set=nfs
#   gcloud compute tpus queued-resources delete mine --zone=us-east5-a --force     # until then they are charged
#
# Run for real: nothing. Checked for form: shellcheck, and the flags against gcloud's reference.
set -euo pipefail
name={{name}}
zone={{zone}}
slices={{slices:1}}

node=(--node-id="$name")
[ "$slices" -eq 1 ] || node=(--node-count="$slices" --node-prefix="$name")
state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'
}

case $(state 2> /dev/null || echo NONE) in
  FAILED | SUSPENDED) gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet ;;&
  NONE | FAILED | SUSPENDED)
    gcloud compute tpus queued-resources create "$name" --zone="$zone" "${node[@]}" {{capacity:--spot}} \
      --accelerator-type={{accelerator}} --runtime-version={{runtime}} ;;
esac
until [ "$(state)" = ACTIVE ]; do
  [ "$(state)" != FAILED ] || exit 1
  sleep 30
done

# The same on every host; JAX finds the others by the metadata of the TPU.
gcloud alpha compute tpus queued-resources ssh "$name" --zone="$zone" --node=all --worker=all --command="$(
  cat << 'REMOTE'
set -eu
if [ {{nfs:none}} != none ] && ! mountpoint -q /shared; then
  sudo mkdir -p /shared
  sudo mount {{nfs:none}} /shared
fi
[ -d jaxllm ] || git clone {{repository}} jaxllm
cd jaxllm
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
pip install --quiet -e '.[tpu,hf,plot,gcs]'
for restart in $(seq 0 50); do
  code=0
  {{command}} || code=$?
  case ", {{relaunch}}," in *", $code,"*) echo "exit code $code, restart $restart" ;; *) exit $code ;; esac
done
REMOTE
)"
