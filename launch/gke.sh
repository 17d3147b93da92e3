#!/usr/bin/env bash
# Slices of TPU pods on Google Kubernetes Engine: a JobSet, by kubectl or by XPK.
# usage: export NAME=dit IMAGE=REGISTRY/dit:1 TPU=v5e:16x16
#   bash launch/gke.sh image                      builds it from the commit and pushes it (docker)
#   bash launch/gke.sh run COMMAND --FLAG...      on a cluster with JobSet and pools of that TPU
#   CLUSTER=C bash launch/gke.sh xpk COMMAND ...  on a cluster that XPK made; with PROJECT, ZONE,
#     STORAGE=its storage
#   bash launch/gke.sh log | delete
#   SLICES=1, RESTARTS=50, CLAIM=a volume claim that all pods mount at /share, CHIPS=4 of a node,
#   DITJAX_DATA, DRY_RUN=1 may be set. --workdir must be on a file system that all pods share.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/machine.sh
. launch/machine.sh

action=${1:-}
shift || true
case $action in
  image | log | delete) ;;
  run | xpk) ditjax_command "$@" ;;
  *) fail "'$action' is no action: expected image, run, xpk, log or delete" ;;
esac
need NAME "a name for the job"
[[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "NAME=$NAME: expected lower-case letters, digits and -"

manifest() {
  local chips=${CHIPS:-4} hosts word
  if [ "$tpu_chips" = 1 ]; then chips=1; fi
  hosts=$((tpu_chips / chips))
  if [ $((hosts * chips)) != "$tpu_chips" ] || [ "$hosts" -lt 1 ]; then
    fail "CHIPS=$chips does not divide the $tpu_chips chips of $TPU"
  fi
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    # Each slice is one job and takes a whole node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # All start again when one dies, and go on from the newest checkpoint ...
    maxRestarts: ${RESTARTS:-50}
    rules:
      # ... but for a user's mistake, which would only come again.
      - name: UsersMistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${SLICES:-1}
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: ditjax, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $tpu_label
                cloud.google.com/gke-tpu-topology: $tpu_topology
              tolerations:
                - {key: google.com/tpu, operator: Exists}
              containers:
                - name: ditjax
                  image: $IMAGE
                  # The TPU's driver locks memory.
                  securityContext: {privileged: true}
                  resources:
                    limits: {google.com/tpu: $chips}
                  env:
                    - {name: DITJAX_DATA, value: '$(yaml "${DITJAX_DATA:-/share/data}")'}
                  # Not python alone: a pod that is evicted saves and ends with 0, and would be done.
                  command: [bash, launch/task.sh, python, -m, ditjax.$1]
                  args:
END
  for word in "${@:2}" --distributed; do
    echo "                    - '$(yaml "$word")'"
  done
  if [ -n "${CLAIM:-}" ]; then
    cat <<END
                  volumeMounts:
                    - {name: share, mountPath: /share}
              volumes:
                - name: share
                  persistentVolumeClaim: {claimName: $CLAIM}
END
  fi
}

# A word inside YAML's single quotes.
yaml() {
  echo "${1//\'/\'\'}"
}

case $action in
  image)
    need IMAGE "the image's name with its registry"
    # The context is the commit, not the directory.
    if [ -n "${DRY_RUN:-}" ]; then
      echo "git archive HEAD | docker build --file=launch/Dockerfile --tag=$(quoted "$IMAGE") -"
    else
      git archive HEAD | docker build --file=launch/Dockerfile --tag="$IMAGE" -
    fi
    run docker push "$IMAGE"
    ;;
  run)
    need IMAGE "the image's name with its registry"
    tpu
    jobset=$(manifest "$@")
    if [ -n "${DRY_RUN:-}" ]; then
      echo "$jobset"
    else
      kubectl apply --filename=- <<<"$jobset"
    fi
    ;;
  xpk)
    need IMAGE "the image's name with its registry"
    need CLUSTER "a cluster that XPK made"
    tpu
    run xpk workload create --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$tpu_name" \
      --num-slices="${SLICES:-1}" --docker-image="$IMAGE" --max-restarts="${RESTARTS:-50}" \
      --restart-on-exit-codes=1 ${PROJECT:+--project="$PROJECT"} ${ZONE:+--zone="$ZONE"} \
      ${STORAGE:+--storage="$STORAGE"} \
      --command="$(quoted bash launch/task.sh python -m "ditjax.$1" "${@:2}" --distributed)"
    ;;
  log)
    run kubectl logs --follow --prefix --max-log-requests=64 \
      --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  delete) run kubectl delete jobset "$NAME" ;;
esac
